"""The order of a stream's samples.

An *epoch* is one pass over all shards; ``position`` counts the samples of the endless sequence of epochs from 0. The
sample at a position is a function of the seed, the list of shards and their contents alone: shards are permuted, read
one after another, and their undecoded samples pass a shuffle buffer.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import webdataset as wds

from ratiograph.data.remote import RemoteShard, fetch_ahead, forgetting, local
from ratiograph.data.tars import Damage

__all__ = ["Order", "mix"]


def mix(*parts: int | str) -> int:
    """A seed made of several parts by hashing; unlike in a sum, epoch 1 of seed 0 differs from epoch 0 of seed 1."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big")


@dataclass
class _ShardReader:
    """Reads shards any number of times; those that fit in ``memory`` bytes are kept, and read from disk once."""

    read: Callable[[Path], Iterator]
    memory: int
    held: dict[Path | RemoteShard, list] = field(default_factory=dict)

    def samples(self, shard: Path | RemoteShard) -> Iterator:
        if shard in self.held:
            return iter(self.held[shard])
        path = local(shard)
        if not path.is_file():
            raise ValueError(f"Shard {path} has vanished: put it back; the same command continues the run.")
        size = path.stat().st_size
        if size > self.memory:
            return self._read(path)
        self.memory -= size
        self.held[shard] = list(self._read(path))
        return iter(self.held[shard])

    def _read(self, path: Path) -> Iterator:
        with forgetting(path):
            yield from self.read(path)


class _Unread(NamedTuple):
    """A sample in the shuffle buffer that has not been read: sample ``number`` of the epoch's shard ``turn``."""

    turn: int
    number: int


@dataclass
class Order:
    """The endless, undecoded sequence of samples from position ``start`` on.

    Args:
        shards: files, or remote ones that are fetched when their turn comes.
        seed: with the epoch's number it fixes the order.
        start: the first position.
        shuffle_buffer: number of samples held to draw from.
        memory: bytes of shards kept undecoded.
        read: the samples of one file.
        count: how many samples ``read`` gives, found without decoding them.
        rejects: why a sample is left out of the sequence, or None where it belongs to it. None takes all samples.
        empty_message: the error's message where an epoch has no sample.
    """

    shards: Sequence[Path | RemoteShard]
    seed: int
    start: int
    shuffle_buffer: int
    memory: int
    read: Callable[[Path], Iterator]
    count: Callable[[Path | RemoteShard], int]
    rejects: Callable[[object], str | None] | None = None
    empty_message: str = "the shards hold no sample"
    rejected: Counter[str] = field(default_factory=Counter)
    """How many samples were left out so far, by reason."""
    counts: dict[Path | RemoteShard, int] = field(default_factory=dict)
    """Samples of each shard; filled only if ``start`` is not 0 and nothing is rejected."""

    def __iter__(self) -> Iterator:
        reader = _ShardReader(self.read, self.memory)
        if not self.start:
            return self._epochs(reader, 0)
        epoch, skip = divmod(self.start, self._samples_an_epoch(reader))
        if self.rejects:  # samples have to be read to know which are left out
            return itertools.islice(self._epochs(reader, epoch), skip, None)
        return itertools.chain(self._rest_of_epoch(reader, epoch, skip), self._epochs(reader, epoch + 1))

    def _samples_an_epoch(self, reader: _ShardReader) -> int:
        """The number of samples of one epoch; with ``rejects`` it may stop counting above ``start``."""
        if self.rejects is None:
            self.counts = {shard: self.count(shard) for shard in self.shards}
            found = sum(self.counts[shard] for shard in self.shards)
        else:
            everything = itertools.chain.from_iterable(reader.samples(shard) for shard in self.shards)
            wanted = (sample for sample in everything if isinstance(sample, Damage) or not self.rejects(sample))
            found = sum(1 for _ in itertools.islice(wanted, self.start + 1))
        if not found:
            raise ValueError(self.empty_message)
        return found

    def _permuted(self, epoch: int) -> tuple[random.Random, list[Path | RemoteShard]]:
        rng = random.Random(mix(self.seed, epoch))
        return rng, rng.sample(self.shards, len(self.shards))

    def _shuffled(self, samples: Iterator, rng: random.Random) -> Iterator:
        return wds.shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, rng=rng)(samples)

    def _epochs(self, reader: _ShardReader, first: int) -> Iterator:
        # webdataset's own deterministic shuffle counts epochs in an attribute, and every worker process has a copy
        # that starts at 0; here the epoch's number is an argument.
        for epoch in itertools.count(first):
            rng, shards = self._permuted(epoch)
            empty = True
            for sample in self._shuffled(self._accepted(reader, shards), rng):
                empty = False
                yield sample
            if empty:
                raise ValueError(self.empty_message)

    def _accepted(self, reader: _ShardReader, shards: Sequence[Path | RemoteShard]) -> Iterator:
        for shard in _fetching_ahead(shards):
            for sample in reader.samples(shard):
                reason = self.rejects(sample) if self.rejects and not isinstance(sample, Damage) else None
                if reason is None:
                    yield sample
                else:
                    self.rejected[reason] += 1

    def _rest_of_epoch(self, reader: _ShardReader, epoch: int, skip: int) -> Iterator:
        """An epoch from its sample ``skip`` on; shards of which every sample is skipped are not read.

        The shuffle does not depend on what it shuffles: until ``skip`` samples have left it, it is given the places of
        samples instead. Of these, the ones that remain in its buffer are read afterwards.
        """
        rng, shards = self._permuted(epoch)
        waiting: list[set[int]] = [set() for _ in shards]  # numbers of the unread samples in the shuffle buffer
        skipping = True

        def places() -> Iterator:
            for turn, shard in enumerate(shards):
                count, number = self.counts[shard], 0
                while skipping and number < count:
                    waiting[turn].add(number)
                    yield _Unread(turn, number)
                    number += 1
                if number < count:
                    yield from itertools.islice(reader.samples(shard), number, None)

        shuffled = self._shuffled(places(), rng)
        for skipped in itertools.islice(shuffled, skip):
            waiting[skipped.turn].remove(skipped.number)
        skipping = False
        read: dict[int, dict[int, object]] = {}
        for place in shuffled:
            if not isinstance(place, _Unread):
                yield place
                continue
            if place.turn not in read:
                numbered = enumerate(itertools.islice(reader.samples(shards[place.turn]), max(waiting[place.turn]) + 1))
                read[place.turn] = {number: sample for number, sample in numbered if number in waiting[place.turn]}
            yield read[place.turn].pop(place.number)


def _fetching_ahead(shards: Sequence[Path | RemoteShard]) -> Iterator[Path | RemoteShard]:
    """``shards``; the one after the current is fetched meanwhile."""
    for turn, shard in enumerate(shards):
        for following in shards[turn + 1 : turn + 2]:
            fetch_ahead(following)
        yield shard
