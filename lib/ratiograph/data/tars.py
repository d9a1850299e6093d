"""Reading tar archives that nobody vouches for.

A *member* is one file of an archive; members whose names agree up to the first dot of the file name, their *key*, are
one *sample*. Members are read into memory one after another, and nothing of an archive is ever written to disk. What
cannot be read is reported in its place as a `Damage`, and reading goes on at the next header that makes sense.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import BinaryIO

from webdataset.tariterators import base_plus_ext

__all__ = ["Damage", "read_groups", "shard_damage", "shown"]

LARGEST_MEMBER = 2**28
"""Bytes; no image or latent comes near it, so that a member that claims more is a mistake or an attack."""

LONGEST_HEADER = 2**16
"""Bytes of a header and its extensions that are gone through again, block by block, when they make no sense."""

OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
ZEROS = bytes(BLOCKSIZE)
METADATA = re.compile(r"__[^/]*__($|/)")  # webdataset's names of members that belong to no sample


@dataclass(frozen=True)
class Damage:
    """Stands in the place of a sample that cannot be read. ``why`` names shard and sample; ``lost`` counts samples."""

    why: str
    lost: int = 1


def shown(name: object) -> str:
    """A name out of an archive as it can be printed: without control characters and not too long."""
    text = str(name)
    return text if text.isprintable() and len(text) <= 200 else ascii(text)[1:-1][:200]


def shard_damage(path: str | Path, what: str) -> str:
    """The sentence that says what is wrong with a shard, and the remedy."""
    return f"Shard {path} is damaged: {what}. Copy or write this shard anew, or leave it out of the data's URLs."


class _Tape:
    """A file read forwards, at most what one member may hold at once, whatever a header claims."""

    def __init__(self, file: BinaryIO):
        self.file, self.returned = file, b""

    def read(self, size: int) -> bytes:
        if not 0 <= size <= LARGEST_MEMBER + BLOCKSIZE:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        returned, self.returned = self.returned[:size], self.returned[size:]
        return returned + self.file.read(size - len(returned)) if returned else self.file.read(size)

    def tell(self) -> int:
        return self.file.tell() - len(self.returned)

    def wind(self, offset: int) -> None:
        if offset != self.tell():
            self.returned = b""
            self.file.seek(offset)


class _Unwanted(Exception):
    """A sound header of something that no sample is made of; the message says what is wrong with it."""


class _Walk:
    """One pass over an archive, as it is or compressed by gzip, bzip2 or xz.

    Args:
        path: the archive.
        contents: whether the members' bytes are read too.
    """

    def __init__(self, path: Path, contents: bool):
        self.path, self.contents = path, contents
        with open(path, "rb") as file:
            start = file.read(6)
        self.open = next((opener for magic, opener in OPENERS.items() if start.startswith(magic)), open)
        self.size = path.stat().st_size if self.open is open else None  # of the archive; unknown where compressed
        self.samples = 0  # that went by, for the messages
        self.offset = 0  # where the next header is expected
        self.ended = False  # whether the blocks before it are zero, as they are behind the last member
        self.lost = False  # whether it lies in bytes that make no sense, and have been reported

    def damage(self, what: object) -> Damage:
        return Damage(shard_damage(self.path, f"{what}, after {self.samples} samples"))

    def members(self) -> Iterator[tuple[str, bytes] | Damage]:
        """(name, contents) of every file, and damage in the place of what is none."""
        try:
            with self.open(self.path, "rb") as file:
                yield from self._members(_Tape(file))
        except FileNotFoundError:
            raise
        except Exception as error:  # the decompressors have many errors of their own
            yield self.damage(f"it cannot be read on ({shown(error)})")

    def _members(self, tape: _Tape) -> Iterator[tuple[str, bytes] | Damage]:
        archive = tarfile.TarFile(fileobj=io.BytesIO(bytes(BLOCKSIZE)))  # an empty one, for the reader of headers
        archive.fileobj = tape
        while self._at_header(tape):
            try:
                member = tarfile.TarInfo.fromtarfile(archive)
                self._check(member, archive.offset)
            except _Unwanted as error:
                yield self.damage(error)
            except Exception as error:  # a hostile header makes the library raise anything
                if not self.lost:
                    reason = "extensions without end" if isinstance(error, RecursionError) else shown(error)
                    yield self.damage(f"its bytes from {self.offset} on are no header of a file ({reason})")
                if self.size is None:  # compressed archives cannot be wound back
                    return
                self._pass_over(tape)
                continue
            else:
                if member.isreg() and not METADATA.match(member.name):
                    yield member.name, self._read(member, tape)
            self.offset, self.lost = archive.offset, False
        if not self.lost and not self.ended:
            yield self.damage("the archive breaks off")

    def _at_header(self, tape: _Tape) -> bool:
        """Winds to the next block that is not zero; False at the end of the file."""
        tape.wind(self.offset)
        self.ended = False
        while (block := tape.read(BLOCKSIZE)) == ZEROS:
            self.offset, self.ended = self.offset + BLOCKSIZE, True
        tape.returned = block
        self.ended = self.ended and not any(block)
        return len(block) == BLOCKSIZE

    def _check(self, member: tarfile.TarInfo, after: int) -> None:
        """Raises `_Unwanted` for what is no file to be read, and ReadError for a header that cannot be true."""
        known = self.size is not None and member.isreg()
        if not 0 <= member.size <= LARGEST_MEMBER or after < member.offset_data:
            raise tarfile.ReadError(f"it claims {member.size} bytes")
        if known and member.offset_data + member.size > self.size:
            raise tarfile.ReadError(f"it claims {member.size} bytes, more than the archive has")
        if not member.name:
            raise _Unwanted("a member has no name")
        if member.name.startswith("/") or ".." in member.name.split("/"):
            raise _Unwanted(f"the name of its member '{shown(member.name)}' leads out of the archive")
        if member.sparse is not None or not (member.isreg() or member.isdir()):
            raise _Unwanted(f"its member '{shown(member.name)}' is no file (a link, a device or the like)")

    def _pass_over(self, tape: _Tape) -> None:
        """Moves on from a header that makes no sense."""
        tried = tape.tell() - self.offset
        self.offset, self.lost = self.offset + (BLOCKSIZE if tried <= LONGEST_HEADER else tried), True

    def _read(self, member: tarfile.TarInfo, tape: _Tape) -> bytes:
        """The member's bytes; none if nobody wants them and the archive's size has told that they are there."""
        if not self.contents and self.size is not None:
            return b""
        data = tape.read(member.size)
        if len(data) < member.size:
            raise EOFError(f"it breaks off in the member '{shown(member.name)}'")
        return data


def read_groups(path: Path, *, contents: bool = True) -> Iterator[dict[str, object] | Damage]:
    """The samples of an archive in their order in the file.

    Args:
        path: a tar file, as it is or compressed by gzip, bzip2 or xz.
        contents: whether the members' bytes are read; without, they are empty.

    Yields:
        ``{"__key__": str, suffix in lower case: bytes, ...}``, and `Damage` in the place of bytes that are no member,
        of members that are no plain files, that claim more than they can hold or whose names lead out of the archive,
        and of samples whose key comes twice.

    Raises:
        FileNotFoundError: there is no such file.
    """
    walk = _Walk(path, contents)
    sample: dict[str, object] = {}
    keys = set()
    for member in walk.members():
        if isinstance(member, Damage):
            yield member
            continue
        key, suffix = base_plus_ext(member[0])
        if key is None:
            continue
        if sample.get("__key__") != key:
            if sample:
                yield _sound(path, sample)
                walk.samples += 1
            sample = {"__key__": key, "__twice__": key in keys}
            keys.add(key)
        sample["__twice__"] |= suffix.lower() in sample
        sample[suffix.lower()] = member[1]
    if sample:
        yield _sound(path, sample)


def _sound(path: Path, sample: dict[str, object]) -> dict[str, object] | Damage:
    if sample.pop("__twice__"):
        return Damage(shard_damage(path, f"its sample '{shown(sample['__key__'])}' is there twice"))
    return sample
