"""The absorbed tilt against the divergence it descends, D_h(q || p*) = E_p*[h(q/p*)]; quadrature as in test_field."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from exact import LOCATION, ROWS, SCALE, TEACHER, TILTS, evaluate, finite_difference, student_of
from ratiograph.algebra.noising import VarianceExploding
from ratiograph.algebra.normalization import Clamped, RatioNormalized
from ratiograph.algebra.objective import AbsorbedTerm, Term
from ratiograph.algebra.rewards import LinearReward
from ratiograph.algebra.targets import MatchTeacher, RewardTilted, Target
from ratiograph.algebra.times import Uniform
from ratiograph.algebra.weightings import BE, KL, LR, LS, SBA, Weighting
from ratiograph.core.types import Condition, Noisy
from ratiograph.networks.teachers.mixture import GaussianMixture
from test_field import DIRECTIONS, LEVELS, POINTS, REACH, full, library_gradient, relative_error

LEVEL = LEVELS["VarianceExploding"]
DISTINCT = ["KL", "LR", "SoftenedReverseKL", "BE", "Jeffreys", "SquaredHellinger", "LS", "SBA(0.5)", "SBA(3.0)"]
"""Each weighting under one name."""


def log_tilted_density(target: Target, noisy: Noisy, student: GaussianMixture) -> Tensor:
    """log p*_t = log p_t + log r*."""
    log_target, _ = target.log_target(evaluate(noisy, noisy.x_t, target.needs, student))
    return TEACHER.log_density(noisy, Condition()) + log_target


def divergence(weighting: Weighting, target: Target, noising, t: float, location: float, scale: float) -> float:
    """E_p*[h(q/p*)] on a grid that does not depend on the parameters."""
    alpha, sigma = noising.alpha_sigma(full(1, t))
    tau = math.hypot(float(alpha) * SCALE, float(sigma))
    x = float(alpha) * LOCATION + tau * torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64)
    noisy = Noisy(x[:, None], full(POINTS, t), alpha.expand(POINTS), sigma.expand(POINTS))
    student = student_of(location, scale)
    log_p = log_tilted_density(target, noisy, student)
    r = (student.log_density(noisy, Condition()) - log_p).exp()
    return float((log_p.exp() * weighting.h(r)).sum() * (x[1] - x[0]))


@pytest.mark.parametrize("tilt", TILTS)
@pytest.mark.parametrize("row", DISTINCT)
def test_field_is_the_gradient_of_the_divergence_to_the_tilted_teacher(row, tilt):
    expected = finite_difference(divergence, ROWS[row], TILTS[tilt], *LEVEL)
    for direction in DIRECTIONS.values():
        term = AbsorbedTerm(direction=direction, weighting=ROWS[row], target=TILTS[tilt])
        assert relative_error(library_gradient(term, *LEVEL), expected) <= 1e-9


@pytest.mark.parametrize("level", LEVELS)
def test_under_every_process(level):
    expected = finite_difference(divergence, LR(), TILTS["linear"], *LEVELS[level])
    term = AbsorbedTerm(direction=DIRECTIONS["scores"], weighting=LR(), target=TILTS["linear"])
    assert relative_error(library_gradient(term, *LEVELS[level]), expected) <= 1e-9


def velocity(kind: type[Term], weighting: Weighting, target: Target, student: GaussianMixture) -> Tensor:
    x_t = torch.linspace(-3, 3, 61, dtype=torch.float64)[:, None]
    noisy = Noisy(x_t, full(61, 0.5), full(61, 1.0), full(61, 0.5))
    term = kind(direction=DIRECTIONS["scores"], weighting=weighting, target=target)
    return term.velocity(evaluate(noisy, x_t, term.needs, student))


@pytest.mark.parametrize("row", DISTINCT)
def test_only_kl_makes_it_the_subtracted_tilt(row):
    student = student_of(LOCATION, SCALE)
    absorbed, subtracted = (velocity(kind, ROWS[row], TILTS["linear"], student) for kind in (AbsorbedTerm, Term))
    assert torch.allclose(absorbed, subtracted, rtol=1e-12, atol=1e-12) is (row == "KL")
    matched = [velocity(kind, ROWS[row], MatchTeacher(), student) for kind in (AbsorbedTerm, Term)]
    torch.testing.assert_close(*matched, rtol=0, atol=0)


def test_velocity_is_its_formula():
    """For omega = r^lam: (r/r*)^lam (d - grad log r*)."""
    x_t = torch.linspace(-3, 3, 61, dtype=torch.float64)[:, None]
    noisy = Noisy(x_t, full(61, 0.5), full(61, 1.0), full(61, 0.5))
    term = AbsorbedTerm(direction=DIRECTIONS["scores"], weighting=SBA(lam=0.5), target=TILTS["linear"])
    evaluation = evaluate(noisy, x_t, term.needs, student_of(LOCATION, SCALE))
    log_target, gradient = TILTS["linear"].log_target(evaluation)
    power = (-evaluation.log_ratio - log_target).exp().sqrt()[:, None]
    torch.testing.assert_close(term.velocity(evaluation), power * (DIRECTIONS["scores"](evaluation) - gradient))


TILTED_TEACHER = GaussianMixture(
    means=[[-1.0 + 0.7 * 0.36], [0.8 + 0.7 * 0.25]],
    std=[0.6, 0.5],
    weights=[0.4 * math.exp(-0.7 + 0.49 * 0.18), 0.6 * math.exp(0.56 + 0.49 * 0.125)],
)


@pytest.mark.parametrize("row", DISTINCT)
def test_both_rest_at_the_tilted_teacher(row):
    for kind in (AbsorbedTerm, Term):
        at_rest = velocity(kind, ROWS[row], TILTS["linear"], TILTED_TEACHER)
        torch.testing.assert_close(at_rest, torch.zeros_like(at_rest), rtol=0, atol=1e-10)
    assert velocity(AbsorbedTerm, ROWS[row], TILTS["linear"], TEACHER).abs().max() > 0.1


def with_normaliser(weighting: Weighting, log_normalizer: float) -> Tensor:
    target = RewardTilted(reward=LinearReward(slope=[0.7]), log_normalizer=log_normalizer).double()
    return velocity(AbsorbedTerm, weighting, target, student_of(LOCATION, SCALE))


@pytest.mark.parametrize(("weighting", "factor"), [(KL(), 1.0), (BE(), math.e**-1), (LS(), math.e)])
def test_the_normaliser_scales_a_power_and_not_kl(weighting, factor):
    """log Z too high by 1 lowers l + log r* by 1: omega = e^(-lam l) grows by e^lam."""
    torch.testing.assert_close(with_normaliser(weighting, 1.2), factor * with_normaliser(weighting, 0.2))


def test_ratio_normalised_weights_do_not_see_the_normaliser():
    velocities = []
    for log_normalizer in (0.2, 1.2):
        weighting = RatioNormalized(weighting=Clamped(weighting=LR()))
        weighting.connect(VarianceExploding(), Uniform())
        velocities.append(with_normaliser(weighting, log_normalizer))
    torch.testing.assert_close(*velocities, rtol=1e-5, atol=1e-6)
    assert (with_normaliser(LR(), 0.2) - with_normaliser(LR(), 1.2)).abs().max() > 0.1
