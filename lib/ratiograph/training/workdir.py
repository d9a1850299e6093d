"""The lock of a run's folder, so that two runs never write into one.

It is a lock of the operating system on ``WORKDIR/.lock``; the file's text names the process that holds it. The lock
ends with that process, even if it is killed, and is not inherited by processes that it starts. It also ends when the
process closes any other handle of the file: while it is held, nothing else may open ``.lock``.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ratiograph.core.files import clear_storage_errors

__all__ = ["locked"]


@contextmanager
def locked(workdir: Path) -> Iterator[Callable[[], None]]:
    """Holds the lock of ``workdir`` while the body runs; the folder is made if missing.

    Yields a function that raises a ValueError if the lock is no longer this process's, or ``.lock`` was removed or
    replaced: another run may have begun.

    Do not nest uses for one folder in one process: leaving the inner one frees the lock.

    Raises:
        ValueError: another process holds the lock (the message has its pid and host), or the folder cannot be written.
    """
    path = Path(workdir) / ".lock"
    with clear_storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b", buffering=0)  # noqa: SIM115  # closing it must write nothing: the disk may be full
    with file:
        try:
            _take(file)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                holder = _holder(file.read().decode(errors="replace"))
                raise ValueError(
                    f"another run is using {workdir}: {holder}. Wait for it, end it, or give this run another --workdir"
                ) from None
            raise ValueError(f"cannot lock {path}: {error.strerror}. Choose another --workdir") from error
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with clear_storage_errors(path):
            file.truncate(0)
            file.write(json.dumps(holder).encode() + b"\n")
        yield functools.partial(_check_held, file, path)


def _take(file: BinaryIO) -> None:
    """Takes the lock, or keeps it; OSError if another process has it. A warning where the file system has none."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        warnings.warn(f"{file.name}: this file system has no locks; see to it that one run uses it", stacklevel=4)


def _check_held(file: BinaryIO, path: Path) -> None:
    held = os.fstat(file.fileno())
    with suppress(OSError):
        there = os.stat(path)
        if (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino):
            _take(file)
            return
    raise ValueError(
        f"{path} was removed, replaced or taken while this run held it, so that another run may write into the folder: "
        "this one ends without a further checkpoint. The same command goes on from the last one"
    )


def _holder(text: str) -> str:
    """The process that the text of a lock file names."""
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # it has the lock and has not written its name yet
        return "another process"
