"""The places of an image's bytes: a file, a member of an archive, or memory.

A *place* is a small object that another process can receive; its ``read()`` does not look at the rest of the archive.
"""

from __future__ import annotations

import os
import struct
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ratiograph.data.tars import LARGEST_MEMBER

__all__ = ["Damaged", "Pixels", "Slice", "ZipMember", "looks_like", "tar_members"]


class Damaged(Exception):
    """An image cannot be read; the message is the reason."""


TOO_LARGE = f"it holds more than {LARGEST_MEMBER:,} bytes, too many for an image"


def _read(file: BinaryIO, size: int) -> bytes:
    """``size`` bytes, or all for -1; Damaged where they are too many."""
    data = file.read(LARGEST_MEMBER + 1 if size < 0 else min(size, LARGEST_MEMBER + 1))
    if len(data) > LARGEST_MEMBER:
        raise Damaged(TOO_LARGE)
    return data


@dataclass(frozen=True, slots=True)
class Slice:
    """``size`` bytes of a file from ``offset`` on: a whole file (-1), or a member of an uncompressed tar archive."""

    path: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return _read(file, self.size)


@dataclass(frozen=True, slots=True)
class ZipMember:
    """A member of a zip archive by the offset of its header, so that no reader needs the archive's whole directory."""

    path: str
    offset: int
    size: int  # compressed
    deflated: bool
    checksum: int

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            header = file.read(30)
            if len(header) < 30:
                raise Damaged("the archive breaks off before it")
            name, extra = struct.unpack("<26xHH", header)
            file.seek(name + extra, os.SEEK_CUR)
            data = _read(file, self.size)
        try:
            if self.deflated:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, LARGEST_MEMBER + 1)
        except zlib.error as error:
            raise Damaged(f"its compressed bytes are damaged ({error})") from error
        if len(data) > LARGEST_MEMBER:
            raise Damaged(TOO_LARGE)
        if zlib.crc32(data) != self.checksum:
            raise Damaged("its bytes differ from the checksum in the archive")
        return data


@dataclass(frozen=True, slots=True, eq=False)
class Pixels:
    """An image already decoded: uint8 [H, W, 3]."""

    values: np.ndarray

    @property
    def size(self) -> int:
        return self.values.nbytes

    def read(self) -> np.ndarray:
        return self.values


# --- files ----------------------------------------------------------------------------------------------------


SIGNATURES = (
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x1f\x8b", "a gzip file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ", "an xz file"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!", "a rar archive"),
    (b"\x89HDF", "an HDF5 file"),
    (b"PAR1", "a parquet file"),
    (b"\x80\x02", "a pickle"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"<", "a web page (the download failed?)"),
    (b"", "a file of an unknown kind"),
)


def looks_like(path: Path) -> str:
    """What a file or folder seems to be, in words."""
    if path.is_dir():
        names = sorted(os.listdir(path))
        return f"a folder of {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}" if names else "an empty folder"
    with open(path, "rb") as file:
        head = file.read(512)
    if head[257:262] == b"ustar":
        return "a tar archive"
    return next(words for signature, words in SIGNATURES if head.startswith(signature)) if head else "an empty file"


def tar_members(path: Path, offset: int = 0, end: int | None = None) -> Iterator[tarfile.TarInfo]:
    """Regular members of an uncompressed tar archive, or of the one at bytes ``offset`` to ``end`` inside another.

    Raises:
        ValueError: the archive breaks off.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None and (end is None or archive.offset <= end):
                    archive.members.clear()  # or a million of them stay in memory
                    if member.isreg():
                        yield member
                file.seek(archive.offset)
            if member is not None or len(block := file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE or any(block):
                raise tarfile.TarError("it ends without the end mark of an archive")
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} is damaged or truncated ({error}): copy or download it again") from error
