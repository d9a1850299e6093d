"""One run a folder: the lock that a second run in the same workdir meets.

The lock is the kernel's, on the file ``WORKDIR/.lock``, which says who holds it. It ends with the process that holds
it, however that ends, so the file a killed run leaves locks nothing, and processes it started do not inherit it.
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

_NAME = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the lock of ``workdir`` while the body runs; the folder is made if missing.

    A process holds a folder once: leaving the inner of two nested uses would free it.

    Raises:
        ValueError: another process holds it, named by pid and host; or the folder cannot be written.
    """
    path = Path(workdir) / _NAME
    with clear_storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                file.seek(0)
                raise ValueError(_held(workdir, file.read())) from None
            if error.errno not in _UNSUPPORTED:
                raise ValueError(f"cannot lock {path}: {error.strerror}. Choose another --workdir") from error
            warnings.warn(f"{path}: this file system has no locks; see to it that one run uses {workdir}", stacklevel=3)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with clear_storage_errors(path):
            file.truncate(0)
            file.write(json.dumps(holder) + "\n")
            file.flush()
        yield


def _held(workdir: Path, text: str) -> str:
    try:
        holder = json.loads(text)
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # it has just taken the lock and not signed yet
        who = "another process"
    return f"another run is using {workdir}: {who}. Wait for it or end it, or give this run another --workdir"
