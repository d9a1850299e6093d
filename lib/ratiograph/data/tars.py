"""Reads tar archives from untrusted sources.

A *member* is one file of an archive; members whose names agree up to the first dot of the file name, their *key*, are
one *sample*. Members are read into memory one after another, and nothing of an archive is ever written to disk. A
`Damage` stands in the place of what cannot be read, and reading goes on at the next valid header.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import math
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import BinaryIO

from webdataset.tariterators import base_plus_ext

from ratiograph.core.foreign import shown
from ratiograph.data.images import is_hidden

__all__ = ["LARGEST_MEMBER", "REMEDY", "Damage", "read_groups", "shard_damage"]

LARGEST_MEMBER = 2**28
"""Bytes of a sample; no image or latent is nearly as large, so that one that claims more is a mistake or an attack."""

EXPANSION = 32
"""Bytes that a compressed archive may give for each of its own, beyond its first ``LARGEST_MEMBER``."""

LONGEST_HEADER = 2**16
"""Bytes of an invalid header and its extensions up to which they are searched for the next header, block by block."""

OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
ZEROS = bytes(BLOCKSIZE)
REMEDY = (
    "Copy or write this shard anew, leave it out of the data's URLs, or have damaged samples skipped (max_damaged of "
    "the stream, --max_damaged of tools/cache_latents.py)."
)
METADATA = re.compile(r"__[^/]*__($|/)")  # webdataset's names of members that belong to no sample


@dataclass(frozen=True)
class Damage:
    """In the place of samples that cannot be read: ``lost`` is their number, ``message`` names shard and sample."""

    message: str
    lost: int = 1


def shard_damage(path: str | Path, problem: str) -> str:
    """The message about a damaged shard, with the remedy."""
    return f"Shard {path} is damaged: {problem}. {REMEDY}"


class _BoundedFile:
    """A file from which one ``read`` gets at most one member's bytes, whatever a header claims.

    ``returned`` holds bytes that have been read and are to be read again; nothing is read past ``end``.
    """

    def __init__(self, file: BinaryIO, end: float):
        self.file, self.end, self.returned = file, end, b""

    def read(self, size: int) -> bytes:
        if not 0 <= size <= LARGEST_MEMBER + BLOCKSIZE:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        if self.file.tell() > self.end:
            raise ValueError(f"it unpacks to more than {self.end} bytes")
        returned, self.returned = self.returned[:size], self.returned[size:]
        return returned + self.file.read(size - len(returned)) if returned else self.file.read(size)

    def tell(self) -> int:
        return self.file.tell() - len(self.returned)

    def seek(self, offset: int) -> None:
        if offset != self.tell():
            self.returned = b""
            self.file.seek(offset)


class _UnusableMember(Exception):
    """A valid header of a member that cannot belong to a sample; the message says why."""


class _Archive:
    """One pass over an archive, plain or compressed by gzip, bzip2 or xz.

    Args:
        path: the archive.
        contents: whether the members' bytes are read too.
    """

    def __init__(self, path: Path, contents: bool):
        self.path, self.contents = path, contents
        with open(path, "rb") as file:
            start = file.read(6)
        self.open = next((opener for magic, opener in OPENERS.items() if start.startswith(magic)), open)
        packed = path.stat().st_size
        self.size = packed if self.open is open else None  # of the archive; unknown where compressed
        self.end = math.inf if self.open is open else LARGEST_MEMBER + EXPANSION * packed
        self.samples = 0  # number of samples so far, for the messages
        self.offset = 0  # where the next header is expected
        self.ended = False  # whether the blocks before the offset are zero, as they are after the last member
        self.invalid = False  # whether the offset lies in bytes that are no header and have been reported

    def damage(self, problem: object) -> Damage:
        return Damage(shard_damage(self.path, f"{problem}, after {self.samples} samples"))

    def members(self) -> Iterator[tuple[str, bytes] | Damage]:
        """(name, contents) of every file, and a `Damage` in the place of anything else."""
        try:
            with self.open(self.path, "rb") as file:
                yield from self._members(_BoundedFile(file, self.end))
        except FileNotFoundError:
            raise
        except Exception as error:  # the decompressors have many errors of their own
            yield self.damage(f"it cannot be read on ({shown(error)})")

    def _members(self, source: _BoundedFile) -> Iterator[tuple[str, bytes] | Damage]:
        archive = tarfile.TarFile(fileobj=io.BytesIO(bytes(BLOCKSIZE)))  # empty: ``fromtarfile`` needs a TarFile
        archive.fileobj = source
        while self._at_header(source):
            try:
                member = tarfile.TarInfo.fromtarfile(archive)
                self._check(member, archive.offset)
            except _UnusableMember as error:
                yield self.damage(error)
            except Exception as error:  # a hostile header makes the library raise anything
                if not self.invalid:
                    reason = "extensions without end" if isinstance(error, RecursionError) else shown(error)
                    yield self.damage(f"its bytes from {self.offset} on are no header of a file ({reason})")
                if self.size is None:  # a compressed archive is not read again from an earlier offset
                    return
                self._skip(source)
                continue
            else:
                if member.isreg() and not (METADATA.match(member.name) or is_hidden(member.name)):
                    yield member.name, self._read(member, source)
            self.offset, self.invalid = archive.offset, False
        if not self.invalid and not self.ended:
            yield self.damage("the archive breaks off")

    def _at_header(self, source: _BoundedFile) -> bool:
        """Moves to the next block that is not zero; False at the end of the file."""
        source.seek(self.offset)
        self.ended = False
        while (block := source.read(BLOCKSIZE)) == ZEROS:
            self.offset, self.ended = self.offset + BLOCKSIZE, True
        source.returned = block
        self.ended = self.ended and not any(block)
        return len(block) == BLOCKSIZE

    def _check(self, member: tarfile.TarInfo, after: int) -> None:
        """Raises `_UnusableMember` for a member that is no plain file, and ReadError for an invalid header."""
        claim = f"its member '{shown(member.name)}' claims {member.size} bytes"
        if not 0 <= member.size <= LARGEST_MEMBER or after < member.offset_data:
            raise tarfile.ReadError(claim)
        if member.isreg() and member.offset_data + member.size > (self.end if self.size is None else self.size):
            raise tarfile.ReadError(f"{claim}, more than the archive can hold")
        if not member.name:
            raise _UnusableMember("a member has no name")
        if member.name.startswith("/") or ".." in member.name.split("/"):
            raise _UnusableMember(f"the name of its member '{shown(member.name)}' leads out of the archive")
        if member.sparse is not None or not (member.isreg() or member.isdir()):
            raise _UnusableMember(f"its member '{shown(member.name)}' is no file (a link, a device or the like)")

    def _skip(self, source: _BoundedFile) -> None:
        """Moves past an invalid header: by one block, or past all that was read where that is long."""
        tried = source.tell() - self.offset
        self.offset, self.invalid = self.offset + (BLOCKSIZE if tried <= LONGEST_HEADER else tried), True

    def _read(self, member: tarfile.TarInfo, source: _BoundedFile) -> bytes:
        """The member's bytes; empty without ``contents``, unless only reading shows that they are all there."""
        if not self.contents and self.size is not None:
            return b""
        data = source.read(member.size)
        if len(data) < member.size:
            raise EOFError(f"it breaks off in the member '{shown(member.name)}'")
        return data


def read_groups(path: Path, *, contents: bool = True) -> Iterator[dict[str, object] | Damage]:
    """The samples of an archive in their order in the file.

    Args:
        path: a tar file, plain or compressed by gzip, bzip2 or xz.
        contents: whether the members' bytes are read; without, they are empty.

    Yields:
        ``{"__key__": str, suffix in lower case: bytes, ...}``, and `Damage` in the place of bytes that are no member,
        of members that are no plain files, that claim more than they can hold or whose names lead out of the archive,
        and of samples whose key comes twice.

    Raises:
        FileNotFoundError: there is no such file.
    """
    archive = _Archive(path, contents)
    sample: dict[str, object] = {}
    keys, size = set(), 0
    for member in archive.members():
        if isinstance(member, Damage):
            yield member
            continue
        key, suffix = base_plus_ext(member[0])
        if key is None:
            continue
        if sample.get("__key__") != key:
            if sample:
                yield _checked(path, sample)
                archive.samples += 1
            sample, size = {"__key__": key, "__problem__": "is there twice" if key in keys else None}, 0
            keys.add(key)
        size += len(member[1])
        if suffix.lower() in sample:
            sample["__problem__"] = "is there twice"
        elif size > LARGEST_MEMBER:
            sample["__problem__"] = f"holds more than {LARGEST_MEMBER} bytes"
        sample[suffix.lower()] = member[1] if sample["__problem__"] is None else b""
    if sample:
        yield _checked(path, sample)


def _checked(path: Path, sample: dict[str, object]) -> dict[str, object] | Damage:
    """``sample``, or a `Damage` if it has a problem: its key or a suffix came twice, or it is too large."""
    problem = sample.pop("__problem__")
    return Damage(shard_damage(path, f"its sample '{shown(sample['__key__'])}' {problem}")) if problem else sample
