"""Rewards against their formulas, written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ratiograph.algebra.rewards import (
    BlackBoxReward,
    ClassReward,
    LinearReward,
    QuadraticReward,
    Reward,
    ScaledReward,
    SumReward,
    check_means,
    take_means,
)
from ratiograph.core.types import Condition

FREE = Condition()
CURVATURE = [[-1.0, 0.4], [0.4, 0.3]]
SLOPE = [0.7, -0.2]


def points(*shape: int) -> Tensor:
    return torch.randn(50, *(shape or (2,)), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Logits(nn.Module):
    """Linear logits [B, 3] of x0 [B, 2], counting loads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.loads = nn.Linear(2, 3), 0

    def load(self) -> None:
        self.loads += 1

    def forward(self, x0: Tensor) -> Tensor:
        return self.linear(x0)


def test_quadratic_reward_is_its_formula():
    x, matrix, slope = points(), torch.tensor(CURVATURE).double(), torch.tensor(SLOPE).double()
    found = QuadraticReward(curvature=torch.tensor(CURVATURE).tolist(), slope=SLOPE).log_reward(x, FREE)
    expected = [float(v @ matrix @ v / 2 + slope @ v) for v in x]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_quadratic_reward_pulls_towards_a_point():
    """-|x - c|^2 / (2 tau^2) up to a constant, its gradient (c - x) / tau^2."""
    x, centre, tau = points().requires_grad_(), torch.tensor([0.8, 0.4], dtype=torch.float64), 0.5
    log_reward = QuadraticReward(curvature=-4, slope=[3.2, 1.6]).log_reward(x, FREE)
    distance = -(x - centre).square().sum(1) / (2 * tau**2)
    torch.testing.assert_close(log_reward - distance, torch.full((50,), float(centre @ centre) * 2).double())
    torch.testing.assert_close(torch.autograd.grad(log_reward.sum(), x)[0], (centre - x) * 4)


def test_a_number_is_that_multiple_of_the_identity_for_any_shape():
    x, matrix = points(1, 2, 2), (0.3 * torch.eye(4)).tolist()
    number = QuadraticReward(curvature=0.3).log_reward(x, FREE)
    torch.testing.assert_close(number, QuadraticReward(curvature=matrix).log_reward(x, FREE), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(number, 0.15 * x.flatten(1).square().sum(1))


def test_class_reward_keeps_the_precision_of_its_input():
    logits = Logits().double()
    reward, x0 = ClassReward(classifier=logits, log_rewards=[0.0, 1.0, -1.0]), points()
    expected = (logits(x0).softmax(1) @ torch.tensor([1.0, math.e, 1 / math.e], dtype=torch.float64)).log()
    torch.testing.assert_close(reward.log_reward(x0, FREE), expected, rtol=1e-12, atol=1e-12)
    half = reward.bfloat16().log_reward(x0.bfloat16(), FREE)
    assert half.dtype == torch.float32


def test_scaled_reward_is_the_exponential_of_the_reward_over_beta():
    reward, x0 = LinearReward(slope=SLOPE), points()
    for beta in (0.5, 1.0, 4.0):
        found = ScaledReward(reward=reward, beta=beta).log_reward(x0, FREE).exp()
        torch.testing.assert_close(found, (x0 @ torch.tensor(SLOPE).double() / beta).exp(), rtol=1e-6, atol=1e-6)


def test_sum_reward_is_the_weighted_product():
    x0, classifier = points(), Logits().double()
    parts = [
        LinearReward(slope=SLOPE),
        QuadraticReward(curvature=-0.3),
        ClassReward(classifier=classifier, log_rewards=[0.0, 1.0, -1.0]),
    ]
    rewards = [part.log_reward(x0, FREE).exp() for part in parts]
    plain = SumReward(rewards=parts).log_reward(x0, FREE).exp()
    torch.testing.assert_close(plain, rewards[0] * rewards[1] * rewards[2])
    weighted = SumReward(rewards=parts, weights=[2.0, -1.0, 0.5]).log_reward(x0, FREE).exp()
    torch.testing.assert_close(weighted, rewards[0] ** 2 / rewards[1] * rewards[2] ** 0.5)


def test_wrappers_load_what_they_hold():
    classifier = Logits()
    inner = ScaledReward(reward=ClassReward(classifier=classifier, log_rewards=[0.0] * 3))
    SumReward(rewards=[inner, LinearReward(slope=SLOPE)]).load()
    assert classifier.loads == 1
    assert not classifier.training


def every_reward() -> list[Reward]:
    linear, quadratic = LinearReward(slope=SLOPE), QuadraticReward(curvature=CURVATURE, slope=SLOPE)
    return [linear, quadratic, ScaledReward(reward=quadratic, beta=2.0), SumReward(rewards=[linear, quadratic])]


def test_constants_survive_a_meta_build_and_stay_out_of_checkpoints():
    with torch.device("meta"):
        built = every_reward()
    for found, expected in zip(built, every_reward(), strict=True):
        torch.testing.assert_close(found.log_reward(points(), FREE), expected.log_reward(points(), FREE))
        assert not found.state_dict()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuadraticReward(curvature=[[1.0, 0.5], [0.4, 1.0]]), "symmetric"),
        (lambda: QuadraticReward(curvature=[[1.0, 0.5]]), "symmetric"),
        (lambda: QuadraticReward(curvature=CURVATURE, slope=[1.0]), "1 entries for a curvature of 2"),
        (lambda: LinearReward(slope=SLOPE)(torch.zeros(2, 3), FREE), "for samples of 2 numbers, and these have 3"),
        (
            lambda: QuadraticReward(curvature=1.0, slope=SLOPE)(torch.zeros(2, 3), FREE),
            "for samples of 2",
        ),
        (
            lambda: ClassReward(classifier=Logits(), log_rewards=[0.0])(points().float(), FREE),
            "entries for 3",
        ),
        (lambda: SumReward(rewards=[]), "at least 1"),
        (lambda: SumReward(rewards=[LinearReward(slope=SLOPE)], weights=[1.0, 2.0]), "2 weights for 1 rewards"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- black boxes ----------------------------------------------------------------------------------------------------


def test_a_black_box_gives_the_same_numbers_and_no_graph():
    classifier = Logits().double()
    held = ClassReward(classifier=classifier, log_rewards=[0.0, 1.0, -1.0])
    x0, box = points().requires_grad_(), BlackBoxReward(reward=held)
    torch.testing.assert_close(box(x0, FREE), held(x0, FREE).detach(), rtol=0, atol=0)
    assert held(x0, FREE).requires_grad
    assert not box(x0, FREE).requires_grad
    box.load()
    assert classifier.loads == 1


def test_one_black_box_makes_the_whole_one():
    linear, box = LinearReward(slope=SLOPE), BlackBoxReward(reward=LinearReward(slope=SLOPE))
    assert linear.differentiable
    assert ScaledReward(reward=SumReward(rewards=[linear, linear])).differentiable
    assert not ScaledReward(reward=SumReward(rewards=[linear, box])).differentiable


# --- what is not finite ---------------------------------------------------------------------------------------------


class Rooted(Reward):
    """log R = sqrt(x): NaN left of 0."""

    def log_reward(self, x0: Tensor, condition: Condition) -> Tensor:
        return x0[:, 0].sqrt()


def test_means_are_of_the_leaves_and_since_the_last_time():
    held = SumReward(rewards=[LinearReward(slope=[1.0, 0.0]), ScaledReward(reward=Rooted(), beta=5.0)], weights=[2, 3])
    module, x0 = nn.ModuleList([held, LinearReward(slope=[0.0, 1.0])]), points().abs()
    assert not take_means(module)
    held(x0[:20], FREE)
    held(x0[20:], FREE)
    module[1](x0, FREE)
    means = take_means(module)
    assert list(means) == ["LinearReward", "Rooted", "LinearReward 2"]
    expected = [x0[:, 0].mean(), x0[:, 0].sqrt().mean(), x0[:, 1].mean()]
    torch.testing.assert_close(torch.stack(list(means.values())), torch.stack(expected).float())
    assert not take_means(module)


def test_the_reward_at_fault_is_named_and_no_other():
    held = SumReward(rewards=[LinearReward(slope=SLOPE), Rooted()])
    held(points(), FREE)
    with pytest.raises(ValueError, match=r"^Rooted gave NaN or infinity as log R of these points"):
        check_means(take_means(held), "these points")
    held(points().abs(), FREE)
    check_means(take_means(held), "these points")


def test_a_reward_is_not_at_fault_for_samples_that_are_not_finite():
    x0 = points().abs()
    x0[3, 1], x0[5, 0] = torch.nan, torch.inf
    reward = Rooted()
    reward(x0, FREE)
    whole = x0[x0.isfinite().all(1)]
    torch.testing.assert_close(take_means(reward)["Rooted"], whole[:, 0].sqrt().mean().float())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda x0: x0, r"gave float32 \[5, 2\] for x0 \[5, 2\]"),
        (lambda x0: x0.sum(), r"gave float32 \[\]"),
        (lambda x0: torch.ones(5, dtype=torch.long), r"gave int64 \[5\]"),
        (lambda x0: 1.0, "gave float for"),
    ],
)
def test_a_reward_of_another_shape_is_named_in_one_line(value, message):
    class Own(Reward):
        def log_reward(self, x0, condition):
            return value(x0)

    with pytest.raises(ValueError, match=f"the reward Own {message}") as error:
        Own()(torch.zeros(5, 2), Condition())
    assert "\n" not in str(error.value)
