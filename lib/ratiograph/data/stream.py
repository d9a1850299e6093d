"""Endless streams of batches from shards.

Sample order is a function of (seed, epoch) and of the list of shards only: shards are permuted, read one
after another, and their undecoded samples pass a shuffle buffer. It does not depend on the number of ranks or of
workers, or on restarts (`sample_order`, `loader`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Interval, MinLen
from torch import Tensor

from ratiograph.core.domains import Fraction, NonNegativeInt, PositiveInt
from ratiograph.core.types import Batch, Condition
from ratiograph.data.embedded import EMBEDDED, check_local, named, resolve, sources
from ratiograph.data.images import PILLOW_MODES, to_tensor
from ratiograph.data.loader import Account, Batches, deliver
from ratiograph.data.raw_samples import DamagedSample, RawImage, RawSample, decode, decode_label, raw_image
from ratiograph.data.remote import forgetting, samples_in
from ratiograph.data.sample_order import Order, mix
from ratiograph.data.shards import count_items, count_samples, index_entry, read_samples, read_shard

__all__ = ["ShardStream", "load_all"]


class SampleStream:
    """Base class: endless, resumable batches from shards.

    Subclasses define ``raw``, ``prepared``, ``collated`` and ``describe``, and ``rejection`` if they leave samples out.

    Args:
        urls, shuffle_buffer, workers, prefetch, memory_megabytes, max_damaged: as in `ShardStream`.
    """

    filtered = False
    """Whether ``rejection`` may leave out samples."""
    harmless = frozenset({"workers", "prefetch", "memory_megabytes"})
    """The parameters that a run may go on with changed: the samples and their order do not depend on them."""

    def __init__(
        self, urls: str, shuffle_buffer: int, workers: int, prefetch: int, memory_megabytes: int, max_damaged: float
    ) -> None:
        for name, value, least in [
            ("shuffle_buffer", shuffle_buffer, 0),
            ("workers", workers, 0),
            ("prefetch", prefetch, 1),
            ("memory_megabytes", memory_megabytes, 0),
        ]:
            if value < least:
                raise ValueError(f"{type(self).__name__}.{name} is {value}: it must be at least {least}.")
        if not 0 <= max_damaged < 1:
            raise ValueError(f"{type(self).__name__}.max_damaged is {max_damaged}: give a fraction in [0, 1).")
        self.urls, self.shuffle_buffer, self.workers, self.prefetch = urls, shuffle_buffer, workers, prefetch
        self.memory_megabytes, self.max_damaged = memory_megabytes, max_damaged
        self._account = Account(max_damaged)

    @property
    def tolerant(self) -> bool:
        """Whether damaged samples are skipped."""
        return self.max_damaged > 0

    @property
    def skipped(self) -> int:
        """Damaged samples of this rank that the last call of ``batches`` has skipped so far."""
        return self._account.damaged

    def accounting(self) -> dict[str, int]:
        """Number of samples since the last call of ``batches``, up to the last batch taken.

        ``used`` and ``damaged`` count this rank's samples. Every other name is a reason for which samples were left
        out; these count all ranks' samples and those that the shuffle buffer has read ahead.
        """
        account = self._account
        return {"used": account.used, "damaged": account.damaged, **dict(sorted(account.rejected.items()))}

    @staticmethod
    def locate(*, urls: str) -> None:
        """Checks that local shards exist; nothing is read or fetched.

        Raises:
            ValueError: a local shard does not exist.
        """
        check_local(urls)

    def file_facts(self) -> dict[str, object]:
        """As of `contracts.Identified`: names and sizes of local shards, and what the indexes beside them say."""
        paths = [] if self.urls in EMBEDDED else [path for path in named(self.urls) if isinstance(path, Path)]
        sizes = [(path.name, path.stat().st_size) for path in paths]
        entries = [dict(entry) for path in paths if (entry := index_entry(path))]
        return {
            f"{name} {self.urls}": _digest(found) for name, found in (("shards", sizes), ("index of", entries)) if found
        }

    def raw(self, path: Path, members: Mapping[str, object]) -> RawSample:
        """The undecoded sample of a shard's members by suffix; DamagedSample where one is missing."""
        raise NotImplementedError

    def read(self, path: Path) -> Iterator:
        """The undecoded samples of one shard; if ``tolerant``, a `Damage` for each damaged one."""
        return read_samples(path, self.raw, tolerant=self.tolerant)

    def rejects(self, raw: RawSample) -> str | None:
        """`rejection`, but None for a damaged sample if ``tolerant``: ``prepared`` raises its error, to be counted."""
        try:
            return self.rejection(raw)
        except DamagedSample:
            if self.tolerant:
                return None
            raise

    def rejection(self, raw: RawSample) -> str | None:
        """Why the stream leaves a sample out, in a word or two, or None where it does not leave it out."""
        return None

    def empty_message(self) -> str:
        """The error's message where ``rejection`` leaves no sample."""
        return f"no sample of {self.urls} is left"

    def prepared(self, raw: RawSample) -> object:
        """The decoded sample; DamagedSample where it cannot be decoded."""
        raise NotImplementedError

    def collated(self, raw: Sequence, prepared: Sequence, positions: Sequence[int], seed: int) -> Batch:
        """The batch of decoded samples.

        Args:
            raw: the undecoded samples, for messages.
            prepared: the decoded ones.
            positions: their places in the endless order, for random draws of single samples.
            seed: the seed of the order.
        """
        raise NotImplementedError

    def count(self, path: Path) -> int:
        """Number of samples that ``read`` gives; from the index where there is one."""
        return count_items(path, self.raw) if self.tolerant else count_samples(path)

    def batches(self, batch_size: int, seed: int, start: int = 0, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Endless batches; one may straddle two epochs, and all have the same size.

        The global batch is the next ``ranks * batch_size`` samples of one sequence, which does not depend on the number
        of ranks or of workers; this rank gets ``batch_size`` rows of it from row ``rank * batch_size`` on.

        Args:
            batch_size: samples a batch, on this rank.
            seed: with the epoch's number it fixes the order.
            start: number of samples that all ranks together have consumed; they are skipped without being decoded, and
                without being read where the index or the shards' headers tell how many there are.
            rank: number of this process among ``ranks``.
            ranks: processes that share the data.

        Returns:
            Batches of float32 ``images`` with their ``condition``. Closing the iterator ends its workers.

        Raises:
            ValueError: at once, a missing shard or embedded package, a server that cannot be reached; while
                iterating, a damaged shard or sample, one of another size or kind, or without what it should carry; with
                ``max_damaged``, too many of them; a worker process that died. The message names shard and sample.
        """
        assert batch_size >= 1, batch_size
        assert start >= 0, start
        assert 0 <= rank < ranks, (rank, ranks)
        order = Order(
            sources(self.urls),
            seed,
            start,
            self.shuffle_buffer,
            self.memory_megabytes * 2**20,
            self.read,
            partial(samples_in, count=self.count),
            self.rejects if self.filtered else None,
            self.empty_message(),
        )
        source = Batches(order, self, batch_size, rank, ranks, self.tolerant)
        self._account = Account(self.max_damaged)
        return deliver(source, self.workers, self.prefetch, self._account)


class ShardStream(SampleStream):
    """Batches of images and class labels from webdataset shards, shuffled anew every epoch, without end.

    Nothing is read before ``batches`` is called.

    Args:
        urls: paths of tar files with braces ('data/faces-{000000..000127}.tar', several joined by '::'), also
            'https://...', 's3://...' and 'pipe:COMMAND', which are fetched into a cache; or the name of an embedded
            data set: 'mnist' (5,000 digits), 'mnist-train' and 'mnist-heldout' (its first 4,500 and last 500);
            'coloured-digits' (10,000 in RGB, with captions).
        resolution: height and width in pixels that every image must have; None takes the images' own.
        channels: 1 (grey) or 3 (RGB); the image files must hold exactly these.
        labels: whether samples carry class labels (member ``<key>.cls``).
        classes: only samples of these classes; None takes all.
        flip: whether to mirror samples left to right, each with probability 1/2 in every epoch.
        shuffle_buffer: number of undecoded samples held to draw from; 0 keeps the order within the shuffled
            shards.
        workers: processes that decode ahead of the training loop; 0 decodes in a thread of this process,
            which is enough for small images.
        prefetch: batches (for each worker) made before they are asked for.
        memory_megabytes: shards are kept in memory, undecoded, up to this much; the others are read every
            epoch.
        max_damaged: 0 makes every damaged sample an error. Up to this fraction, in [0, 1), of the samples met, and of
            the first 1,000, they are skipped, counted and named in the log; the next sound sample takes their place.

    Raises:
        ValueError: an argument outside its domain.
    """

    def __init__(
        self,
        *,
        urls: str,
        resolution: PositiveInt | None = None,
        channels: Literal[1, 3] = 1,
        labels: bool = True,
        classes: Annotated[Sequence[NonNegativeInt], MinLen(1)] | None = None,
        flip: bool = False,
        shuffle_buffer: NonNegativeInt = 5000,
        workers: Annotated[int, Interval(ge=0, le=1000)] = 0,
        prefetch: PositiveInt = 4,
        memory_megabytes: NonNegativeInt = 64,
        max_damaged: Fraction = 0.0,
    ) -> None:
        if channels not in PILLOW_MODES:
            raise ValueError(f"ShardStream.channels is {channels}: choose 1 (grey) or 3 (RGB).")
        if classes is not None and not classes:
            raise ValueError("ShardStream.classes is empty: name at least one class, or None for all.")
        if resolution is not None and resolution < 1:
            raise ValueError(f"ShardStream.resolution is {resolution}: give pixels, or None for the images' own.")
        super().__init__(urls, shuffle_buffer, workers, prefetch, memory_megabytes, max_damaged)
        self.resolution, self.channels, self.labels, self.flip = resolution, channels, labels, flip
        self.classes = None if classes is None else frozenset(classes)

    @property
    def filtered(self) -> bool:
        return self.classes is not None

    def raw(self, path: Path, members: Mapping[str, object]) -> RawImage:
        return raw_image(path, members)

    def rejection(self, raw: RawImage) -> str | None:
        return None if decode_label(raw) in self.classes else "other class"

    def empty_message(self) -> str:
        return f"no sample of the data has a class in ShardStream.classes={sorted(self.classes or ())}"

    def prepared(self, raw: RawImage) -> tuple[np.ndarray, int]:
        return decode(raw, channels=self.channels, resolution=self.resolution, labels=self.labels)

    def collated(self, raw, prepared, positions, seed) -> Batch:
        """Images float32 [B, channels, H, W] in [-1, 1]; labels int64 [B], or None without ``labels``."""
        batch = _collated(raw, prepared, labels=self.labels)
        return replace(batch, images=flipped(batch.images, positions, seed)) if self.flip else batch

    def describe(self) -> str:
        """One line for people, from the arguments alone."""
        size = f"{self.resolution}x{self.resolution}" if self.resolution else "images of their own size"
        colour = "grey" if self.channels == 1 else "RGB"
        return f"{self.urls}: {size}, {colour}{', classes' if self.labels else ''}{', flips' if self.flip else ''}"


def _digest(found: list) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def _collated(raw: Sequence[RawImage], prepared: Sequence[tuple[np.ndarray, int]], *, labels: bool) -> Batch:
    pixels, classes = zip(*prepared, strict=True)
    for sample, image in zip(raw, pixels, strict=True):
        if image.shape != pixels[0].shape:
            raise ValueError(
                f"{sample.place} is {image.shape[1]}x{image.shape[2]} (height x width), {raw[0].place} is "
                f"{pixels[0].shape[1]}x{pixels[0].shape[2]}: one data set needs one size. Set "
                "ShardStream.resolution to be told which samples differ, and write their shards anew."
            )
    places = tuple(sample.place for sample in raw) if labels else ()
    return Batch(to_tensor(pixels), Condition(torch.tensor(classes) if labels else None), places)


def flipped(images: Tensor, positions: Sequence[int], seed: int) -> Tensor:
    """The images [B, C, H, W], each mirrored with probability 1/2; the draw is a function of (seed, position)."""
    coins = torch.tensor([mix(seed, "flip", position) & 1 for position in positions], dtype=torch.bool)
    return torch.where(coins[:, None, None, None], images.flip(-1), images)


def load_all(urls: str, *, resolution: int | None = None, channels: int = 1) -> tuple[Tensor, Tensor]:
    """A whole labelled data set in the shards' own order.

    Returns:
        ``(images, labels)``: float32 [N, channels, H, W] in [-1, 1] and int64 [N].

    Raises:
        ValueError: as ``ShardStream.batches``.
    """
    raw = []
    for path in resolve(urls):
        with forgetting(path):
            raw += read_shard(path)
    prepared = [decode(sample, channels=channels, resolution=resolution, labels=True) for sample in raw]
    batch = _collated(raw, prepared, labels=True)
    return batch.images, batch.condition.labels
