"""Random numbers of a run: those of the global batch, however many processes share it.

Notation: ``parts`` processes hold B samples each of a global batch of parts * B; the process of number ``part`` holds
the rows [part B, (part + 1) B). Every process draws for the global batch and keeps its rows, so that a step sees the
same numbers on 1, 2 or 4 processes. Drawing costs nothing beside a network's pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["BatchGenerator", "integers", "normal", "own_rows", "uniform"]


class BatchGenerator(torch.Generator):
    """A generator that knows which rows of the global batch its process holds.

    Args:
        device: as of ``torch.Generator``.
        part: number of this process.
        parts: number of processes.
    """

    def __new__(cls, device: torch.device, part: int = 0, parts: int = 1):
        return super().__new__(cls, device)

    def __init__(self, device: torch.device, part: int = 0, parts: int = 1):
        assert 0 <= part < parts, (part, parts)
        self.part, self.parts = part, parts


def own_rows(draw: Callable[[int], Tensor], samples: int, generator: torch.Generator) -> Tensor:
    """The rows [samples, ...] of this process, of ``draw(n)`` [n, ...], which draws for n samples from ``generator``.

    A plain ``torch.Generator`` draws for these samples alone.
    """
    parts = getattr(generator, "parts", 1)
    if parts == 1:
        return draw(samples)
    first = generator.part * samples
    return draw(parts * samples)[first : first + samples]


def normal(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers of ``shape`` [B, ...] on the generator's device."""
    samples, *rest = shape

    def draw(n: int) -> Tensor:
        return torch.randn((n, *rest), generator=generator, device=generator.device, dtype=dtype)

    return own_rows(draw, samples, generator)


def uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1) of ``shape`` [B, ...], float32 on the generator's device."""
    samples, *rest = shape
    return own_rows(lambda n: torch.rand((n, *rest), generator=generator, device=generator.device), samples, generator)


def integers(low: int, high: int, samples: int, generator: torch.Generator) -> Tensor:
    """Uniform integers ``low`` .. ``high`` - 1, [samples] int64 on the generator's device."""

    def draw(n: int) -> Tensor:
        return torch.randint(low, high, (n,), generator=generator, device=generator.device)

    return own_rows(draw, samples, generator)
