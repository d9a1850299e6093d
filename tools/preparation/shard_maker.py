"""Makes shards of a source: in parallel, resumable, and always the same to the last byte.

The source's entries are put in a fixed random order and cut into consecutive, nearly equal parts, one a shard. Worker
processes prepare the images; this process writes shard after shard, each aside and then renamed. A *record* describes
a finished shard. Until all are finished the records lie in ``.progress/`` beside the shards, afterwards in the
index. A sample's key is its number in the source's own order, so that a sample can be traced to its image.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from preparation.cropping import Preparation
from preparation.parallel_map import in_order
from preparation.sources import Entry, Listing, Source
from preparation.tar_samples import Numbered, Prepared, Skipped, prepare_entries
from ratiograph.core.files import Missing, write_atomically
from ratiograph.core.foreign import read_json
from ratiograph.data.shards import INDEX

__all__ = ["Watch", "make_shards"]

PROGRESS = ".progress"
SETTINGS = "settings.json"
CHUNK = 32  # images a message to a worker
END = bytes(2 * tarfile.BLOCKSIZE)  # ends a tar archive


class Watch:
    """Receives reports of the progress; this base class ignores them."""

    def begin(self, total: int, done: int) -> None:
        """``total`` images belong into shards, ``done`` of them lie in finished ones."""

    def advance(self) -> None:
        """One more image was prepared or skipped."""

    def skip(self, skipped: Skipped) -> None:
        """An image was skipped."""


# --- one shard ------------------------------------------------------------------------------------------------


@dataclass
class _Writer:
    """Writes the samples of one shard and counts them."""

    samples: int = 0
    sizes: set[tuple[int, int]] = field(default_factory=set)
    skipped: list[Skipped] = field(default_factory=list)

    def write(self, results: Iterable[Prepared | Skipped], on_skip: Callable[[Skipped], None], file: BinaryIO) -> None:
        for result in results:
            if isinstance(result, Skipped):
                self.skipped.append(result)
                on_skip(result)
            else:
                file.write(result.blocks)
                self.samples += 1
                self.sizes.add(result.size)
        file.write(END)

    def record(self, path: Path) -> dict:
        """The record of the shard at ``path``; ``size`` is None where the images' sizes differ."""
        skipped = [{"name": one.name, "reason": one.reason, "shard": path.name} for one in self.skipped]
        size = list(*self.sizes) if len(self.sizes) == 1 else None
        return {"samples": self.samples, **_fingerprint(path), "size": size, "skipped": skipped}


def _fingerprint(path: Path) -> dict[str, int | str]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _intact(path: Path, record: Mapping | None) -> bool:
    """Whether the shard at ``path`` is the one of its record."""
    if record is None or not path.is_file() or path.stat().st_size != record["bytes"]:
        return False
    return _fingerprint(path)["sha256"] == record["sha256"]


# --- all shards -----------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Job:
    """Shards on their way into ``folder``; ``settings`` fixes every byte of them."""

    folder: Path
    name: str
    settings: dict
    listing: Listing
    parts: list[list[Numbered]]
    preparation: Preparation
    max_corrupt: float
    workers: int
    watch: Watch
    records: dict[str, dict] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)

    def path(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:06d}.tar"

    def claim(self) -> None:
        """Takes the folder, with what an earlier attempt at the same shards left in it."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file: give a folder for the shards")
        earlier = _read_json(self.folder / INDEX) or _read_json(self.folder / PROGRESS / SETTINGS)
        if earlier is None:
            if others := _others(self.folder):
                raise ValueError(f"{self.folder} holds other files already ({others}): give a new or empty folder")
            write_atomically(self.folder / PROGRESS / SETTINGS, _json_bytes({"settings": self.settings}))
        elif differing := _differences(earlier.get("settings"), self.settings):
            raise ValueError(
                f"{self.folder} holds shards made with other settings: {differing}. Repeat the earlier command, give "
                "another folder, or delete this one"
            )
        else:
            try:
                self.records = _records(self.folder, earlier)
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"the index or the records in {self.folder} are damaged ({error!r}): delete the folder"
                ) from error

    def run(self) -> None:
        paths = [self.path(number) for number in range(len(self.parts))]
        pending = [number for number, path in enumerate(paths) if not _intact(path, self.records.get(path.name))]
        for number in pending:
            self.records.pop(paths[number].name, None)
        for record in self.records.values():
            self.skipped += [Skipped(one["name"], one["reason"]) for one in record["skipped"]]
        total = len(self.listing.entries)
        self.watch.begin(total, total - sum(len(self.parts[number]) for number in pending))
        self.check_skipped()
        chunks = (chunk for number in pending for chunk in _chunks(self.parts[number]))
        with closing(in_order(partial(prepare_entries, self.preparation), chunks, self.workers)) as prepared:
            results = self.counted(itertools.chain.from_iterable(prepared))
            for number in pending:
                self.write(number, itertools.islice(results, len(self.parts[number])))

    def counted(self, results: Iterable[Prepared | Skipped]) -> Iterator[Prepared | Skipped]:
        for result in results:
            self.watch.advance()
            yield result

    def write(self, number: int, results: Iterable[Prepared | Skipped]) -> None:
        writer, path = _Writer(), self.path(number)
        write_atomically(path, partial(writer.write, results, self.skip))
        if not writer.samples:
            raise ValueError(f"all images of {path.name} are damaged, and a shard cannot be empty: make fewer shards")
        self.records[path.name] = writer.record(path)
        write_atomically(self.folder / PROGRESS / f"{path.name}.json", _json_bytes(self.records[path.name]))

    def skip(self, skipped: Skipped) -> None:
        self.watch.skip(skipped)
        self.skipped.append(skipped)
        self.check_skipped()

    def check_skipped(self) -> None:
        total = len(self.listing.entries)
        if len(self.skipped) > self.max_corrupt * total:
            first = "; ".join(f"{one.name}: {one.reason}" for one in self.skipped[:3])
            raise ValueError(
                f"{len(self.skipped)} of {total} images cannot be used, more than --max_corrupt={self.max_corrupt:g} "
                f"allows: {first}{'; ...' if len(self.skipped) > 3 else ''}. Mend the source or allow more; the same "
                "command continues from here"
            )

    def finish(self) -> dict:
        """Writes the index and clears away what only an unfinished job needs."""
        records = [self.records[self.path(number).name] for number in range(len(self.parts))]
        sizes = {tuple(record["size"] or ()) for record in records}
        index = {
            "shards": {
                self.path(number).name: {key: record[key] for key in ("samples", "bytes", "sha256")}
                for number, record in enumerate(records)
            },
            "source": self.settings["source"],
            "samples": sum(record["samples"] for record in records),
            "size": list(*sizes) or None if len(sizes) == 1 else None,
            "members": sorted(self.listing.entries[0].members),
            "classes": self.listing.classes,
            "class_names": self.listing.class_names and list(self.listing.class_names),
            "skipped": [one for record in records for one in record["skipped"]],
            "settings": self.settings,
        }
        if _read_json(self.folder / INDEX) != index:
            write_atomically(self.folder / INDEX, _json_bytes(index))
        shutil.rmtree(self.folder / PROGRESS, ignore_errors=True)
        for temporary in self.folder.glob(f".{self.name}-*.tmp"):  # of attempts that were killed
            temporary.unlink(missing_ok=True)
        return index


def _chunks(entries: Sequence[Numbered]) -> Iterator[Sequence[Numbered]]:
    return (entries[start : start + CHUNK] for start in range(0, len(entries), CHUNK))


def _json_bytes(document: Mapping) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()


def _read_json(path: Path) -> dict | None:
    """The object in one of the maker's own files; None without the file."""
    try:
        found = read_json(path)
    except Missing:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, or give another folder") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (it is no object with named fields): delete it, or give another folder")
    return found


def _others(folder: Path) -> str:
    """The first names in a folder, without ``.progress``."""
    names = sorted(path.name for path in folder.iterdir() if path.name != PROGRESS) if folder.is_dir() else []
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def _differences(earlier: Mapping | None, settings: Mapping) -> str:
    if earlier is None:
        return "they are of another data set"
    keys = [key for key in (earlier | settings) if earlier.get(key) != settings.get(key)]
    return ", ".join(f"{key}={earlier.get(key)} (now {settings.get(key)})" for key in keys)


def _records(folder: Path, earlier: Mapping) -> dict[str, dict]:
    """Records of finished shards: from the index of a finished job, or from the files of an unfinished one."""
    records = {
        name: {**entry, "size": earlier["size"], "skipped": [one for one in earlier["skipped"] if one["shard"] == name]}
        for name, entry in earlier.get("shards", {}).items()
    }
    paths = (folder / PROGRESS).glob("*.tar.json")
    return records | {path.name.removesuffix(".json"): _read_json(path) for path in paths}


def make_shards(
    source: Source,
    folder: Path,
    *,
    name: str | None = None,
    resolution: int | None = None,
    channels: int = 3,
    format: str | None = None,
    shards: int | None = None,
    shard_samples: int | None = None,
    shuffle_seed: int | None = 0,
    max_corrupt: float = 1e-3,
    workers: int = 1,
    watch: Watch | None = None,
) -> dict:
    """Writes the shards ``<folder>/<name>-000000.tar`` ... of a source, and their index.

    Killed at any time and called again, it continues, and the shards are the same to the last byte, as with any other
    number of workers. A damaged image is skipped, reported to ``watch`` and listed in the index.

    Args:
        source: what to make shards of.
        folder: new, empty, or holding what an earlier call with the same arguments left.
        name: stem of the shard files; None is the source's kind, and the resolution where one is given.
        resolution, channels, format: see `Preparation`.
        shards: number of files; None is as many as ``shard_samples`` takes.
        shard_samples: samples a file, at most; None is the source's own choice.
        shuffle_seed: of the samples' random order; None keeps the source's own order.
        max_corrupt: fraction of the images that may be skipped.
        workers: processes that prepare images; 1 works in this process.
        watch: receives reports of the progress.

    Returns:
        The index: ``shards`` {file: {samples, bytes, sha256}}, ``source``, ``samples``, ``size`` [width, height] or
        None where sizes differ, ``members`` (suffixes beside the image's), ``classes`` and ``class_names`` or None,
        ``skipped`` [{name, reason, shard}], ``settings``.

    Raises:
        ValueError: the source cannot be used, too many images are damaged, the folder holds something else or cannot
            be written.
    """
    listing = source.listing()
    total = len(listing.entries)
    name = name or f"{source.kind}{resolution or ''}"
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"--name={name}: give letters, digits, - and _ only")
    count = shards or -(-total // (shard_samples or source.shard_samples))
    if count > total:
        raise ValueError(f"--shards={count}: the source has only {total} images")
    image_options = {"resolution": resolution, "channels": channels, "format": format}
    shard_options = {"shards": count, "shuffle_seed": shuffle_seed, "images": total}
    contents = {"contents": _contents(listing.entries)}
    settings = source.settings() | {"name": name} | image_options | shard_options | contents
    job = _Job(
        folder=Path(folder),
        name=name,
        settings=settings,
        listing=listing,
        parts=_parts(listing.entries, count, shuffle_seed),
        preparation=Preparation(**image_options, new_format=source.format, normalize=source.normalize),
        max_corrupt=max_corrupt,
        workers=workers,
        watch=watch or Watch(),
    )
    job.claim()
    job.run()
    return job.finish()


def _parts(entries: Sequence[Entry], count: int, shuffle_seed: int | None) -> list[list[Numbered]]:
    """The entries in their random order, or without a seed in their own, cut into ``count`` nearly equal parts."""
    total = len(entries)
    order = np.arange(total) if shuffle_seed is None else np.random.RandomState(shuffle_seed).permutation(total)
    numbered = [(number, entries[number]) for number in order.tolist()]
    bounds = np.linspace(0, total, count + 1).astype(int)
    return [numbered[first:last] for first, last in itertools.pairwise(bounds)]


def _contents(entries: Sequence[Entry]) -> str:
    """SHA-256 of what the source lists, so that a source that has changed is noticed."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(f"{entry.name} {entry.image.size} {sorted(entry.members.items())}\n".encode())
    return digest.hexdigest()[:16]
