"""The one field against the divergence it descends: quadrature and finite differences in float64.

Notation: the student is x0 = m + s z; D(m, s) = E_p[h(r) - h(r*) - h'(r*)(r - r*)] at one noise level. With
x_t = alpha m + tau u, tau^2 = alpha^2 s^2 + sigma^2, an orthogonal change of variables takes (z, eps) to independent
(u, w). Gradients are linear in w, so that w = +-1 integrates it exactly, and u is integrated by the trapezoid rule.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from exact import LOCATION, ROWS, SCALE, TEACHER, TILTS, evaluate, finite_difference, student_of
from ratiograph.algebra.directions import RatioGradient, ScoreDifference
from ratiograph.algebra.noising import RectifiedFlow, ScaledLinearDDPM, VarianceExploding, VariancePreserving
from ratiograph.algebra.objective import Objective, Term
from ratiograph.algebra.targets import MatchTeacher, Target
from ratiograph.algebra.times import SigmaSquared, Uniform
from ratiograph.algebra.weightings import KL, LR, LS, Weighting
from ratiograph.core.types import Condition, Noisy
from ratiograph.networks.teachers.mixture import ExactRatio
from ratiograph.tasks.distillation import Distillation
from ratiograph.training.optim import EMA, Adam

LEVELS = {
    "VarianceExploding": (VarianceExploding(), 0.5),
    "VariancePreserving": (VariancePreserving(), 0.25),
    "RectifiedFlow": (RectifiedFlow(), 0.4),
    "ScaledLinearDDPM": (ScaledLinearDDPM(), 300.0),
}
DIRECTIONS = {"scores": ScoreDifference(), "ratio": RatioGradient()}
TARGETS: dict[str, Target] = {"teacher": MatchTeacher(), **TILTS}
POINTS = 4001
REACH = 14.0  # of u: SBA at lambda = 5 has its mass far out


def full(n: int, value: float) -> Tensor:
    return torch.full((n,), value, dtype=torch.float64)


def divergence(weighting: Weighting, target: Target, noising, t: float, location: float, scale: float) -> float:
    """D(location, scale), up to a constant, on a grid that does not depend on the parameters."""
    alpha, sigma = noising.alpha_sigma(full(1, t))
    tau = math.hypot(float(alpha) * SCALE, float(sigma))
    x = float(alpha) * LOCATION + tau * torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64)
    noisy = Noisy(x[:, None], full(POINTS, t), alpha.expand(POINTS), sigma.expand(POINTS))
    log_p = TEACHER.log_density(noisy, Condition())
    student = student_of(location, scale)
    r = (student.log_density(noisy, Condition()) - log_p).exp()
    bregman = weighting.h(r)
    if not isinstance(target, MatchTeacher):
        log_target, _ = target.log_target(evaluate(noisy, noisy.x_t, target.needs, student))
        r_star = log_target.exp().requires_grad_()
        h_star = weighting.h(r_star)
        (slope,) = torch.autograd.grad(h_star.sum(), r_star)
        bregman = bregman - h_star.detach() - slope * (r - r_star.detach())
    return float((log_p.exp() * bregman).sum() * (x[1] - x[0]))


def library_gradient(term: Term, noising, t: float, points: int = POINTS) -> Tensor:
    """Gradient [2] from ``x0.backward(field)`` of the library's own components, the mean taken by quadrature."""
    theta = torch.tensor([LOCATION, SCALE], dtype=torch.float64, requires_grad=True)
    alpha, sigma = (float(v) for v in noising.alpha_sigma(full(1, t)))
    tau = math.hypot(alpha * SCALE, sigma)
    u = torch.linspace(-REACH, REACH, points, dtype=torch.float64).repeat(2)
    w = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(points)
    z, noise = (alpha * SCALE * u + sigma * w) / tau, (sigma * u - alpha * SCALE * w) / tau
    density = torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi) * (u[1] - u[0]) / 2
    x0 = (theta[0] + theta[1] * z)[:, None]
    noisy = noising.add_noise(x0.detach(), full(len(u), t), noise[:, None])
    evaluation = evaluate(noisy, x0, term.needs, student_of(LOCATION, SCALE))
    x0.backward(term.field(evaluation) * density[:, None])
    return theta.grad


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("row", ROWS)
def test_field_is_the_gradient_of_the_divergence(row, target):
    weighting, level = ROWS[row], LEVELS["VarianceExploding"]
    expected = finite_difference(divergence, weighting, TARGETS[target], *level)
    # A tabulated omega has kinks, which the trapezoid rule integrates to second order only.
    points, bar = (200_001, 1e-6) if row == "CustomWeighting" else (POINTS, 1e-9)
    for direction in DIRECTIONS.values():
        term = Term(direction=direction, weighting=weighting, target=TARGETS[target])
        assert relative_error(library_gradient(term, *level, points), expected) <= bar


@pytest.mark.parametrize("row", ["LR", "SBA(0.5)"])
@pytest.mark.parametrize("level", LEVELS)
def test_field_is_the_gradient_under_every_process(level, row):
    for target in TARGETS.values():
        expected = finite_difference(divergence, ROWS[row], target, *LEVELS[level])
        for direction in DIRECTIONS.values():
            term = Term(direction=direction, weighting=ROWS[row], target=target)
            assert relative_error(library_gradient(term, *LEVELS[level]), expected) <= 1e-9


# At lambda = -1.5 the correction is too small a part of the gradient for its sign to double the error.
@pytest.mark.parametrize("row", [row for row in ROWS if row != "SBA(-1.5)"])
def test_the_printed_sign_of_equation_35_is_wrong(row):
    level = LEVELS["VarianceExploding"]
    expected = finite_difference(divergence, ROWS[row], TILTS["linear"], *level)
    matched, tilted = (
        library_gradient(Term(direction=ScoreDifference(), weighting=ROWS[row], target=target), *level)
        for target in (MatchTeacher(), TILTS["linear"])
    )
    printed = 2 * matched - tilted  # omega(r) d + omega(r*) grad log r*
    assert relative_error(printed, expected) > 1


def test_kl_field_is_the_score_difference_to_the_tilted_teacher():
    term = Term(direction=ScoreDifference(), weighting=KL(), target=TILTS["linear"])
    x_t = torch.linspace(-4, 4, 101, dtype=torch.float64)[:, None]
    noisy = Noisy(x_t, full(101, 0.5), full(101, 1.0), full(101, 0.5))
    v = term.velocity(evaluate(noisy, x_t, term.needs, student_of(LOCATION, SCALE)))
    # p* of R = exp(0.7 x): each mean moves by 0.7 variance; the tilted density is differentiated numerically.
    widened = [0.36 + 0.25, 0.25 + 0.25]

    def log_tilted(x: Tensor) -> Tensor:
        parts = [
            math.log(weight) + 0.7 * mean + 0.7**2 * (var - 0.25) / 2
            - (x - mean - 0.7 * (var - 0.25)).square() / (2 * var) - math.log(var) / 2
            for weight, mean, var in zip([0.4, 0.6], [-1.0, 0.8], widened, strict=True)
        ]  # fmt: skip
        return torch.stack(parts).logsumexp(0)

    step = 1e-5
    score = (log_tilted(x_t + step) - log_tilted(x_t - step)) / (2 * step)
    student_score = -(x_t - LOCATION) / (SCALE**2 + 0.25)
    torch.testing.assert_close(v, student_score - score, rtol=0, atol=1e-8)


class Affine(torch.nn.Module):
    """x0 = m + s z with learnt (m, s), in float64."""

    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor([LOCATION, SCALE], dtype=torch.float64))

    def noise(self, samples: int, generator: torch.Generator) -> Tensor:
        return torch.randn(samples, 1, generator=generator, dtype=torch.float64)

    def forward(self, z: Tensor, condition: Condition) -> Tensor:
        return self.theta[0] + self.theta[1] * z


LOW, HIGH = 0.2, 0.7


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("weighting", [KL(), LR(), LS()], ids=["KL", "LR", "LS"])
def test_monte_carlo_backward_of_the_field(weighting, direction, target):
    """The distillation's own noising, evaluation and objective, with p(t) and w(t), on random samples."""
    noising, count = RectifiedFlow(), 100_000
    term = Term(
        direction=DIRECTIONS[direction], weighting=weighting, target=TARGETS[target], time_weight=SigmaSquared()
    )
    exact, student = student_of(LOCATION, SCALE), Affine()
    task = Distillation(
        student=student,
        objective=Objective(terms={"distribution": term}),
        noising=noising,
        times=Uniform(low=LOW, high=HIGH),
        student_optimizer=Adam(),
        ema=EMA(),
        teacher=TEACHER,
        student_score=exact,
        student_score_times=Uniform(),
        student_score_optimizer=Adam(),
        ratio=ExactRatio(student=exact),
    )
    generator = torch.Generator().manual_seed(0)
    z = student.noise(count, generator)
    x0 = student(z, Condition())
    field = task.objective.fields(task.evaluate(x0, Condition(), generator))["distribution"]
    x0.backward(field / count)
    found = student.theta.grad
    per_sample = torch.cat([field, field * z], 1)  # (dx0/dm, dx0/ds) = (1, z)
    error = per_sample.std(0) / math.sqrt(count)

    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(8))
    start, end = noising.t_range
    times = start + (end - start) * (LOW + (HIGH - LOW) * (nodes + 1) / 2)
    expected = sum(
        w / 2 * t**2 * finite_difference(divergence, weighting, TARGETS[target], noising, float(t))
        for t, w in zip(times, weights, strict=True)
    )
    assert (error < 0.03 * expected.norm()).all(), "too few samples for a test that can fail"
    assert ((found - expected).abs() < 4 * error).all()
