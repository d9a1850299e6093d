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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import webdataset as wds

from ratiograph.data.images import IMAGE_SUFFIXES, PILLOW_MODES, BadImage, encode_png, pixels_of
from ratiograph.data.tars import Damage, read_groups, shard_damage, shown

__all__ = [
    "INDEX",
    "DamagedSample",
    "RawSample",
    "count_items",
    "count_samples",
    "damaged_sample",
    "decode",
    "encode_png",
    "index_entry",
    "raw_image",
    "read_samples",
    "read_shard",
    "verify_shard",
    "write_shards",
]

INDEX = "index.json"


class DamagedSample(ValueError):
    """A sample or a shard that cannot be used; the message names it and the remedy."""


@dataclass
class RawSample:
    """One sample as it lies in a shard; ``pixels`` uint8 [C, H, W] exists after the first ``decode``."""

    shard: str
    key: str
    image: bytes
    label: bytes | None
    pixels: np.ndarray | None = None

    @property
    def place(self) -> str:
        return f"sample '{shown(self.key)}' of shard {self.shard}"


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
    aside = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        index = {}
        bounds = np.linspace(0, len(samples), shards + 1).astype(int)
        for number, (first, last) in enumerate(itertools.pairwise(bounds)):
            path = aside / f"{name}-{number:06d}.tar"
            _write_tar(path, samples[first:last])
            index[path.name] = {
                "samples": int(last - first),
                "bytes": path.stat().st_size,
                "sha256": _sha256(path),
            }
        (aside / INDEX).write_text(json.dumps({"shards": index}, indent=1) + "\n")
        _replace_folder(aside, folder)
    except OSError as error:
        raise ValueError(
            f"Cannot write shards to {folder}: {error.strerror or error}. Free some space or choose another "
            "folder (the cache folder is set by the environment variable RATIOGRAPH_CACHE)."
        ) from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
    return sorted(folder / shard for shard in index)


def _write_tar(path: Path, samples: Sequence[Mapping[str, object]]) -> None:
    with open(path, "wb") as file:
        with wds.TarWriter(file, encoder=False, mtime=0) as writer:
            for sample in samples:
                writer.write(dict(sample))
        file.flush()
        os.fsync(file.fileno())


def _replace_folder(aside: Path, folder: Path) -> None:
    """Puts ``aside`` in the place of ``folder``; a copy that another process put there meanwhile will do."""
    os.chmod(aside, 0o755)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        os.rename(aside, folder)
    except OSError:
        if not (folder / INDEX).is_file():
            raise


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------ checking


def index_entry(path: Path) -> Mapping[str, object] | None:
    """What the index beside a shard says of it: ``samples``, ``bytes``, ``sha256``.

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
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"The shard index {index} is damaged ({error}). Delete it (the shards can be read without one) or write "
            "the shards anew."
        ) from error
    return entry


@functools.lru_cache(maxsize=16)  # asked for every shard of a folder; size and time tell whether it is still the same
def _index(path: Path, size: int, modified: int) -> dict:
    return json.loads(path.read_text())["shards"]


def verify_shard(path: Path, *, contents: bool) -> bool:
    """Whether the shard exists and has the size, and with ``contents`` the SHA-256, that its index says."""
    entry = index_entry(path)
    if entry is None or not path.is_file() or path.stat().st_size != entry["bytes"]:
        return False
    return not contents or _sha256(path) == entry["sha256"]


def _promised(path: Path) -> int | None:
    """Number of samples that the index tells of a shard; None without an index.

    Raises:
        DamagedSample: the shard has another size than the index says.
    """
    entry = index_entry(path)
    if entry is None:
        return None
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise _damaged(path, f"it has {size} bytes, its index says {entry['bytes']}")
    return entry["samples"]


def _damaged(path: str | Path, what: str) -> DamagedSample:
    return DamagedSample(shard_damage(path, what))


def damaged_sample(place: str, what: str) -> DamagedSample:
    """The error that says what is wrong with the sample at ``place``, and the remedy."""
    return DamagedSample(f"{place} is damaged: {what}. Write this shard anew, or leave it out of the data's URLs.")


def count_samples(path: Path) -> int:
    """Number of samples of one shard: from the index when the shard's size agrees with it, else from its headers.

    What img2dataset leaves beside a shard, ``<name>_stats.json``, spares the headers too.

    Raises:
        DamagedSample: the shard is damaged.
    """
    promised = _promised(path)
    if promised is not None:
        return promised
    with suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads(path.with_name(f"{path.stem}_stats.json").read_text())["successes"])
    state = path.stat()
    return _scan(path, state.st_size, state.st_mtime_ns)


@functools.cache  # asked whenever a stream resumes; size and time tell whether it is still the same
def _scan(path: Path, size: int, modified: int) -> int:
    found = 0
    for group in read_groups(path, contents=False):
        if isinstance(group, Damage):
            raise DamagedSample(group.why)
        found += 1
    return found


def count_items(path: Path, raw: Callable[[Path, Mapping[str, object]], object]) -> int:
    """How many items `read_samples` gives for a shard if ``tolerant``; members need not be read to know."""
    entry = index_entry(path)
    if entry is not None and path.stat().st_size == entry["bytes"]:
        return entry["samples"]
    return sum(1 for _ in _tolerated(path, (_made(path, group, raw) for group in read_groups(path, contents=False))))


# ------------------------------------------------------------------------------------------------ reading


Raw = TypeVar("Raw")


def read_shard(path: Path, *, tolerant: bool = False) -> Iterator[RawSample | Damage]:
    """The images of one shard in their order in the file, undecoded; as ``read_samples``."""
    return read_samples(path, raw_image, tolerant=tolerant)


def read_samples(
    path: Path, raw: Callable[[Path, Mapping[str, object]], Raw], *, tolerant: bool = False
) -> Iterator[Raw | Damage]:
    """The samples of one shard in their order in the file, each made by ``raw`` from its members by suffix.

    Args:
        path: the shard.
        raw: makes a sample of ``(path, {"__key__": key, suffix: bytes, ...})``, or raises DamagedSample.
        tolerant: whether what is damaged comes as a `Damage`, after the shard's sound samples, instead of an error. If
            the shard has the size that the index says, as many items come as it says, so that damage does not move the
            samples of other shards; of a shard of another size, one `Damage` stands for all that is lacking.

    Raises:
        DamagedSample: (unless ``tolerant``) the shard is damaged or empty, or ``raw`` refuses a sample; names shard
            and sample.
    """
    items = (_made(path, group, raw) for group in read_groups(path))
    yield from _tolerated(path, items) if tolerant else _whole(path, items)


def _made(path: Path, group: Mapping[str, object] | Damage, raw: Callable) -> object:
    try:
        return group if isinstance(group, Damage) else raw(path, group)
    except DamagedSample as error:
        return Damage(str(error))


def _whole(path: Path, items: Iterator) -> Iterator:
    """``items``, of which none may be damaged or lacking."""
    promised, found = _promised(path), 0
    for item in items:
        if isinstance(item, Damage):
            raise DamagedSample(item.why)
        yield item
        found += 1
    if not found or promised not in (None, found):
        raise _damaged(path, _lacking(found, promised))


def _lacking(found: int, promised: int | None) -> str:
    return "it holds no samples" if promised is None else f"{found} samples can be read of {promised}"


def _tolerated(path: Path, items: Iterator) -> Iterator:
    """The sound ones of ``items``, then damage for those that are lacking.

    One sample's damage can show in two items, a header that makes no sense and a sample that lacks a member: where the
    index is about this very file, it tells how many samples there were.
    """
    entry = index_entry(path)
    promised = entry["samples"] if entry else None
    found, damaged = 0, []
    for item in items:
        if isinstance(item, Damage):
            damaged.append(item)
        elif promised is None or found < promised:
            yield item
            found += 1
    lacking = (promised or 0) - found
    why = shard_damage(path, _lacking(found, promised))
    if entry and path.stat().st_size == entry["bytes"]:
        yield from [*damaged, *itertools.repeat(Damage(why), max(0, lacking - len(damaged)))][:lacking]
    elif entry:
        yield Damage("; ".join([why, *(damage.why for damage in damaged[:1])]), max(1, lacking))
    else:
        yield from damaged or ([] if found else [Damage(why)])


def raw_image(path: Path, sample: Mapping[str, object]) -> RawSample:
    """The sample of a shard's members by suffix; DamagedSample where none is an image."""
    for suffix in IMAGE_SUFFIXES:
        if suffix in sample:
            return RawSample(str(path), sample["__key__"], sample[suffix], sample.get("cls"))
    raise no_image(path, sample)


def no_image(path: Path, sample: Mapping[str, object]) -> DamagedSample:
    """The error for a sample whose members hold no image."""
    return DamagedSample(
        f"Sample '{shown(sample['__key__'])}' of shard {path} has no image: its files end in "
        f"{sorted(shown(k) for k in sample if not k.startswith('__'))}, an image must end in one of "
        f"{list(IMAGE_SUFFIXES)}."
    )


def decode(sample: RawSample, *, channels: int, resolution: int | None, labels: bool) -> tuple[np.ndarray, int]:
    """Decodes a sample.

    Args:
        sample: from ``read_shard``.
        channels: 1 (grey) or 3 (RGB); the file must hold exactly these.
        resolution: height and width that the image must have, or None for any.
        labels: whether the sample must have a class label.

    Returns:
        ``(pixels, label)``: uint8 [channels, H, W] and the class index (-1 without ``labels``).

    Raises:
        DamagedSample: damaged image, other size or channels, missing or unreadable label; names shard and sample.
    """
    if sample.pixels is None:
        sample.pixels = _decode_image(sample, channels)
    height, width = sample.pixels.shape[1:]
    if resolution is not None and (height, width) != (resolution, resolution):
        raise DamagedSample(
            f"{sample.place} is {height}x{width} (height x width), resolution={resolution} was asked for. "
            f"Set ShardStream.resolution, or write the shards anew at {resolution}x{resolution}."
        )
    return sample.pixels, decode_label(sample) if labels else -1


def _decode_image(sample: RawSample, channels: int) -> np.ndarray:
    try:
        mode, pixels = pixels_of(sample.image)
    except BadImage as error:
        raise DamagedSample(
            f"{sample.place} {error}. Write this shard anew, or leave it out of the data's URLs."
        ) from error
    if mode != PILLOW_MODES[channels]:
        raise DamagedSample(
            f"{sample.place} has colour mode {mode}, channels={channels} needs {PILLOW_MODES[channels]}. "
            "Set ShardStream.channels (1 for grey, 3 for RGB), or convert the images."
        )
    return pixels


def decode_label(sample: RawSample) -> int:
    """The sample's class index; DamagedSample where there is none, or no number."""
    if sample.label is None:
        raise DamagedSample(
            f"{sample.place} has no class label ('{shown(sample.key)}.cls'). Add the labels to the shards, or set "
            "ShardStream.labels = False to train without classes."
        )
    try:
        return int(sample.label)
    except ValueError as error:
        raise DamagedSample(
            f"The class label of {sample.place} is {sample.label[:40]!r}, a whole number in digits was expected."
        ) from error
