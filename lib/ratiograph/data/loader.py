"""Decodes samples and puts them into batches, ahead of the consumer, in a thread or in worker processes.

The *global batch* number k holds the samples at positions ``start + k N`` to ``start + (k+1) N - 1``, N = ranks times
batch_size; rank r gets rows ``r batch_size`` to ``(r+1) batch_size - 1`` of it, and of W worker processes number
k mod W decodes it. Every process goes through all samples and decodes only its own rows, so that the position of a
sample depends neither on the number of ranks nor on that of workers.

Where a GPU is in use, batches are pinned ahead of the consumer, so that copies to the GPU overlap with its work.
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

from ratiograph.core.foreign import shown
from ratiograph.core.types import Batch, Condition
from ratiograph.data.raw_samples import DamagedSample
from ratiograph.data.remote import forget_fetched
from ratiograph.data.sample_order import Order
from ratiograph.data.tars import Damage

__all__ = ["Account", "Batches", "deliver"]

log = logging.getLogger(__name__)

PATIENCE = 1000
"""``max_damaged`` is a fraction of at least so many samples; so many damaged samples in a row are an error."""
PINNED = 2
"""Batches of worker processes that are pinned ahead of the consumer."""


class Decoder(Protocol):
    """Decodes raw samples and puts them into batches."""

    def prepared(self, raw: object) -> object:
        """The decoded sample; DamagedSample where it cannot be used."""

    def collated(self, raw: Sequence, prepared: Sequence, positions: Sequence[int], seed: int) -> Batch:
        """The batch of decoded samples; ``positions`` are their places in the endless order."""


@dataclass(frozen=True)
class Failure:
    """An error in a worker; the consumer raises it, without the worker's traceback."""

    message: str


@dataclass(frozen=True)
class Delivery:
    """A batch, the damaged samples met for it, and the number of samples rejected since the start, by reason."""

    batch: Batch
    damaged: tuple[Damage, ...]
    rejected: Counter[str]

    def pinned(self) -> Delivery:
        """The delivery with its tensors in pinned memory, except the caption, which tokenizers read on the CPU."""
        parts = self.batch.condition.parts()
        pinned = {name: value if name == "caption" else value.pin_memory() for name, value in parts.items()}
        return replace(self, batch=Batch(self.batch.images.pin_memory(), Condition(**pinned), self.batch.places))


@dataclass
class Account:
    """Counts of the samples that a stream has delivered, skipped as damaged and rejected up to the last batch taken."""

    max_damaged: float
    used: int = 0
    damaged: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    reported: set[str] = field(default_factory=set)

    def add(self, delivery: Delivery) -> None:
        """Counts a batch, and logs each damaged sample once.

        Raises:
            ValueError: more than ``max_damaged`` of all samples met so far were damaged.
        """
        self.used += len(delivery.batch)
        self.rejected = delivery.rejected
        for damage in delivery.damaged:
            self.damaged += damage.lost
            if damage.message not in self.reported:
                self.reported.add(damage.message)
                log.warning("Skipped (%d so far): %s", self.damaged, damage.message)
        if delivery.damaged and self.damaged > self.max_damaged * max(self.used, PATIENCE):
            raise ValueError(
                f"{self.damaged} of the first {self.used} samples are damaged, more than max_damaged="
                f"{self.max_damaged} allows; the last: {delivery.damaged[-1].message}"
            )


class _Lookahead:
    """Indexes the samples at the next positions; reads no more of them than needed."""

    def __init__(self, samples: Iterator):
        self.samples, self.waiting = samples, deque()

    def __getitem__(self, ahead: int) -> object:
        while len(self.waiting) <= ahead:
            self.waiting.append(next(self.samples))
        return self.waiting[ahead]

    def drop(self, count: int) -> None:
        """Moves on by ``count`` positions."""
        for _ in range(count):
            self[0]
            self.waiting.popleft()


@dataclass
class Batches(IterableDataset):
    """One rank's decoded batches of an order, without end.

    With ``tolerant``, the next sound sample of the order replaces a damaged one, so that a position holds the same
    sample on every rank and worker.
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
        try:
            samples = _Lookahead(iter(self.order))
            for count in itertools.count():
                if count % workers == number:
                    yield self._delivery(samples, count)
                samples.drop(self.ranks * self.batch_size)
        except ValueError as error:
            yield Failure(str(error))
        except OSError as error:
            yield Failure(f"Reading the data failed: {shown(error, 1000)}. The same command continues the run.")
        except Exception as error:  # what escapes from a worker process comes with its whole traceback as the message
            yield _unforeseen(error)

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
            sample = samples[k]
            try:
                if isinstance(sample, Damage):
                    raise DamagedSample(sample.message)
                return sample, self.decoder.prepared(sample)
            except DamagedSample as error:
                if not self.tolerant:
                    raise DamagedSample(f"{error}{forget_fetched(error.shard) if error.shard else ''}") from error
                if k - ahead >= PATIENCE:
                    raise ValueError(f"{PATIENCE} samples in a row are damaged, the last: {error}") from None
                if k == ahead:  # a later sample is counted at its own position
                    damaged.append(sample if isinstance(sample, Damage) else Damage(str(error)))
        raise AssertionError("the order has no end")


def _unforeseen(error: BaseException) -> Failure:
    return Failure(f"Reading the data failed: {type(error).__name__}: {shown(error, 1000)}")


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
            put(_unforeseen(error))

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
    except (RuntimeError, OSError) as error:
        yield Failure(
            f"A process that reads the data has died ({shown(error, 1000)}). Often the machine ran out of memory: lower"
            " the stream's workers, prefetch or shuffle_buffer. The same command continues from the last checkpoint."
        )


def _deliveries(source: Batches, workers: int, ahead: int) -> Iterator[Delivery | Failure]:
    """The items of ``source`` from worker processes or a thread; a thread pins them if a GPU is in use."""
    items = _from_workers(source, workers, ahead) if workers else source
    if torch.cuda.is_initialized():
        pinned = (item.pinned() if isinstance(item, Delivery) else item for item in items)
        return _prefetch(pinned, PINNED if workers else ahead)
    return items if workers else _prefetch(items, ahead)


def deliver(source: Batches, workers: int, ahead: int, account: Account) -> Iterator[Batch]:
    """The batches of ``source``, decoded up to ``ahead`` before the consumer by worker processes, or a thread if 0.

    Raises:
        ValueError: while iterating: the source failed, a worker died, or too many samples are damaged.
    """
    with closing(_deliveries(source, workers, ahead)) as items:
        for item in items:
            if isinstance(item, Failure):
                raise ValueError(item.message)
            account.add(item)
            yield item.batch
