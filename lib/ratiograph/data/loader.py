"""From the order of samples to decoded batches, in a thread or in worker processes.

The *global batch* number k holds the samples at positions ``start + k N`` to ``start + (k+1) N - 1``, N = ranks times
batch_size; rank r gets rows ``r batch_size`` to ``(r+1) batch_size - 1`` of it, and of W worker processes number
k mod W makes it. Every process walks the whole order and decodes only its own rows, so that neither ranks nor workers
change which sample lies where.

Where a GPU is in use, batches are pinned ahead of the consumer: their copies to it then go on beside its work.
"""

from __future__ import annotations

import itertools
import logging
import queue
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ratiograph.core.types import Batch, Condition
from ratiograph.data.sample_order import Order
from ratiograph.data.shards import DamagedSample
from ratiograph.data.tars import Damage

__all__ = ["Account", "Batches", "deliver"]

log = logging.getLogger(__name__)

PATIENCE = 1000
"""Samples before the fraction of damaged ones is judged, and damaged samples in a row that are the end."""
PINNED = 2
"""Batches of worker processes that lie pinned."""


class Decoder(Protocol):
    """What makes a batch of raw samples."""

    def prepared(self, raw: object) -> object:
        """The decoded sample; DamagedSample where it cannot be used."""

    def collated(self, raw: Sequence, prepared: Sequence, positions: Sequence[int], seed: int) -> Batch:
        """The batch of decoded samples; ``positions`` are their places in the endless order."""


@dataclass(frozen=True)
class Failure:
    """An error on its way from a worker to the consumer, who raises it without the worker's traceback."""

    message: str


@dataclass(frozen=True)
class Delivery:
    """A batch with what happened while it was made: the damaged samples, and what was left out since the start."""

    batch: Batch
    damaged: tuple[Damage, ...]
    rejected: Counter[str]

    def pinned(self) -> Delivery:
        """Whatever goes to the GPU in memory that it reads by itself; a caption stays where tokenizers read it."""
        told = self.batch.condition.parts()
        pinned = {name: value if name == "caption" else value.pin_memory() for name, value in told.items()}
        return replace(self, batch=Batch(self.batch.images.pin_memory(), Condition(**pinned)))


@dataclass
class Account:
    """What a stream has delivered, passed over and left out, as far as the consumer has come."""

    max_damaged: float
    used: int = 0
    damaged: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    named: set[str] = field(default_factory=set)

    def add(self, delivery: Delivery) -> None:
        """Enters a batch into the books.

        Raises:
            ValueError: more than ``max_damaged`` of all samples met so far were damaged.
        """
        self.used += len(delivery.batch)
        self.rejected = delivery.rejected
        for damage in delivery.damaged:
            self.damaged += damage.lost
            if damage.why not in self.named:
                self.named.add(damage.why)
                log.warning("Skipped (%d so far): %s", self.damaged, damage.why)
        if delivery.damaged and self.damaged > self.max_damaged * max(self.used, PATIENCE):
            raise ValueError(
                f"{self.damaged} of the first {self.used} samples are damaged, more than max_damaged="
                f"{self.max_damaged} allows; the last: {delivery.damaged[-1].why}"
            )


class _Lookahead:
    """The samples at the next positions, read no further than asked for."""

    def __init__(self, samples: Iterator):
        self.samples, self.waiting = samples, deque()

    def __getitem__(self, ahead: int) -> object:
        while len(self.waiting) <= ahead:
            self.waiting.append(next(self.samples))
        return self.waiting[ahead]

    def drop(self, count: int) -> None:
        """Moves on by ``count`` positions."""
        for _ in range(count):
            if self.waiting:
                self.waiting.popleft()
            else:
                next(self.samples)


@dataclass
class Batches(IterableDataset):
    """One rank's decoded batches of an order, without end.

    With ``tolerant``, the next sound sample of the order stands in for a damaged one, so that a position holds the same
    sample whichever rank and worker asks for it.
    """

    order: Order
    decoder: Decoder
    batch_size: int
    rank: int = 0
    ranks: int = 1
    tolerant: bool = False

    def __iter__(self) -> Iterator[Delivery | Failure]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        samples = _Lookahead(iter(self.order))
        try:
            for count in itertools.count():
                if count % workers == number:
                    yield self._delivery(samples, count)
                samples.drop(self.ranks * self.batch_size)
        except ValueError as error:
            yield Failure(str(error))
        except OSError as error:
            yield Failure(f"Reading the data failed: {error}. The same command continues the run.")

    def _delivery(self, samples: _Lookahead, count: int) -> Delivery:
        first = self.rank * self.batch_size
        damaged: list[Damage] = []
        raw, prepared = zip(*(self._sound(samples, first + k, damaged) for k in range(self.batch_size)), strict=True)
        position = self.order.start + count * self.ranks * self.batch_size + first
        positions = range(position, position + self.batch_size)
        batch = self.decoder.collated(raw, prepared, positions, self.order.seed)
        return Delivery(batch, tuple(damaged), Counter(self.order.rejected))

    def _sound(self, samples: _Lookahead, ahead: int, damaged: list[Damage]) -> tuple[object, object]:
        """The sample at a position, raw and decoded, or the next one that can be used."""
        for k in itertools.count(ahead):
            try:
                if isinstance(samples[k], Damage):
                    raise DamagedSample(samples[k].why)
                return samples[k], self.decoder.prepared(samples[k])
            except DamagedSample as error:
                if not self.tolerant:
                    raise
                if k - ahead >= PATIENCE:
                    raise ValueError(f"{PATIENCE} samples in a row are damaged, the last: {error}") from None
                if k == ahead:  # others are counted where they are met themselves
                    damaged.append(samples[k] if isinstance(samples[k], Damage) else Damage(str(error)))
        raise AssertionError("the order has no end")


def _prefetch(source: Iterable[Delivery | Failure], ahead: int) -> Iterator[Delivery | Failure]:
    """Runs ``source`` in a background thread, at most ``ahead`` items before the consumer."""
    ready: queue.Queue = queue.Queue(ahead)
    stopped = threading.Event()

    def put(item: Delivery | Failure) -> None:
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
            put(Failure(f"Reading the data failed: {type(error).__name__}: {error}"))

    thread = threading.Thread(target=run, name="ShardStream", daemon=True)
    thread.start()
    try:
        while True:
            yield ready.get()
    finally:
        stopped.set()
        thread.join(timeout=5)


def _from_workers(source: Batches, workers: int, ahead: int) -> Iterator[Delivery | Failure]:
    # Batches leave the loader in the workers' turn, so their order does not depend on who is faster. Its seed for the
    # workers, which they do not use, is not drawn from the run's own random numbers.
    loader = DataLoader(
        source, batch_size=None, num_workers=workers, prefetch_factor=ahead, generator=torch.Generator()
    )
    before = signal.getsignal(signal.SIGCHLD)
    try:
        batches = iter(loader)
        if threading.current_thread() is threading.main_thread():
            # torch's handler raises wherever the main thread is; without it the death shows here, some seconds later.
            signal.signal(signal.SIGCHLD, before)
        yield from batches
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        yield Failure(
            f"A process that reads the data has died ({error}). Often the machine ran out of memory: lower the "
            "stream's workers, prefetch or shuffle_buffer. The same command continues from the last checkpoint."
        )


def _pinned(source: Iterable[Delivery | Failure]) -> Iterator[Delivery | Failure]:
    for item in source:
        yield item.pinned() if isinstance(item, Delivery) else item


def _made(source: Batches, workers: int, ahead: int) -> Iterator[Delivery | Failure]:
    """What ``source`` makes ahead of the consumer, in worker processes or a thread; pinned in a thread either way."""
    made = _from_workers(source, workers, ahead) if workers else source
    if torch.cuda.is_initialized():
        return _prefetch(_pinned(made), ahead if not workers else PINNED)
    return made if workers else _prefetch(made, ahead)


def deliver(source: Batches, workers: int, ahead: int, account: Account) -> Iterator[Batch]:
    """The batches of ``source``, made ``ahead`` of the consumer by so many worker processes, or by a thread for 0.

    Raises:
        ValueError: while iterating, whatever the source fails with, a worker that died, too much damage.
    """
    with closing(_made(source, workers, ahead)) as items:
        for item in items:
            if isinstance(item, Failure):
                raise ValueError(item.message)
            account.add(item)
            yield item.batch
