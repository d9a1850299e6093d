"""Gradient checkpointing: what a network keeps for its backward pass, and what it computes a second time there.

Notation: a *block* is a module of a network; a *part* of it is a function of features that is cheap up to its last
operation, a convolution. Autograd keeps every operation's inputs: three maps for norm, SiLU and convolution, of which
the last two follow from the first at a few percent of the time; convolutions and products take nearly all of it.
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
"""(function, *inputs) => function(*inputs), with or without keeping what the backward pass needs."""


def directly(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """The `Part` that keeps everything."""
    return function(*inputs)


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """The `Part` that keeps only ``inputs`` and runs ``function`` a second time in the backward pass.

    The second run stops before the last operation that keeps anything, so a convolution at the end is not done twice.
    Dropout draws the same numbers, autocast chooses the same types, and second derivatives are those of a pass that
    keeps everything. Without gradients, and in compiled code, whose compiler does the same, ``function`` runs directly.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=recomputed_alike)


class Checkpointing:
    """Keeps everything. Subclasses trade time for memory, with the same values and gradients."""

    part: Part = staticmethod(directly)
    """Runs a part."""

    def run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """``block(*inputs)``."""
        return block(*inputs)


class WholeBlocks(Checkpointing):
    """Keeps each block's input and runs the block again (Chen et al. 2016): the least memory, a third more time."""

    part = staticmethod(recomputed)

    def run(self, block, *inputs):
        return recomputed(block, *inputs)


class CheapOperations(Checkpointing):
    """Keeps the results of convolutions and products, and computes normalisation, SiLU, dropout and resampling again.

    A residual block keeps two maps instead of five or more, and no convolution or product is done twice.
    """

    part = staticmethod(recomputed)

    def run(self, block, *inputs):
        return block(*inputs, part=self.part)
