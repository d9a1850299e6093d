"""Tilted targets: the first-order one against finite differences and against the exact one, and the role of Z."""

from __future__ import annotations

import math

import pytest
import torch
from exact import LOCATION, SCALE, TEACHER, evaluate, student_of
from torch import Tensor

from ratiograph.directions import RatioGradient, ScoreDifference
from ratiograph.objective import Objective, Term
from ratiograph.rewards import ClassReward, LinearReward, Reward
from ratiograph.targets import MatchTeacher, RewardTilted, RewardTiltedNoJacobian, Target
from ratiograph.teachers.mixture import ExactTilted, GaussianMixture
from ratiograph.types import Batch, Condition, Evaluation, Nodes, Noisy
from ratiograph.weightings import KL, LR, LS

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
