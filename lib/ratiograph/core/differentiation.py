"""Passes whose gradient is differentiated again: R1's penalty and second-order targets.

Notation: a convolution y = W x, its first derivative dx = W^T dy, and the derivative of that, dy' = W dx'. Fused
attention and compiled blocks have no second derivative, so neither runs in such a pass. And torch's convolution takes
the second derivative with respect to W too, frozen or not: in a frozen network half of the work, for nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

__all__ = ["recomputed_alike", "twice_differentiable", "uncompiled"]

_ACTIVE: ContextVar[bool] = ContextVar("twice_differentiable", default=False)


def uncompiled() -> AbstractContextManager:
    """A context in which compiled blocks run as they were written: compiled ones have no second derivative."""
    # Nothing is compiled before torch's compiler is imported, which takes a second or two.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """A context for the forward pass of a network whose gradient is to be differentiated."""
    token = _ACTIVE.set(True)
    try:
        with sdpa_kernel(SDPBackend.MATH), uncompiled(), _FrozenConvolutions():
            yield
    finally:
        _ACTIVE.reset(token)


class _Again(AbstractContextManager):
    """``twice_differentiable`` that can be entered again, as a block is run again by each of two backward passes."""

    def __enter__(self) -> None:
        self.context = twice_differentiable()
        self.context.__enter__()

    def __exit__(self, *error) -> None:
        self.context.__exit__(*error)


def recomputed_alike() -> tuple[AbstractContextManager, AbstractContextManager]:
    """``context_fn`` of ``torch.utils.checkpoint``: contexts of a block's forward pass and of its recomputation.

    The backward pass no longer knows that the forward pass was one to be differentiated twice.
    """
    return nullcontext(), _Again() if _ACTIVE.get() else nullcontext()


class _FrozenConvolution(torch.autograd.Function):
    """W x, where W needs no gradient: the derivative is itself a convolution, whose derivative asks for dy alone."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation, groups):
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        # Not saved for the backward: a checkpointed convolution would run again to give back what is there anyway.
        ctx.weight = weight
        ctx.arguments = stride, padding, dilation, groups
        sizes = zip(x.shape[2:], y.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        # Rows and columns at the end that no output reads where the stride does not divide: their gradient is zero.
        ctx.unread = [n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, k, s, p, d in sizes]
        return y

    @staticmethod
    def backward(ctx, gradient):
        stride, padding, dilation, groups = ctx.arguments
        dx = F.conv_transpose2d(gradient, ctx.weight, None, stride, padding, ctx.unread, groups, dilation)
        return dx, None, None, None, None, None, None


class _FrozenConvolutions(TorchFunctionMode):
    """Runs each convolution with frozen weights as a ``_FrozenConvolution``."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.conv2d and len(args) == 7 and not isinstance(args[4], str) and _frozen(*args[:3]):
            return _FrozenConvolution.apply(*_cast(*args[:3]), *args[3:])
        return function(*args, **(kwargs or {}))


def _frozen(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    return torch.is_grad_enabled() and x.requires_grad and not learns


def _cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor | None]:
    """In the type that autocast would choose for a convolution."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return [x, weight, bias]
    dtype = torch.get_autocast_dtype(kind)
    return [None if each is None else each.to(dtype) for each in (x, weight, bias)]
