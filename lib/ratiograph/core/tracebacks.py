"""What an exception comes from: a user's own module, memory that does not suffice, or neither."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

import ratiograph

__all__ = ["described", "out_of_memory", "own_line"]

_PACKAGE = Path(ratiograph.__file__).resolve().parent


def described(error: BaseException) -> str:
    """An exception on one line: 'NameError: name 'x' is not defined'."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch's CPU allocator or a GPU had no memory left."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error))
    )


def own_line(error: BaseException, program: str | None = None) -> str:
    """'mine.py:12 (in value)': the innermost line of a user's own module that ``error`` came through, '' without one.

    Own modules are the files outside Python, its packages, this library, and ``program``, the file that runs. An error
    of syntax in an own module is such a line too.
    """
    if isinstance(error, SyntaxError) and error.filename and _own(error.filename):
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in frames if frame.filename != program and _own(frame.filename)]
    if not frames:
        return ""
    inside = "" if frames[-1].name == "<module>" else f" (in {frames[-1].name})"
    return f"{frames[-1].filename}:{frames[-1].lineno}{inside}"


def _own(file: str) -> bool:
    path = Path(file)
    return path.is_file() and not any(path.resolve().is_relative_to(place) for place in _foreign())


def _foreign() -> Iterator[Path]:
    """Folders whose files are no user's own modules."""
    yield _PACKAGE
    for name in ("stdlib", "platstdlib", "purelib", "platlib"):
        yield Path(sysconfig.get_path(name)).resolve()
    yield from (_PACKAGE.parents[1] / "launch", _PACKAGE.parents[1] / "tools")  # of a checkout
