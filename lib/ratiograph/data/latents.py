"""Shards of captioned latents: an autoencoder's latents with the text encoder's states of their captions.

Members of a sample: ``<key>.latent.npy`` float16 [C, H, W], the autoencoder's latent times its scaling
factor; ``<key>.text.npy`` float16 [L, E]; and for SDXL ``<key>.pooled.npy`` float16 [P] and ``<key>.sizes.npy`` [6].
A sample may also hold its caption as text, ``<key>.txt``, for rewards and evaluations that read it. Shards of prompts
hold all but the latent.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Interval
from torch import Tensor

from ratiograph.core.domains import Fraction, NonNegativeInt, PositiveInt
from ratiograph.core.foreign import read_json, shown
from ratiograph.core.types import Batch, Condition
from ratiograph.data.captions import pack
from ratiograph.data.embedded import sources
from ratiograph.data.raw_samples import DamagedSample, RawSample
from ratiograph.data.shards import INDEX, write_shards
from ratiograph.data.stream import SampleStream

__all__ = ["CachedCaptionStream", "LatentStream"]

RANKS = {"latent": 3, "text": 2, "pooled": 1, "sizes": 1}
ENCODERS = "encoders"
"""The key of the facts in a cache's index.json."""
FACTS = {
    "latent": ("autoencoder", "scaling_factor", "shift_factor"),
    "text": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_tokens", "text_width"),
    "pooled": ("pooled_width",),
}
"""By part of a sample, the facts (see `contracts.Encoded`) of what made it."""


def encoders_of(folder: Path) -> dict[str, object]:
    """The facts in a folder's index.json; {} without an index, or in one that states none.

    Raises:
        ValueError: the index is damaged.
    """
    try:
        index = read_json(folder / INDEX)
    except FileNotFoundError:
        return {}
    stated = index.get(ENCODERS) if isinstance(index, dict) else None
    return stated if isinstance(stated, dict) else {}


def shapes(found: Mapping[str, Sequence[int]]) -> dict[str, object]:
    """The facts that the shapes of one sample's parts state."""
    facts = dict(zip(("text_tokens", "text_width"), found.get("text", ()), strict=False))
    return facts | dict(zip(("pooled_width",), found.get("pooled", ()), strict=False))


@dataclass
class RawLatent(RawSample):
    """An undecoded sample; ``arrays`` are npy files by their part's name, ``caption`` is UTF-8."""

    arrays: Mapping[str, bytes]
    caption: bytes | None = None

    def array(self, part: str) -> np.ndarray:
        """The decoded part, of the number type that the file has.

        Raises:
            DamagedSample: it is missing, damaged, of a wrong rank, or holds NaN or infinity; names shard and sample.
        """
        if part not in self.arrays:
            raise DamagedSample(
                f"{self.place} has no {part} ('{shown(self.key)}.{part}.npy'): encode it into the shards, or read "
                "them as what they hold (LatentStream.captions, LatentStream.pooled; CachedCaptionStream for no "
                "latents)"
            )
        try:
            array = _array(self.arrays[part])
        except Exception as error:  # on hostile bytes the reader raises anything: TypeError, SyntaxError, MemoryError
            raise self.damaged(f"is damaged: its {part} is no npy array of numbers ({error})") from error
        if array.ndim != RANKS[part] or not _finite(array):
            raise self.damaged(f"is damaged: its {part} of shape {array.shape} is not {RANKS[part]}-d and finite")
        return array


def _array(data: bytes) -> np.ndarray:
    """An npy file's numbers; nothing in it is executed."""
    width, read = HEADERS[data[:8]]
    start = 8 + width + int.from_bytes(data[8 : 8 + width], "little")  # the magic, the header's length, the header
    shape, fortran, dtype = _header(data[8:start], read)
    # A view of the file's own bytes: numpy's reader makes room for all that a header claims.
    array = np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape, order="F" if fortran else "C")
    if dtype.str in ("<f2", "<f4", "<i4", "<i8"):
        return array
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        return array.astype(np.float32)


HEADERS = {
    b"\x93NUMPY\x01\x00": (2, np.lib.format.read_array_header_1_0),
    b"\x93NUMPY\x02\x00": (4, np.lib.format.read_array_header_2_0),
}
"""By a file's magic: bytes of the header's length, and numpy's reader of the header."""


@functools.lru_cache(maxsize=64)  # thousands of samples have the same one
def _header(data: bytes, read: Callable) -> tuple[tuple[int, ...], bool, np.dtype]:
    return read(io.BytesIO(data))


def _finite(array: np.ndarray) -> bool:
    if array.dtype != np.float16:
        return bool(np.isfinite(array).all())
    return bool(((array.view(np.uint16) & 0x7C00) != 0x7C00).all())  # an exponent of ones is infinity or NaN


class CachedCaptionStream(SampleStream):
    """Batches of captions alone with the text encoder's states, for a generator that needs no real latents.

    ``Batch.images`` is empty [B, 0]; shards may hold latents too, which are not decoded. ``tools/cache_latents.py
    --caption_only`` makes such shards of a list of prompts. Arguments not listed are those of `ShardStream`.

    Args:
        urls: as in `LatentStream`.
        pooled: whether samples also carry SDXL's pooled caption and sizes.
        shuffle_buffer: undecoded samples held to draw from, 0.12 MB each for SD 1.5 and 0.32 MB for SDXL.

    Raises:
        ValueError: an argument outside its domain.
    """

    def __init__(
        self,
        *,
        urls: str,
        pooled: bool = False,
        shuffle_buffer: NonNegativeInt = 1000,
        workers: Annotated[int, Interval(ge=0, le=1000)] = 0,
        prefetch: PositiveInt = 4,
        memory_megabytes: NonNegativeInt = 64,
        max_damaged: Fraction = 0.0,
    ) -> None:
        super().__init__(urls, shuffle_buffer, workers, prefetch, memory_megabytes, max_damaged)
        self.pooled = pooled

    @property
    def parts(self) -> tuple[str, ...]:
        """The members that are decoded."""
        return ("text", "pooled", "sizes") if self.pooled else ("text",)

    def raw(self, path: Path, members: Mapping[str, object]) -> RawLatent:
        arrays = {part: members[f"{part}.npy"] for part in self.parts if f"{part}.npy" in members}
        return RawLatent(str(path), str(members["__key__"]), arrays, members.get("txt"))

    def prepared(self, raw: RawLatent) -> tuple[dict[str, np.ndarray], str | None]:
        caption = None if raw.caption is None else raw.decoded_caption(raw.caption)
        return {part: raw.array(part) for part in self.parts}, caption

    def collated(self, raw, prepared, positions, seed) -> Batch:
        """Latents, where they are read, and their condition in float32; ``caption`` if the samples hold captions."""
        arrays, captions = zip(*prepared, strict=True)
        stacked = {part: _stack(raw, [sample[part] for sample in arrays], part) for part in arrays[0]}
        images = stacked.pop("latent", torch.zeros(len(raw), 0))
        return Batch(images, Condition(**stacked, caption=_packed(raw, captions)))

    def encoder_facts(self) -> dict[str, object]:
        """As of `contracts.Encoded`: what each index.json beside the shards states of the parts that are read.

        Without such an index these are the shapes of a local shard's first sample.

        Raises:
            ValueError: two of the indexes differ, or one is damaged; a shard is missing.
        """
        shards = {(s if isinstance(s, Path) else s.path).parent: s for s in sources(self.urls)}
        wanted = [fact for part in self.parts for fact in FACTS.get(part, ())]
        found: dict[str, tuple[object, Path]] = {}
        for folder, shard in shards.items():
            stated = encoders_of(folder) or (self._shapes(shard) if isinstance(shard, Path) else {})
            for fact in wanted:
                if fact in stated and stated[fact] != found.setdefault(fact, (stated[fact], folder))[0]:
                    other, place = found[fact]
                    raise ValueError(
                        f"the shards of {place} were encoded with {fact} {shown(other)}, those of {folder} with "
                        f"{shown(stated[fact])}: run tools/cache_latents.py again with one model for both"
                    )
        return {fact: value for fact, (value, _) in found.items()}

    def _shapes(self, shard: Path) -> dict[str, object]:
        with suppress(DamagedSample, StopIteration):  # it is named when it is read for training
            raw = next(sample for sample in self.read(shard) if isinstance(sample, RawLatent))
            return shapes({part: raw.array(part).shape for part in self.parts})
        return {}

    def describe(self) -> str:
        """One line for people, from the arguments alone."""
        return f"{self.urls}: encoded captions{', sizes' if self.pooled else ''}"


class LatentStream(CachedCaptionStream):
    """Batches of latents and captions from webdataset shards, shuffled anew every epoch, without end.

    Nothing is read before ``batches`` is called. Arguments not listed are those of `ShardStream`.

    Args:
        urls: paths of tar files with braces ('data/coyo-{000000..000127}.tar', several joined by '::'), or remote ones.
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
        shuffle_buffer: NonNegativeInt = 1000,
        workers: Annotated[int, Interval(ge=0, le=1000)] = 0,
        prefetch: PositiveInt = 4,
        memory_megabytes: NonNegativeInt = 64,
        max_damaged: Fraction = 0.0,
    ) -> None:
        if pooled and not captions:
            raise ValueError("LatentStream.pooled is part of the caption: set LatentStream.captions = True too")
        super().__init__(
            urls=urls,
            pooled=pooled,
            shuffle_buffer=shuffle_buffer,
            workers=workers,
            prefetch=prefetch,
            memory_megabytes=memory_megabytes,
            max_damaged=max_damaged,
        )
        self.captions = captions

    @property
    def parts(self) -> tuple[str, ...]:
        return ("latent", *(super().parts if self.captions else ()))

    def describe(self) -> str:
        """One line for people, from the arguments alone."""
        return f"{self.urls}: latents{', captions' if self.captions else ''}{', sizes' if self.pooled else ''}"


def _stack(raw: Sequence[RawLatent], arrays: Sequence[np.ndarray], part: str) -> Tensor:
    for sample, array in zip(raw, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise ValueError(
                f"the {part} of {sample.place} is {array.shape}, that of {raw[0].place} {arrays[0].shape}: one data "
                "set needs one shape; write its shards anew"
            )
    return torch.from_numpy(np.stack(arrays)).float()


def _packed(raw: Sequence[RawLatent], captions: Sequence[str | None]) -> Tensor | None:
    if all(caption is None for caption in captions):
        return None
    for sample, caption in zip(raw, captions, strict=True):
        if caption is None:
            raise ValueError(
                f"{sample.place} has no caption ('{shown(sample.key)}.txt') and others have: write their shards anew"
            )
    return pack(captions)


def write_latents(
    folder: Path,
    name: str,
    parts: Mapping[str, np.ndarray | Tensor],
    shards: int = 1,
    captions: Sequence[str] | None = None,
) -> list[Path]:
    """Writes captioned latents to ``shards`` files ``<folder>/<name>-000000.tar`` ... and their index.

    Args:
        folder: as `shards.write_shards`.
        name: stem of the shard files.
        parts: arrays of N samples each by name: ``latent`` [N, C, H, W], ``text`` [N, L, E], ``pooled`` [N, P] and
            ``sizes`` [N, 6], of which the first is required; float16 on disk, sizes int32.
        shards: number of files, at most N.
        captions: N captions as text, or None.

    Returns:
        The shard paths in order.
    """
    assert {"latent"} <= parts.keys() <= RANKS.keys(), parts.keys()
    arrays = {
        part: np.asarray(values).astype(np.int32 if part == "sizes" else np.float16) for part, values in parts.items()
    }
    samples = [
        {"__key__": f"{k:09d}", **{f"{part}.npy": npy_bytes(values[k]) for part, values in arrays.items()}}
        for k in range(len(arrays["latent"]))
    ]
    for sample, caption in zip(samples, captions or [], strict=captions is not None):
        sample["txt"] = caption.encode()
    return write_shards(Path(folder), name, samples, shards)


def npy_bytes(array: np.ndarray) -> bytes:
    """The npy file of ``array``."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def picture(samples: Tensor) -> Tensor:
    """Samples as images that can be shown: images unchanged, latents as their channels side by side.

    Latents [N, C, H, W] of unit variance with C other than 1 and 3 become grey [N, 1, H, C W], black at -3, white at 3.
    """
    if samples.ndim != 4 or samples.shape[1] in (1, 3):
        return samples
    return torch.cat([channel[:, None] for channel in samples.unbind(1)], 3) / 3
