"""A compact U-Net conditioned on a caption. Shapes: ``text`` [B, L, E], embedding [B, 4 channels]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import MinLen
from torch import Tensor, nn

from ratiograph.core.domains import Depth, Fraction, PositiveInt
from ratiograph.core.types import Condition
from ratiograph.networks.architectures.unet import UNet
from ratiograph.networks.checkpointing import Checkpointing
from ratiograph.networks.denoisers import EDM
from ratiograph.networks.weights.weight_files import load_weights, locate_weights

__all__ = ["CaptionedUNet", "EDMFromGrey"]


class CaptionedUNet(UNet):
    """``UNet`` whose noise embedding also takes the caption: the sum of its words' states, through two layers.

    States of all zeros are the empty prompt; a condition without a caption counts as one. Word order is lost.

    Args:
        resolution, image_channels, channels, multipliers, blocks, patch_size, attention, dropout: as in ``UNet``.
        checkpointing: as in ``UNet``.
        text_width: E.
        caption_dropout: probability of training a sample with the empty prompt, which guidance needs.

    Raises:
        ValueError: as ``UNet``; ``caption_dropout`` outside [0, 1).
    """

    def __init__(
        self,
        *,
        resolution: PositiveInt = 28,
        image_channels: PositiveInt = 3,
        channels: PositiveInt = 48,
        multipliers: Annotated[Sequence[PositiveInt], MinLen(1)] = (1, 2),
        blocks: Depth = 1,
        patch_size: PositiveInt = 2,
        attention: bool = True,
        dropout: Fraction = 0.0,
        text_width: PositiveInt = 32,
        caption_dropout: Fraction = 0.0,
        checkpointing: Checkpointing | None = None,
    ):
        super().__init__(
            resolution=resolution,
            image_channels=image_channels,
            channels=channels,
            multipliers=multipliers,
            blocks=blocks,
            patch_size=patch_size,
            attention=attention,
            dropout=dropout,
            checkpointing=checkpointing,
        )
        self.text_width, self.caption_dropout = text_width, caption_dropout
        embedding = 4 * channels
        self.text_embedding = nn.Sequential(
            nn.Linear(text_width, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )

    def _words(self, condition: Condition, samples: int) -> Tensor:
        """[B, E]: the sum of the words' states, 0 where the caption is dropped."""
        weight = self.text_embedding[0].weight
        if condition.text is None:
            return weight.new_zeros(samples, self.text_width)
        if condition.text.shape[-1] != self.text_width:
            raise ValueError(
                f"the captions' states have {condition.text.shape[-1]} numbers a word, CaptionedUNet.text_width is "
                f"{self.text_width}: set it as WordEncoder.width"
            )
        words = condition.text.to(weight.dtype).sum(1)
        if self.training and self.caption_dropout:
            words = words * (torch.rand(len(words), 1, device=words.device) >= self.caption_dropout)
        return words

    def _embed(self, c_noise, condition):
        embedding = self.noise_embedding(c_noise) + self.text_embedding(self._words(condition, len(c_noise)))
        return F.silu(embedding)


class EDMFromGrey(EDM):
    """``EDM`` round a `CaptionedUNet` whose training starts from a grey, uncaptioned denoiser of the same widths.

    The mean of the channels takes the place of the grey image: the stem's weights are the grey ones for each channel,
    divided by the number of channels, and the output's are repeated. The differences between the channels enter by
    random weights, so that colours have different features; the caption does too.

    Args:
        network: the network; widths and patches as the grey one's.
        sigma_data: standard deviation of the coloured data.
        weights: safetensors file of an ``EDM`` round a grey ``UNet``, or the name of weights in the package.
        compiled: as in ``EDM``.
    """

    def load(self) -> None:
        """Loads the grey weights.

        Raises:
            FileNotFoundError, ValueError: there are none at ``weights``, or they are of other widths.
        """
        if self.weights is None:
            return
        network, path = self.network, locate_weights(self.weights)
        grey = UNet(
            resolution=network.resolution,
            channels=network.channels,
            multipliers=network.multipliers,
            blocks=len(network.encoder[0]),
            patch_size=network.patch_size,
            attention=len(network.middle) > 1,
        )
        load_weights(path, EDM(network=grey, sigma_data=self.sigma_data))
        channels, device = network.image_channels, network.stem.weight.device
        tensors = {name: tensor.to(device) for name, tensor in grey.state_dict().items()}
        own = network.stem.weight.detach().unflatten(1, (channels, -1))
        differences = (own - own.mean(1, keepdim=True)).flatten(1, 2)
        tensors["stem.weight"] = tensors["stem.weight"].repeat(1, channels, 1, 1) / channels + differences
        tensors["out.weight"] = tensors["out.weight"].repeat(channels, 1, 1, 1)
        tensors["out.bias"] = tensors["out.bias"].repeat(channels)
        network.load_state_dict({**network.state_dict(), **tensors})
