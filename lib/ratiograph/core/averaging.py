"""Averages gradients over the ranks of a run, in buckets and beside other work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ratiograph.core.distributed import is_sharded, ranks

__all__ = ["Averaging", "average_gradients"]

BUCKET = 32 * 2**20
"""Elements of a bucket of gradients: the latency of an exchange does not show, and the copy is small."""


class Averaging:
    """Averages gradients over the ranks in the background, all buckets at once, from construction to ``finish``.

    In between a gradient is a part of its bucket and holds a partial sum: nothing may read or add to ``p.grad``. Which
    parameters have a gradient must be the same on every rank, as it is for one graph. Gradients of sharded weights
    (`parallel.Sharded`) are means already.

    Args:
        parameters: whose gradients are averaged.
    """

    @torch.no_grad()
    def __init__(self, parameters: Iterable[nn.Parameter]):
        self._work = []
        if ranks() == 1:
            return
        for bucket in _buckets([p for p in parameters if p.grad is not None and not is_sharded(p.grad)]):
            total = _joined(bucket).div_(ranks())
            self._work.append(dist.all_reduce(total, async_op=True))

    def __bool__(self) -> bool:
        """Whether there is anything to wait for."""
        return bool(self._work)

    def finish(self) -> None:
        """Waits until the gradients are means; on a GPU, later work on the same stream waits for them instead."""
        for work in self._work:
            work.wait()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces each gradient by its mean over the ranks, see `Averaging`."""
    Averaging(parameters).finish()


def _joined(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The gradients one after another [n]; afterwards they are views of it, strides and all: no copy back is due."""
    gradients = [parameter.grad for parameter in parameters]
    total = gradients[0].new_empty(sum(gradient.numel() for gradient in gradients))
    parts = total.split([gradient.numel() for gradient in gradients])
    # As empty_like, which keeps the strides of a gradient without holes, and makes those of any other contiguous.
    strides = [torch.empty_like(gradient, device="meta").stride() for gradient in gradients]
    views = [part.as_strided(g.shape, stride) for part, g, stride in zip(parts, gradients, strides, strict=True)]
    torch._foreach_copy_(views, gradients)
    for parameter, view in zip(parameters, views, strict=True):
        parameter.grad = view
    return total


def _buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Neighbours with gradients of one type together, up to ``BUCKET`` elements."""
    buckets: list[list[nn.Parameter]] = []
    held = 0
    for parameter in parameters:
        if not buckets or held + parameter.numel() > BUCKET or buckets[-1][0].grad.dtype != parameter.grad.dtype:
            buckets.append([])
            held = 0
        buckets[-1].append(parameter)
        held += parameter.numel()
    return buckets
