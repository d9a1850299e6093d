"""A compact U-Net for a few CPU cores, and a multi-layer perceptron with the same interface for vectors.

Both have ``encode(x, c_noise, condition) -> Encoding`` and ``decode(encoding) -> F``: a caller that needs only features
skips the decoder. Shapes: x [B, C, H, W] (or [B, D]), c_noise [B], F like x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Interval, MinLen
from torch import Tensor, nn

from ratiograph.core.domains import Depth, Fraction, NonNegativeInt, PositiveInt
from ratiograph.core.types import Condition, Encoding
from ratiograph.networks.architectures.blocks import NoiseEmbedding, ResidualBlock, SelfAttention, group_norm, zero_
from ratiograph.networks.checkpointing import Checkpointing

__all__ = ["MLP", "UNet"]


class ClassEmbedding(nn.Embedding):
    """The row of each label; 0 for no class (a negative label, or no labels at all).

    Args:
        classes: number of classes.
        width: size of the embedding.
        dropout: probability of training a sample without its class, which guidance needs.
    """

    def __init__(self, classes: int, width: int, dropout: float):
        super().__init__(classes, width)
        self.dropout = dropout

    def forward(self, labels: Tensor | None) -> Tensor:
        """[B, width] of labels [B]; [1, width] without labels."""
        if labels is None and not self.dropout:
            raise ValueError(
                f"a network with classes={self.num_embeddings} needs labels and the data gave none; only one trained "
                "with label_dropout can do without"
            )
        if labels is None:
            return torch.zeros_like(self.weight[:1])
        known = labels >= 0
        if self.training and self.dropout:
            known = known & (torch.rand(len(labels), device=labels.device) >= self.dropout)
        return super().forward(labels.clamp(min=0)) * known[:, None]


class UNet(nn.Module):
    """Encoder, middle and decoder of residual blocks, on patches of the image.

    Patches of ``patch_size``² pixels become channels at the first level: at patch size 2 that is about four times as
    fast on a CPU. Feature maps of the encoding: the last of each level, then the middle (coarsest last).

    Args:
        resolution: height and width of the images.
        image_channels: channels C of the images.
        channels: width of the first level.
        multipliers: width of each level as a multiple of ``channels``; each level after the first halves the size.
        blocks: residual blocks a level in the encoder, and in the decoder.
        patch_size: side of the pixel patches that become channels.
        attention: whether the middle attends over all positions.
        dropout: dropout probability of the residual blocks.
        classes: number of classes, 0 for an unconditional network. Negative labels ask for no class.
        label_dropout: probability of training a sample without its class, which guidance needs.
        checkpointing: trades time for memory: ``CheapOperations`` or ``WholeBlocks``; None keeps all activations.

    Raises:
        ValueError: if ``resolution`` is not divisible by the patch size and the halvings.
    """

    def __init__(
        self,
        *,
        resolution: PositiveInt = 28,
        image_channels: PositiveInt = 1,
        channels: PositiveInt = 64,
        multipliers: Annotated[Sequence[PositiveInt], MinLen(1)] = (1, 2),
        blocks: Depth = 1,
        patch_size: PositiveInt = 2,
        attention: bool = True,
        dropout: Fraction = 0.0,
        classes: NonNegativeInt = 0,
        label_dropout: Fraction = 0.0,
        checkpointing: Checkpointing | None = None,
    ):
        super().__init__()
        factor = patch_size * 2 ** (len(multipliers) - 1)
        if resolution % factor:
            raise ValueError(
                f"resolution={resolution} must be a multiple of patch_size * 2^(levels - 1) = {factor}: "
                "change UNet.patch_size or UNet.multipliers"
            )
        self.resolution, self.image_channels, self.patch_size = resolution, image_channels, patch_size
        self.shape = (image_channels, resolution, resolution)
        self.channels, self.multipliers, self.classes = channels, tuple(multipliers), classes
        self.label_dropout, self.checkpointing = label_dropout, checkpointing or Checkpointing()
        embedding = 4 * channels
        widths = [channels * m for m in multipliers]
        self.feature_channels = (*widths, widths[-1])
        self.noise_embedding = NoiseEmbedding(embedding)
        self.class_embedding = ClassEmbedding(classes, embedding, label_dropout) if classes else None
        patch_channels = image_channels * patch_size**2
        self.stem = nn.Conv2d(patch_channels, widths[0], 3, padding=1)
        self.encoder, self.downsamples = nn.ModuleList(), nn.ModuleList()
        self.decoder, self.upsamples = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            self.encoder.append(nn.ModuleList(ResidualBlock(width, width, embedding, dropout) for _ in range(blocks)))
            self.decoder.append(
                nn.ModuleList(
                    ResidualBlock(2 * width if k == 0 else width, width, embedding, dropout) for k in range(blocks)
                )
            )
            if level + 1 < len(widths):
                self.downsamples.append(nn.Conv2d(width, widths[level + 1], 3, stride=2, padding=1))
                self.upsamples.append(nn.Conv2d(widths[level + 1], width, 1))
        self.middle = nn.ModuleList([ResidualBlock(widths[-1], widths[-1], embedding, dropout)])
        if attention:
            self.middle.append(SelfAttention(widths[-1]))
        self.out_norm = group_norm(widths[0])
        self.out = zero_(nn.Conv2d(widths[0], patch_channels, 3, padding=1))

    def drop_decoder(self) -> None:
        """Removes what only ``decode`` needs."""
        del self.decoder, self.upsamples, self.out_norm, self.out

    def _embed(self, c_noise: Tensor, condition: Condition) -> Tensor:
        embedding = self.noise_embedding(c_noise)
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(condition.labels)
        return F.silu(embedding)

    def encode(self, x: Tensor, c_noise: Tensor, condition: Condition) -> Encoding:
        embedding = self._embed(c_noise, condition)
        h = self.stem(F.pixel_unshuffle(x, self.patch_size))
        skips = []
        for level, blocks in enumerate(self.encoder):
            for block in blocks:
                h = self.checkpointing.run(block, h, embedding)
            skips.append(h)
            if level < len(self.downsamples):
                h = self.downsamples[level](h)
        h = self.checkpointing.run(self.middle[0], h, embedding)
        for attention in self.middle[1:]:
            h = self.checkpointing.run(attention, h)
        return Encoding(features=(*skips, h), embedding=embedding)

    def decode(self, encoding: Encoding) -> Tensor:
        *skips, h = encoding.features
        for level in reversed(range(len(self.decoder))):
            h = torch.cat([h, skips[level]], 1)
            for block in self.decoder[level]:
                h = self.checkpointing.run(block, h, encoding.embedding)
            if level:
                # Project before enlarging: the same map as after it, at a quarter of the work.
                h = F.interpolate(self.upsamples[level - 1](h), scale_factor=2, mode="nearest")
        return F.pixel_shuffle(self.checkpointing.part(self._end, h), self.patch_size)

    def _end(self, h: Tensor) -> Tensor:
        return self.out(F.silu(self.out_norm(h)))


class ResidualLinear(nn.Linear):
    """h + W SiLU(h) + b."""

    compiles = True

    def forward(self, h: Tensor) -> Tensor:
        return h + super().forward(F.silu(h))


class MLP(nn.Module):
    """Residual perceptron on vectors [B, D] with the noise level and class added to the first hidden layer.

    The only feature of the encoding is the hidden layer [B, width] halfway through.

    Args:
        dimension: D.
        width: size of the hidden layers.
        layers: number of residual hidden layers, at least 2; the encoder is the first half.
        classes: number of classes, 0 for an unconditional network. Negative labels ask for no class.
        label_dropout: probability of training a sample without its class, which guidance needs.
    """

    def __init__(
        self,
        *,
        dimension: PositiveInt = 2,
        width: PositiveInt = 128,
        layers: Annotated[int, Interval(ge=2, le=1000)] = 4,
        classes: NonNegativeInt = 0,
        label_dropout: Fraction = 0.0,
    ):
        super().__init__()
        self.feature_channels = (width,)
        self.width, self.layers, self.classes, self.shape = width, layers, classes, (dimension,)
        self.label_dropout = label_dropout
        self.noise_embedding = NoiseEmbedding(width, frequencies=16)
        self.class_embedding = ClassEmbedding(classes, width, label_dropout) if classes else None
        self.stem = nn.Linear(dimension, width)
        hidden = [ResidualLinear(width, width) for _ in range(layers)]
        self.encoder, self.decoder = nn.ModuleList(hidden[: layers // 2]), nn.ModuleList(hidden[layers // 2 :])
        self.out = zero_(nn.Linear(width, dimension))

    def drop_decoder(self) -> None:
        """Removes what only ``decode`` needs."""
        del self.decoder, self.out

    def encode(self, x: Tensor, c_noise: Tensor, condition: Condition) -> Encoding:
        embedding = self.noise_embedding(c_noise)
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(condition.labels)
        h = self.stem(x) + embedding
        for layer in self.encoder:
            h = layer(h)
        return Encoding(features=(h,), embedding=embedding)

    def decode(self, encoding: Encoding) -> Tensor:
        (h,) = encoding.features
        for layer in self.decoder:
            h = layer(h)
        return self.out(F.silu(h))
