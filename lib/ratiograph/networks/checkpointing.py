"""What a network keeps for its backward pass, and what it computes a second time there instead.

Notation: a *block* is a module of a network; a *part* of it is a function of features that is cheap up to its last
operation, a convolution. Autograd keeps of every operation its inputs, so of norm, SiLU and convolution three maps,
of which the last two follow from the first at a few percent of the time: what costs is convolutions and products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ratiograph.core.differentiation import recomputed_alike

__all__ = ["CheapOperations", "WholeBlocks"]

Part = Callable[..., Tensor]
"""(function, *inputs) => function(*inputs), however it comes by its gradient."""


def directly(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """The `Part` that keeps everything."""
    return function(*inputs)


def again(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """The `Part` that keeps ``inputs`` alone, and runs ``function`` a second time where the backward pass wants more.

    That second run ends at the last operation that keeps anything, before this is computed: a convolution there is
    not done twice. Dropout draws the same numbers, autocast chooses the same types, and a second derivative is that
    of a pass that keeps everything. Compiled code runs directly: the compiler itself computes again what is cheap.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=recomputed_alike)


class Checkpointing:
    """Keeps everything. Subclasses trade time for memory; values and gradients are the same."""

    part: Part = staticmethod(directly)
    """Runs a part."""

    def run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """``block(*inputs)``."""
        return block(*inputs)


class WholeBlocks(Checkpointing):
    """Keeps each block's input and runs all of it again (Chen et al. 2016): the least memory, a third more time."""

    part = staticmethod(again)

    def run(self, block, *inputs):
        return again(block, *inputs)


class CheapOperations(Checkpointing):
    """Keeps what convolutions and products give, and computes normalisation, SiLU, dropout and resampling again.

    Of a residual block that is two maps instead of five or more, and no convolution or product is done twice.
    """

    part = staticmethod(again)

    def run(self, block, *inputs):
        return block(*inputs, part=self.part)
