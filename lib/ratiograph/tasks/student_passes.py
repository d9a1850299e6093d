"""The student's pass of a step: its samples first, the gradient at them once the field is known.

Notation: z [B, ...] noise, x0 = G(z) the samples; ``backward(field)`` adds (dx0/dtheta)^T field to the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ratiograph.core.types import Condition
from ratiograph.networks.students import OneStep

__all__ = ["Kept", "Replayed"]


class Kept:
    """One pass, whose activations wait for the field.

    Args:
        student: G.
        z: noise [B, ...].
        condition: what the student is told.
    """

    def __init__(self, student: OneStep, z: Tensor, condition: Condition):
        self._output = student(z, condition)
        self.x0 = self._output.detach()

    def backward(self, field: Tensor) -> None:
        """Adds the gradient at ``field`` [B, ...]."""
        _backward(self._output, field)


class Replayed:
    """Passes without a graph, and once more with one when the field is known: the gradient costs a pass forward more.

    No activations wait while other networks run, and in the end those of one micro-batch exist at a time. Dropout drops
    the same values in both passes.

    Args:
        student: G.
        z: noise [B, ...].
        condition: what the student is told.
        pieces: micro-batches; B is a multiple of it.
    """

    def __init__(self, student: OneStep, z: Tensor, condition: Condition, pieces: int):
        self._student = student
        self._told = list(zip(z.split(len(z) // pieces), condition.split(pieces), strict=True))
        self._dice: list[tuple[Tensor, Tensor | None]] = []
        samples = []
        with torch.no_grad():
            for told in self._told:
                self._dice.append(_dice(z.device))
                samples.append(student(*told))
        self.x0 = torch.cat(samples)

    def backward(self, field: Tensor) -> None:
        """Adds the gradient at ``field`` [B, ...]."""
        device = field.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for told, dice, part in zip(self._told, self._dice, field.split(len(self._told[0][0])), strict=True):
                _throw(dice, device)
                _backward(self._student(*told), part)


def _backward(x0: Tensor, field: Tensor) -> None:
    """``x0.backward(field)``, which would import sympy: the gradient of the inner product at x0 is field."""
    (x0 * field).sum().backward()


def _dice(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """State of the generators that dropout draws from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _throw(dice: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(dice[0])
    if dice[1] is not None:
        torch.cuda.set_rng_state(dice[1], device)
