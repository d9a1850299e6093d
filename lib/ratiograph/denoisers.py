"""Denoisers: mu(x_t) = E[x0 | x_t], the one interface of teacher, student score and student.

Notation: s = sigma / alpha and y = x_t / alpha, the variance-exploding view of a noisy sample. The score is
(alpha mu - x_t) / sigma^2. A denoiser first encodes (features by resolution, coarsest last), then decodes, so that
features and the denoised sample come from one pass and whoever needs only features stops at the encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ratiograph.types import Condition, Noisy, expand
from ratiograph.weight_files import load_weights

__all__ = ["EDM", "Denoiser"]


ASSETS = Path(__file__).parent / "assets"


def locate_weights(name: str) -> Path:
    """The file of ``name``: a path, or the bare name of one that ships inside the package."""
    shipped = ASSETS / f"{name}.safetensors"
    return shipped if shipped.is_file() else Path(name)


@dataclass(frozen=True)
class Encoding:
    """What an encoder hands its decoder. ``features``: maps [B, C_k, H_k, W_k], finest first; ``embedding`` [B, E].

    ``restore`` exists on encodings made by a preconditioned denoiser: decoder output [B, ...] => mu [B, ...].
    """

    features: tuple[Tensor, ...]
    embedding: Tensor | None = None
    restore: Callable[[Tensor], Tensor] | None = None

    def detach(self) -> Encoding:
        return replace(self, features=tuple(f.detach() for f in self.features))


class Denoiser(nn.Module):
    """Base class: subclasses give ``encode`` and ``decode``."""

    can_sample = False
    """Whether ``sample(n, generator)`` gives exact samples of the denoiser's own distribution."""

    def load(self) -> None:
        """Loads pretrained weights, if the denoiser has any. Never called in a dry run."""

    def encode(self, noisy: Noisy, condition: Condition) -> Encoding:
        """Features of ``noisy``, and all that ``decode`` needs."""
        raise NotImplementedError

    def decode(self, encoding: Encoding) -> Tensor:
        """mu [B, ...] float32 from an encoding."""
        raise NotImplementedError

    def denoise(self, noisy: Noisy, condition: Condition) -> Tensor:
        """mu(x_t) = E[x0 | x_t] [B, ...], in the dtype of ``noisy.x_t``."""
        return self.decode(self.encode(noisy, condition))

    def forward(self, noisy: Noisy, condition: Condition) -> Tensor:
        return self.denoise(noisy, condition)


class EDM(Denoiser):
    """mu = c_skip y + c_out F(c_in y, log(s) / 4) with s = sigma / alpha, y = x_t / alpha (EDM Eq. 7, Table 1).

    The network runs under autocast in ``autocast_dtype`` when that is set; everything outside it is float32.

    Args:
        network: a module with ``encode`` and ``decode`` (``UNet``, ``MLP``).
        sigma_data: standard deviation of the clean data.
        weights: safetensors file to start from, a path or the name of one in the package (``mnist_teacher``); None
            starts from random weights.
    """

    autocast_dtype: torch.dtype | None = None

    def __init__(self, *, network: nn.Module, sigma_data: float = 0.5, weights: str | None = None):
        super().__init__()
        if sigma_data <= 0:
            raise ValueError(f"sigma_data={sigma_data} must be positive")
        self.network, self.sigma_data, self.weights = network, sigma_data, weights

    def load(self) -> None:
        if self.weights is not None:
            load_weights(locate_weights(self.weights), self)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.network.shape

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of each feature map, finest first."""
        return self.network.feature_channels

    def _autocast(self, device: torch.device) -> torch.autocast:
        enabled = self.autocast_dtype is not None
        return torch.autocast(device.type, dtype=self.autocast_dtype or torch.bfloat16, enabled=enabled)

    def encode(self, noisy: Noisy, condition: Condition) -> Encoding:
        y, s = noisy.rescaled()
        norm = (s.square() + self.sigma_data**2).sqrt()
        c_skip, c_out = self.sigma_data**2 / norm.square(), s * self.sigma_data / norm
        with self._autocast(y.device):
            encoding = self.network.encode(y / expand(norm, y), s.log() / 4, condition)
        return replace(encoding, restore=lambda out: expand(c_skip, y) * y + expand(c_out, y) * out.to(y.dtype))

    def decode(self, encoding: Encoding) -> Tensor:
        with self._autocast(encoding.features[0].device):
            out = self.network.decode(encoding)
        return encoding.restore(out)


def set_precision(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Sets the autocast type of every network inside ``module`` that has one; None is float32."""
    for child in module.modules():
        if hasattr(child, "autocast_dtype"):
            child.autocast_dtype = dtype
