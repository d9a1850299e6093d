"""Samplers on Gaussians, whose probability-flow ODE has a closed form, and against diffusers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ratiograph.algebra.noising import ScaledLinearDDPM
from ratiograph.core.draws import GeneratorDraws, SampleDraws
from ratiograph.core.types import Condition, Noisy
from ratiograph.networks.guidance import Guided
from ratiograph.networks.samplers import (
    DDIMSampler,
    EulerSampler,
    HeunSampler,
    StochasticHeunSampler,
    TrailingDDIMSampler,
)
from ratiograph.networks.teachers.mixture import GaussianMixture, RingMixture

FREE = Condition()
MEAN, STD = torch.tensor([0.7, -0.3], dtype=torch.float64), 0.5
GAUSSIAN = GaussianMixture(means=[MEAN.tolist()], std=STD)


def exact(noise: torch.Tensor, start: float) -> torch.Tensor:
    """dx/dsigma = sigma (x - m) / (c^2 + sigma^2) from sigma = ``start`` to 0."""
    return MEAN + (start * noise - MEAN) * STD / math.hypot(STD, start)


def noise_of(count: int) -> torch.Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def error(sampler) -> float:
    noise = noise_of(100)
    return float((sampler.sample(GAUSSIAN, noise, FREE) - exact(noise, 80.0)).abs().max())


@pytest.mark.parametrize(("sampler", "order", "last"), [(HeunSampler, 2, 3e-4), (EulerSampler, 1, 0.05)])
def test_converges_to_the_ode_at_its_order(sampler, order, last):
    errors = [error(sampler(steps=steps, sigma_min=1e-5)) for steps in (50, 100, 200, 400)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders == pytest.approx([order] * 3, abs=0.15)
    assert errors[-1] < last


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


class Passes(GaussianMixture):
    """A Gaussian that counts its passes, under any process."""

    def __init__(self):
        super().__init__(means=[MEAN.tolist()], std=STD)
        self.times = []

    def denoise(self, noisy: Noisy, condition: Condition) -> torch.Tensor:
        self.times.append(noisy.t.unique().tolist())
        return super().denoise(noisy, condition)


@pytest.mark.parametrize(
    "sampler",
    [
        EulerSampler(steps=7),
        HeunSampler(steps=7),
        HeunSampler(steps=1),
        StochasticHeunSampler(steps=7),
        DDIMSampler(steps=7),
        TrailingDDIMSampler(steps=3),
    ],
)
def test_every_sampler_knows_its_price(sampler):
    passes = Passes()
    sampler.sample(passes, noise_of(3), FREE, SampleDraws(0, range(3)))
    assert len(passes.times) == sampler.evaluations
    assert all(len(times) == 1 for times in passes.times)


@pytest.mark.parametrize("sampler", [HeunSampler(steps=1), EulerSampler(steps=1)])
def test_one_evaluation_is_the_denoiser(sampler):
    noise = noise_of(5)
    levels = torch.full((5,), 80.0, dtype=torch.float64)
    expected = GAUSSIAN.denoise(Noisy(80 * noise, levels, levels / levels, levels), FREE)
    torch.testing.assert_close(sampler.sample(GAUSSIAN, noise, FREE), expected)


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


# --------------------------------------------------------------------------------------- Euler is DDIM


def test_euler_is_ddim_at_alpha_one():
    """x' = mu + sigma' (x - mu) / sigma, written as DDIM writes it."""
    sampler, x = EulerSampler(steps=9), 80 * noise_of(20)
    for sigma, following in itertools.pairwise(sampler.sigmas()):
        level = torch.full((20,), sigma, dtype=torch.float64)
        denoised = GAUSSIAN.denoise(Noisy(x, level, torch.ones_like(level), level), FREE)
        x = denoised + following * (x - denoised) / sigma
    torch.testing.assert_close(sampler.sample(GAUSSIAN, noise_of(20), FREE), x)


# ---------------------------------------------------------------------------------------- stochastic Heun


def algorithm_2(noise, draws, steps, s_churn, s_min, s_max, s_noise):
    """Karras et al. 2022, Algorithm 2, line by line, with the Gaussian's own mu."""
    t = HeunSampler(steps=steps).sigmas()
    x = t[0] * noise
    for i in range(steps):
        gamma = min(s_churn / steps, 2**0.5 - 1) if s_min <= t[i] <= s_max else 0
        t_hat = t[i] + gamma * t[i]
        epsilon = s_noise * draws.normal((2,)).double() if gamma else 0
        x_hat = x + (t_hat**2 - t[i] ** 2) ** 0.5 * epsilon
        d = t_hat * (x_hat - MEAN) / (STD**2 + t_hat**2)
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            other = t[i + 1] * (x - MEAN) / (STD**2 + t[i + 1] ** 2)
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + other / 2)
    return x


@pytest.mark.parametrize("churn", [(40, 0.05, 50, 1.003), (8, 0.0, float("inf"), 1.0), (5, 0.5, 2.0, 1.1)])
def test_stochastic_heun_is_algorithm_2(churn):
    names = ("s_churn", "s_min", "s_max", "s_noise")
    sampler = StochasticHeunSampler(steps=12, **dict(zip(names, churn, strict=True)))
    found = sampler.sample(GAUSSIAN, noise_of(50), FREE, SampleDraws(1, range(50)))
    expected = algorithm_2(noise_of(50), SampleDraws(1, range(50)), 12, *churn)
    torch.testing.assert_close(found, expected)
    assert (found - HeunSampler(steps=12).sample(GAUSSIAN, noise_of(50), FREE)).abs().max() > 0.01


def test_without_churn_it_is_heun():
    expected = HeunSampler(steps=10).sample(GAUSSIAN, noise_of(50), FREE)
    for quiet in ({"s_churn": 0.0}, {"s_min": 100.0, "s_max": 200.0}):
        found = StochasticHeunSampler(steps=10, **quiet).sample(GAUSSIAN, noise_of(50), FREE)
        assert torch.equal(found, expected)


def discrete_variance(sampler) -> float:
    """Variance of the samples of ``GAUSSIAN``: every step multiplies x - m by a number and adds independent noise."""
    variance = 80.0**2
    for sigma, following in itertools.pairwise(sampler.sigmas()):
        gamma = min(sampler.s_churn / sampler.steps, 2**0.5 - 1)
        noisier = sigma * (1 + gamma)
        first, change = noisier / (STD**2 + noisier**2), following - noisier
        euler = 1 + change * first
        heun = 1 + change * (first + following / (STD**2 + following**2) * euler) / 2
        variance = (euler if following == 0 else heun) ** 2 * (variance + noisier**2 - sigma**2)
    return variance


def churned(steps: int) -> StochasticHeunSampler:
    return StochasticHeunSampler(steps=steps, s_churn=10.0, s_min=0.0, s_max=float("inf"), s_noise=1.0)


def test_fresh_noise_keeps_the_marginal():
    """With s_noise = 1 the samples have the Gaussian's mean and, as steps shrink, exactly its variance."""
    biases = [abs(discrete_variance(churned(steps)) / STD**2 - 1) for steps in (50, 100, 200, 400, 800)]
    assert all(b < 0.35 * a for a, b in itertools.pairwise(biases))
    assert biases[-1] < 2e-4
    count, sampler = 40_000, churned(100)
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = (
        sampler.sample(GAUSSIAN, noise, FREE, GeneratorDraws(count, torch.Generator().manual_seed(seed)))
        for seed in (1, 2)
    )
    for x in (a, b):
        assert x.mean(0).tolist() == pytest.approx(MEAN.tolist(), abs=4 * STD / count**0.5)
        assert x.var(0).tolist() == pytest.approx([discrete_variance(sampler)] * 2, rel=4 * (2 / count) ** 0.5)
        assert x.var(0).tolist() == pytest.approx([STD**2] * 2, rel=4 * (2 / count) ** 0.5 + biases[1])
    # Each path forgets most of where it started, as the ODE never does.
    assert abs(float(torch.corrcoef(torch.stack([a[:, 0], b[:, 0]]))[0, 1])) < 0.1


def test_a_stochastic_sample_is_its_own():
    ring, sampler = RingMixture(std=0.1), StochasticHeunSampler(steps=10)
    whole = sampler.sample(ring, SampleDraws(5, range(8)).normal((2,)), FREE, SampleDraws(7, range(8)))
    for part in (range(3), range(3, 8)):
        draws = SampleDraws(7, part)
        found = sampler.sample(ring, SampleDraws(5, part).normal((2,)), FREE, draws)
        torch.testing.assert_close(found, whole[list(part)])


def test_without_draws_the_noise_is_torchs():
    sampler = StochasticHeunSampler(steps=5)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(sampler.sample(GAUSSIAN, noise_of(4), FREE))
    assert torch.equal(found[0], found[1])
    assert (found[0] - found[2]).abs().min() > 1e-6


# ------------------------------------------------------------------------------------------------- DDIM


def in_diffusers(denoiser, noise, condition, steps, **config):
    """Samples by diffusers' DDIMScheduler, told the noise that the denoiser implies."""
    scheduler = pytest.importorskip("diffusers").DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, **config
    )
    scheduler.set_timesteps(steps)
    x, process = noise * scheduler.init_noise_sigma, ScaledLinearDDPM()
    for t in scheduler.timesteps:
        times = torch.full((len(x),), float(t), dtype=x.dtype)
        alpha, sigma = process.alpha_sigma(times)
        mu = denoiser.denoise(Noisy(x, times, alpha, sigma), condition)
        epsilon = (x - alpha[:, None] * mu) / sigma[:, None]
        x = scheduler.step(epsilon, t, x, eta=0.0).prev_sample
    return scheduler.timesteps.tolist(), x


SD = {"steps_offset": 1, "set_alpha_to_one": False, "timestep_spacing": "leading"}
RING = RingMixture(std=0.2, radius=1.5)


@pytest.mark.parametrize("denoiser", [RING, Guided(denoiser=RING, guidance_scale=3.0)])
@pytest.mark.parametrize(
    ("sampler", "config"),
    [
        (DDIMSampler(steps=50), SD),
        (DDIMSampler(steps=7), SD),
        (DDIMSampler(steps=20, offset=0, clean_end=True), {**SD, "steps_offset": 0, "set_alpha_to_one": True}),
        (TrailingDDIMSampler(steps=8), {**SD, "timestep_spacing": "trailing"}),
        (TrailingDDIMSampler(steps=1, clean_end=True), {"set_alpha_to_one": True, "timestep_spacing": "trailing"}),
    ],
)
def test_ddim_is_diffusers(denoiser, sampler, config):
    condition = Condition(torch.arange(40) % 8)
    timesteps, expected = in_diffusers(denoiser, noise_of(40), condition, sampler.steps, **config)
    assert sampler.timesteps() == timesteps
    found = sampler.sample(denoiser, noise_of(40), condition)
    assert (found - expected).abs().max() < 1e-5
    assert found.dtype == torch.float64


def test_ddim_converges_to_the_ode_at_first_order():
    """In the variance-exploding view DDIM is Euler on the process's own levels: x_T / alpha_T is the start."""
    process, noise = ScaledLinearDDPM(), noise_of(100)
    levels = process.sigma_table / process.alpha_table
    errors = []
    for steps in (50, 100, 200):
        sampler = DDIMSampler(steps=steps)
        first, (alpha, _) = sampler.timesteps()[0], sampler.levels()[0]
        start, end = (float(levels[t]) for t in (first, 0))
        y = MEAN + (noise / alpha - MEAN) * math.hypot(STD, end) / math.hypot(STD, start)
        expected = y * float(process.alpha_table[0])
        errors.append(float((sampler.sample(GAUSSIAN, noise, FREE) - expected).abs().max()))
    assert [math.log2(a / b) for a, b in itertools.pairwise(errors)] == pytest.approx([1, 1], abs=0.15)


def test_one_trailing_step_is_the_denoiser_at_the_last_step():
    """That is what a one-step student starts as: ``OneStepDDPM`` at step 999."""
    process, noise = ScaledLinearDDPM(), noise_of(6)
    times = torch.full((6,), 999.0, dtype=torch.float64)
    expected = GAUSSIAN.denoise(Noisy(noise, times, *process.alpha_sigma(times)), FREE)
    found = TrailingDDIMSampler(steps=1, clean_end=True).sample(GAUSSIAN, noise, FREE)
    torch.testing.assert_close(found, expected)


def test_refusals():
    with pytest.raises(ValueError, match=r"EulerSampler\.steps=0"):
        EulerSampler(steps=0)
    with pytest.raises(ValueError, match="1001 must be 1 to the process's 1000"):
        DDIMSampler(steps=1001)
    with pytest.raises(ValueError, match="offset=1 leave the process's steps"):
        DDIMSampler(steps=1000)
    assert DDIMSampler(steps=1000, offset=0).timesteps()[0] == 999
    with pytest.raises(ValueError, match="at least 1"):
        HeunSampler(steps=0)
    with pytest.raises(ValueError, match="odd"):
        HeunSampler.for_evaluations(4)
