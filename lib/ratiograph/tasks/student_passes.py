"""The student's pass of a step: its samples first, their gradient once the field is known.

Notation: z [B, ...] noise, x0 = G(z) the samples; ``backward(field)`` adds (dx0/dtheta)^T field to the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ratiograph.core.types import Condition
from ratiograph.networks.students import OneStep

__all__ = ["KeptPass", "ReplayedPass"]


class KeptPass:
    """One pass, whose activations are kept until the field is known.

    Args:
        student: G.
        z: noise [B, ...].
        condition: of the B samples.
    """

    def __init__(self, student: OneStep, z: Tensor, condition: Condition):
        self._output = student(z, condition)
        self.x0 = self._output.detach()

    def backward(self, field: Tensor) -> None:
        """Adds the gradient at ``field`` [B, ...]."""
        _backward(self._output, field)


class ReplayedPass:
    """Passes without a graph, repeated with one when the field is known: the gradient costs one more forward pass.

    No activations are held while other networks run, and the backward holds those of one micro-batch at a time. Dropout
    drops the same values in both passes.

    Args:
        student: G.
        z: noise [B, ...].
        condition: of the B samples.
        pieces: micro-batches; B is a multiple of it.
    """

    def __init__(self, student: OneStep, z: Tensor, condition: Condition, pieces: int):
        self._student = student
        self._inputs = list(zip(z.split(len(z) // pieces), condition.split(pieces), strict=True))
        self._rng_states, samples = [], []
        with torch.no_grad():
            for inputs in self._inputs:
                self._rng_states.append(_rng_state(z.device))
                samples.append(student(*inputs))
        self.x0 = torch.cat(samples)

    def backward(self, field: Tensor) -> None:
        """Adds the gradient at ``field`` [B, ...]."""
        device, fields = field.device, field.split(len(self._inputs[0][0]))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for inputs, rng_state, part in zip(self._inputs, self._rng_states, fields, strict=True):
                _set_rng_state(rng_state, device)
                _backward(self._student(*inputs), part)


def _backward(x0: Tensor, field: Tensor) -> None:
    """``x0.backward(field)``, which would import sympy: the gradient of the inner product at x0 is field."""
    (x0 * field).sum().backward()


def _rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """State of the generators that dropout draws from, on the CPU and on ``device`` if that is a GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_rng_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
