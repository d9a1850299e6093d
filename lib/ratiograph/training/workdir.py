"""The lock of a run's folder, so that two runs never write into one.

It is a lock of the operating system on ``WORKDIR/.lock``; the file's text names the process that holds it. The lock
ends with that process, even if it is killed, and is not inherited by processes that it starts.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ratiograph.core.files import clear_storage_errors

__all__ = ["locked"]


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the lock of ``workdir`` while the body runs; the folder is made if missing.

    Do not nest uses for one folder in one process: leaving the inner one frees the lock.

    Raises:
        ValueError: another process holds the lock (the message has its pid and host), or the folder cannot be written.
    """
    path = Path(workdir) / ".lock"
    with clear_storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise ValueError(
                    f"another run is using {workdir}: {_holder(file.read())}. Wait for it or end it, or give this run "
                    "another --workdir"
                ) from None
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise ValueError(f"cannot lock {path}: {error.strerror}. Choose another --workdir") from error
            warnings.warn(f"{path}: this file system has no locks; see to it that one run uses {workdir}", stacklevel=3)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with clear_storage_errors(path):
            file.truncate(0)
            file.write(json.dumps(holder) + "\n")
            file.flush()
        yield


def _holder(text: str) -> str:
    """The process that the text of a lock file names."""
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # it has the lock and has not written its name yet
        return "another process"
