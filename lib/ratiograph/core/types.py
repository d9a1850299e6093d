"""Values that travel between components.

Notation (the same in every module): ``x0`` a clean sample [B, ...], ``x_t = alpha x0 + sigma noise`` its noisy
version, ``t`` [B] the process's own time, ``alpha`` and ``sigma`` [B] the signal and noise scales at ``t``.
p is the teacher (or the data), q the student; ``log_ratio`` l = log p_t(x_t) / q_t(x_t) [B].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Batch", "Condition", "Encoding", "Noisy", "NoisySamples", "expand"]


def expand(scale: Tensor, like: Tensor) -> Tensor:
    """Views a per-sample value [B] as [B, 1, ...] so that it broadcasts over ``like`` [B, ...]."""
    return scale.reshape(-1, *[1] * (like.ndim - 1))


def _pieces(values: Tensor, pieces: int) -> list[Tensor]:
    assert len(values) % pieces == 0, (len(values), pieces)
    return list(values.split(len(values) // pieces))


@dataclass(frozen=True)
class Condition:
    """The conditions of a batch, as conditional networks take them; a part that a run does not have is None.

    ``labels`` [B] int64: class indices. ``augment`` [B, 9]: how each image was augmented (EDM, Appendix F), None for
    images as they are; networks without augmentation labels ignore it. ``text`` [B, L, E]: the text encoder's states of
    each caption. ``pooled`` [B, P] and ``sizes`` [B, 6]: SDXL's pooled caption and its "time ids", the original size,
    the crop's corner and the target size as (height, width) pairs in pixels. ``caption`` [B, 1024] uint8: the caption
    itself (`captions.pack`), for rewards and evaluations with text encoders of their own; it stays on the CPU.
    """

    labels: Tensor | None = None
    augment: Tensor | None = None
    text: Tensor | None = None
    pooled: Tensor | None = None
    sizes: Tensor | None = None
    caption: Tensor | None = None

    def to(self, device: torch.device) -> Condition:
        """On ``device``, all but the caption, which tokenizers read on the CPU."""
        moved = {k: v if k == "caption" else v.to(device, non_blocking=True) for k, v in self.parts().items()}
        return Condition(**moved)

    def repeat(self, times: int) -> Condition:
        """The condition of a batch that holds this one's samples ``times`` over, one whole copy after another."""
        return self.map(lambda tensor: tensor.repeat(times, *[1] * (tensor.ndim - 1)))

    def join(self, other: Condition) -> Condition:
        """This one's samples followed by ``other``'s; a part that either lacks is left out."""
        theirs = other.parts()
        return Condition(**{k: torch.cat([v, theirs[k]]) for k, v in self.parts().items() if k in theirs})

    def split(self, pieces: int) -> list[Condition]:
        """The samples in ``pieces`` runs of equal length."""
        named = self.parts()
        cut = zip(*(_pieces(tensor, pieces) for tensor in named.values()), strict=True)
        return [Condition(**dict(zip(named, each, strict=True))) for each in cut] or [self] * pieces

    def parts(self) -> dict[str, Tensor]:
        """The parts that are there, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """The condition whose parts are ``change`` of this one's."""
        return Condition(**{name: change(tensor) for name, tensor in self.parts().items()})


@dataclass(frozen=True)
class Batch:
    """Real samples. ``images`` [B, C, H, W] in [-1, 1], or latents; ``condition`` holds their labels or captions.

    ``places`` says for messages where each sample lies; it may be empty.
    """

    images: Tensor
    condition: Condition
    places: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device) -> Batch:
        return Batch(self.images.to(device, non_blocking=True), self.condition.to(device), self.places)

    def split(self, pieces: int) -> list[Batch]:
        """The samples in ``pieces`` runs of equal length."""
        return [Batch(*each) for each in zip(_pieces(self.images, pieces), self.condition.split(pieces), strict=True)]


@dataclass(frozen=True)
class Noisy:
    """A sample of the forward process: ``x_t`` [B, ...] with its ``t``, ``alpha`` and ``sigma`` [B]."""

    x_t: Tensor
    t: Tensor
    alpha: Tensor
    sigma: Tensor

    def join(self, other: Noisy) -> Noisy:
        """These samples followed by ``other``'s."""
        mine, theirs = ((each.x_t, each.t, each.alpha, each.sigma) for each in (self, other))
        return Noisy(*(torch.cat(pair) for pair in zip(mine, theirs, strict=True)))

    def split(self, pieces: int) -> list[Noisy]:
        """The samples in ``pieces`` runs of equal length."""
        cut = (_pieces(each, pieces) for each in (self.x_t, self.t, self.alpha, self.sigma))
        return [Noisy(*each) for each in zip(*cut, strict=True)]

    def rescaled(self) -> tuple[Tensor, Tensor]:
        """``(x_t / alpha, sigma / alpha)``: the variance-exploding view in which EDM networks are native."""
        return self.x_t / expand(self.alpha, self.x_t), self.sigma / self.alpha


class NoisySamples(NamedTuple):
    """Noisy samples, the clean ones [B, ...] they were made from, and their condition."""

    noisy: Noisy
    x0: Tensor
    condition: Condition

    def join(self, other: NoisySamples) -> NoisySamples:
        """These, followed by ``other``."""
        return NoisySamples(
            self.noisy.join(other.noisy), torch.cat([self.x0, other.x0]), self.condition.join(other.condition)
        )

    def split(self, pieces: int) -> list[NoisySamples]:
        """The samples in ``pieces`` runs of equal length."""
        cut = self.noisy.split(pieces), _pieces(self.x0, pieces), self.condition.split(pieces)
        return [NoisySamples(*each) for each in zip(*cut, strict=True)]


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
