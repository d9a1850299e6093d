"""Rewards: log R(x0) [B], R > 0, of clean samples x0 [B, ...]; always in log space.

The tilted target is p*(x0) = R(x0) p(x0) / Z with Z = E_p[R]. A *leaf* is a reward that holds no other reward.

A log R that is NaN or infinite is a mistake of the reward. Calling a reward notes the mean of log R over samples that
are themselves finite, on the device and without waiting for it; ``take_means`` hands the means of all leaves out, by
name. They are logged with a run's other metrics, whose check for finite values therefore ends the run with the name of
the reward; where waiting costs nothing, ``check_means`` raises at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ratiograph.core.domains import Positive
from ratiograph.core.types import Condition

__all__ = [
    "BlackBoxReward",
    "ClassReward",
    "LinearReward",
    "QuadraticReward",
    "Reward",
    "ScaledReward",
    "SumReward",
]


class Reward(nn.Module):
    """Base class: subclasses define ``log_reward``. Calling the reward also records the mean of log R for the log."""

    differentiable = True
    """Whether autograd gives grad log R with respect to x0; False for a black box."""
    _sums: Tensor | None = None

    def load(self) -> None:
        """Loads pretrained weights, if the reward has any. Never called in a dry run."""

    def log_reward(self, x0: Tensor, condition: Condition) -> Tensor:
        """log R [B] of ``x0`` [B, ...]."""
        raise NotImplementedError

    def forward(self, x0: Tensor, condition: Condition) -> Tensor:
        """``log_reward``; its mean over the samples whose x0 is finite is recorded for ``take_means``.

        Raises:
            ValueError: it raised an error, or returned something else than a number [B] for each sample.
        """
        log_reward = self._checked(x0, condition)
        finite = x0.detach().flatten(1).isfinite().all(1)
        values = torch.where(finite, log_reward.detach().float(), 0.0)
        sums = torch.stack([values.sum(), finite.sum()])
        self._sums = sums if self._sums is None else self._sums + sums
        return log_reward

    def _checked(self, x0: Tensor, condition: Condition) -> Tensor:
        name = type(self).__name__
        log_reward = self.log_reward(x0, condition)
        numbers = isinstance(log_reward, Tensor) and log_reward.is_floating_point()
        if not numbers or log_reward.shape != x0.shape[:1]:
            found = type(log_reward).__name__
            if isinstance(log_reward, Tensor):
                found = f"{str(log_reward.dtype).removeprefix('torch.')} {list(log_reward.shape)}"
            raise ValueError(
                f"the reward {name} gave {found} for x0 {list(x0.shape)}: its log_reward must return floating-point "
                f"numbers [B], here [{len(x0)}]"
            )
        return log_reward

    def take_mean(self) -> Tensor | None:
        """Mean log R [] of the calls since the last time, on the device; None if there were none."""
        sums, self._sums = self._sums, None
        return None if sums is None else sums[0] / sums[1].clamp_min(1)


def take_means(module: nn.Module) -> dict[str, Tensor]:
    """Mean log R [] by class name of each reward in ``module`` that was called since the last time.

    Rewards that hold other rewards are left out, and several of one class are numbered. A mean is NaN or infinite only
    if that reward was so for a finite sample.
    """
    means: dict[str, Tensor] = {}
    for reward in module.modules():
        if not isinstance(reward, Reward):
            continue
        mean = reward.take_mean()
        if mean is not None and not any(isinstance(part, Reward) for part in list(reward.modules())[1:]):
            kind = type(reward).__name__
            number = sum(name.split(" ")[0] == kind for name in means) + 1
            means[kind if number == 1 else f"{kind} {number}"] = mean
    return means


def check_means(means: Mapping[str, Tensor], samples: str) -> None:
    """Raises a ValueError that names the rewards whose mean is NaN or infinite; synchronises the device.

    Args:
        means: of `take_means`.
        samples: what the rewards were called on, for the message.
    """
    bad = [name for name, mean in means.items() if not bool(mean.isfinite())]
    if bad:
        raise ValueError(
            f"{', '.join(bad)} gave NaN or infinity as log R of {samples}: R must be positive and finite. Look at "
            "those samples (images in [-1, 1]? latents without a DecodedReward?) and at the reward's weights"
        )


def _constant(values: Sequence) -> Tensor:
    """float64, and on the CPU even when the graph is built on the meta device: a constant is no weight."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _vectors(x0: Tensor, reward: Reward, dimension: int | None) -> Tensor:
    """``x0`` [B, ...] as [B, D]; a ValueError unless D is ``dimension`` (None: any)."""
    x = x0.flatten(1)
    if dimension not in (None, x.shape[1]):
        raise ValueError(f"{type(reward).__name__} is for samples of {dimension} numbers, and these have {x.shape[1]}")
    return x


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
        return _vectors(x0, self, len(self.slope)) @ self.slope_vector.to(x0.dtype)


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
        self.dimension = len(self.slope or ()) or (len(matrix) if matrix.ndim else None)
        self.register_buffer("curvature_matrix", matrix, persistent=False)
        self.register_buffer("slope_vector", _constant(self.slope or 0.0), persistent=False)

    def log_reward(self, x0, condition):
        x = _vectors(x0, self, self.dimension)
        curvature, slope = self.curvature_matrix.to(x0.dtype), self.slope_vector.to(x0.dtype)
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
        if logits.shape[1] != len(self.log_rewards):
            count = len(self.log_rewards)
            raise ValueError(f"ClassReward.log_rewards has {count} entries for {logits.shape[1]} classes: give as many")
        log_probability = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
        return torch.logsumexp(log_probability + self.log_reward_vector.to(log_probability.dtype), 1)


class ScaledReward(Reward):
    """R = R_held^(1/beta), that is exp(reward / beta) of a reward model that is held as its exponential.

    beta is the temperature of RLHF's KL-regularised objective, whose optimum is p* proportional to exp(reward/beta) p.

    Args:
        reward: the reward held.
        beta: temperature > 0; small ones tilt more.
    """

    def __init__(self, *, reward: Reward, beta: Positive = 1.0):
        super().__init__()
        self.reward, self.beta = reward, beta

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    def load(self) -> None:
        self.reward.load()

    def log_reward(self, x0, condition):
        return self.reward(x0, condition) / self.beta


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

    @property
    def differentiable(self) -> bool:
        return all(reward.differentiable for reward in self.rewards)

    def load(self) -> None:
        for reward in self.rewards:
            reward.load()

    def log_reward(self, x0, condition):
        parts = [w * reward(x0, condition) for w, reward in zip(self.weights, self.rewards, strict=True)]
        return torch.stack(parts).sum(0)


class BlackBoxReward(Reward):
    """The reward held as numbers alone: no graph is kept, and who asks for its gradient is refused.

    For rewards that have no gradient (a count, a rule, a judge behind a program), or one that is not to be climbed.

    Args:
        reward: the reward held.
    """

    differentiable = False

    def __init__(self, *, reward: Reward):
        super().__init__()
        self.reward = reward

    def load(self) -> None:
        self.reward.load()

    @torch.no_grad()
    def log_reward(self, x0, condition):
        return self.reward(x0, condition)
