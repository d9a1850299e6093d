"""Second derivatives of frozen convolutions: the same values, and none of the work for their weights."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ratiograph.core.differentiation import recomputed_alike, twice_differentiable

# (channels in, out, kernel, stride, padding, dilation, groups, height, width)
SHAPES = [
    (3, 4, 3, 1, 1, 1, 1, 5, 6),
    (4, 6, 3, 2, 1, 1, 2, 6, 7),
    (2, 2, 1, 1, 0, 1, 1, 4, 4),
    (2, 3, 2, 3, 0, 1, 1, 7, 6),
    (2, 3, 3, 1, 2, 2, 1, 6, 6),
]


def layer_of(shape, learns=False):
    inputs, outputs, kernel, stride, padding, dilation, groups, *size = shape
    torch.manual_seed(0)
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, dtype=torch.float64)
    x = torch.randn(2, inputs, *size, dtype=torch.float64, requires_grad=True)
    return layer.requires_grad_(learns), x


def penalty(layer, x, context):
    """|grad_x sum tanh(W x)|^2 and its gradient, by torch or in the context."""
    with context:
        y = layer(x)
    (slope,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
    value = slope.square().sum()
    return value.detach(), *torch.autograd.grad(value, [x, *(p for p in layer.parameters() if p.requires_grad)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_second_derivative_is_that_of_torch(shape):
    layer, x = layer_of(shape)
    for plain, frozen in zip(
        penalty(layer, x, torch.enable_grad()), penalty(layer, x, twice_differentiable()), strict=True
    ):
        torch.testing.assert_close(frozen, plain, rtol=1e-12, atol=1e-12)

    def frozen_layer(x):
        with twice_differentiable():
            return layer(x).tanh()

    assert gradgradcheck(frozen_layer, (x,))


class Convolutions(TorchDispatchMode):
    """Counts convolutions by the number of their outputs' values that are asked for."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name == "convolution_backward":
            self.counts["backward"] += sum(args[-1][:2])
        self.counts["forward"] += name == "convolution"
        return function(*args, **(kwargs or {}))


def test_no_derivative_with_respect_to_frozen_weights_is_taken():
    """Forward, to x, to dy, and to x once more: four convolutions, where torch takes a fifth, to W."""
    layer, x = layer_of(SHAPES[0])
    for context, most in ((twice_differentiable(), 4), (torch.enable_grad(), 5)):
        with Convolutions() as convolutions:
            penalty(layer, x, context)
        assert sum(convolutions.counts.values()) == most, convolutions.counts


def test_weights_that_learn_keep_their_derivative():
    layer, x = layer_of(SHAPES[0], learns=True)
    plain, again = penalty(layer, x, torch.enable_grad()), penalty(layer, x, twice_differentiable())
    assert len(again) == 4
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


def test_autocast_chooses_the_type():
    layer, x = layer_of(SHAPES[0])
    layer, x = layer.float(), x.detach().float().requires_grad_()
    results = []
    for context in (twice_differentiable(), torch.enable_grad()):
        with torch.autocast("cpu", dtype=torch.bfloat16), context:
            y = layer(x)
        assert y.dtype == torch.bfloat16
        (slope,) = torch.autograd.grad(y.float().tanh().sum(), x, create_graph=True)
        assert slope.dtype == torch.float32
        results.append((slope.detach(), *torch.autograd.grad(slope.square().sum(), x)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_a_recomputed_block_is_the_same_kind_of_pass():
    """Checkpointing compares what both passes save, and refuses another number of tensors."""
    layer, x = layer_of(SHAPES[0])
    found = []

    def block(x):
        return layer(x.tanh()).tanh()

    for again in (True, False):
        with twice_differentiable():
            y = checkpoint(block, x, use_reentrant=False, context_fn=recomputed_alike) if again else block(x)
        (slope,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), x)[0])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_attention_has_a_second_derivative():
    q = torch.randn(1, 1, 4, 8, dtype=torch.float64, requires_grad=True)

    def attend(q):
        with twice_differentiable():
            return F.scaled_dot_product_attention(q, 2 * q, q.tanh())

    assert gradgradcheck(attend, (q,))
