"""CIFAR-10 and CIFAR-100 as they are published, read without executing their pickles.

A batch is N images as pixels uint8 [N, 3072], the red plane first, and N class indices.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np

from preparation.cropping import plain
from preparation.image_bytes import Pixels, looks_like
from preparation.sources import Entry, Listing, Source, class_member
from ratiograph.data.images import is_hidden
from ratiograph.data.tars import LARGEST_MEMBER
from ratiograph.networks.weights.restricted_pickles import Array, DType, Function, Refused, Unpickler, numpy_names

__all__ = ["CIFAR10", "CIFAR100"]


class _PixelArray(Array):
    """A numpy array whose bytes Python 2 pickled as a string."""

    __slots__ = ()

    def __setstate__(self, state: tuple) -> None:
        *head, data = state
        super().__setstate__((*head, data.encode("latin-1") if isinstance(data, str) else data))


def _latin1(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise Refused(f"_codecs.encode to {encoding!r}")
    return text.encode("latin-1")


_ALLOWED = {
    "_codecs.encode": Function(_latin1),
    "numpy.dtype": Function(DType),
    "numpy.ndarray": Function(_PixelArray),
    **dict.fromkeys(numpy_names("multiarray._reconstruct"), Function(_PixelArray)),
}


def _unpickled(data: bytes) -> dict[str, object]:
    """The dict in a CIFAR pickle; Refused names whatever else there is."""
    document = Unpickler(io.BytesIO(data), _ALLOWED, encoding="latin-1").load()
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in document.items()}


Batch = tuple[np.ndarray, Sequence[int]]


def _pickled_batch(data: bytes, *, labels: str) -> Batch:
    document = _unpickled(data)
    return document["data"].values, [int(label) for label in document[labels]]


def _pickled_names(data: bytes, *, key: str) -> list[str]:
    return [name.decode() if isinstance(name, bytes) else name for name in _unpickled(data)[key]]


def _binary_batch(data: bytes, *, labels: int) -> Batch:
    """Records of ``labels`` bytes, of which the last is the class, and 3072 pixels."""
    records = np.frombuffer(data, np.uint8).reshape(-1, labels + 3072)
    return records[:, labels:], records[:, labels - 1].tolist()


def _text_names(data: bytes) -> list[str]:
    return data.decode().split()


@dataclass(frozen=True)
class _Version:
    """File names and readers of one form in which CIFAR is published."""

    splits: Mapping[str, tuple[str, ...]]
    names: str
    read_batch: Callable[[bytes], Batch]
    read_names: Callable[[bytes], list[str]]


@dataclass(frozen=True, kw_only=True)
class CIFAR10(Source):
    """CIFAR-10 (Krizhevsky 2009), its python or binary version: the archive as downloaded, or its folder.

    The python version's pickles are read as data: everything but lists, dicts, text, numbers and arrays is refused.

    Args:
        split: train (50,000 images) or test (10,000).
    """

    split: str = "train"

    kind = "cifar10"
    where = "CIFAR is at https://www.cs.toronto.edu/~kriz/cifar.html: cifar-10-python.tar.gz, cifar-10-binary.tar.gz"
    normalize = staticmethod(plain)
    classes: ClassVar[int] = 10
    versions: ClassVar[tuple[_Version, ...]] = (
        _Version(
            {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
            "batches.meta",
            partial(_pickled_batch, labels="labels"),
            partial(_pickled_names, key="label_names"),
        ),
        _Version(
            {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test": ("test_batch.bin",)},
            "batches.meta.txt",
            partial(_binary_batch, labels=1),
            _text_names,
        ),
    )

    def listing(self) -> Listing:
        self.require()
        if self.split not in ("train", "test"):
            raise ValueError(f"--split={self.split}: {self.kind} has the splits train and test")
        files = self._files()
        for version in self.versions:
            if all(name in files for name in version.splits[self.split]):
                names = self._read(version.names, version.read_names, files) if version.names in files else None
                entries = [e for name in version.splits[self.split] for e in self._entries(name, version, files)]
                return Listing(entries, self.classes, names)
        raise ValueError(self._missing(files))

    def _files(self) -> dict[str, bytes]:
        """The published files by name, from the folder, a folder in it, or an archive."""
        known = {name for source in (CIFAR10, CIFAR100) for version in source.versions for name in _files_of(version)}
        if self.path.is_dir():
            paths = [path for pattern in ("*", "*/*") for path in sorted(self.path.glob(pattern))]
            paths = [path for path in paths if path.name in known and path.is_file()]
            paths = [path for path in paths if not is_hidden(path.relative_to(self.path).as_posix())]
            return {path.name: _bounded(path.name, path.stat().st_size, path.read_bytes) for path in paths}
        try:
            with tarfile.open(self.path) as archive:
                # in one pass: a compressed archive can only be read forward
                members = ((Path(member.name).name, member) for member in archive if member.isreg())
                return {
                    name: _bounded(name, member.size, archive.extractfile(member).read)
                    for name, member in members
                    if name in known and not is_hidden(member.name)
                }
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{self.path} is damaged or truncated ({error}): download it again") from error
        except tarfile.TarError as error:
            raise self.other_kind(f"{self.kind} needs the published archive or its folder") from error

    def _missing(self, files: Mapping[str, bytes]) -> str:
        for other in (CIFAR10, CIFAR100):
            if other is not type(self) and any(name in files for v in other.versions for name in _files_of(v)):
                return f"{self.path} is {other.kind}: give that as the source in place of {self.kind}"
        wanted = " or ".join(", ".join(version.splits[self.split]) for version in self.versions)
        found = f"of them only {', '.join(sorted(files))}" if files else "none"
        return f"{self.path} lacks the files {wanted}: it has {found} (it is {looks_like(self.path)}). {self.where}"

    def _read(self, name: str, read: Callable, files: Mapping[str, bytes]) -> object:
        try:
            return read(files[name])
        except Refused as error:
            raise ValueError(f"{self.path}: {name}: refused {error}, foreign to CIFAR; nothing was run") from error
        except Exception as error:  # damaged files raise whatever their bytes happen to mean
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{self.path}: {name} is damaged ({reason}): download it again") from error

    def _entries(self, name: str, version: _Version, files: Mapping[str, bytes]) -> Iterator[Entry]:
        pixels, labels = self._read(name, version.read_batch, files)
        kind, labels = f"{pixels.dtype} {list(pixels.shape)}", np.asarray(labels)
        if kind != f"uint8 [{len(labels)}, 3072]" or not len(labels) or labels.dtype.kind not in "iu":
            raise ValueError(f"{self.path}: {name} holds pixels {kind} and labels {labels.dtype} {list(labels.shape)}")
        if labels.min() < 0 or labels.max() >= self.classes:
            raise ValueError(
                f"{self.path}: {name} has classes {labels.min()} to {labels.max()}, not 0 to {self.classes - 1}"
            )
        images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))  # planes => RGB pixels
        stem = name.removesuffix(".bin")
        for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            yield Entry(f"{stem}, image {number}", Pixels(image), class_member(label))


def _bounded(name: str, size: int, read: Callable[[], bytes]) -> bytes:
    """The bytes of a published file, which are at most 154 million."""
    if size > LARGEST_MEMBER:
        raise ValueError(f"{name} has {size:,} bytes, more than any file of CIFAR: download it again")
    return read()


def _files_of(version: _Version) -> tuple[str, ...]:
    return (*(name for names in version.splits.values() for name in names), version.names)


class CIFAR100(CIFAR10):
    """CIFAR-100 (Krizhevsky 2009) with its 100 fine classes; otherwise as `CIFAR10`."""

    kind = "cifar100"
    where = "CIFAR is at https://www.cs.toronto.edu/~kriz/cifar.html: cifar-100-python.tar.gz, cifar-100-binary.tar.gz"
    classes = 100
    versions = (
        _Version(
            {"train": ("train",), "test": ("test",)},
            "meta",
            partial(_pickled_batch, labels="fine_labels"),
            partial(_pickled_names, key="fine_label_names"),
        ),
        _Version(
            {"train": ("train.bin",), "test": ("test.bin",)},
            "fine_label_names.txt",
            partial(_binary_batch, labels=2),
            _text_names,
        ),
    )
