"""Layers of the EDM networks (Karras et al. 2022, Appendix F): resampling, embeddings, attention, residual blocks.

Shapes: features [B, C, H, W], embedding [B, E], c_noise [B], class labels [B], augmentation labels [B, A].
Angles of the noise embedding are float32 whatever the autocast type. No layer depends on the memory format, so
channels-last features stay channels-last.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ratiograph.core.types import Condition
from ratiograph.networks.architectures.blocks import zero_
from ratiograph.networks.checkpointing import Part, directly

Resample = Callable[[Tensor], Tensor]
"""[B, C, H, W] -> the same at half or at twice the resolution."""

# --- resampling ---------------------------------------------------------------------------------------------


def box_down(x: Tensor) -> Tensor:
    """Means of 2 x 2 positions: the filter (1, 1)/2 in each direction, every second position."""
    return F.avg_pool2d(x, 2)


def box_up(x: Tensor) -> Tensor:
    """Every position four times: zeros stuffed in between, then the filter (1, 1) in each direction."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def binomial_down(x: Tensor, padding: int = 1) -> Tensor:
    """The filter (1, 3, 3, 1)/8 in each direction on ``x`` with ``padding`` zeros around, every second position."""
    # (1, 3, 3, 1)/8 is the threefold convolution of (1, 1)/2 with itself.
    x = F.avg_pool2d(F.pad(x, 4 * [padding]), 2, stride=1)
    return F.avg_pool2d(F.avg_pool2d(x, 2, stride=1), 2)


def binomial_up(x: Tensor) -> Tensor:
    """Zeros stuffed in between, then the filter (1, 3, 3, 1)/4 in each direction."""
    x = F.pad(box_up(x), 4 * [1])
    return F.avg_pool2d(F.avg_pool2d(x, 2, stride=1), 2, stride=1)


# --- embeddings ---------------------------------------------------------------------------------------------


class SineCosine(nn.Module):
    """c_noise => sin and cos of c_noise 10000^(-k / (n - 1)), k = 0 .. n - 1, in this order (DDPM++).

    Args:
        width: 2 n, even and at least 4.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def angles(self, c_noise: Tensor, last: int) -> Tensor:
        """[B, width / 2]: the exponents k reach -1 at k = ``last``."""
        steps = torch.arange(self.width // 2, device=c_noise.device, dtype=torch.float32)
        return c_noise.float()[:, None] * (1 / 10000) ** (steps / last)

    def forward(self, c_noise: Tensor) -> Tensor:
        angles = self.angles(c_noise, self.width // 2 - 1)
        return torch.cat([angles.sin(), angles.cos()], 1)


class CosineSine(SineCosine):
    """c_noise => cos and sin of c_noise 10000^(-k / n), k = 0 .. n - 1, in this order (ADM)."""

    def forward(self, c_noise: Tensor) -> Tensor:
        angles = self.angles(c_noise, self.width // 2)
        return torch.cat([angles.cos(), angles.sin()], 1)


class RandomFourier(nn.Module):
    """c_noise => sin and cos of 2 pi c_noise f with fixed random frequencies f ~ N(0, 16^2) (NCSN++).

    The frequencies belong to the weights: the layers after this one fit no others.

    Args:
        width: number of sines and cosines together, even.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.register_buffer("frequencies", 16 * torch.randn(width // 2))

    def forward(self, c_noise: Tensor) -> Tensor:
        angles = c_noise.float()[:, None] * (2 * math.pi * self.frequencies.float())
        return torch.cat([angles.sin(), angles.cos()], 1)


class ClassEmbedding(nn.Module):
    """scale table[label] + bias for each label; a negative label means no class and gives the bias.

    Args:
        classes: number of classes.
        width: size of the embedding.
        scale: constant factor of the table.
        bias: whether there is a bias.
        dropout: probability of training without a class, which guidance needs.
    """

    def __init__(self, classes: int, width: int, *, scale: float, bias: bool, dropout: float):
        super().__init__()
        self.table = nn.Parameter(torch.randn(classes, width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.scale, self.dropout = scale, dropout

    def forward(self, labels: Tensor | None, batch: int) -> Tensor:
        if labels is None and not self.dropout:
            raise ValueError(
                f"a network with classes={len(self.table)} needs labels and the data gave none; labels of -1, or None "
                "for a network with label_dropout, ask for no class"
            )
        if labels is None:
            labels = torch.full((batch,), -1, device=self.table.device)
        known = labels >= 0
        if self.training and self.dropout:
            known = known & (torch.rand(batch, device=labels.device) >= self.dropout)
        embedding = F.embedding(labels.clamp(min=0), self.table) * (self.scale * known[:, None])
        return embedding if self.bias is None else embedding + self.bias


class Embedding(nn.Module):
    """The condition of all blocks [B, E]: noise level, class and augmentation.

    Args:
        noise: c_noise [B] => [B, W], with an attribute ``width`` = W.
        width: E.
        classes: embedding of the class labels, None for an unconditional network.
        augment_labels: number A of augmentation labels, 0 for none.
    """

    def __init__(self, noise: nn.Module, width: int, classes: ClassEmbedding | None, augment_labels: int):
        super().__init__()
        self.noise, self.classes = noise, classes
        self.augment = nn.Linear(augment_labels, noise.width, bias=False) if augment_labels else None
        self.layer1, self.layer2 = nn.Linear(noise.width, width), nn.Linear(width, width)

    def first(self, c_noise: Tensor, condition: Condition) -> Tensor:
        """Noise level and augmentation [B, W]; no labels mean images that were not augmented."""
        embedding = self.noise(c_noise).to(torch.promote_types(self.layer1.weight.dtype, torch.float32))
        if self.augment is None or condition.augment is None:
            return embedding
        return embedding + self.augment(condition.augment.to(embedding.dtype))


class EarlyClassEmbedding(Embedding):
    """The class joins before both layers (DDPM++, NCSN++)."""

    def forward(self, c_noise: Tensor, condition: Condition) -> Tensor:
        embedding = self.first(c_noise, condition)
        if self.classes is not None:
            embedding = embedding + self.classes(condition.labels, len(c_noise))
        return F.silu(self.layer2(F.silu(self.layer1(embedding))))


class LateClassEmbedding(Embedding):
    """The class joins after both layers (ADM)."""

    def forward(self, c_noise: Tensor, condition: Condition) -> Tensor:
        embedding = self.layer2(F.silu(self.layer1(self.first(c_noise, condition))))
        if self.classes is not None:
            embedding = embedding + self.classes(condition.labels, len(c_noise))
        return F.silu(embedding)


# --- blocks -------------------------------------------------------------------------------------------------


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """At most 32 groups of at least four channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps)


class Attention(nn.Module):
    """Multi-head self-attention over the positions of a feature map, without the residual connection.

    Channels of the projection are ordered (head, channel, query-key-value), as in the official weights.

    Args:
        channels: channels of the input and output.
        heads: number of heads, a divisor of ``channels``.
        eps: of the normalisation.
    """

    def __init__(self, channels: int, heads: int, eps: float):
        super().__init__()
        self.heads, self.norm = heads, group_norm(channels, eps)
        self.query_key_value = nn.Conv2d(channels, 3 * channels, 1)
        self.project = zero_(nn.Conv2d(channels, channels, 1))

    def _query_key_value(self, x: Tensor) -> Tensor:
        return self.query_key_value(self.norm(x))

    def forward(self, x: Tensor, part: Part = directly) -> Tensor:
        qkv = part(self._query_key_value, x)
        qkv = rearrange(qkv, "b (head c three) h w -> three b head (h w) c", head=self.heads, three=3)
        # Fused kernels want channels next to each other; without, torch would keep the map of all pairs.
        # Every backend keeps logits and softmax in float32, which trained networks need: theirs overflow float16.
        attended = F.scaled_dot_product_attention(*qkv.contiguous())
        return self.project(rearrange(attended, "b head (h w) c -> b (head c) h w", h=x.shape[2]))


class Block(nn.Module):
    """norm, SiLU, resample, conv, embedding and norm, SiLU, dropout, conv; plus the skip; then attention.

    Subclasses say how the embedding enters. The last convolution and projection start at zero.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        embedding: size E of the embedding.
        heads: attention heads, 0 for a block without attention.
        resample: applied to the input and to the residual branch.
        dropout: probability of zeroing an activation before the second convolution.
    """

    compiles = True
    """A block for `compilation.compile_blocks`."""
    eps = 1e-5
    skip_scale = 1.0
    """Factor of every sum of a skip and its residual branch."""
    modulations = 1
    """How many numbers the embedding gives each channel."""
    projects_resampled = False
    """Whether a resampled skip has a convolution even where the channels agree."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        *,
        heads: int = 0,
        resample: Resample | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.resample, self.dropout = resample or nn.Identity(), dropout
        self.norm1, self.norm2 = group_norm(in_channels, self.eps), group_norm(out_channels, self.eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = zero_(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.affine = nn.Linear(embedding, self.modulations * out_channels)
        project = in_channels != out_channels or (resample is not None and self.projects_resampled)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if project else nn.Identity()
        self.attention = Attention(out_channels, heads, self.eps) if heads else None

    def modulate(self, h: Tensor, values: Tensor) -> Tensor:
        """``norm2`` of ``h`` under the embedding's ``values`` [B, modulations * C, 1, 1]."""
        raise NotImplementedError

    def _first(self, x: Tensor) -> Tensor:
        return self.conv1(self.resample(F.silu(self.norm1(x))))

    def _second(self, h: Tensor, values: Tensor) -> Tensor:
        return self.conv2(F.dropout(F.silu(self.modulate(h, values)), self.dropout, self.training))

    def _resampled_skip(self, x: Tensor) -> Tensor:
        return self.skip(self.resample(x))

    def forward(self, x: Tensor, embedding: Tensor, part: Part = directly) -> Tensor:
        straight = self.skip(x) if isinstance(self.resample, nn.Identity) else part(self._resampled_skip, x)
        h = part(self._second, part(self._first, x), self.affine(embedding)[:, :, None, None])
        x = (straight + h) * self.skip_scale
        return x if self.attention is None else (x + self.attention(x, part)) * self.skip_scale


class ShiftBlock(Block):
    """The embedding is added before the normalisation; sums are divided by sqrt(2) (DDPM++, NCSN++)."""

    eps = 1e-6
    skip_scale = math.sqrt(0.5)
    projects_resampled = True

    def modulate(self, h: Tensor, values: Tensor) -> Tensor:
        return self.norm2(h + values)


class ScaleShiftBlock(Block):
    """The embedding scales and shifts after the normalisation (ADM)."""

    modulations = 2

    def modulate(self, h: Tensor, values: Tensor) -> Tensor:
        scale, shift = values.chunk(2, 1)
        return torch.addcmul(shift, self.norm2(h), scale + 1)
