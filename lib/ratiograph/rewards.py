"""Rewards: log R(x0) [B], R > 0, of clean samples x0 [B, ...]; always in log space.

The tilted target is p*(x0) = R(x0) p(x0) / Z with Z = E_p[R].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ratiograph.types import Condition

__all__ = ["ClassReward", "LinearReward", "Reward"]


class Reward(nn.Module):
    """Base class. ``log_reward`` must be differentiable with respect to x0."""

    def load(self) -> None:
        """Loads pretrained weights, if the reward has any. Never called in a dry run."""

    def log_reward(self, x0: Tensor, condition: Condition) -> Tensor:
        """log R [B] of ``x0`` [B, ...]."""
        raise NotImplementedError


class LinearReward(Reward):
    """R(x0) = exp(<slope, x0>), under which a Gaussian mixture stays one: an exact oracle.

    Args:
        slope: one number per dimension of x0.
    """

    def __init__(self, *, slope: Sequence[float]):
        super().__init__()
        self.slope = tuple(slope)

    def log_reward(self, x0, condition):
        return x0.flatten(1) @ x0.new_tensor(self.slope)


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

    def load(self) -> None:
        self.classifier.load()
        self.classifier.eval()

    def log_reward(self, x0, condition):
        log_probability = self.classifier(x0).float().log_softmax(1)
        return torch.logsumexp(log_probability + log_probability.new_tensor(self.log_rewards), 1)
