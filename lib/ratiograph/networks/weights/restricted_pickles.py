"""Reads untrusted pickles as data: only the stand-ins that a reader lists are called; every other global is refused.

Stand-ins return objects that are immutable or *sealed*: these take from the pickle only the state that their class
allows, so that a pickle cannot change an object of this process.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from typing import BinaryIO

import numpy as np

__all__ = ["Array", "DType", "Function", "Refused", "Sealed", "Unpickler", "numpy_names"]


class Refused(Exception):
    """A pickle holds something that files of its kind don't need; the message is its name."""


class Sealed:
    """Takes no state from a pickle."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise Refused(f"state for {type(self).__name__.strip('_')}")


class Function(Sealed):
    """A stand-in that calls ``call``."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable):
        self._call = call

    def __call__(self, *args: object) -> object:
        return self._call(*args)


class DType(Sealed):
    """A numpy dtype of numbers; its state is the byte order."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, align: bool = False, copy: bool = True):
        if not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
            raise Refused(f"numpy.dtype({code!r})")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
            raise Refused("a structured numpy.dtype")
        self.dtype = self.dtype.newbyteorder(state[1])


class Array(Sealed):
    """A numpy array; its state holds shape, dtype and bytes."""

    __slots__ = ("values",)

    def __init__(self, *args: object):
        pass

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        values = np.frombuffer(data, dtype.dtype)
        self.values = values.reshape(shape, order="F" if fortran else "C")


def numpy_names(name: str) -> tuple[str, str]:
    """The names of a numpy global before and after numpy 2."""
    return f"numpy.core.{name}", f"numpy._core.{name}"


class Unpickler(pickle.Unpickler):
    """An unpickler of the globals in ``allowed`` alone.

    Args:
        file: the pickle.
        allowed: stand-ins by 'module.name'.
        encoding: of Python 2's strings.
    """

    def __init__(self, file: BinaryIO, allowed: Mapping[str, Callable], encoding: str = "ASCII"):
        super().__init__(file, encoding=encoding)
        self.allowed = allowed

    def find_class(self, module: str, name: str) -> object:
        if f"{module}.{name}" not in self.allowed:
            raise Refused(f"{module}.{name}")
        return self.allowed[f"{module}.{name}"]

    def persistent_load(self, identifier: object) -> object:
        raise Refused(f"the persistent object {identifier!r}")
