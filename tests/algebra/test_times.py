"""Time samplers' distributions by their quantiles, and time weights by their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from exact import LOCATION, SCALE, TEACHER, evaluate, student_of
from ratiograph.algebra.directions import ScoreDifference
from ratiograph.algebra.noising import RectifiedFlow, ScaledLinearDDPM, VarianceExploding, VariancePreserving
from ratiograph.algebra.objective import Term
from ratiograph.algebra.times import (
    DDPMSteps,
    FixedSigma,
    InverseTeacherError,
    KarrasIndex,
    LogitNormal,
    LogNormalSigma,
    SigmaSquared,
    Uniform,
    UnitTimeWeight,
)
from ratiograph.algebra.weightings import KL
from ratiograph.core.contracts import Needs
from ratiograph.core.types import Condition

COUNT = 100_000
LEVELS = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])


def draw(sampler, noising, seed: int = 0) -> torch.Tensor:
    t = sampler(noising, COUNT, torch.Generator().manual_seed(seed))
    assert t.shape == (COUNT,)
    assert t.dtype == torch.float32
    return t


def shares_below(values: torch.Tensor, quantiles: torch.Tensor) -> list[float]:
    """Share of ``values`` below each exact quantile: the quantile's level, within four standard errors (0.0064)."""
    return [float((values < q).float().mean()) for q in quantiles]


def within_error(levels: torch.Tensor):
    return pytest.approx(levels.tolist(), abs=4 * 0.5 / math.sqrt(COUNT))


@pytest.mark.parametrize("noising", [VarianceExploding(), RectifiedFlow(), ScaledLinearDDPM()])
def test_uniform(noising):
    t = draw(Uniform(low=0.1, high=0.95), noising)
    start, end = noising.t_range
    fractions = 0.1 + 0.85 * LEVELS
    assert shares_below(t, start + (end - start) * fractions) == within_error(LEVELS)
    assert t.min() >= start + 0.1 * (end - start) - 1e-4
    assert t.max() <= start + 0.95 * (end - start) + 1e-4


def karras(u):
    return (0.002 ** (1 / 7) + u * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7


@pytest.mark.parametrize("noising", [VarianceExploding(), VariancePreserving(), RectifiedFlow()])
def test_karras_index_has_one_distribution_of_noise_to_signal(noising):
    alpha, sigma = noising.alpha_sigma(draw(KarrasIndex(), noising))
    assert shares_below(sigma / alpha, karras(LEVELS.double())) == within_error(LEVELS)


def test_karras_index_cut():
    t = draw(KarrasIndex(low=0.2, high=0.8), VarianceExploding())
    assert shares_below(t, karras(0.2 + 0.6 * LEVELS.double())) == within_error(LEVELS)
    assert karras(0.8) == pytest.approx(24.4, abs=0.05)  # "the first 800 of 1000" of SiD
    assert 24.3 < float(t.max()) <= karras(0.8) * (1 + 1e-5)
    assert karras(0.2) * (1 - 1e-5) <= float(t.min()) < 1.01 * karras(0.2)


@pytest.mark.parametrize("noising", [VarianceExploding(), VariancePreserving()])
def test_log_normal_sigma(noising):
    alpha, sigma = noising.alpha_sigma(draw(LogNormalSigma(mean=-1.2, std=1.2), noising).double())
    normal = torch.distributions.Normal(-1.2, 1.2)
    assert shares_below((sigma / alpha).log(), normal.icdf(LEVELS)) == within_error(LEVELS)


def test_logit_normal():
    t = draw(LogitNormal(mean=0.5, std=0.8), RectifiedFlow())
    normal = torch.distributions.Normal(0.5, 0.8)
    assert shares_below(t, torch.sigmoid(normal.icdf(LEVELS))) == within_error(LEVELS)


def test_ddpm_steps_are_uniform_integers():
    t = draw(DDPMSteps(low=20, high=29), ScaledLinearDDPM())
    counts = torch.bincount(t.long(), minlength=31) / COUNT
    assert torch.equal(t, t.round())
    assert counts[:20].sum() == counts[30:].sum() == 0
    assert counts[20:30].tolist() == pytest.approx([0.1] * 10, abs=4 * 0.3 / math.sqrt(COUNT))


@pytest.mark.parametrize("sampler", [Uniform(), KarrasIndex(), LogNormalSigma(), LogitNormal()])
def test_times_follow_from_the_generator(sampler):
    first, again, other = (draw(sampler, RectifiedFlow(), seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def evaluation_at(t: torch.Tensor):
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, len(t), 1, generator=generator, dtype=torch.float64)
    noisy = RectifiedFlow().add_noise(x0, t.double(), noise)
    return evaluate(noisy, x0, Needs(), student_of(LOCATION, SCALE))


def test_time_weights():
    evaluation = evaluation_at(torch.tensor([0.2, 0.5, 0.9]))
    assert UnitTimeWeight()(evaluation).tolist() == [1, 1, 1]
    assert SigmaSquared()(evaluation).tolist() == pytest.approx([0.04, 0.25, 0.81])


def test_sigma_squared_frees_the_scores_of_their_scale():
    """w alpha d = alpha^2 (mu_q - mu_p)."""
    evaluation = evaluation_at(torch.linspace(0.1, 0.9, 9))
    field = Term(direction=ScoreDifference(), weighting=KL(), time_weight=SigmaSquared()).field(evaluation)
    difference = evaluation.student_score_denoised - TEACHER.denoise(evaluation.noisy, Condition())
    torch.testing.assert_close(field, evaluation.noisy.alpha[:, None] ** 2 * difference)


def test_inverse_teacher_error_is_the_normaliser_of_dmd():
    """w alpha d = (mu_q - mu_p) / mean|x0 - mu_p|."""
    evaluation = evaluation_at(torch.linspace(0.1, 0.9, 9))
    field = Term(direction=ScoreDifference(), weighting=KL(), time_weight=InverseTeacherError()).field(evaluation)
    mu = TEACHER.denoise(evaluation.noisy, Condition())
    expected = (evaluation.student_score_denoised - mu) / (evaluation.x0 - mu).abs().clamp(min=1e-4)
    torch.testing.assert_close(field, expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Uniform(low=0.5, high=0.5),
        lambda: KarrasIndex(high=1.1),
        lambda: KarrasIndex(sigma_min=-1),
        lambda: DDPMSteps(low=5, high=4),
        lambda: DDPMSteps()(VarianceExploding(), 2, torch.Generator()),
    ],
)
def test_refusals(make):
    with pytest.raises(ValueError, match=r"low|sigma|last step"):
        make()


def test_fixed_sigma_is_one_noise_level_under_any_process():
    for noising in (VarianceExploding(), VariancePreserving(), RectifiedFlow()):
        t = FixedSigma(sigma=2.5)(noising, 5, torch.Generator())
        alpha, sigma = noising.alpha_sigma(t)
        assert (sigma / alpha).tolist() == pytest.approx([2.5] * 5)
