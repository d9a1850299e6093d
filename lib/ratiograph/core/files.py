"""Writing files so that a crash, a full disk or a second run never leaves half of one behind.

A *temporary* is the file being written; it lies beside its destination under a dotted name that ends in
``.tmp`` and is renamed over it only when its bytes are on the disk. Readers see the old file or the new one,
nothing between.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

__all__ = [
    "Missing",
    "clear_storage_errors",
    "expanded",
    "remove_temporaries",
    "sampled_digest",
    "sync_folder",
    "write_atomically",
]

_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp", re.DOTALL)


class Missing(FileNotFoundError):
    """A file or folder that a run needs is not there.

    Args:
        source: how the user named it; also the error's ``filename``.
        message: what is missing and how to get it, one line.
    """

    def __init__(self, source: str, message: str):
        super().__init__(message)
        self.filename = source

    def __str__(self) -> str:
        return self.args[0]


def expanded(name: str | Path) -> Path:
    """The path that a user named, ``~`` put in its place; ``~NAME`` of nobody stays, so that it is a missing file."""
    return Path(os.path.expanduser(name))


@contextmanager
def clear_storage_errors(path: Path) -> Iterator[None]:
    """Turns an OSError raised while ``path`` is written into a ValueError that says what to do.

    Raises:
        ValueError: the body raised OSError (disk full, read-only folder, quota, no permission).
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror or error}. Free space there, check its permissions, or "
            "choose another folder; earlier files are intact, and the same command continues from them"
        ) from error


def sampled_digest(paths: Iterable[Path]) -> str:
    """16 digits of a SHA-256 of the files' sizes, their first MiB and 64 blocks of 16 KiB spread over each.

    Two trained networks differ everywhere, so that this tells their files apart, and takes milliseconds for 10 GB.

    Raises:
        OSError: a file is missing or cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{size}:".encode() + file.read(2**20))
            for block in range(64 if size > 2**20 else 0):
                file.seek(block * (size - 2**14) // 63)
                digest.update(file.read(2**14))
    return digest.hexdigest()[:16]


def sync_folder(folder: Path) -> None:
    """Makes renames in ``folder`` durable, on file systems that can sync a folder."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomically(path: Path, write: bytes | Callable[[BinaryIO], None]) -> None:
    """Writes ``path`` whole or not at all: temporary beside it -> fsync -> rename -> fsync of the folder.

    Args:
        path: destination; its folder is made if missing, an existing file is replaced.
        write: the bytes, or a function that writes them to the open binary file it is given.

    Raises:
        ValueError: the file cannot be written; an earlier ``path`` is intact and the temporary is removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with clear_storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                if callable(write):
                    write(file)
                else:
                    file.write(write)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


def remove_temporaries(folder: Path) -> None:
    """Removes the temporaries in ``folder`` and in the folders right below it, but not those of other live processes.

    Call it where this process writes nothing there at the moment.
    """
    for path in (*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")):
        named = _TEMPORARY.fullmatch(path.name)
        if named and not _is_another_process(int(named[1])):
            with suppress(OSError):
                path.unlink()


def _is_another_process(pid: int) -> bool:
    """Whether such a process lives on this machine. A container often gives a new process the number of the last."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return pid != os.getpid()
