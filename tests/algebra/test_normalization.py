"""Normalisers and the clamp: exact on constructed batches, the same on one rank and on two, never constant."""

from __future__ import annotations

import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from exact import ROWS
from ratiograph.algebra.noising import ScaledLinearDDPM, VarianceExploding, VariancePreserving
from ratiograph.algebra.normalization import Clamped, MeanNormalized, RatioNormalized, TimeNormalized
from ratiograph.algebra.times import DDPMSteps, KarrasIndex, LogitNormal, LogNormalSigma, Uniform
from ratiograph.algebra.weightings import BE, KL, LR, LS, ReverseKL

T = torch.zeros(())


def ratios(dtype=torch.float64):
    return torch.linspace(-4, 4, 81, dtype=dtype)


def test_clamped_bounds_the_ratio_once():
    l = torch.tensor([-9.0, -1.0, 0.5, 9.0])  # noqa: E741
    found = Clamped(weighting=BE(), limit=2)(l, T)
    assert found.tolist() == pytest.approx([math.exp(v) for v in (-2, -1, 0.5, 2)])
    with pytest.raises(ValueError, match="closed form"):
        Clamped(weighting=BE()).h(torch.ones(1))  # a clamped weighting belongs to another divergence


def test_mean_normalized_divides_by_the_mean_of_the_batch():
    l = torch.tensor([0.0, math.log(3)])  # noqa: E741
    found = MeanNormalized(weighting=BE())(l, T)
    assert found.tolist() == pytest.approx([0.5, 1.5])
    weight, target_weight = MeanNormalized(weighting=BE()).pair(l, torch.tensor([0.0, 0.0]), T)
    assert weight.tolist() == pytest.approx([0.5, 1.5])
    assert target_weight.tolist() == pytest.approx([0.5, 0.5])


def test_mean_normalized_survives_ratios_that_overflow():
    l = torch.tensor([200.0, 200.0 + math.log(3)])  # noqa: E741  e^200 is infinite in float32
    assert MeanNormalized(weighting=BE())(l, T).tolist() == pytest.approx([0.5, 1.5], rel=1e-4)


@pytest.mark.parametrize("row", ["SBA(3.0)", "BE", "SquaredHellinger"])
def test_mean_normalized_powers_ignore_the_scale_of_rho(row):
    """For powers of rho, dividing rho by its mean (f-distill's first normalisation) changes nothing."""
    l, weighting = ratios(), MeanNormalized(weighting=ROWS[row])  # noqa: E741
    torch.testing.assert_close(weighting(l + 1.7, T), weighting(l, T))


def test_time_normalized_divides_by_the_mean_at_about_the_same_time():
    """Two times, two groups, in any order: each group's weights have mean 1."""
    t = torch.tensor(2 * [0.9, 0.1, 0.9, 0.1])
    l = torch.tensor(2 * [1.0, 2.0, 3.0, 6.0]).log()  # noqa: E741
    weighting = TimeNormalized(weighting=BE(), bins=2)
    assert weighting(l, t).tolist() == pytest.approx(2 * [0.5, 0.5, 1.5, 1.5])
    weight, target_weight = weighting.pair(l, torch.zeros(8), t)
    assert weight.tolist() == pytest.approx(2 * [0.5, 0.5, 1.5, 1.5])
    assert target_weight.tolist() == pytest.approx(2 * [0.5, 0.25, 0.5, 0.25])


@pytest.mark.parametrize(("samples", "groups"), [(3, 1), (7, 1), (8, 2), (31, 7), (32, 8), (80, 8)])
def test_no_group_of_times_is_so_small_that_its_weights_are_one(samples, groups):
    """Each group's weights have mean 1, and no group is of fewer than four unless the batch is."""
    t, l = torch.rand(samples).sort().values, torch.randn(samples)  # noqa: E741
    weight = TimeNormalized(weighting=BE())(l, t)
    parts = weight.tensor_split(groups)
    assert [float(part.mean()) for part in parts] == pytest.approx(groups * [1.0], abs=1e-5)
    assert min(len(part) for part in parts) >= min(4, samples)
    assert float(weight.std()) > 0.1


def test_one_time_bin_is_the_batch_mean():
    l, t = ratios(), torch.rand(81)  # noqa: E741
    one, mean = TimeNormalized(weighting=LR(), bins=1), MeanNormalized(weighting=LR())
    torch.testing.assert_close(one(l, t), mean(l, t))


def test_pair_of_a_clamped_normalised_weighting():
    """The field vanishes at r = r*, however far out."""
    weighting = MeanNormalized(weighting=Clamped(weighting=LS(), limit=3))
    l = torch.tensor([-20.0, 1.0, 20.0])  # noqa: E741
    weight, target_weight = weighting.pair(l, l, T)
    torch.testing.assert_close(weight, target_weight)
    assert float(weight.mean()) == pytest.approx(1)


@pytest.mark.parametrize("weighting", [MeanNormalized(weighting=KL()), Clamped(weighting=ReverseKL())])
def test_wrapped_kl_runs_without_a_ratio(weighting):
    assert not weighting.needs_ratio
    assert weighting(torch.tensor([-3.0, 3.0]), T).tolist() == [1, 1]
    assert isinstance(weighting.row, KL)


def binned(weighting=None, **arguments):
    """RatioNormalized over t uniform in [0, 1]."""
    normalized = RatioNormalized(weighting=weighting or BE(), **arguments)
    normalized.connect(VariancePreserving(), Uniform())
    return normalized


def test_ratio_normalized_divides_rho_by_the_mean_of_its_bin():
    """Two bins; rho of mean 2 in the first and 8 in the second: omega = rho / mean."""
    t = torch.tensor([0.1, 0.9, 0.2, 0.8])
    rho = torch.tensor([1.0, 4.0, 3.0, 12.0])
    normalized = binned(bins=2, decay=0.0)
    assert normalized(rho.log(), t).tolist() == pytest.approx([0.5, 0.5, 1.5, 1.5])


def test_ratio_normalized_runs_over_the_steps_without_a_bias():
    """After batches with sums S_k of n_k samples the mean is sum decay^(n-k) S_k / sum decay^(n-k) n_k."""
    normalized, decay = binned(bins=1, decay=0.5), 0.5
    batches = [torch.tensor([1.0, 3.0]), torch.tensor([5.0, 9.0]), torch.tensor([2.0, 4.0])]
    total = count = 0.0
    for rho in batches:
        total, count = decay * total + float(rho.sum()), decay * count + len(rho)
        found = normalized(rho.log(), torch.full((2,), 0.5))
        assert found.tolist() == pytest.approx((rho * count / total).tolist())


def test_ratio_normalized_stands_still_in_evaluation():
    normalized = binned(bins=1, decay=0.9)
    t = torch.full((2,), 0.5)
    normalized(torch.tensor([0.0, 0.0]), t)
    normalized.eval()
    first = normalized(torch.tensor([1.0, 2.0]), t)
    assert first.tolist() == pytest.approx([math.e, math.e**2])
    torch.testing.assert_close(normalized(torch.tensor([1.0, 2.0]), t), first)


def test_weights_vary_with_one_sample_a_bin():
    """Each sample alone in its bin, at the first step and later: the larger ratio keeps the larger weight."""
    normalized = binned(bins=4, decay=0.9)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9])
    for step in range(3):
        l = torch.tensor([0.0, 1.0, 2.0, 3.0]).roll(step)  # noqa: E741
        found = normalized(l, t)
        assert found.max() > 1.2 * found.min()
        assert found.argmax() == l.argmax()
        assert found.argmin() == l.argmin()


@pytest.mark.parametrize("ahead", [-40.0, -200.0, 200.0])
def test_weights_vary_with_a_discriminator_far_ahead(ahead):
    """A common offset of l is what normalising removes, however large, because the clamp comes after it."""
    torch.manual_seed(0)
    l, t = torch.randn(64), torch.rand(64)  # noqa: E741
    found = binned(Clamped(weighting=LR(), limit=3.0))(l + ahead, t)
    torch.testing.assert_close(found, binned(Clamped(weighting=LR(), limit=3.0))(l, t), rtol=1e-3, atol=1e-4)
    assert found.std() > 0.1
    clamped_first = Clamped(weighting=LR(), limit=3.0)(l + ahead, t)
    assert clamped_first.std() < 1e-6  # what the order of wrapping is for


@pytest.mark.parametrize("row", ["KL", "LR", "BE", "SBA(3.0)", "SquaredHellinger"])
def test_the_exact_ratio_is_left_as_it_is(row):
    """E_q[rho] = 1 at every t: l = log p/q of two Gaussians, so the normaliser tends to the identity."""
    torch.manual_seed(0)
    m, samples = 0.7, 400_000
    x, t = torch.randn(samples, dtype=torch.float64), torch.rand(samples)
    l = m * x - m * m / 2  # noqa: E741  p = N(m, 1), q = N(0, 1)
    found = binned(ROWS[row], bins=4)(l, t)
    torch.testing.assert_close(found.log(), ROWS[row].log_weight(l, t), rtol=0, atol=0.05)


def test_the_target_is_not_corrected():
    normalized = binned(bins=1, decay=0.0)
    weight, target_weight = normalized.pair(torch.tensor([1.0, 1.0]), torch.tensor([2.0, -1.0]), torch.full((2,), 0.5))
    assert weight.tolist() == pytest.approx([1.0, 1.0])
    assert target_weight.tolist() == pytest.approx([math.e**2, math.e**-1])


def test_both_stages_in_the_papers_order():
    """rho by the mean of its bin, then omega by the mean of the batch, the target's omega by the same number."""
    t = torch.tensor([0.1, 0.9, 0.2, 0.8])
    rho = torch.tensor([1.0, 4.0, 3.0, 12.0])
    both = MeanNormalized(weighting=binned(LS(), bins=2, decay=0.0))
    omega = torch.tensor([2.0, 2.0, 2 / 3, 2 / 3])  # 1 / rho of the normalised rho
    weight, target_weight = both.pair(rho.log(), torch.zeros(4), t)
    torch.testing.assert_close(weight, omega / omega.mean())
    torch.testing.assert_close(target_weight, torch.ones(4) / omega.mean())


@pytest.mark.parametrize(
    ("noising", "times"),
    [
        (VarianceExploding(), KarrasIndex(low=0.1, high=0.8)),
        (VarianceExploding(), LogNormalSigma()),
        (VariancePreserving(), Uniform(low=0.2, high=0.95)),
        (VariancePreserving(), LogitNormal(mean=0.3, std=0.8)),
        (VariancePreserving(), KarrasIndex()),
        (ScaledLinearDDPM(), DDPMSteps(low=20, high=980)),
    ],
)
def test_quantiles_are_uniform(noising, times):
    """The quantile of a draw is U[0, 1]: each decile holds a tenth of the samples, to five standard errors."""
    t = times(noising, 20_000, torch.Generator().manual_seed(0))
    u = times.quantile(noising, t)
    assert 0 <= u.min() <= u.max() <= 1
    shares = torch.histc(u, 10, 0, 1) / len(u)
    assert (shares - 0.1).abs().max() < 5 * math.sqrt(0.09 / len(u)) + 1e-3
    assert (u.argsort() == t.argsort()).float().mean() > 0.9 or isinstance(times, DDPMSteps)


def every_normalizer():
    return {
        "ratio": binned(LR(), bins=3, decay=0.5),
        "mean": MeanNormalized(weighting=LR()),
        "time": TimeNormalized(weighting=LR(), bins=3),
        "all": MeanNormalized(weighting=binned(Clamped(weighting=LS(), limit=2.0), bins=3, decay=0.5)),
        "clamped last": Clamped(weighting=binned(LR(), bins=3, decay=0.5), limit=1.0),
    }


def batches():
    generator = torch.Generator().manual_seed(3)
    return [(2 * torch.randn(12, generator=generator), torch.rand(12, generator=generator)) for _ in range(3)]


def weights(normalizer, l, t):  # noqa: E741
    """omega [B, 3]: alone, and with that of a target."""
    return torch.stack([normalizer(l, t), *normalizer.pair(l, t - l.sin(), t)], 1)


def _one_rank_of_two(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    normalizers = every_normalizer()
    found = {
        name: [weights(n, l.tensor_split(2)[rank], t.tensor_split(2)[rank]) for l, t in batches()]  # noqa: E741
        for name, n in normalizers.items()
    }
    torch.save(found, os.path.join(folder, f"rank_{rank}.pt"))
    dist.destroy_process_group()


def test_one_rank_and_two_give_the_same_weights(tmp_path):
    mp.start_processes(_one_rank_of_two, (str(tmp_path),), nprocs=2, start_method="spawn")
    ranks = [torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]
    for name, normalizer in every_normalizer().items():
        for step, (l, t) in enumerate(batches()):  # noqa: E741
            together = torch.cat([rank[name][step] for rank in ranks])
            assert torch.equal(together, weights(normalizer, l, t)), (name, step)


def test_running_means_are_the_objectives_state_and_not_the_students():
    normalized = binned(bins=3)
    normalized(torch.randn(8), torch.rand(8))
    assert set(normalized.state_dict()) == {"log_sum", "count"}
    other = binned(bins=3)
    other.load_state_dict(normalized.state_dict())
    l, t = torch.randn(8), torch.rand(8)  # noqa: E741
    assert torch.equal(normalized(l, t), other(l, t))


def test_a_normaliser_over_time_must_be_connected():
    with pytest.raises(ValueError, match="connect"):
        RatioNormalized(weighting=BE())(torch.zeros(2), torch.zeros(2))
