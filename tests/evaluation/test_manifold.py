"""Precision, recall, density and coverage against brute force in float64, and the inception score's definition."""

import math
import statistics

import pytest
import torch

from ratiograph.evaluation import manifold
from ratiograph.evaluation.inception_score import inception_score
from ratiograph.evaluation.manifold import Manifold, expected_coverage, nearest_distances


def distances(x, y):
    """[N, M] in float64, by differences."""
    return torch.stack([(y.double() - row).square().sum(1).sqrt() for row in x.double()])


def brute_radii(x, k):
    return distances(x, x).fill_diagonal_(torch.inf).sort(1).values[:, k - 1]


def brute(real, fake, k=3, k_density=5):
    """The four definitions, pair by pair."""
    between = distances(real, fake)
    in_real, in_fake = between <= brute_radii(real, k)[:, None], between <= brute_radii(fake, k)[None]
    dense = between <= brute_radii(real, k_density)[:, None]
    return {
        "precision": in_real.any(0).double().mean().item(),
        "recall": in_fake.any(1).double().mean().item(),
        "density": dense.sum().item() / (k_density * len(fake)),
        "coverage": dense.any(1).double().mean().item(),
    }


def normal(seed, n, d):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def small_tiles(monkeypatch):
    """Sets of some hundred vectors take several tiles, the last of them short, and several batches of pairs."""
    monkeypatch.setattr(manifold, "TILE", 64)
    monkeypatch.setattr(manifold, "PAIRS", 500)


CASES = {
    "same distribution": (normal(0, 300, 8), normal(1, 211, 8)),
    "narrower": (normal(0, 211, 8), 0.6 * normal(1, 300, 8)),
    "wider": (normal(0, 130, 8), 1.5 * normal(1, 129, 8)),
    "many features": (normal(0, 150, 700), 0.97 * normal(1, 140, 700)),
    "far from the origin": (1e4 + normal(0, 200, 6), 1e4 + normal(1, 200, 6)),
    "features of unlike scales": (
        normal(0, 200, 4) * torch.tensor([1e3, 1.0, 1e-3, 0.0]),
        normal(1, 200, 4) * torch.tensor([1e3, 1.0, 1e-3, 0.0]),
    ),
    "integers, with ties and copies": ((2 * normal(0, 300, 3)).round(), (2 * normal(1, 200, 3)).round()),
    "an outlier": (normal(0, 200, 8), torch.cat([normal(1, 199, 8), torch.full((1, 8), 1e5)])),
    "float64": (normal(0, 200, 8).double(), normal(1, 200, 8).double() * 0.9),
}


@pytest.mark.parametrize("case", CASES)
def test_rates_are_those_of_brute_force(case, small_tiles):
    real, fake = CASES[case]
    assert Manifold(real).compare(fake) == pytest.approx(brute(real, fake), abs=1e-9)


def test_precision_and_recall_are_torch_fidelitys():
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    real, fake = normal(0, 600, 16), 0.9 * normal(1, 500, 16)
    settings = {"prc_neighborhood": 3, "prc_batch_size": 1000, "verbose": False, "save_cpu_ram": False}
    theirs = prc.prc_features_to_metric(fake, real, **settings)
    ours = Manifold(real).compare(fake)
    assert 0.5 < ours["recall"] < ours["precision"] < 0.9
    assert [ours["precision"], ours["recall"]] == pytest.approx([theirs["precision"], theirs["recall"]], rel=1e-6)


@pytest.mark.parametrize(("k", "k_density"), [(1, 1), (5, 3), (20, 2)])
def test_other_neighbourhoods(k, k_density, small_tiles):
    real, fake = CASES["same distribution"]
    found = Manifold(real, neighbours=k, density_neighbours=k_density).compare(fake)
    assert found == pytest.approx(brute(real, fake, k, k_density), abs=1e-9)


def test_whole_tiles_give_the_same():
    for real, fake in CASES.values():
        assert Manifold(real).compare(fake) == pytest.approx(brute(real, fake), abs=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_nearest_distances_are_exact(case, small_tiles):
    features = CASES[case][1]
    expected = distances(features, features).fill_diagonal_(torch.inf).sort(1).values[:, :4]
    torch.testing.assert_close(nearest_distances(features, 4).sqrt(), expected, rtol=1e-12, atol=0)


def test_every_other_sample_may_be_a_neighbour():
    features = normal(2, 7, 3)
    expected = distances(features, features).sort(1).values[:, 1:]
    torch.testing.assert_close(nearest_distances(features, 6).sqrt(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("real", "samples", "k"), [(60, 30, 5), (30, 90, 2), (200, 20, 5)])
def test_coverage_of_the_same_distribution_has_its_exact_mean(real, samples, k, monkeypatch):
    found = [
        Manifold(normal(2 * n, real, 2), density_neighbours=k).compare(normal(2 * n + 1, samples, 2))["coverage"]
        for n in range(60)
    ]
    mean, error = statistics.fmean(found), statistics.stdev(found) / 60**0.5
    assert abs(mean - expected_coverage(real, samples, k)) < 3.5 * error
    assert error < 0.02


def test_identical_sets(small_tiles):
    """Every ball holds its centre and, on its surface, its k-th neighbour: the density is (k + 1) / k."""
    real = normal(0, 300, 16)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    assert Manifold(real).compare(real[order]) == pytest.approx(
        {"precision": 1, "recall": 1, "density": 6 / 5, "coverage": 1}
    )


def test_disjoint_sets():
    assert Manifold(normal(0, 200, 5)).compare(normal(1, 200, 5) + 100) == {
        "precision": 0,
        "recall": 0,
        "density": 0,
        "coverage": 0,
    }


def test_collapsed_set(small_tiles):
    """Copies of one real vector are precise and dense, and reach no other real vector than those it is near."""
    real = normal(0, 300, 6)
    found = Manifold(real).compare(real[:1].repeat(100, 1))
    holders = (distances(real, real[:1])[:, 0] <= brute_radii(real, 5)).sum().item()
    assert found == pytest.approx(
        {"precision": 1, "recall": 1 / 300, "density": holders / 5, "coverage": holders / 300}
    )
    assert 1 <= holders <= 30


def test_half_of_two_clusters():
    """Samples of one cluster of two: precise, of density 1, and half recalled and covered."""
    clusters = 50 * torch.tensor([[1.0, 0], [-1, 0]])
    real = normal(0, 2000, 2) + clusters.repeat(1000, 1)
    found = Manifold(real).compare(normal(1, 1000, 2) + clusters[0])
    assert found["precision"] > 0.95
    # A ball with 5 of the cluster's 1,000 real vectors holds about 5 of its 1,000 samples; the other balls none.
    assert found["density"] == pytest.approx(1.0, abs=0.1)
    assert found["recall"] == pytest.approx(0.5, abs=0.03)
    assert found["coverage"] == pytest.approx(0.5, abs=0.03)


def test_errors():
    with pytest.raises(ValueError, match="at least 6 samples"):
        Manifold(normal(0, 5, 2))
    with pytest.raises(ValueError, match="at least 4 samples"):
        Manifold(normal(0, 9, 2)).compare(normal(1, 3, 2))
    with pytest.raises(ValueError, match="have 3 features, the real ones 2"):
        Manifold(normal(0, 9, 2)).compare(normal(1, 9, 3))
    with pytest.raises(ValueError, match=r"\[N, D\], got \(9, 2, 1\)"):
        Manifold(normal(0, 9, 2)[..., None])
    with pytest.raises(ValueError, match="1 of 9 feature vectors are not finite"):
        Manifold(normal(0, 9, 2)).compare(normal(1, 9, 2).index_fill(0, torch.tensor([4]), torch.nan))


# ------------------------------------------------------------------------------------------ inception score


def brute_score(logits):
    p = logits.double().exp() / logits.double().exp().sum(1, keepdim=True)
    marginal = p.mean(0)
    divergences = [sum(float(a * math.log(a / b)) for a, b in zip(row, marginal, strict=True)) for row in p]
    return math.exp(sum(divergences) / len(divergences))


@pytest.mark.parametrize(("n", "splits"), [(60, 1), (60, 4), (61, 4)])
def test_score_is_its_definition(n, splits):
    logits = 3 * normal(0, n, 7)
    parts = [brute_score(part) for part in logits.tensor_split(splits)]
    mean, error = inception_score(logits, splits=splits)
    assert mean == pytest.approx(sum(parts) / splits, rel=1e-12)
    if splits == 1:
        assert math.isnan(error)
    else:
        variance = sum((part - mean) ** 2 for part in parts) / (splits - 1)
        assert error == pytest.approx(math.sqrt(variance / splits), rel=1e-9)


def test_score_is_torch_fidelitys():
    """Of one part: theirs are of shuffled samples."""
    isc = pytest.importorskip("torch_fidelity.metric_isc")
    logits = 3 * normal(0, 400, 7)
    theirs = isc.isc_features_to_metric(logits, splits=1)["inception_score_mean"]
    assert inception_score(logits, splits=1)[0] == pytest.approx(theirs, rel=1e-6)


def test_score_of_known_cases():
    certain = 1e4 * torch.eye(10).repeat(50, 1)
    assert inception_score(certain, splits=5) == pytest.approx((10, 0), abs=1e-9)  # certain and even: K
    assert inception_score(certain[:1].repeat(500, 1))[0] == pytest.approx(1)  # one class
    assert inception_score(torch.zeros(500, 10))[0] == pytest.approx(1)  # no idea
    three = 1e4 * torch.eye(10)[:3].repeat(100, 1)
    assert inception_score(three, splits=1)[0] == pytest.approx(3)


def test_score_errors():
    with pytest.raises(ValueError, match="10 splits"):
        inception_score(torch.zeros(9, 10))
    with pytest.raises(ValueError, match="not finite"):
        inception_score(torch.full((20, 3), torch.nan), splits=2)
