"""Shards: webdataset tar files of encoded images, and the index that lets a damaged one be recognised.

A shard is a tar archive whose members share a key: ``000123.png`` is the image and ``000123.cls`` the class
index in ASCII digits. ``index.json`` beside the shards records, for every shard, its number of samples, its
size in bytes and its SHA-256. The index is optional for shards made elsewhere; a shard without one is
scanned when it is opened, because Python's tar reader takes a damaged header for the end of the archive and
says nothing.

Pixels are uint8 v in 0..255 on disk and v / 127.5 - 1 in [-1, 1] outside this package's ``data`` folder.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import webdataset as wds
from PIL import Image, UnidentifiedImageError
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

__all__ = [
    "INDEX",
    "RawSample",
    "count_samples",
    "damaged_sample",
    "decode",
    "encode_png",
    "read_samples",
    "read_shard",
    "verify_shard",
    "write_shards",
]

INDEX = "index.json"
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
MAIN_SUFFIXES = (*IMAGE_SUFFIXES, "latent.npy")  # every sample has one of these, which is what counts as a sample
PILLOW_MODES = {1: "L", 3: "RGB"}


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
        return f"sample '{self.key}' of shard {self.shard}"


# ------------------------------------------------------------------------------------------------ writing


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG file of ``pixels`` uint8, [H, W] (grey) or [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


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


def _index_entry(path: Path) -> dict | None:
    """What the index beside a shard says of it, or None where there is no index or no such entry."""
    index = path.parent / INDEX
    if not index.is_file():
        return None
    try:
        return json.loads(index.read_text())["shards"].get(path.name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The shard index {index} is damaged ({error}). Delete it (the shards can be read without one) "
            f"or write "
            "the shards anew."
        ) from error


def verify_shard(path: Path, *, contents: bool) -> bool:
    """Whether the shard exists and has the size, and with ``contents`` the SHA-256, that its index says."""
    entry = _index_entry(path)
    if entry is None or not path.is_file() or path.stat().st_size != entry["bytes"]:
        return False
    return not contents or _sha256(path) == entry["sha256"]


def _scan(path: Path) -> int:
    """Number of samples, from the archive's headers. A tar ends in zero blocks; anything else is damage."""
    state = path.stat()
    return _scan_file(path, state.st_size, state.st_mtime_ns)


@functools.cache  # a shard is opened every epoch; size and time tell whether it is still the same
def _scan_file(path: Path, size: int, modified: int) -> int:
    keys = set()
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                key, suffix = base_plus_ext(member.name)
                if member.isreg() and key is not None and suffix.lower() in MAIN_SUFFIXES:
                    keys.add(key)
            archive.fileobj.seek(archive.offset)
            end = archive.fileobj.read(2 * tarfile.BLOCKSIZE)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise _damaged(path, str(error)) from error
    if len(end) < tarfile.BLOCKSIZE or any(end):
        raise _damaged(path, f"the archive breaks off after {len(keys)} samples")
    return len(keys)


def _damaged(path: str | Path, what: str) -> ValueError:
    return ValueError(
        f"Shard {path} is damaged: {what}. Copy or write this shard anew, or leave it out of the data's URLs."
    )


def damaged_sample(place: str, what: str) -> ValueError:
    """The error that says what is wrong with the sample at ``place``, and the remedy."""
    return ValueError(f"{place} is damaged: {what}. Write this shard anew, or leave it out of the data's URLs.")


def count_samples(path: Path) -> int:
    """Number of samples of one shard: from the index when the shard's size agrees with it, else from its
    headers.

    Raises:
        ValueError: the shard is damaged.
    """
    entry = _index_entry(path)
    if entry is None:
        return _scan(path)
    if path.stat().st_size != entry["bytes"]:
        raise _damaged(path, f"it has {path.stat().st_size} bytes, its index says {entry['bytes']}")
    return entry["samples"]


# ------------------------------------------------------------------------------------------------ reading


Raw = TypeVar("Raw")


def read_shard(path: Path) -> Iterator[RawSample]:
    """The images of one shard in their order in the file, undecoded.

    Raises:
        ValueError: the shard is damaged or empty, or a sample has no image; names shard and sample.
    """
    return read_samples(path, _raw)


def read_samples(path: Path, raw: Callable[[Path, Mapping[str, object]], Raw]) -> Iterator[Raw]:
    """The samples of one shard in their order in the file, each made by ``raw`` from its members by suffix.

    Raises:
        ValueError: the shard is damaged or empty, or ``raw`` refuses a sample.
    """
    expected = count_samples(path)
    found = 0
    for sample in _grouped(path):
        yield raw(path, sample)
        found += 1
    if found != expected or not found:
        raise _damaged(path, f"{found} samples can be read of {expected}")


def _grouped(path: Path) -> Iterator[dict]:
    """The archive's members, joined into samples by their key."""
    found = 0
    try:
        with open(path, "rb") as file:
            for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])):
                yield sample
                found += 1
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        raise _damaged(path, f"{error.args[0] if error.args else error}, after {found} samples") from error


def _raw(path: Path, sample: Mapping[str, object]) -> RawSample:
    for suffix in IMAGE_SUFFIXES:
        if suffix in sample:
            return RawSample(str(path), sample["__key__"], sample[suffix], sample.get("cls"))
    raise ValueError(
        f"Sample '{sample['__key__']}' of shard {path} has no image: its files end in "
        f"{sorted(k for k in sample if not k.startswith('__'))}, an image must end in one of "
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
        ValueError: damaged image, other size or channels, missing or unreadable label; names shard and
            sample.
    """
    if sample.pixels is None:
        sample.pixels = _decode_image(sample, channels)
    height, width = sample.pixels.shape[1:]
    if resolution is not None and (height, width) != (resolution, resolution):
        raise ValueError(
            f"{sample.place} is {height}x{width} (height x width), resolution={resolution} was asked for. "
            f"Set ShardStream.resolution, or write the shards anew at {resolution}x{resolution}."
        )
    return sample.pixels, decode_label(sample) if labels else -1


def _decode_image(sample: RawSample, channels: int) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(sample.image)) as image:
            mode, pixels = image.mode, np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        reason = "not an image file" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(
            f"{sample.place} cannot be decoded ({reason}). Write this shard anew, or leave it out of the data's URLs."
        ) from error
    if mode != PILLOW_MODES[channels]:
        raise ValueError(
            f"{sample.place} has colour mode {mode}, channels={channels} needs {PILLOW_MODES[channels]}. "
            "Set ShardStream.channels (1 for grey, 3 for RGB), or convert the images."
        )
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))  # HWC => CHW


def decode_label(sample: RawSample) -> int:
    """The sample's class index; ValueError that names the sample where there is none, or no number."""
    if sample.label is None:
        raise ValueError(
            f"{sample.place} has no class label ('{sample.key}.cls'). Add the labels to the shards, or set "
            "ShardStream.labels = False to train without classes."
        )
    try:
        return int(sample.label)
    except ValueError as error:
        raise ValueError(
            f"The class label of {sample.place} is {sample.label[:40]!r}, a whole number in digits was expected."
        ) from error
