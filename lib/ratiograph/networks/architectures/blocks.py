"""Layers and the encoding that several networks share. Shapes: features [B, C, H, W], embedding [B, E]."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ratiograph.core.types import Encoding
from ratiograph.networks.checkpointing import Part, directly


def zero_(module: nn.Module) -> nn.Module:
    """Sets all parameters to zero, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with at most 16 groups of at least four channels."""
    return nn.GroupNorm(math.gcd(16, max(channels // 4, 1)), channels)


@dataclass(frozen=True)
class SkipEncoding(Encoding):
    """``features``: the last map of each level, finest first, then the middle's. ``skips``: what the decoder takes."""

    skips: tuple[Tensor, ...] = ()

    def detach(self) -> SkipEncoding:
        skips = tuple(skip.detach() for skip in self.skips)
        return replace(super().detach(), skips=skips, embedding=self.embedding.detach())


class NoiseEmbedding(nn.Module):
    """c_noise [B] => [B, width]: cosines and sines of log-spaced frequencies, then two layers.

    Args:
        width: size of the embedding.
        frequencies: number of sine and of cosine features.
    """

    def __init__(self, width: int, frequencies: int = 32):
        super().__init__()
        self.frequencies = frequencies
        self.layers = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, c_noise: Tensor) -> Tensor:
        dtype = torch.promote_types(self.layers[0].weight.dtype, torch.float32)
        steps = torch.arange(self.frequencies, device=c_noise.device, dtype=dtype) / self.frequencies
        # c_noise = log(sigma) / 4 spans about [-1.6, 1.1]; frequencies 1 .. 64 resolve it without aliasing.
        angles = c_noise.to(dtype)[:, None] * torch.pow(64.0, steps)
        return self.layers(torch.cat([angles.cos(), angles.sin()], 1))


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, scale-and-shift by the embedding, SiLU, dropout, zero-initialised conv; plus the skip.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        embedding: size E of the embedding, or 0 for a block without one.
        dropout: probability of zeroing an activation before the second convolution.
    """

    compiles = True
    """A block for `compilation.compile_blocks`."""

    def __init__(self, in_channels: int, out_channels: int, embedding: int, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.norm2 = group_norm(in_channels), group_norm(out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = zero_(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.affine = nn.Linear(embedding, 2 * out_channels) if embedding else None
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.dropout = dropout

    def _first(self, x: Tensor) -> Tensor:
        return self.conv1(F.silu(self.norm1(x)))

    def _second(self, h: Tensor, values: Tensor | None) -> Tensor:
        h = self.norm2(h)
        if values is not None:
            scale, shift = values.chunk(2, 1)
            h = torch.addcmul(shift, h, scale + 1)
        return self.conv2(F.dropout(F.silu(h), self.dropout, self.training))

    def forward(self, x: Tensor, embedding: Tensor | None = None, part: Part = directly) -> Tensor:
        values = None if self.affine is None else self.affine(embedding)[:, :, None, None]
        return self.skip(x) + part(self._second, part(self._first, x), values)


class SelfAttention(nn.Module):
    """Residual multi-head attention over the positions of a feature map.

    Args:
        channels: channels of the input and output.
        head_channels: channels of one head; must divide ``channels``.
    """

    compiles = True

    def __init__(self, channels: int, head_channels: int = 64):
        super().__init__()
        self.heads = max(channels // head_channels, 1)
        self.norm = group_norm(channels)
        self.query_key_value = nn.Conv2d(channels, 3 * channels, 1)
        self.project = zero_(nn.Conv2d(channels, channels, 1))

    def _query_key_value(self, x: Tensor) -> Tensor:
        return self.query_key_value(self.norm(x))

    def forward(self, x: Tensor, part: Part = directly) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = part(self._query_key_value, x).reshape(batch, 3, self.heads, channels // self.heads, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # each [B, heads, positions, head channels]
        attended = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(batch, channels, height, width)
        return x + self.project(attended)
