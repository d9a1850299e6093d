"""Fréchet and kernel distances against clean-fid, torch-fidelity and brute force; their errors by simulation."""

import itertools
import math
from types import SimpleNamespace

import cleanfid.fid
import numpy as np
import pytest
import scipy.linalg
import torch

from ratiograph.evaluation import kid
from ratiograph.evaluation.frechet import FeatureStatistics, fit, frechet_distance, frechet_with_error
from ratiograph.evaluation.kid import draw_subsets, kernel_distance, subset_distances, unbiased_distance


def features(seed, n, d, spread=1.0):
    """Correlated features in float32, as a network gives them."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(d, d)) / math.sqrt(d)
    return torch.tensor(np.maximum(rng.normal(size=(n, d)) * spread @ mixing + 0.3, 0), dtype=torch.float32)


# ------------------------------------------------------------------------------------------------ Fréchet


@pytest.mark.parametrize(("n", "d"), [(700, 96), (300, 256)])
def test_frechet_is_cleanfids_and_torch_fidelitys(n, d, monkeypatch):
    torch_fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    # clean-fid asks sqrtm for a pair through the argument ``disp``, which scipy is about to drop.
    pair = SimpleNamespace(sqrtm=lambda matrix, disp=True: (scipy.linalg.sqrtm(matrix), None))
    monkeypatch.setattr(cleanfid.fid, "linalg", pair)
    x, y = features(0, n, d), features(1, n + 100, d, 1.1)
    found, _ = frechet_with_error(x, fit(y))
    assert found == pytest.approx(frechet_distance(fit(x), fit(y)), rel=1e-10)
    statistics = [torch_fidelity.fid_features_to_statistics(s.double()) for s in (x, y)]
    theirs = torch_fidelity.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert found == pytest.approx(theirs, rel=1e-6)
    assert found == pytest.approx(cleanfid.fid.fid_from_feats(x.double().numpy(), y.double().numpy()), rel=1e-6)


def test_merged_statistics_are_those_of_all():
    x = features(2, 90, 7).double() * 1e3 + 1e5
    merged = FeatureStatistics(7)
    for part in x.tensor_split(4):
        merged.merge(fit(part))
    assert merged.count == 90
    torch.testing.assert_close(merged.mean, x.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(merged.covariance, torch.cov(x.T), rtol=1e-9, atol=0)


def test_jackknife_is_its_definition():
    x, y = features(3, 63, 5), features(4, 80, 5)
    parts = [part.double().numpy() for part in x.tensor_split(6)]
    thetas = []
    for g in range(6):
        rest = np.concatenate(parts[:g] + parts[g + 1 :])
        a, b = np.cov(rest, rowvar=False), np.cov(y.double().numpy(), rowvar=False)
        shift = rest.mean(0) - y.double().numpy().mean(0)
        thetas.append(shift @ shift + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real))
    _, error = frechet_with_error(x, fit(y), groups=6)
    assert error == pytest.approx(math.sqrt(5 / 6 * np.sum((thetas - np.mean(thetas)) ** 2)), rel=1e-6)


def test_jackknife_error_is_that_of_repeated_draws():
    reference = fit(features(5, 20_000, 3))
    found = [frechet_with_error(features(100 + k, 400, 3, 1.3), reference) for k in range(60)]
    distances, errors = (np.array(part) for part in zip(*found, strict=True))
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(distances.std(ddof=1), rel=0.3)


def test_few_samples():
    reference = fit(features(6, 50, 3))
    assert math.isnan(frechet_with_error(features(7, 3, 3), reference)[1])
    assert frechet_with_error(features(7, 4, 3), reference)[1] > 0
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        frechet_with_error(features(7, 1, 3), reference)


# ------------------------------------------------------------------------------------------------ kernel


def brute(x, y):
    """The unbiased estimate, pair by pair."""

    def k(a, b):
        return float((a.double() @ b.double() / len(a) + 1) ** 3)

    def within(s):
        return sum(k(a, b) for a, b in itertools.permutations(s, 2)) / (len(s) * (len(s) - 1))

    return within(x) + within(y) - 2 * sum(k(a, b) for a, b in itertools.product(x, y)) / (len(x) * len(y))


@pytest.mark.parametrize("block", [5, 2048])
def test_unbiased_distance_is_its_definition(block, monkeypatch):
    monkeypatch.setattr(kid, "BLOCK", block)
    x, y = features(0, 17, 6), features(1, 12, 6, 1.4)
    assert unbiased_distance(x, y) == pytest.approx(brute(x, y), rel=1e-11)


def test_kernel_distance_is_cleanfids():
    """clean-fid draws its subsets from numpy's global state, of the second set first."""
    x, y = features(0, 500, 64), features(1, 400, 64, 1.2)
    np.random.seed(3)
    theirs = cleanfid.fid.kernel_distance(x.double().numpy(), y.double().numpy(), num_subsets=20, max_subset_size=150)
    np.random.seed(3)
    pairs = [tuple(torch.tensor(np.random.choice(n, 150, replace=False)) for n in (400, 500)) for _ in range(20)]
    ours = subset_distances(x, y, [(i, j) for j, i in pairs])
    assert float(ours.mean()) == pytest.approx(theirs, rel=1e-9)


def test_average_over_all_subsets_is_the_estimate_from_all_pairs():
    x, y = features(2, 6, 4), features(3, 5, 4, 2)
    subsets = [torch.tensor(list(itertools.combinations(range(n), 3))) for n in (6, 5)]
    every = subset_distances(x, y, itertools.product(*subsets))
    assert len(every) == 20 * 10
    assert float(every.mean()) == pytest.approx(unbiased_distance(x, y), rel=1e-11)


def test_mean_and_error_over_subsets():
    x, y = features(4, 120, 8), features(5, 90, 8, 1.3)
    generator = torch.Generator().manual_seed(11)
    pairs = list(draw_subsets(120, 90, subsets=7, size=40, generator=generator))
    for i, j in pairs:
        assert len(i.unique()) == len(j.unique()) == 40
        assert i.max() < 120
        assert j.max() < 90
    expected = np.array([brute(x[i], y[j]) for i, j in pairs])
    mean, error = kernel_distance(x, y, subsets=7, size=40, seed=11)
    assert mean == pytest.approx(expected.mean(), rel=1e-10)
    assert error == pytest.approx(expected.std(ddof=1) / math.sqrt(90 / 40), rel=1e-8)
    few = kernel_distance(x, y, subsets=2, size=10, seed=11)[1]
    pairs = list(draw_subsets(120, 90, subsets=2, size=10, generator=torch.Generator().manual_seed(11)))
    assert few == pytest.approx(float(subset_distances(x, y, pairs).std()) / math.sqrt(2), rel=1e-8)
    assert math.isnan(kernel_distance(x, y, subsets=1, size=40)[1])
    assert kernel_distance(x, y, size=5000)[1] > 1e-6  # halves at most, so that subsets differ


def test_error_is_that_of_repeated_draws():
    """No smaller than the spread of sets drawn anew, which subsets that overlap would have it be."""
    found = [
        kernel_distance(features(2 * k, 200, 3), features(2 * k + 1, 200, 3, 1.5), size=20, subsets=40)
        for k in range(40)
    ]
    means, errors = (np.array(part) for part in zip(*found, strict=True))
    assert 0.8 < np.sqrt(np.mean(errors**2)) / means.std(ddof=1) < 2


def test_equal_distributions_are_at_zero_on_average():
    found = np.array([unbiased_distance(features(2 * k, 50, 4), features(2 * k + 1, 50, 4)) for k in range(40)])
    assert abs(found.mean()) < 4 * found.std(ddof=1) / math.sqrt(40)
    assert (found < 0).any()
    assert (found > 0).any()


def test_shapes():
    with pytest.raises(ValueError, match=r"got \(4, 3\) and \(4, 2\)"):
        kernel_distance(torch.zeros(4, 3), torch.zeros(4, 2))
