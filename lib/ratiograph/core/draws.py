"""Random numbers that belong to a sample and not to the batch it is made in.

Notation: sample i of a seed has random streams of its own, Philox with the key (seed, i): one of normal numbers, and
one of integers, so that its noise does not depend on whether a label was drawn. Whatever is drawn for it is the same in
any batch, on any rank and for any device, so that 50,000 samples are one set however they are made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ratiograph.core import randomness

__all__ = ["GeneratorDraws", "SampleDraws"]


class SampleDraws:
    """Draws for the samples ``indices`` of ``seed``: row k of a result comes from the stream of sample indices[k].

    The streams advance from draw to draw; two objects with the same arguments give the same numbers for the same calls.
    They are drawn on the CPU and moved.

    Args:
        seed: of the whole set of samples, 0 to 2^64 - 1.
        indices: which samples, each 0 to 2^64 - 1, in any order.
        device: where the draws go.

    Raises:
        ValueError: the seed or an index is out of range.
    """

    def __init__(self, seed: int, indices: Sequence[int], device: torch.device | str = "cpu"):
        self.seed, self.indices, self.device = seed, tuple(int(i) for i in indices), torch.device(device)
        for name, value in [("seed", seed), *(("index", i) for i in self.indices)]:
            if not 0 <= value < 2**64:
                raise ValueError(f"SampleDraws: {name} {value} must be 0 to 2^64 - 1")

    def _streams(self, lane: int) -> list[np.random.Generator]:
        """Each sample's stream number ``lane``, 2^192 draws away from the others."""
        keys = (np.array([self.seed, index], np.uint64) for index in self.indices)
        counter = np.array([0, 0, 0, lane], np.uint64)
        return [np.random.Generator(np.random.Philox(key=key, counter=counter)) for key in keys]

    @cached_property
    def _normals(self) -> list[np.random.Generator]:
        return self._streams(0)

    @cached_property
    def _integers(self) -> list[np.random.Generator]:
        return self._streams(1)

    def __len__(self) -> int:
        return len(self.indices)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """The next standard normal numbers of each sample, [n, *shape] float32."""
        rows = np.empty((len(self), math.prod(shape)), np.float32)
        for stream, row in zip(self._normals, rows, strict=True):
            stream.standard_normal(out=row, dtype=np.float32)
        return torch.from_numpy(rows).reshape(len(self), *shape).to(self.device)

    def integers(self, high: int) -> Tensor:
        """The next uniform integer of each sample, 0 to ``high`` - 1, [n] int64."""
        drawn = [int(stream.integers(high)) for stream in self._integers]
        return torch.tensor(drawn, dtype=torch.int64, device=self.device)


class GeneratorDraws:
    """Draws of one generator for a batch as a whole: in training, where a sample has a place in a step and no index.

    Args:
        samples: n.
        generator: gives the numbers, on its own device.
    """

    def __init__(self, samples: int, generator: torch.Generator):
        self.samples, self.generator = samples, generator

    def __len__(self) -> int:
        return self.samples

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers [n, *shape] float32."""
        return randomness.normal((self.samples, *shape), self.generator)

    def integers(self, high: int) -> Tensor:
        """Uniform integers, 0 to ``high`` - 1, [n] int64."""
        return randomness.integers(0, high, self.samples, self.generator)
