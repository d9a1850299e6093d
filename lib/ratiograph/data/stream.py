"""Endless streams of batches from shards.

Sample order is a function of (seed, epoch) and of the list of shards only: shards are permuted, read one
after another, and their undecoded samples pass a shuffle buffer. Neither the number of workers nor a restart
changes it.
"""

from __future__ import annotations

import hashlib
import itertools
import queue
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ratiograph.types import Batch, Condition

from .embedded import resolve
from .shards import PILLOW_MODES, RawSample, count_samples, decode, decode_label, read_shard

__all__ = ["ShardStream", "load_all"]


def _collate(raw: list[RawSample], *, channels: int, resolution: int | None, labels: bool) -> Batch:
    """Decodes samples into one batch, uint8 [C, H, W] each => float32 [B, C, H, W] in [-1, 1]."""
    pairs = [decode(sample, channels=channels, resolution=resolution, labels=labels) for sample in raw]
    pixels, classes = zip(*pairs, strict=True)
    for sample, image in zip(raw, pixels, strict=True):
        if image.shape != pixels[0].shape:
            raise ValueError(
                f"{sample.place} is {image.shape[1]}x{image.shape[2]} (height x width), {raw[0].place} is "
                f"{pixels[0].shape[1]}x{pixels[0].shape[2]}: one data set needs one size. Set "
                "ShardStream.resolution to be told which samples differ, and write their shards anew."
            )
    images = torch.from_numpy(np.stack(pixels)).float().div_(127.5).sub_(1)
    return Batch(images, Condition(torch.tensor(classes) if labels else None))


@dataclass
class _ShardReader:
    """Reads shards again and again; those that fit in ``memory`` bytes are read from disk once."""

    read: Callable[[Path], Iterator]
    memory: int
    held: dict[Path, list] = field(default_factory=dict)

    def samples(self, path: Path) -> Iterator:
        if path not in self.held and path.stat().st_size <= self.memory:
            self.memory -= path.stat().st_size
            self.held[path] = list(self.read(path))
        return iter(self.held[path]) if path in self.held else self.read(path)


@dataclass
class _Order:
    """The endless, undecoded sequence of samples from sample number ``start`` on."""

    paths: list[Path]
    seed: int
    start: int
    shuffle_buffer: int
    memory: int
    read: Callable[[Path], Iterator] = read_shard
    classes: frozenset[int] | None = None

    def __iter__(self) -> Iterator:
        reader = _ShardReader(self.read, self.memory)
        epoch, skip = 0, self.start
        if skip or self.classes:  # whole epochs are skipped unread
            epoch, skip = divmod(skip, self._samples_an_epoch(reader))
        return itertools.islice(self._epochs(reader, epoch), skip, None)

    def _samples_an_epoch(self, reader: _ShardReader) -> int:
        if self.classes is None:
            return sum(count_samples(path) for path in self.paths)
        count = sum(self._wanted(sample) for path in self.paths for sample in reader.samples(path))
        if not count:
            raise ValueError(f"no sample of the data has a class in ShardStream.classes={sorted(self.classes)}")
        return count

    def _wanted(self, sample: RawSample) -> bool:
        return self.classes is None or decode_label(sample) in self.classes

    def _epochs(self, reader: _ShardReader, first: int) -> Iterator:
        # webdataset's own deterministic shuffle counts epochs in an attribute, of which every worker process
        # has its own copy that starts over; here the epoch's number is handed in.
        for epoch in itertools.count(first):
            rng = random.Random(_mix(self.seed, epoch))
            paths = rng.sample(self.paths, len(self.paths))
            samples = filter(self._wanted, itertools.chain.from_iterable(reader.samples(path) for path in paths))
            yield from wds.shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, rng=rng)(samples)


def _mix(seed: int, epoch: int) -> int:
    """A seed for one epoch; unlike with a sum, epoch 1 of seed 0 differs from epoch 0 of seed 1."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:8], "big")


@dataclass(frozen=True)
class _Failure:
    """An error on its way from a worker to the consumer, who raises it without the worker's traceback."""

    message: str


@dataclass
class _Batches(IterableDataset):
    """Decoded batches of an order. Of several worker processes, number i makes batches i, i + workers, ..."""

    order: _Order
    batch_size: int
    collate: Callable[[list], Batch]

    def __iter__(self) -> Iterator[Batch | _Failure]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        samples = iter(self.order)
        try:
            for count in itertools.count():
                raw = list(itertools.islice(samples, self.batch_size))
                if count % workers == number:
                    yield self.collate(raw)
        except ValueError as error:
            yield _Failure(str(error))


def _prefetch(source: Iterable[Batch | _Failure], ahead: int) -> Iterator[Batch | _Failure]:
    """Runs ``source`` in a background thread, at most ``ahead`` items before the consumer."""
    ready: queue.Queue = queue.Queue(ahead)
    stopped = threading.Event()

    def put(item: Batch | _Failure) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def run() -> None:
        try:
            for item in source:
                put(item)
                if stopped.is_set():
                    return
        except BaseException as error:  # anything unforeseen must not leave the consumer waiting for ever
            put(_Failure(f"Reading the data failed: {type(error).__name__}: {error}"))

    thread = threading.Thread(target=run, name="ShardStream", daemon=True)
    thread.start()
    try:
        while True:
            yield ready.get()
    finally:
        stopped.set()
        thread.join(timeout=5)


def _raise_failures(items: Iterable[Batch | _Failure]) -> Iterator[Batch]:
    for item in items:
        if isinstance(item, _Failure):
            raise ValueError(item.message)
        yield item


class SampleStream:
    """Base class: endless, resumable batches from shards. Subclasses give ``read``, ``collate`` and ``describe``."""

    classes: frozenset[int] | None = None
    """Only samples of these classes; None takes all."""

    def __init__(self, urls: str, shuffle_buffer: int, workers: int, prefetch: int, memory_megabytes: int) -> None:
        for name, value, least in [
            ("shuffle_buffer", shuffle_buffer, 0),
            ("workers", workers, 0),
            ("prefetch", prefetch, 1),
            ("memory_megabytes", memory_megabytes, 0),
        ]:
            if value < least:
                raise ValueError(f"{type(self).__name__}.{name} is {value}: it must be at least {least}.")
        self.urls = urls
        self.shuffle_buffer = shuffle_buffer
        self.workers = workers
        self.prefetch = prefetch
        self.memory_megabytes = memory_megabytes

    def read(self, path: Path) -> Iterator:
        """The undecoded samples of one shard."""
        raise NotImplementedError

    def collate(self, raw: list) -> Batch:
        """Decodes samples into one batch."""
        raise NotImplementedError

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Endless batches; one may straddle two epochs, and all have the same size.

        Args:
            batch_size: samples a batch.
            seed: with the epoch's number it fixes the order.
            start: number of samples already consumed; they are passed over without being decoded.

        Returns:
            Batches of float32 ``images`` with their ``condition``. Closing the iterator ends its workers.

        Raises:
            ValueError: at once, a missing shard or embedded package; while iterating, a damaged shard or
                sample, one of another size or kind, or without what it should carry. The message names shard
                and sample.
        """
        assert batch_size >= 1, batch_size
        assert start >= 0, start
        memory = self.memory_megabytes * 2**20
        order = _Order(resolve(self.urls), seed, start, self.shuffle_buffer, memory, self.read, self.classes)
        source = _Batches(order, batch_size, self.collate)
        if self.workers == 0:
            return _raise_failures(_prefetch(source, self.prefetch))
        # Batches leave the loader in the workers' turn, so their order does not depend on who is faster.
        return _raise_failures(
            wds.WebLoader(source, batch_size=None, num_workers=self.workers, prefetch_factor=self.prefetch)
        )


class ShardStream(SampleStream):
    """Batches of images and class labels from webdataset shards, shuffled anew every epoch, without end.

    Nothing is read before ``batches`` is called.

    Args:
        urls: paths of tar files with braces ('data/faces-{000000..000127}.tar', several joined by '::'), or
            the name of an embedded data set: 'mnist' (5,000 digits), 'mnist-train' and 'mnist-heldout' (its
            first 4,500 and last 500).
        resolution: height and width in pixels that every image must have; None takes the images' own.
        channels: 1 (grey) or 3 (RGB); the image files must hold exactly these.
        labels: whether samples carry class labels (member ``<key>.cls``).
        classes: only samples of these classes; None takes all.
        shuffle_buffer: number of undecoded samples held to draw from; 0 keeps the order within the shuffled
            shards.
        workers: processes that decode ahead of the training loop; 0 decodes in a thread of this process,
            which is enough for small images.
        prefetch: batches (for each worker) made before they are asked for.
        memory_megabytes: shards are kept in memory, undecoded, up to this much; the others are read every
            epoch.

    Raises:
        ValueError: an argument outside its domain.
    """

    def __init__(
        self,
        *,
        urls: str,
        resolution: int | None = None,
        channels: int = 1,
        labels: bool = True,
        classes: Sequence[int] | None = None,
        shuffle_buffer: int = 5000,
        workers: int = 0,
        prefetch: int = 4,
        memory_megabytes: int = 64,
    ) -> None:
        if channels not in PILLOW_MODES:
            raise ValueError(f"ShardStream.channels is {channels}: choose 1 (grey) or 3 (RGB).")
        if classes is not None and not classes:
            raise ValueError("ShardStream.classes is empty: name at least one class, or None for all.")
        if resolution is not None and resolution < 1:
            raise ValueError(f"ShardStream.resolution is {resolution}: give pixels, or None for the images' own.")
        super().__init__(urls, shuffle_buffer, workers, prefetch, memory_megabytes)
        self.resolution = resolution
        self.channels = channels
        self.labels = labels
        self.classes = None if classes is None else frozenset(classes)

    def read(self, path: Path) -> Iterator[RawSample]:
        return read_shard(path)

    def collate(self, raw: list[RawSample]) -> Batch:
        """Images float32 [B, channels, H, W] in [-1, 1]; labels int64 [B], or None without ``labels``."""
        return _collate(raw, channels=self.channels, resolution=self.resolution, labels=self.labels)

    def describe(self) -> str:
        """One line for people, from the arguments alone."""
        size = f"{self.resolution}x{self.resolution}" if self.resolution else "images of their own size"
        colour = "grey" if self.channels == 1 else "RGB"
        return f"{self.urls}: {size}, {colour}{', classes' if self.labels else ''}"


def load_all(urls: str, *, resolution: int | None = None, channels: int = 1) -> tuple[Tensor, Tensor]:
    """A whole labelled data set in the shards' own order.

    Returns:
        ``(images, labels)``: float32 [N, channels, H, W] in [-1, 1] and int64 [N].

    Raises:
        ValueError: as ``ShardStream.batches``.
    """
    raw = [sample for path in resolve(urls) for sample in read_shard(path)]
    batch = _collate(raw, channels=channels, resolution=resolution, labels=True)
    return batch.images, batch.condition.labels
