"""Values that travel between components.

Notation (the same in every module): ``x0`` a clean sample [B, ...], ``x_t = alpha x0 + sigma noise`` its noisy
version, ``t`` [B] the process's own time, ``alpha`` and ``sigma`` [B] the signal and noise scales at ``t``.
p is the teacher (or the data), q the student; ``log_ratio`` l = log p_t(x_t) / q_t(x_t) [B].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Batch", "Condition", "Noisy", "expand"]


def expand(scale: Tensor, like: Tensor) -> Tensor:
    """Views a per-sample value [B] as [B, 1, ...] so that it broadcasts over ``like`` [B, ...]."""
    return scale.reshape(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Condition:
    """What a conditional network is told. ``labels`` [B] int64 class indices, or None when unconditional."""

    labels: Tensor | None = None

    def to(self, device: torch.device) -> Condition:
        return Condition(None if self.labels is None else self.labels.to(device, non_blocking=True))

    def repeat(self, times: int) -> Condition:
        """The condition of a batch that holds this one's samples ``times`` over, one whole copy after another."""
        return Condition(None if self.labels is None else self.labels.repeat(times))


@dataclass(frozen=True)
class Batch:
    """Real samples. ``images`` [B, C, H, W] in [-1, 1]; ``condition`` holds their labels where the data has any."""

    images: Tensor
    condition: Condition

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device) -> Batch:
        return Batch(self.images.to(device, non_blocking=True), self.condition.to(device))


@dataclass(frozen=True)
class Noisy:
    """A sample of the forward process: ``x_t`` [B, ...] with its ``t``, ``alpha`` and ``sigma`` [B]."""

    x_t: Tensor
    t: Tensor
    alpha: Tensor
    sigma: Tensor

    def rescaled(self) -> tuple[Tensor, Tensor]:
        """``(x_t / alpha, sigma / alpha)``: the variance-exploding view in which EDM networks are native."""
        return self.x_t / expand(self.alpha, self.x_t), self.sigma / self.alpha
