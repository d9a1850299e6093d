"""Shards of captioned latents: an autoencoder's latents with the text encoder's states of their captions.

Members of a sample, all ``.npy``: ``<key>.latent.npy`` float16 [C, H, W], the autoencoder's latent times its scaling
factor; ``<key>.text.npy`` float16 [L, E]; and for SDXL ``<key>.pooled.npy`` float16 [P] and ``<key>.sizes.npy`` [6].
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ratiograph.types import Batch, Condition

from .shards import damaged_sample, read_samples, write_shards
from .stream import SampleStream

__all__ = ["LatentStream"]

CAPTION = ("text",)
SIZED_CAPTION = ("text", "pooled", "sizes")
RANKS = {"latent": 3, "text": 2, "pooled": 1, "sizes": 1}


@dataclass(frozen=True)
class RawLatent:
    """One sample as it lies in a shard; ``arrays`` are npy files by their part's name."""

    shard: str
    key: str
    arrays: Mapping[str, bytes]

    @property
    def place(self) -> str:
        return f"sample '{self.key}' of shard {self.shard}"

    def array(self, part: str) -> np.ndarray:
        """The decoded part.

        Raises:
            ValueError: it is missing, damaged, of a wrong rank, or holds NaN or infinity; names shard and sample.
        """
        if part not in self.arrays:
            raise ValueError(
                f"{self.place} has no {part} ('{self.key}.{part}.npy'): encode the captions into the shards, or read "
                "them as what they hold (LatentStream.captions, LatentStream.pooled)"
            )
        try:
            found = np.load(io.BytesIO(self.arrays[part]), allow_pickle=False).astype(np.float32)
        except (ValueError, EOFError, OSError) as error:
            raise damaged_sample(self.place, f"its {part} is no npy array of numbers ({error})") from error
        if found.ndim != RANKS[part] or not np.isfinite(found).all():
            raise damaged_sample(self.place, f"its {part} of shape {found.shape} is not {RANKS[part]}-d and finite")
        return found


def _raw(path: Path, sample: Mapping[str, object]) -> RawLatent:
    arrays = {part: sample[f"{part}.npy"] for part in RANKS if f"{part}.npy" in sample}
    return RawLatent(str(path), str(sample["__key__"]), arrays)


class LatentStream(SampleStream):
    """Batches of latents and captions from webdataset shards, shuffled anew every epoch, without end.

    Nothing is read before ``batches`` is called. Arguments not listed are those of `ShardStream`.

    Args:
        urls: paths of tar files with braces ('data/coyo-{000000..000127}.tar', several joined by '::').
        captions: whether samples carry the text encoder's states (member ``<key>.text.npy``).
        pooled: whether they also carry SDXL's pooled caption and sizes.
        shuffle_buffer: undecoded samples held to draw from, 0.15 MB each for SD 1.5 and 0.45 MB for SDXL.

    Raises:
        ValueError: an argument outside its domain.
    """

    def __init__(
        self,
        *,
        urls: str,
        captions: bool = True,
        pooled: bool = False,
        shuffle_buffer: int = 1000,
        workers: int = 0,
        prefetch: int = 4,
        memory_megabytes: int = 64,
    ) -> None:
        if pooled and not captions:
            raise ValueError("LatentStream.pooled is part of the caption: set LatentStream.captions = True too")
        super().__init__(urls, shuffle_buffer, workers, prefetch, memory_megabytes)
        self.captions, self.pooled = captions, pooled

    @property
    def parts(self) -> tuple[str, ...]:
        """The members that become the condition."""
        return (SIZED_CAPTION if self.pooled else CAPTION) if self.captions else ()

    def read(self, path: Path):
        return read_samples(path, _raw)

    def collate(self, raw: Sequence[RawLatent]) -> Batch:
        return Batch(_stack(raw, "latent"), Condition(**{part: _stack(raw, part) for part in self.parts}))

    def describe(self) -> str:
        """One line for people, from the arguments alone."""
        return f"{self.urls}: latents{', captions' if self.captions else ''}{', sizes' if self.pooled else ''}"


def _stack(raw: Sequence[RawLatent], part: str) -> Tensor:
    arrays = [sample.array(part) for sample in raw]
    for sample, array in zip(raw, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise ValueError(
                f"the {part} of {sample.place} is {array.shape}, that of {raw[0].place} {arrays[0].shape}: one data "
                "set needs one shape; write its shards anew"
            )
    return torch.from_numpy(np.stack(arrays))


def write_latents(folder: Path, name: str, parts: Mapping[str, np.ndarray | Tensor], shards: int = 1) -> list[Path]:
    """Writes captioned latents to ``shards`` files ``<folder>/<name>-000000.tar`` ... and their index.

    Args:
        folder: as `shards.write_shards`.
        name: stem of the shard files.
        parts: arrays of N samples each by name: ``latent`` [N, C, H, W], ``text`` [N, L, E], ``pooled`` [N, P] and
            ``sizes`` [N, 6], of which the first is required; float16 on disk, sizes int32.
        shards: number of files, at most N.

    Returns:
        The shard paths in order.
    """
    assert {"latent"} <= parts.keys() <= RANKS.keys(), parts.keys()
    kinds = {part: np.int32 if part == "sizes" else np.float16 for part in parts}
    arrays = {part: np.asarray(values).astype(kinds[part]) for part, values in parts.items()}
    samples = [
        {"__key__": f"{k:09d}", **{f"{part}.npy": _npy(values[k]) for part, values in arrays.items()}}
        for k in range(len(arrays["latent"]))
    ]
    return write_shards(Path(folder), name, samples, shards)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def picture(samples: Tensor) -> Tensor:
    """Samples as what a grid of pictures can show: images as they are, latents as their channels side by side.

    Latents [N, C, H, W] of unit variance with C other than 1 and 3 become grey [N, 1, H, C W], black at -3, white at 3.
    """
    if samples.ndim != 4 or samples.shape[1] in (1, 3):
        return samples
    return torch.cat([channel[:, None] for channel in samples.unbind(1)], 3) / 3
