"""Images prepared as samples: the blocks of a tar archive that hold an image with its label or caption.

These functions run in worker processes.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

from preparation.cropping import Preparation
from preparation.image_bytes import Damaged
from preparation.sources import Entry

__all__ = ["Numbered", "Prepared", "Skipped", "prepare_entries"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A sample ready to be written: the blocks of a tar archive that hold it, and its image's (width, height)."""

    blocks: bytes
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Skipped:
    """An image that was left out, and why."""

    name: str
    reason: str


Numbered = tuple[int, Entry]
"""An entry with its number in the source's own order."""


def prepare_entries(preparation: Preparation, entries: Sequence[Numbered]) -> list[Prepared | Skipped]:
    """Reads and prepares each entry; a damaged or missing image is `Skipped`.

    Raises:
        ValueError: an image cannot be read for a reason that may pass.
    """
    return [_prepare(preparation, number, entry) for number, entry in entries]


def _prepare(preparation: Preparation, number: int, entry: Entry) -> Prepared | Skipped:
    try:
        suffix, data, size = preparation(entry.image.read())
    except (Damaged, FileNotFoundError) as error:
        return Skipped(entry.name, error.strerror if isinstance(error, OSError) else str(error))
    except OSError as error:  # no fault of this image, and another attempt may succeed
        raise ValueError(f"cannot read {entry.name}: {error}. The same command continues from here") from error
    members = sorted({**entry.members, suffix: data}.items())
    return Prepared(b"".join(_tar_blocks(f"{number:08d}.{suffix}", data) for suffix, data in members), size)


def _tar_blocks(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)  # of no owner, and of time 0
    info.size, info.mode = len(data), 0o444
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)
