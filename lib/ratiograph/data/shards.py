"""Shards: webdataset tar files of encoded images, and the index that lets a damaged one be recognised.

A shard is a tar archive whose members share a key: ``000123.png`` is the image and ``000123.cls`` the class
index in ASCII digits. ``index.json`` beside the shards records, for every shard, its number of samples, its
size in bytes and its SHA-256. The index is optional for shards made elsewhere; samples are then counted from the
archive's headers where their number is needed.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import webdataset as wds

from ratiograph.core.foreign import read_json
from ratiograph.data.raw_samples import DamagedSample, RawImage, raw_image
from ratiograph.data.tars import Damage, read_groups, shard_damage

__all__ = [
    "INDEX",
    "count_items",
    "count_samples",
    "file_digest",
    "index_entry",
    "read_samples",
    "read_shard",
    "verify_shard",
    "write_shards",
]

INDEX = "index.json"


# ------------------------------------------------------------------------------------------------ writing


def write_shards(folder: Path, name: str, samples: Sequence[Mapping[str, object]], shards: int) -> list[Path]:
    """Writes ``samples`` into ``shards`` files ``<folder>/<name>-000000.tar`` ... and their index.

    The folder appears whole or not at all: everything is written aside, flushed to disk and renamed.

    Args:
        folder: does not exist yet, or holds an older attempt, which is replaced.
        name: stem of the shard files.
        samples: webdataset samples, ``{"__key__": str, "png": bytes, "cls": bytes}``; split into consecutive,
            nearly equal parts.
        shards: number of files, at most ``len(samples)``.

    Returns:
        The shard paths in order.

    Raises:
        ValueError: the folder cannot be written (full disk, no permission).
    """
    assert 1 <= shards <= len(samples), (shards, len(samples))
    index = {}
    bounds = np.linspace(0, len(samples), shards + 1).astype(int).tolist()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True
        ) as aside:
            for number, (first, last) in enumerate(itertools.pairwise(bounds)):
                path = Path(aside) / f"{name}-{number:06d}.tar"
                _write_tar(path, samples[first:last])
                entry = {"samples": last - first, "bytes": path.stat().st_size, "sha256": file_digest(path)}
                index[path.name] = entry
            (Path(aside) / INDEX).write_text(json.dumps({"shards": index}, indent=1) + "\n")
            _replace_folder(Path(aside), folder)
    except OSError as error:
        raise ValueError(
            f"Cannot write shards to {folder}: {error.strerror or error}. Free some space or choose another "
            "folder (the cache folder is set by the environment variable RATIOGRAPH_CACHE)."
        ) from error
    return sorted(folder / shard for shard in index)


def _write_tar(path: Path, samples: Sequence[Mapping[str, object]]) -> None:
    with open(path, "wb") as file:
        with wds.TarWriter(file, encoder=False, mtime=0) as writer:
            for sample in samples:
                writer.write(dict(sample))
        file.flush()
        os.fsync(file.fileno())


def _replace_folder(aside: Path, folder: Path) -> None:
    """Renames ``aside`` to ``folder``, unless another process has just written a complete ``folder``."""
    os.chmod(aside, 0o755)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        os.rename(aside, folder)
    except OSError:
        if not (folder / INDEX).is_file():
            raise


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------ checking


def index_entry(path: Path) -> Mapping[str, object] | None:
    """The entry of a shard in the index beside it: ``samples``, ``bytes``, ``sha256``.

    Returns:
        The entry, or None where there is no index or no such entry.

    Raises:
        ValueError: the index is damaged.
    """
    index = path.parent / INDEX
    try:
        state = index.stat()
    except OSError:
        return None
    try:
        entry = _index(index, state.st_size, state.st_mtime_ns).get(path.name)
        assert entry is None or all(isinstance(entry[part], int) for part in ("samples", "bytes")), path.name
        assert entry is None or 0 <= entry["samples"] <= entry["bytes"], path.name
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"The shard index {index} is damaged ({error}). Delete it (the shards can be read without one) or write "
            "the shards anew."
        ) from error
    return entry


@functools.lru_cache(maxsize=16)  # called for every shard of a folder; size and time change with the file
def _index(path: Path, size: int, modified: int) -> dict:
    return read_json(path)["shards"]


def verify_shard(path: Path, *, contents: bool) -> bool:
    """Whether the shard exists and has the size (with ``contents`` also the SHA-256) that its index states."""
    entry = index_entry(path)
    if entry is None or not path.is_file() or path.stat().st_size != entry["bytes"]:
        return False
    return not contents or file_digest(path) == entry["sha256"]


def _indexed_count(path: Path) -> int | None:
    """Number of samples of a shard by its index; None without an index.

    Raises:
        DamagedSample: the shard has another size than the index states.
    """
    entry = index_entry(path)
    if entry is None:
        return None
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise DamagedSample(shard_damage(path, f"it has {size} bytes, its index says {entry['bytes']}"))
    return entry["samples"]


def count_samples(path: Path) -> int:
    """Number of samples of one shard: from the index, else its headers.

    The counts that img2dataset writes beside its shards are not read: they still hold after samples were removed.

    Raises:
        DamagedSample: the shard is damaged.
    """
    indexed = _indexed_count(path)
    if indexed is not None:
        return indexed
    state = path.stat()
    return _count_in_headers(path, state.st_size, state.st_mtime_ns)


@functools.cache  # called whenever a stream resumes; size and time change with the file
def _count_in_headers(path: Path, size: int, modified: int) -> int:
    found = 0
    for group in read_groups(path, contents=False):
        if isinstance(group, Damage):
            raise DamagedSample(group.message)
        found += 1
    return found


def count_items(path: Path, raw: Callable[[Path, Mapping[str, object]], object]) -> int:
    """Number of items that `read_samples` gives for a shard if ``tolerant``; reads the index or the headers alone."""
    entry = index_entry(path)
    if entry is not None and path.stat().st_size == entry["bytes"]:
        return entry["samples"]
    return sum(1 for _ in _tolerant(path, _items(path, raw, contents=False)))


# ------------------------------------------------------------------------------------------------ reading


Raw = TypeVar("Raw")


def read_shard(path: Path, *, tolerant: bool = False) -> Iterator[RawImage | Damage]:
    """The images of one shard in their order in the file, undecoded; as `read_samples`."""
    return read_samples(path, raw_image, tolerant=tolerant)


def read_samples(
    path: Path, raw: Callable[[Path, Mapping[str, object]], Raw], *, tolerant: bool = False
) -> Iterator[Raw | Damage]:
    """The samples of one shard in their order in the file, each built by ``raw`` from its members.

    Args:
        path: the shard.
        raw: builds a sample from ``(path, {"__key__": key, suffix: bytes, ...})``, or raises DamagedSample.
        tolerant: whether a damaged sample is given as a `Damage` after the shard's sound samples, instead of an error.
            If the shard has the size that the index states, the number of items is the index's too, so that damage does
            not move the samples of other shards; in a shard of another size, one `Damage` counts all missing samples.

    Raises:
        DamagedSample: (unless ``tolerant``) the shard is damaged or empty, or ``raw`` refuses a sample; names shard
            and sample.
    """
    items = _items(path, raw)
    yield from _tolerant(path, items) if tolerant else _strict(path, items)


def _items(path: Path, raw: Callable[[Path, Mapping[str, object]], Raw], *, contents: bool = True) -> Iterator:
    """A sample or a `Damage` for every group of members, as they stand in the file."""
    for group in read_groups(path, contents=contents):
        try:
            yield group if isinstance(group, Damage) else raw(path, group)
        except DamagedSample as error:
            yield Damage(str(error))


def _strict(path: Path, items: Iterator) -> Iterator:
    """``items``; a damaged or missing one is an error."""
    indexed, found = _indexed_count(path), 0
    for item in items:
        if isinstance(item, Damage):
            raise DamagedSample(item.message)
        yield item
        found += 1
    if not found or indexed not in (None, found):
        raise DamagedSample(_missing_samples(path, found, indexed))


def _missing_samples(path: Path, found: int, indexed: int | None) -> str:
    return shard_damage(path, "it holds no samples" if indexed is None else f"{found} samples can be read of {indexed}")


def _tolerant(path: Path, items: Iterator) -> Iterator:
    """The sound ones of ``items``, then a `Damage` for those that are missing.

    One damaged sample can be two damaged items (an unreadable header, then a sample that lacks a member), so the number
    of samples is the index's if the index describes this file.
    """
    entry = index_entry(path)
    indexed = entry["samples"] if entry else None
    found, damaged = 0, []
    for item in items:
        if isinstance(item, Damage):
            damaged.append(item)
        elif indexed is None or found < indexed:
            yield item
            found += 1
    missing = (indexed or 0) - found
    message = _missing_samples(path, found, indexed)
    if entry and path.stat().st_size == entry["bytes"]:
        yield from itertools.islice(itertools.chain(damaged, itertools.repeat(Damage(message))), max(0, missing))
    elif entry:
        yield Damage("; ".join([message, *(damage.message for damage in damaged[:1])]), max(1, missing))
    else:
        yield from damaged or ([] if found else [Damage(message)])
