"""Heun's sampler on Gaussians, whose probability-flow ODE has a closed form."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ratiograph.samplers import HeunSampler
from ratiograph.teachers.mixture import GaussianMixture, RingMixture
from ratiograph.types import Condition, Noisy

FREE = Condition()
MEAN, STD = torch.tensor([0.7, -0.3], dtype=torch.float64), 0.5
GAUSSIAN = GaussianMixture(means=[MEAN.tolist()], std=STD)


def exact(noise: torch.Tensor, start: float) -> torch.Tensor:
    """dx/dsigma = sigma (x - m) / (c^2 + sigma^2) from sigma = ``start`` to 0."""
    return MEAN + (start * noise - MEAN) * STD / math.hypot(STD, start)


def noise_of(count: int) -> torch.Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def error(steps: int) -> float:
    noise = noise_of(100)
    found = HeunSampler(steps=steps, sigma_min=1e-5).sample(GAUSSIAN, noise, FREE)
    return float((found - exact(noise, 80.0)).abs().max())


def test_converges_to_the_ode_at_second_order():
    errors = [error(steps) for steps in (50, 100, 200, 400)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders == pytest.approx([2, 2, 2], abs=0.15)
    assert errors[-1] < 3e-4


class Counted(GaussianMixture):
    """A Gaussian that remembers the noise levels it was asked at."""

    def __init__(self):
        super().__init__(means=[MEAN.tolist()], std=STD)
        self.asked = []

    def denoise(self, noisy: Noisy, condition: Condition) -> torch.Tensor:
        assert (noisy.alpha == 1).all()
        self.asked.append(float(noisy.sigma[0]))
        return super().denoise(noisy, condition)


@pytest.mark.parametrize(("evaluations", "steps"), [(1, 1), (3, 2), (5, 3), (35, 18), (79, 40)])
def test_evaluation_counts(evaluations, steps):
    sampler, counted = HeunSampler.for_evaluations(evaluations), Counted()
    sampler.sample(counted, noise_of(3), FREE)
    assert sampler.steps == steps
    assert len(counted.asked) == evaluations
    assert counted.asked[0] == pytest.approx(80)


def test_one_evaluation_is_the_denoiser():
    noise = noise_of(5)
    levels = torch.full((5,), 80.0, dtype=torch.float64)
    expected = GAUSSIAN.denoise(Noisy(80 * noise, levels, levels / levels, levels), FREE)
    torch.testing.assert_close(HeunSampler.for_evaluations(1).sample(GAUSSIAN, noise, FREE), expected)


def test_schedule_is_edms():
    """Eq. 5 of EDM: linear in sigma^(1/7)."""
    sigmas = HeunSampler(steps=18).sigmas()
    assert len(sigmas) == 19
    assert sigmas[0] == pytest.approx(80)
    assert sigmas[-2:] == pytest.approx([0.002, 0.0])
    roots = torch.tensor(sigmas[:-1], dtype=torch.float64) ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(17))


def test_samples_a_ring_with_the_right_shares():
    ring = RingMixture(std=0.1)
    count = 4000
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    x = HeunSampler().sample(ring, noise, FREE)
    nearest = torch.cdist(x.double(), ring.means).min(1)
    shares = torch.bincount(nearest.indices, minlength=8) / count
    assert shares.tolist() == pytest.approx([1 / 8] * 8, abs=4 * math.sqrt(0.11 / count))
    # |x - m|^2 / std^2 is chi-square with two degrees of freedom around its own mode.
    assert float((nearest.values / 0.1).square().mean()) == pytest.approx(2, rel=0.1)


def test_conditional_samples_stay_in_their_class():
    ring = RingMixture(std=0.05)
    labels = torch.arange(64) % 8
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    x = HeunSampler().sample(ring, noise, Condition(labels))
    assert torch.equal(torch.cdist(x.double(), ring.means).argmin(1), labels)


def test_refusals():
    with pytest.raises(ValueError, match="at least 1"):
        HeunSampler(steps=0)
    with pytest.raises(ValueError, match="odd"):
        HeunSampler.for_evaluations(4)
