"""Rewards: log R(x0) [B], R > 0, of clean samples x0 [B, ...]; always in log space.

The tilted target is p*(x0) = R(x0) p(x0) / Z with Z = E_p[R].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ratiograph.types import Condition

__all__ = ["ClassReward", "LinearReward", "QuadraticReward", "Reward", "ScaledReward", "SumReward"]


class Reward(nn.Module):
    """Base class. ``log_reward`` must be differentiable with respect to x0."""

    def load(self) -> None:
        """Loads pretrained weights, if the reward has any. Never called in a dry run."""

    def log_reward(self, x0: Tensor, condition: Condition) -> Tensor:
        """log R [B] of ``x0`` [B, ...]."""
        raise NotImplementedError


def _constant(values: Sequence) -> Tensor:
    """float64, and on the CPU even when the graph is built on the meta device: a constant is no weight."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")


class LinearReward(Reward):
    """R(x0) = exp(<slope, x0>), under which a Gaussian mixture stays one: an exact oracle.

    Args:
        slope: one number per dimension of x0.
    """

    def __init__(self, *, slope: Sequence[float]):
        super().__init__()
        self.slope = tuple(slope)
        self.register_buffer("slope_vector", _constant(self.slope), persistent=False)

    def log_reward(self, x0, condition):
        return x0.flatten(1) @ self.slope_vector.to(x0.dtype)


class QuadraticReward(Reward):
    """R(x0) = exp(x0^T A x0 / 2 + <b, x0>), under which a Gaussian mixture stays one: an exact oracle.

    A = -I / tau^2 and b = c / tau^2 is exp(-|x0 - c|^2 / (2 tau^2)) up to a constant factor.

    Args:
        curvature: A, a symmetric D x D matrix as a list of rows, or one number a for a times the identity.
        slope: b, one number per dimension of x0; 0 by default.

    Raises:
        ValueError: for a matrix that is not square and symmetric, or a slope of another length.
    """

    def __init__(self, *, curvature: float | Sequence[Sequence[float]], slope: Sequence[float] | None = None):
        super().__init__()
        self.curvature = curvature if isinstance(curvature, int | float) else tuple(map(tuple, curvature))
        self.slope = None if slope is None else tuple(slope)
        matrix = _constant(self.curvature)
        if matrix.ndim and (matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.equal(matrix.mT)):
            raise ValueError(f"QuadraticReward.curvature must be one number or a symmetric matrix: {self.curvature}")
        if matrix.ndim and slope is not None and len(self.slope) != len(matrix):
            raise ValueError(f"QuadraticReward.slope has {len(slope)} entries for a curvature of {len(matrix)} rows")
        self.register_buffer("curvature_matrix", matrix, persistent=False)
        self.register_buffer("slope_vector", _constant(self.slope or 0.0), persistent=False)

    def log_reward(self, x0, condition):
        x, curvature, slope = x0.flatten(1), self.curvature_matrix.to(x0.dtype), self.slope_vector.to(x0.dtype)
        bent = x @ curvature if curvature.ndim else curvature * x
        return ((bent / 2 + slope) * x).sum(1)


class ClassReward(Reward):
    """R(x0) = sum_y P(y | x0) e^(b_y) for a classifier P: the expected reward of the sample's class.

    p*(y) is then proportional to e^(b_y) p(y) wherever the classifier is certain.

    Args:
        classifier: a module with ``load()`` and logits [B, K] of x0 in [-1, 1].
        log_rewards: b_y for each of the K classes.
    """

    def __init__(self, *, classifier: nn.Module, log_rewards: Sequence[float]):
        super().__init__()
        self.classifier, self.log_rewards = classifier.requires_grad_(False), tuple(log_rewards)
        self.register_buffer("log_reward_vector", _constant(self.log_rewards), persistent=False)

    def load(self) -> None:
        self.classifier.load()
        self.classifier.eval()

    def log_reward(self, x0, condition):
        logits = self.classifier(x0)
        log_probability = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
        return torch.logsumexp(log_probability + self.log_reward_vector.to(log_probability.dtype), 1)


class ScaledReward(Reward):
    """R = R_held^(1/beta), that is exp(reward / beta) of a reward model that is held as its exponential.

    beta is the temperature of RLHF's KL-regularised objective, whose optimum is p* proportional to exp(reward/beta) p.

    Args:
        reward: the reward held.
        beta: temperature > 0; small ones tilt more.
    """

    def __init__(self, *, reward: Reward, beta: float = 1.0):
        super().__init__()
        if beta <= 0:
            raise ValueError(f"ScaledReward.beta={beta} must be positive; to suppress a reward use SumReward.weights")
        self.reward, self.beta = reward, beta

    def load(self) -> None:
        self.reward.load()

    def log_reward(self, x0, condition):
        return self.reward.log_reward(x0, condition) / self.beta


class SumReward(Reward):
    """log R = sum_i w_i log R_i: several rewards at once, R their weighted product.

    Args:
        rewards: the rewards R_i, at least one.
        weights: w_i of any sign, one for each reward; 1 by default.

    Raises:
        ValueError: for no reward, or another number of weights.
    """

    def __init__(self, *, rewards: Sequence[Reward], weights: Sequence[float] | None = None):
        super().__init__()
        self.rewards = nn.ModuleList(rewards)
        self.weights = (1.0,) * len(self.rewards) if weights is None else tuple(weights)
        if not self.rewards or len(self.weights) != len(self.rewards):
            raise ValueError(f"SumReward has {len(self.weights)} weights for {len(self.rewards)} rewards (at least 1)")

    def load(self) -> None:
        for reward in self.rewards:
            reward.load()

    def log_reward(self, x0, condition):
        parts = [w * reward.log_reward(x0, condition) for w, reward in zip(self.weights, self.rewards, strict=True)]
        return torch.stack(parts).sum(0)
