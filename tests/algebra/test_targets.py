"""Tilted targets: the approximate ones against finite differences, brute force and the exact one, and the role of Z."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from exact import LOCATION, SCALE, TEACHER, evaluate, student_of
from ratiograph.algebra.directions import RatioGradient, ScoreDifference
from ratiograph.algebra.objective import AbsorbedTerm, Objective, Term
from ratiograph.algebra.rewards import BlackBoxReward, ClassReward, LinearReward, QuadraticReward, Reward, ScaledReward
from ratiograph.algebra.second_order_targets import RewardTiltedCumulant, RewardTiltedSecondOrder
from ratiograph.algebra.targets import (
    MatchTeacher,
    RewardTilted,
    RewardTiltedNoJacobian,
    RewardWeighted,
    Target,
    log_mean_reward,
)
from ratiograph.algebra.weightings import KL, LR, LS
from ratiograph.core.contracts import Evaluation, Nodes
from ratiograph.core.types import Batch, Condition, Noisy
from ratiograph.networks.architectures.unet import UNet
from ratiograph.networks.denoisers import EDM, set_precision
from ratiograph.networks.teachers.exact_tilting import ExactTilted, MixtureClassifier, tilt
from ratiograph.networks.teachers.mixture import ExactRatio, GaussianMixture, RingMixture

FREE = Condition()
PLANE = GaussianMixture(
    means=[[0.0, 1.0], [-1.0, 0.5]], covariances=[[[0.5, 0.2], [0.2, 0.3]], [[0.4, -0.3], [-0.3, 0.8]]]
)


class Curved(Reward):
    """log R = -(x^2 + x y + 2 y^2) / 2 + sin x."""

    def log_reward(self, x0: Tensor, condition: Condition) -> Tensor:
        x, y = x0[:, 0], x0[:, 1]
        return -(x.square() + x * y + 2 * y.square()) / 2 + x.sin()

    @staticmethod
    def gradient(x0: Tensor) -> Tensor:
        x, y = x0[:, 0], x0[:, 1]
        return torch.stack([-x - y / 2 + x.cos(), -x / 2 - 2 * y], 1)


def at(x_t: Tensor, alpha: float, sigma: float) -> Noisy:
    full = lambda value: torch.full((len(x_t),), value, dtype=x_t.dtype)  # noqa: E731
    return Noisy(x_t, full(sigma), full(alpha), full(sigma))


def points(dimension: int = 2) -> Tensor:
    return torch.randn(100, dimension, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def fitted(target: RewardTilted, log_normalizer: float = 0.0) -> RewardTilted:
    target.double().log_normalizer.fill_(log_normalizer)
    return target


def test_matching_the_teacher_needs_no_target():
    assert MatchTeacher().log_target(evaluate(at(points(1), 1.0, 0.5), points(1), MatchTeacher.needs, PLANE)) is None


def test_vector_jacobian_product_against_finite_differences():
    """d/dx log R(mu(x_t)), through the teacher's own denoiser."""
    target, x_t = fitted(RewardTilted(reward=Curved()), 0.3), points()
    evaluation = Evaluation(at(x_t, 0.6, 0.4), x_t, FREE, Nodes(teacher=PLANE), target.needs)
    log_target, gradient = target.log_target(evaluation)

    def log_reward(x: Tensor) -> Tensor:
        return Curved().log_reward(PLANE.denoise(at(x, 0.6, 0.4), FREE), FREE)

    torch.testing.assert_close(log_target, log_reward(x_t) - 0.3)
    step = 1e-5
    for i in range(2):
        shift = step * torch.eye(2, dtype=torch.float64)[i]
        difference = (log_reward(x_t + shift) - log_reward(x_t - shift)) / (2 * step)
        torch.testing.assert_close(gradient[:, i], difference, rtol=1e-6, atol=1e-8)
    assert not log_target.requires_grad
    assert not gradient.requires_grad


def test_no_jacobian_form_is_its_definition():
    target, x_t = fitted(RewardTiltedNoJacobian(reward=Curved()), 0.3), points()
    evaluation = Evaluation(at(x_t, 0.6, 0.4), x_t, FREE, Nodes(teacher=PLANE), target.needs)
    log_target, gradient = target.log_target(evaluation)
    mu = PLANE.denoise(at(x_t, 0.6, 0.4), FREE)
    torch.testing.assert_close(log_target, Curved().log_reward(mu, FREE) - 0.3)
    torch.testing.assert_close(gradient, Curved.gradient(mu) / 0.6)
    assert not evaluation.noisy.x_t.requires_grad  # no graph through the teacher was asked for


@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_no_jacobian_is_the_limit_at_small_noise(alpha):
    x_t, gradients = points(), []
    for kind in (RewardTilted, RewardTiltedNoJacobian):
        target = fitted(kind(reward=Curved()))
        evaluation = Evaluation(at(x_t, alpha, 1e-3), x_t, FREE, Nodes(teacher=PLANE), target.needs)
        gradients.append(target.log_target(evaluation)[1])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_first_order_is_low_by_jensen_on_one_gaussian():
    """For one Gaussian and R = exp(<b, x0>) the gradient is exact, log R_t too low by b^T Cov[x0 | x_t] b / 2."""
    covariance = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
    teacher = GaussianMixture(means=[[0.3, -0.2]], covariances=[covariance.tolist()])
    reward, x_t, alpha, sigma = LinearReward(slope=[0.8, -1.1]), points(), 0.6, 0.4
    slope = torch.tensor([0.8, -1.1], dtype=torch.float64)
    log_normalizer = float(slope @ torch.tensor([0.3, -0.2], dtype=torch.float64) + slope @ covariance @ slope / 2)
    first, exact = fitted(RewardTilted(reward=reward), log_normalizer), ExactTilted(reward=reward)
    evaluation = Evaluation(at(x_t, alpha, sigma), x_t, FREE, Nodes(teacher=teacher), first.needs)
    (log_first, gradient), (log_exact, exact_gradient) = first.log_target(evaluation), exact.log_target(evaluation)
    torch.testing.assert_close(gradient, exact_gradient)
    posterior = torch.linalg.inv(torch.linalg.inv(covariance) + alpha**2 / sigma**2 * torch.eye(2).double())
    torch.testing.assert_close(log_exact - log_first, (slope @ posterior @ slope / 2).expand(100))


def test_first_order_becomes_exact_at_small_noise():
    reward, x_t = LinearReward(slope=[0.8, -1.1]), points()
    target, exact = fitted(RewardTilted(reward=reward)), ExactTilted(reward=reward)
    evaluation = Evaluation(at(x_t, 1.0, 1e-3), x_t, FREE, Nodes(teacher=PLANE), target.needs)
    expected = exact.log_expected_reward(evaluation)
    torch.testing.assert_close(target.log_target(evaluation)[0], expected, rtol=0, atol=1e-5)


def test_fit_is_the_log_mean_of_the_reward():
    rewards = torch.tensor([0.0, 1.0, -2.0, 500.0, 500.5, 3.0])[:, None]  # e^500 overflows even float64's square
    batches = iter([Batch(rewards[:2], FREE), Batch(rewards[2:4], FREE), Batch(rewards[4:], FREE)])
    target = RewardTilted(reward=LinearReward(slope=[1.0]), normalizer_samples=4)
    target.fit(batches)
    assert float(target.log_normalizer) == pytest.approx(500 - math.log(4))
    assert len(next(batches)) == 2, "no more batches are read than asked for"
    assert "log_normalizer" in target.state_dict()


def velocities(target: Target, weighting) -> Tensor:
    term = Term(direction=ScoreDifference(), weighting=weighting, target=target)
    x_t = points(1)
    return term.velocity(evaluate(at(x_t, 1.0, 0.5), x_t, term.needs, student_of(LOCATION, SCALE)))


def test_only_kl_does_not_see_the_normaliser():
    reward = LinearReward(slope=[0.7])
    for weighting, moves in ((KL(), False), (LR(), True), (LS(), True)):
        first, second = (velocities(fitted(RewardTilted(reward=reward), z), weighting) for z in (0.0, 1.0))
        assert bool((first - second).abs().max() > 0.05) is moves


@pytest.mark.parametrize("weighting", [KL(), LR(), LS()])
def test_the_field_vanishes_at_the_tilted_teacher(weighting):
    """q = p* is the fixed point, pointwise, for every weighting."""
    exact = ExactTilted(reward=LinearReward(slope=[0.7]))
    student = GaussianMixture(
        means=[[-1.0 + 0.7 * 0.36], [0.8 + 0.7 * 0.25]],
        std=[0.6, 0.5],
        weights=[0.4 * math.exp(-0.7 + 0.49 * 0.18), 0.6 * math.exp(0.56 + 0.49 * 0.125)],
    )
    x_t = points(1)
    for direction in (ScoreDifference(), RatioGradient()):
        term = Term(direction=direction, weighting=weighting, target=exact)
        evaluation = evaluate(at(x_t, 1.0, 0.5), x_t, term.needs, student)
        torch.testing.assert_close(term.velocity(evaluation), torch.zeros_like(x_t), rtol=0, atol=1e-12)
        assert direction(evaluation).abs().max() > 0.1


def test_a_tilted_term_and_a_ratio_on_the_teachers_features_share_one_pass_in_any_order():
    reward, x_t = LinearReward(slope=[0.7]), points(1)
    kinds = {
        "tilted": lambda: Term(
            direction=ScoreDifference(), weighting=LS(), target=fitted(RewardTilted(reward=reward), 0.1)
        ),
        "again": lambda: Term(
            direction=ScoreDifference(), weighting=LR(), target=fitted(RewardTilted(reward=reward), 0.2)
        ),
        "gan": lambda: Term(direction=RatioGradient(), weighting=LR()),
    }
    alone = {}
    for name, make in kinds.items():
        term = make()
        alone[name] = term.field(evaluate(at(x_t, 1.0, 0.5), x_t, term.needs, student_of(LOCATION, SCALE)))
    for order in (["tilted", "again", "gan"], ["gan", "again", "tilted"], ["again", "gan", "tilted"]):
        objective = Objective(terms={name: kinds[name]() for name in order})
        evaluation = evaluate(at(x_t, 1.0, 0.5), x_t, objective.needs, student_of(LOCATION, SCALE))
        for name, field in objective.fields(evaluation).items():
            torch.testing.assert_close(field, alone[name])


def test_class_reward_is_the_mean_of_the_rewards_under_the_classifier():
    logits = torch.nn.Linear(2, 3).double()
    reward = ClassReward(classifier=logits, log_rewards=[0.0, 1.0, -1.0])
    x0 = points()
    expected = (logits(x0).softmax(1) @ torch.tensor([1.0, math.e, 1 / math.e], dtype=torch.float64)).log()
    torch.testing.assert_close(reward.log_reward(x0, FREE).double(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for p in reward.parameters())


def test_teacher_of_the_proofs_is_the_one_the_targets_use():
    """``ExactTilted`` refers to the evaluation's teacher: another teacher, another target."""
    exact, x_t = ExactTilted(reward=LinearReward(slope=[0.7])), points(1)
    one, other = (
        exact.log_target(Evaluation(at(x_t, 1.0, 0.5), x_t, FREE, Nodes(teacher=teacher)))[0]
        for teacher in (TEACHER, student_of(LOCATION, SCALE))
    )
    assert (one - other).abs().max() > 0.1


# --- second order -------------------------------------------------------------------------------------------


def estimate(target: RewardTilted, teacher, x_t: Tensor, alpha: float, sigma: float, seed: int = 0):
    """(log r*, its gradient) at ``x_t``, the probes drawn from ``seed``."""
    evaluation = Evaluation(at(x_t, alpha, sigma), x_t, FREE, Nodes(teacher=teacher), target.needs)
    torch.manual_seed(seed)
    return target.log_target(evaluation)


def curvature(reward: Reward, teacher, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """(log R(mu) [], R's relative Hessian Hess R / R at mu [D, D], Sigma [D, D]) at one point x [D], by brute force."""
    mu = teacher.denoise(at(x[None], alpha, sigma), FREE)[0]
    jacobian = torch.autograd.functional.jacobian(lambda v: teacher.denoise(at(v[None], alpha, sigma), FREE)[0], x)
    log_reward = reward.log_reward(mu[None], FREE)[0]
    hessian = torch.autograd.functional.hessian(
        lambda v: (reward.log_reward(v[None], FREE)[0] - log_reward.detach()).exp(), mu
    )
    return log_reward, hessian, sigma**2 / alpha * jacobian


LINE = GaussianMixture(means=[[-1.0], [0.8]], std=[0.6, 0.5], weights=[0.4, 0.6])


class Cubic(Reward):
    """log R = x^3 / 3 + x / 2: curved upwards on one side, downwards on the other."""

    def log_reward(self, x0: Tensor, condition: Condition) -> Tensor:
        return (x0.pow(3) / 3 + x0 / 2).flatten(1).sum(1)


def test_second_order_is_equation_24_in_one_dimension():
    """One probe is exact there; where the correction is negative its logarithm is replaced by itself."""
    x_t, scales = torch.linspace(-3, 3, 61, dtype=torch.float64)[:, None], (0.6, 0.4)
    second, cumulant = (
        estimate(kind(reward=Cubic(), log_normalizer=0.3).double(), LINE, x_t, *scales)[0]
        for kind in (RewardTiltedSecondOrder, RewardTiltedCumulant)
    )
    parts = [curvature(Cubic(), LINE, x, *scales) for x in x_t]
    log_reward, half = (torch.stack(v) for v in zip(*((g, (h * s).sum() / 2) for g, h, s in parts), strict=True))
    assert half.max() > 0.05
    assert half.min() < -0.05
    equation = (log_reward.exp() * (1 + half)).log() - 0.3
    torch.testing.assert_close(second[half > 0], equation[half > 0])
    torch.testing.assert_close(second[half < 0], (log_reward + half - 0.3)[half < 0])
    torch.testing.assert_close(cumulant, log_reward + half - 0.3)


def test_probes_average_to_the_trace():
    """With v = (1, +-1), v^T M v is tr M plus or minus twice the off-diagonal part: exactly two values, half each."""
    x, scales = torch.tensor([[0.3, -0.5]], dtype=torch.float64), (0.6, 0.4)
    target = RewardTiltedCumulant(reward=Curved(), log_normalizer=0.0).double()
    found = estimate(target, PLANE, x.expand(4000, 2), *scales)[0]
    log_reward, relative, sigma = curvature(Curved(), PLANE, x[0], *scales)
    gradient = Curved.gradient(PLANE.denoise(at(x, *scales), FREE))[0]
    hessian = relative - torch.outer(gradient, gradient)
    mean = log_reward + (relative * sigma).sum() / 2
    spread = (hessian @ sigma)[0, 1] / 2 + (hessian @ sigma)[1, 0] / 2
    assert abs(spread) > 0.01
    torch.testing.assert_close((found - mean).abs(), spread.abs().expand(4000))
    assert abs(float((found - mean).mean() / spread)) < 4 / math.sqrt(4000)
    many = RewardTiltedCumulant(reward=Curved(), probes=50, log_normalizer=0.0).double()
    averaged = estimate(many, PLANE, x.expand(400, 2), *scales)[0]
    assert float((averaged - mean).std() / spread.abs()) == pytest.approx(1 / math.sqrt(50), rel=0.15)


@pytest.mark.parametrize("kind", [RewardTiltedSecondOrder, RewardTiltedCumulant])
@pytest.mark.parametrize("sigma", [0.4, 3.0])
def test_second_order_gradient_against_finite_differences(kind, sigma):
    target, x_t, step = kind(reward=Curved(), probes=2, log_normalizer=0.3).double(), points(), 1e-5
    log_target, gradient = estimate(target, PLANE, x_t, 0.6, sigma)
    for i in range(2):
        shift = step * torch.eye(2, dtype=torch.float64)[i]
        up, down = (estimate(target, PLANE, x_t + s * shift, 0.6, sigma)[0] for s in (1, -1))
        torch.testing.assert_close(gradient[:, i], (up - down) / (2 * step), rtol=1e-5, atol=1e-7)
    assert not log_target.requires_grad
    assert not gradient.requires_grad


def test_cumulant_is_exact_for_a_gaussian_and_a_linear_reward():
    teacher = GaussianMixture(means=[[0.3, -0.2]], covariances=[[[0.5, 0.2], [0.2, 0.3]]])
    reward = LinearReward(slope=[2.8, -3.1])
    target = RewardTiltedCumulant(reward=reward, log_normalizer=float(tilt(reward, teacher)[1])).double()
    for sigma in (0.1, 1.0, 10.0):
        found = estimate(target, teacher, points(), 0.6, sigma)
        evaluation = Evaluation(at(points(), 0.6, sigma), points(), FREE, Nodes(teacher=teacher))
        torch.testing.assert_close(found, ExactTilted(reward=reward).log_target(evaluation), rtol=1e-6, atol=1e-6)


def test_one_normaliser_serves_every_noise_level():
    """E_p[r*_t(x_t)] = E_p[R] / Z = 1 at each t, with Z of clean samples."""
    teacher, reward = GaussianMixture(means=[[0.3]], std=0.7), LinearReward(slope=[1.3])
    target = RewardTiltedCumulant(reward=reward, log_normalizer=float(tilt(reward, teacher)[1])).double()
    for sigma in (0.1, 1.0, 10.0):
        width = math.hypot(0.6 * 0.7, sigma)
        x = 0.6 * 0.3 + width * torch.linspace(-9, 9, 2001, dtype=torch.float64)[:, None]
        density = teacher.log_density(at(x, 0.6, sigma), FREE).exp()
        mean = (density * estimate(target, teacher, x, 0.6, sigma)[0].exp()).sum() * (x[1, 0] - x[0, 0])
        assert float(mean) == pytest.approx(1, abs=1e-6)


OVERLAPPING = GaussianMixture(
    means=[[0.0, 0.6], [-0.5, 0.3], [0.6, -0.4]], std=[0.6, 0.5, 0.7], weights=[0.3, 0.4, 0.3]
)


def attraction(tau: float) -> QuadraticReward:
    """R = exp(-|x0 - (0.8, 0.4)|^2 / (2 tau^2)) up to a constant."""
    return QuadraticReward(curvature=-1 / tau**2, slope=[0.8 / tau**2, 0.4 / tau**2])


def errors(kind, reward, teacher, sigma: float, **arguments) -> float:
    """RMS error of log R_t under p_t."""
    generator = torch.Generator().manual_seed(1)
    x0 = teacher.sample(1000, generator, dtype=torch.float64)
    x_t = x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    target = kind(reward=reward, log_normalizer=0.0, **arguments).double()
    evaluation = Evaluation(at(x_t, 1.0, sigma), x_t, FREE, Nodes(teacher=teacher))
    exact = ExactTilted(reward=reward).log_expected_reward(evaluation)
    return float((estimate(target, teacher, x_t, 1.0, sigma)[0] - exact).square().mean().sqrt())


@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0, 3.0, 10.0, 80.0])
@pytest.mark.parametrize("tau", [4.0, 2.0])
def test_second_order_beats_the_first_at_every_noise_level(tau, sigma):
    first = errors(RewardTilted, attraction(tau), OVERLAPPING, sigma)
    for kind in (RewardTiltedSecondOrder, RewardTiltedCumulant):
        assert errors(kind, attraction(tau), OVERLAPPING, sigma) < first / 3
        assert errors(kind, attraction(tau), OVERLAPPING, sigma, probes=64) < first / 10


def test_where_second_order_is_no_better():
    """Not a parabola across the posterior: a strong reward on far modes, and a step. The docstring's warning."""
    modes = GaussianMixture(means=[[-2.0, 0.0], [2.0, 0.0]], std=0.3)
    first = errors(RewardTilted, attraction(1.0), modes, 1.0)
    assert errors(RewardTiltedSecondOrder, attraction(1.0), modes, 1.0) > first
    assert errors(RewardTiltedCumulant, attraction(1.0), modes, 1.0) > 2 * first
    ring = RingMixture(std=0.15, classes=[0, 1] * 4)
    step = ClassReward(classifier=MixtureClassifier(mixture=ring), log_rewards=[1.0, 0.0])
    assert errors(RewardTiltedSecondOrder, step, ring, 0.6) > 5 * errors(RewardTilted, step, ring, 0.6)


def test_finite_where_equation_24_is_negative():
    """In 64 dimensions a mild reward makes 1 + c/2 negative; what replaces it stays within a fifth of the error."""
    generator = torch.Generator().manual_seed(3)
    teacher = GaussianMixture(means=torch.randn(3, 64, generator=generator).div(2).tolist(), std=[0.4, 0.5, 0.6])
    reward, x_t = QuadraticReward(curvature=-0.25), 3 * torch.randn(50, 64, generator=generator, dtype=torch.float64)
    target = RewardTiltedSecondOrder(reward=reward, probes=8, log_normalizer=0.0).double()
    log_target, gradient = estimate(target, teacher, x_t, 1.0, 3.0)
    mu = teacher.denoise(at(x_t, 1.0, 3.0), FREE)
    assert ((log_target - reward.log_reward(mu, FREE)) < -1).all(), "1 + c/2 is to be negative here"
    assert gradient.isfinite().all()
    evaluation = Evaluation(at(x_t, 1.0, 3.0), x_t, FREE, Nodes(teacher=teacher))
    exact = ExactTilted(reward=reward).log_expected_reward(evaluation)
    first = reward.log_reward(mu, FREE) - exact
    assert (log_target - exact).square().mean() < first.square().mean() / 25


def small_unet() -> EDM:
    torch.manual_seed(0)
    network = UNet(resolution=8, channels=16)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15)  # zero-initialised layers would hide most of the Jacobian
    return EDM(network=network).requires_grad_(False)


class Smooth(Reward):
    """log R = 3 sin(<w, x0>) with a fixed w."""

    def log_reward(self, x0: Tensor, condition: Condition) -> Tensor:
        x = x0.flatten(1)
        return 3 * (x @ torch.linspace(-0.3, 0.3, x.shape[1], dtype=x.dtype)).sin()


def test_second_order_through_a_network_with_attention():
    teacher, target = small_unet().double(), RewardTiltedSecondOrder(reward=Smooth(), log_normalizer=0.0).double()
    generator = torch.Generator().manual_seed(0)
    x_t, direction = (torch.randn(6, 1, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    _, gradient = estimate(target, teacher, x_t, 0.6, 0.8)
    step = 1e-5
    up, down = (estimate(target, teacher, x_t + s * direction, 0.6, 0.8)[0] for s in (step, -step))
    difference = (up - down) / (2 * step)
    torch.testing.assert_close((gradient * direction).flatten(1).sum(1), difference, rtol=1e-4, atol=1e-6)
    assert difference.abs().min() > 1e-3


def test_second_order_where_fused_attention_would_run():
    """In this memory format queries are contiguous, and torch takes a kernel without a second derivative."""
    teacher, target = small_unet(), RewardTiltedSecondOrder(reward=Smooth(), log_normalizer=0.0)
    x_t = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = estimate(target, teacher, x_t, 0.6, 0.8)
    teacher.to(memory_format=torch.channels_last)
    torch.testing.assert_close(estimate(target, teacher, x_t, 0.6, 0.8), expected, rtol=1e-3, atol=1e-4)


def test_second_order_under_bf16_autocast():
    """Double backward through the autocast network; log R_t and its gradient within bf16's reach of float32."""
    teacher, target = small_unet(), RewardTiltedSecondOrder(reward=Smooth(), log_normalizer=0.0)
    x_t = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    precise = estimate(target, teacher, x_t, 0.6, 0.8)
    set_precision(teacher, torch.bfloat16)
    for found, expected in zip(estimate(target, teacher, x_t, 0.6, 0.8), precise, strict=True):
        assert found.dtype == torch.float32
        assert 0 < float((found - expected).norm() / expected.norm()) < 0.05


class Normed(Reward):
    """log R = sum sin(LayerNorm(x W)) / 3."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = torch.nn.Sequential(torch.nn.Linear(2, 6), torch.nn.LayerNorm(6)).double()
        torch.nn.init.normal_(self.network[1].weight)

    def log_reward(self, x0: Tensor, condition: Condition) -> Tensor:
        return self.network(x0).sin().sum(1) / 3


def test_second_order_gradient_through_a_layer_norm():
    plain, x_t, step = Normed(), points(), 1e-5
    before = plain.log_reward(x_t, FREE)
    target = RewardTiltedCumulant(reward=plain, log_normalizer=0.0).double()
    torch.testing.assert_close(plain.log_reward(x_t, FREE), before, rtol=1e-12, atol=1e-12)
    _, gradient = estimate(target, PLANE, x_t, 0.6, 0.8)
    for i in range(2):
        shift = step * torch.eye(2, dtype=torch.float64)[i]
        up, down = (estimate(target, PLANE, x_t + s * shift, 0.6, 0.8)[0] for s in (1, -1))
        torch.testing.assert_close(gradient[:, i], (up - down) / (2 * step), rtol=1e-5, atol=1e-6)


def test_probes_come_from_the_global_generator():
    target = RewardTiltedSecondOrder(reward=Curved(), log_normalizer=0.0).double()
    first, again, other = (estimate(target, PLANE, points(), 0.6, 0.4, seed)[0] for seed in (0, 0, 1))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert (first - other).abs().max() > 1e-3


# --- the normaliser -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RewardTilted, RewardTiltedNoJacobian, RewardTiltedSecondOrder, RewardTiltedCumulant])
def test_a_given_normaliser_is_kept_and_used(kind):
    def unread():
        raise AssertionError("no sample is to be read")
        yield

    given = kind(reward=LinearReward(slope=[0.7]), log_normalizer=1)
    given.fit(unread())
    assert float(given.log_normalizer) == 1
    assert not given.needs_samples
    zero = kind(reward=LinearReward(slope=[0.7]), log_normalizer=0.0)
    for weighting, moves in ((KL(), False), (LR(), True), (LS(), True)):
        difference = velocities(given.double(), weighting) - velocities(zero.double(), weighting)
        assert bool(difference.abs().max() > 0.05) is moves
    assert kind(reward=LinearReward(slope=[0.7])).needs_samples
    assert not MatchTeacher().needs_samples


def test_log_mean_reward_and_its_standard_error():
    """The delta method's error against the jackknife's, and against the log-normal's own."""
    log_reward = 0.5 * torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_mean, error = log_mean_reward(log_reward + 800)  # e^800 overflows float64
    assert float(log_mean) == pytest.approx(800 + math.log(log_reward.exp().mean()))
    reward = log_reward.exp()
    left_out = ((reward.sum() - reward) / 3999).log()
    jackknife = (left_out - left_out.mean()).square().sum().mul(3999 / 4000).sqrt()
    assert float(error) == pytest.approx(float(jackknife), rel=1e-3)
    assert float(error) == pytest.approx(math.sqrt(math.expm1(0.25) / 4000), rel=0.05)
    assert abs(float(log_mean) - 800 - 0.125) < 4 * float(error)


def test_the_normaliser_is_of_all_ranks(monkeypatch):
    """Two ranks with 50 samples each estimate what one does from the 100."""
    from ratiograph.algebra import targets

    reward, x0 = LinearReward(slope=[0.7]), points(1)
    monkeypatch.setattr(targets, "ranks", lambda: 2)
    monkeypatch.setattr(targets, "gather", lambda own: torch.cat([own, reward.log_reward(x0[50:], FREE)]))
    target = RewardTilted(reward=reward, normalizer_samples=100).double()
    target.fit([Batch(x0[:50], FREE), Batch(torch.full_like(x0, torch.nan), FREE)])  # the second is not to be read
    monkeypatch.undo()
    alone = RewardTilted(reward=reward, normalizer_samples=100).double()
    alone.fit([Batch(x0, FREE)])
    assert float(target.log_normalizer) == pytest.approx(float(alone.log_normalizer), rel=1e-12)
    assert float(alone.log_normalizer) == pytest.approx(float((0.7 * x0).exp().mean().log()), rel=1e-6)


def test_a_reward_that_gives_nan_is_named_before_training():
    class Broken(Reward):
        def log_reward(self, x0: Tensor, condition: Condition) -> Tensor:
            return x0[:, 0].log()

    target = RewardTilted(reward=ScaledReward(reward=Broken()), normalizer_samples=100)
    with pytest.raises(ValueError, match=r"^Broken gave NaN or infinity as log R of 100 samples of p"):
        target.fit([Batch(points(1), FREE)])


# --- black boxes --------------------------------------------------------------------------------------------


class Steps(Reward):
    """R = 1, 3 or 1/2: piecewise constant, so that autograd's gradient is 0 everywhere and says nothing."""

    differentiable = False

    def log_reward(self, x0: Tensor, condition: Condition) -> Tensor:
        x = x0.detach()[:, 0]
        return torch.where(x > 0.5, math.log(3), torch.where(x > -0.8, 0.0, -math.log(2)))


@pytest.mark.parametrize("kind", [RewardTilted, RewardTiltedNoJacobian, RewardTiltedSecondOrder, RewardTiltedCumulant])
def test_a_black_box_is_refused_where_its_gradient_is_needed(kind):
    for reward in (Steps(), ScaledReward(reward=Steps()), BlackBoxReward(reward=Curved())):
        with pytest.raises(ValueError, match=rf"{kind.__name__} needs the gradient.*RewardWeighted.*RatioGradient"):
            kind(reward=reward)


GRID = torch.linspace(-6, 6, 2401, dtype=torch.float64)
WIDTH = float(GRID[1] - GRID[0])


def weighted_steps() -> RewardWeighted:
    """log Z by quadrature."""
    p = TEACHER.log_density(at(GRID[:, None], 1.0, 0.0), FREE).exp()
    log_z = float((p * Steps().log_reward(GRID[:, None], FREE).exp()).sum().mul(WIDTH).log())
    return RewardWeighted(reward=Steps(), log_normalizer=log_z).double()


def test_weighted_positives_are_positives_of_the_tilted_teacher():
    """The gradient of the weighted logistic loss in l vanishes at log p*_t/q_t, whatever the noise, and only there."""
    target, student = weighted_steps(), student_of(LOCATION, SCALE)
    p = TEACHER.log_density(at(GRID[:, None], 1.0, 0.0), FREE).exp()
    weight = target.log_weight(Batch(GRID[:, None], FREE)).exp()
    tilted = p * Steps().log_reward(GRID[:, None], FREE).exp()
    tilted = tilted / (tilted.sum() * WIDTH)
    assert float((p * weight).sum() * WIDTH) == pytest.approx(1)
    x_t = torch.linspace(-4, 4, 81, dtype=torch.float64)
    for sigma in (0.1, 0.5, 3.0):
        kernel = torch.exp(-(x_t[:, None] - GRID).square() / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
        q = student.log_density(at(x_t[:, None], 1.0, sigma), FREE).exp()
        gradients = {}
        for name, clean in (("p*", tilted), ("p", p)):
            l = ((kernel @ clean).log() + math.log(WIDTH) - q.log()).requires_grad_()  # noqa: E741
            positive = (kernel * p * weight).sum(1) * WIDTH * torch.nn.functional.softplus(-l)
            negative = q * torch.nn.functional.softplus(l)
            (gradients[name],) = torch.autograd.grad((positive + negative).sum(), l)
        assert gradients["p*"].abs().max() < 1e-8  # log Z is kept in float32
        assert gradients["p"].abs().max() > 1e-3


@pytest.mark.parametrize("weighting", [KL(), LR(), LS()], ids=["KL", "LR", "LS"])
def test_the_field_on_the_tilted_ratio_is_the_absorbed_tilt_and_rests_at_the_tilted_teacher(weighting):
    reward, x_t = LinearReward(slope=[0.7]), torch.linspace(-3, 3, 61, dtype=torch.float64)[:, None]
    tilted, log_normalizer = tilt(reward, TEACHER)
    target = RewardWeighted(reward=BlackBoxReward(reward=reward), log_normalizer=float(log_normalizer))
    weighed = Term(direction=RatioGradient(), weighting=weighting, target=target)
    absorbed = AbsorbedTerm(direction=RatioGradient(), weighting=weighting, target=ExactTilted(reward=reward))

    def velocity(term: Term, teacher: GaussianMixture, student: GaussianMixture) -> Tensor:
        nodes = Nodes(teacher=teacher, ratio=ExactRatio(student=student))
        return term.velocity(Evaluation(at(x_t, 1.0, 0.5), x_t, FREE, nodes, term.needs))

    student = student_of(LOCATION, SCALE)
    # What the weighted positives teach: the ratio of p*, here the exact one.
    torch.testing.assert_close(velocity(weighed, tilted, student), velocity(absorbed, TEACHER, student))
    assert velocity(weighed, tilted, tilted).abs().max() < 1e-12
    assert velocity(weighed, tilted, TEACHER).abs().max() > 0.1


def test_log_weights_are_log_r_star_without_a_graph():
    reward = LinearReward(slope=[0.7])
    target = RewardWeighted(reward=reward, log_normalizer=0.3)
    x0 = points(1).requires_grad_()
    found = target.log_weight(Batch(x0, FREE))
    torch.testing.assert_close(found, 0.7 * x0.detach()[:, 0] - 0.3, rtol=1e-6, atol=1e-6)
    assert not found.requires_grad
    assert RewardWeighted(reward=reward).needs_samples


def test_scores_beside_weighted_positives_are_refused():
    with pytest.raises(ValueError, match=r"ScoreDifference knows nothing.*RatioGradient"):
        Term(direction=ScoreDifference(), weighting=KL(), target=RewardWeighted(reward=Steps(), log_normalizer=0.0))
