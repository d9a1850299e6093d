"""EDM's U-Nets: DDPM++, NCSN++ (Song et al. 2021), ADM (Dhariwal & Nichol 2021), as Karras et al. 2022 (App. F) train.

Shapes: x and F [B, C, H, W], c_noise [B]. Levels are numbered from the finest, 0; level k has the resolution H / 2^k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import MinLen
from torch import Tensor, nn

from ratiograph.core.domains import Depth, Fraction, NonNegativeInt, PositiveInt
from ratiograph.core.types import Condition
from ratiograph.networks.architectures.blocks import SkipEncoding, zero_
from ratiograph.networks.architectures.edm_blocks import (
    Block,
    ClassEmbedding,
    CosineSine,
    EarlyClassEmbedding,
    LateClassEmbedding,
    RandomFourier,
    Resample,
    ScaleShiftBlock,
    ShiftBlock,
    SineCosine,
    binomial_down,
    binomial_up,
    box_down,
    box_up,
    group_norm,
)
from ratiograph.networks.checkpointing import Checkpointing

__all__ = ["ADM", "DDPMPP", "NCSNPP"]


class Level(nn.Module):
    """Blocks at one resolution, after the ``resample`` block that leads there, where there is one."""

    def __init__(self, resample: Block | None, blocks: Sequence[Block]):
        super().__init__()
        self.resample, self.blocks = resample, nn.ModuleList(blocks)


Make = Callable[..., Block]
"""(in channels, out channels, attention=bool, resample=function or None) -> block."""


def encoder_levels(
    make: Make, widths: Sequence[int], width: int, blocks: int, attended: Sequence[int], down: Resample
) -> tuple[nn.ModuleList, list[int]]:
    """Levels from the finest, after a stem of ``width`` channels; and the widths of all skips, the stem's first."""
    levels, skips = [], [width]
    for k, wider in enumerate(widths):
        resample = make(width, width, attention=False, resample=down) if k else None
        inputs = [width] + (blocks - 1) * [wider]
        levels.append(Level(resample, [make(i, wider, attention=k in attended, resample=None) for i in inputs]))
        skips += ([width] if k else []) + blocks * [wider]
        width = wider
    return nn.ModuleList(levels), skips


def decoder_levels(
    make: Make,
    widths: Sequence[int],
    skips: Sequence[int],
    blocks: int,
    attended: Sequence[int],
    attended_from: int,
    up: Resample,
) -> nn.ModuleList:
    """Levels from the finest; each block takes the newest skip that is left, the coarsest level's first."""
    levels, skips, width = [], list(skips), widths[-1]
    for k in reversed(range(len(widths))):
        resample = make(width, width, attention=False, resample=up) if k + 1 < len(widths) else None
        inputs = [width + skips.pop(), *(widths[k] + skips.pop() for _ in range(blocks))]
        attention = [k in attended and i >= attended_from for i in range(blocks + 1)]
        level = [make(i, widths[k], attention=a, resample=None) for i, a in zip(inputs, attention, strict=True)]
        levels.append(Level(resample, level))
        width = widths[k]
    return nn.ModuleList(reversed(levels))


class EDMUNet(nn.Module):
    """Base class: levels of residual blocks, a middle, and a skip from every block but the middle's.

    Args:
        resolution: height and width of the images.
        image_channels: channels C of the images.
        widths: channels of each level.
        blocks: residual blocks a level in the encoder; the decoder has one more.
        stem_channels: channels after the first convolution.
        embedding: (c_noise [B], condition) -> [B, E].
        make: makes a block.
        attention_resolutions: resolutions of the levels with attention.
        attended_from: index of the first block in the decoder's levels that has attention, if its level has.
        checkpointing: what the backward pass computes again; None: nothing.

    Raises:
        ValueError: ``resolution`` is not divisible by the halvings, or no level has one of ``attention_resolutions``.
    """

    down, up = staticmethod(box_down), staticmethod(box_up)

    def __init__(
        self,
        *,
        resolution: int,
        image_channels: int,
        widths: Sequence[int],
        blocks: int,
        stem_channels: int,
        embedding: nn.Module,
        make: Make,
        attention_resolutions: Sequence[int],
        attended_from: int,
        checkpointing: Checkpointing | None,
    ):
        super().__init__()
        if resolution % 2 ** (len(widths) - 1):
            raise ValueError(
                f"resolution={resolution} must be a multiple of 2^(levels - 1) = {2 ** (len(widths) - 1)}: change it, "
                "or the number of multipliers"
            )
        self.resolution, self.image_channels = resolution, image_channels
        self.shape = (image_channels, resolution, resolution)
        self.checkpointing = checkpointing or Checkpointing()
        self.feature_channels = (*widths, widths[-1])
        attended = attended_levels(resolution, len(widths), attention_resolutions)
        self.embedding = embedding
        self.stem = nn.Conv2d(image_channels, stem_channels, 3, padding=1)
        self.encoder, skips = encoder_levels(make, widths, stem_channels, blocks, attended, self.down)
        self.middle = nn.ModuleList(make(widths[-1], widths[-1], attention=a, resample=None) for a in (True, False))
        self.decoder = decoder_levels(make, widths, skips, blocks, attended, attended_from, self.up)
        self.out_norm = group_norm(widths[0], self.encoder[0].blocks[0].eps)
        self.out = zero_(nn.Conv2d(widths[0], image_channels, 3, padding=1))

    def drop_decoder(self) -> None:
        """Removes what only ``decode`` needs."""
        del self.decoder, self.out_norm, self.out

    def _descend(self, k: int, x: Tensor, image: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """From level k - 1, the input of level k and the image at level k (unchanged here, see NCSNPP)."""
        return self.checkpointing.run(self.encoder[k].resample, x, embedding), image

    def encode(self, x: Tensor, c_noise: Tensor, condition: Condition) -> SkipEncoding:
        embedding, image = self.embedding(c_noise, condition), x
        skips, ends = [self.stem(x)], []
        for k, level in enumerate(self.encoder):
            if k:
                h, image = self._descend(k, skips[-1], image, embedding)
                skips.append(h)
            for block in level.blocks:
                skips.append(self.checkpointing.run(block, skips[-1], embedding))
            ends.append(skips[-1])
        h = skips[-1]
        for block in self.middle:
            h = self.checkpointing.run(block, h, embedding)
        return SkipEncoding((*ends, h), embedding, skips=tuple(skips))

    def decode(self, encoding: SkipEncoding) -> Tensor:
        h, skips, embedding = encoding.features[-1], list(encoding.skips), encoding.embedding
        for level in reversed(self.decoder):
            if level.resample is not None:
                h = self.checkpointing.run(level.resample, h, embedding)
            for block in level.blocks:
                h = self.checkpointing.run(block, torch.cat([h, skips.pop()], 1), embedding)
        return self.checkpointing.part(self._end, h)

    def _end(self, h: Tensor) -> Tensor:
        return self.out(F.silu(self.out_norm(h)))


def attended_levels(resolution: int, levels: int, attention_resolutions: Sequence[int]) -> list[int]:
    """Indices of the levels at ``attention_resolutions``; ValueError for a resolution that no level has."""
    sizes = [resolution >> k for k in range(levels)]
    unknown = sorted(set(attention_resolutions) - set(sizes))
    if unknown:
        raise ValueError(f"attention_resolutions holds {unknown}; the levels have the resolutions {sizes}")
    return [k for k, size in enumerate(sizes) if size in attention_resolutions]


def xavier_(network: EDMUNet) -> None:
    """Uniform with variance 2 / (fan in + fan out), branches almost 0 at their ends, biases 0 (DDPM++, NCSN++)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, ClassEmbedding):
            nn.init.xavier_uniform_(module.table)
    for module in network.modules():
        if isinstance(module, Block):
            nn.init.xavier_uniform_(module.conv2.weight, 1e-5)
            if module.attention is not None:
                nn.init.xavier_uniform_(module.attention.query_key_value.weight, math.sqrt(0.2))
                nn.init.xavier_uniform_(module.attention.project.weight, 1e-5)
    nn.init.xavier_uniform_(network.out.weight, 1e-5)


class DDPMPP(EDMUNet):
    """DDPM++, the network of EDM's "VP" models; the defaults are CIFAR-10's.

    Attention has one head; in the decoder only the last block of a level has it.

    Args:
        resolution: height and width of the images.
        image_channels: channels C of the images.
        channels: width of the first convolution.
        multipliers: width of each level as a multiple of ``channels``; each level after the first halves the size.
        blocks: residual blocks a level in the encoder; the decoder has one more.
        attention_resolutions: resolutions of the feature maps with attention; the middle always has it.
        dropout: dropout probability of the residual blocks.
        classes: number of classes, 0 for an unconditional network.
        augment_labels: size of ``Condition.augment``, 0 for a network without augmentation labels.
        label_dropout: probability of training without a class, which guidance needs.
        checkpointing: trades time for memory: ``CheapOperations`` or ``WholeBlocks``; None keeps all activations.

    Raises:
        ValueError: ``resolution`` is not divisible by the halvings, or no level has one of ``attention_resolutions``.
    """

    def __init__(
        self,
        *,
        resolution: PositiveInt = 32,
        image_channels: PositiveInt = 3,
        channels: PositiveInt = 128,
        multipliers: Annotated[Sequence[PositiveInt], MinLen(1)] = (2, 2, 2),
        blocks: Depth = 4,
        attention_resolutions: Sequence[PositiveInt] = (16,),
        dropout: Fraction = 0.13,
        classes: NonNegativeInt = 0,
        augment_labels: NonNegativeInt = 9,
        label_dropout: Fraction = 0.0,
        checkpointing: Checkpointing | None = None,
    ):
        def make(inputs: int, outputs: int, *, attention: bool, resample: Resample | None) -> Block:
            heads = 1 if attention else 0
            return ShiftBlock(inputs, outputs, 4 * channels, heads=heads, resample=resample, dropout=dropout)

        noise = self.make_noise(channels)
        known = None
        if classes:
            known = ClassEmbedding(classes, noise.width, scale=math.sqrt(classes), bias=True, dropout=label_dropout)
        super().__init__(
            resolution=resolution,
            image_channels=image_channels,
            widths=[channels * m for m in multipliers],
            blocks=blocks,
            stem_channels=channels,
            embedding=EarlyClassEmbedding(noise, 4 * channels, known, augment_labels),
            make=make,
            attention_resolutions=attention_resolutions,
            attended_from=blocks,
            checkpointing=checkpointing,
        )
        self.classes, self.augment_labels = classes, augment_labels
        self.pyramid = self.make_pyramid()
        xavier_(self)

    def make_noise(self, channels: int) -> nn.Module:
        """The embedding of the noise level, with its ``width``."""
        return SineCosine(channels)

    def make_pyramid(self) -> nn.ModuleList:
        """Convolutions that bring the image to each level after the first: none here."""
        return nn.ModuleList()


class NCSNPP(DDPMPP):
    """NCSN++, the network of EDM's "VE" models: DDPM++ with three changes; arguments and defaults are DDPM++'s.

    Random Fourier features of the noise level, twice as many; a smoother resampling filter (1, 3, 3, 1); and a second
    path from the image to every level: a pyramid of convolutions. At each level features and pyramid both go on from
    their sum over sqrt(2).
    """

    down, up = staticmethod(binomial_down), staticmethod(binomial_up)

    def make_noise(self, channels: int) -> nn.Module:
        return RandomFourier(2 * channels)

    def make_pyramid(self) -> nn.ModuleList:
        widths = (self.image_channels, *self.feature_channels[:-2])
        # Two zeros on each side: one for the convolution, one for the filter after it.
        return nn.ModuleList(nn.Conv2d(a, b, 3, padding=2) for a, b in pairwise(widths))

    def _descend(self, k: int, x: Tensor, image: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        x, _ = super()._descend(k, x, image, embedding)
        image = self.checkpointing.part(binomial_down, self.pyramid[k - 1](image), 0)
        x = (x + image) * math.sqrt(0.5)
        return x, x


class ADM(EDMUNet):
    """ADM, the network of EDM's ImageNet-64 model, whose values are the defaults.

    Args:
        head_channels: a level of width w has floor(w / head_channels) heads. The others: as in ``DDPMPP``.

    Raises:
        ValueError: as ``DDPMPP``; a level with attention is narrower than a head, or its heads do not divide its width.
    """

    def __init__(
        self,
        *,
        resolution: PositiveInt = 64,
        image_channels: PositiveInt = 3,
        channels: PositiveInt = 192,
        multipliers: Annotated[Sequence[PositiveInt], MinLen(1)] = (1, 2, 3, 4),
        blocks: Depth = 3,
        attention_resolutions: Sequence[PositiveInt] = (32, 16, 8),
        head_channels: PositiveInt = 64,
        dropout: Fraction = 0.1,
        classes: NonNegativeInt = 1000,
        augment_labels: NonNegativeInt = 0,
        label_dropout: Fraction = 0.0,
        checkpointing: Checkpointing | None = None,
    ):
        def make(inputs: int, outputs: int, *, attention: bool, resample: Resample | None) -> Block:
            heads = outputs // head_channels if attention else 0
            if heads and outputs % heads:
                raise ValueError(f"ADM: width {outputs} is no multiple of its {heads} heads: change head_channels")
            return ScaleShiftBlock(inputs, outputs, 4 * channels, heads=heads, resample=resample, dropout=dropout)

        attended = attended_levels(resolution, len(multipliers), attention_resolutions)
        if any((width := channels * multipliers[level]) < head_channels for level in attended):
            raise ValueError(f"ADM: width {width} of an attended level is less than head_channels={head_channels}")
        known = ClassEmbedding(classes, 4 * channels, scale=1.0, bias=False, dropout=label_dropout) if classes else None
        super().__init__(
            resolution=resolution,
            image_channels=image_channels,
            widths=[channels * m for m in multipliers],
            blocks=blocks,
            stem_channels=channels * multipliers[0],
            embedding=LateClassEmbedding(CosineSine(channels), 4 * channels, known, augment_labels),
            make=make,
            attention_resolutions=attention_resolutions,
            attended_from=0,
            checkpointing=checkpointing,
        )
        self.classes, self.augment_labels = classes, augment_labels
