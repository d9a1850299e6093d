"""Reads untrusted pickles as data: only the stand-ins that a reader lists are called; every other global is refused.

Stand-ins return objects that are immutable or *sealed*: these take from the pickle only the state that their class
allows, so that a pickle cannot change an object of this process.

A few hundred bytes of pickle can ask for more time or memory than there is: tuples of tuples whose hash takes for ever,
or a memo of 2^31 places. `check_budget` therefore reads the opcodes first and builds nothing. There an object has a
*size*, the objects in it with repetitions, a *length*, the characters and bytes in it likewise, and a *depth*.
"""

from __future__ import annotations

import pickle
import pickletools
import re
from collections.abc import Callable, Mapping
from typing import BinaryIO

import numpy as np

from ratiograph.core.foreign import shown

__all__ = ["Array", "DType", "Function", "Refused", "Sealed", "Unpickler", "check_budget", "numpy_names"]

OPCODES = 400_000
"""The most in one pickle; CIFAR-100's, the largest that is read, has 200,000, an official EDM network 100,000."""
SIZES = 2**23
"""The most objects, with repetitions, that all opcodes together may put into others."""
REPEATED = 2**28
"""The most characters and bytes that a pickle may take from its memo again."""
DEPTH = 500
CHANGING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
"""Opcodes that put objects into one that is there already."""


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
        start = file.tell()
        check_budget(file)
        file.seek(start)
        super().__init__(file, encoding=encoding)
        self.allowed = allowed

    def find_class(self, module: str, name: str) -> object:
        if f"{module}.{name}" not in self.allowed:
            raise Refused(shown(f"{module}.{name}"))
        return self.allowed[f"{module}.{name}"]

    def persistent_load(self, identifier: object) -> object:
        named = f" '{shown(identifier)}'" if isinstance(identifier, str) else ""  # others may be endless to print
        raise Refused(f"the persistent object{named}")


class _Extent:
    """Size, length and depth of an object that a pickle would build."""

    __slots__ = ("depth", "length", "size")

    def __init__(self, length: int = 0):
        self.size, self.length, self.depth = 1, length, 1

    def take(self, parts: list[_Extent]) -> int:
        """Puts ``parts`` into this object; returns their size."""
        size = sum(part.size for part in parts)
        self.size, self.length = self.size + size, self.length + sum(part.length for part in parts)
        self.depth = max([self.depth, *(part.depth + 1 for part in parts)])
        return size


_MARK = _Extent()


class _Budget:
    """The stack and memo of an unpickler, with the extents of objects in their places."""

    def __init__(self):
        self.stack: list[_Extent] = []
        self.memo: dict[int, _Extent] = {}
        self.sizes = self.repeated = 0

    def step(self, opcode: pickletools.OpcodeInfo, argument: object) -> None:
        """Follows one opcode; Refused if a budget is spent, IndexError or KeyError in a damaged pickle."""
        name = opcode.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(self.memo) if name == "MEMOIZE" else argument
            if not 0 <= place < OPCODES:
                raise Refused(f"a memo of {place:,} places")
            self.memo[place] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
            self.repeated += self.stack[-1].length
        elif name == "MARK":
            self.stack.append(_MARK)
        elif name == "DUP":
            self.stack.append(self.stack[-1])
        else:
            self._build(opcode, argument)
        if self.sizes > SIZES or self.repeated > REPEATED:
            raise Refused("a pickle that builds more than it holds")

    def _build(self, opcode: pickletools.OpcodeInfo, argument: object) -> None:
        before, parts = opcode.stack_before, []
        if pickletools.markobject in before or (opcode.name in ("POP", "POP_MARK") and self.stack[-1] is _MARK):
            while (part := self.stack.pop()) is not _MARK:
                parts.append(part)
            before = before[: before.index(pickletools.markobject)] if pickletools.markobject in before else ()
        parts += [self.stack.pop() for _ in before]
        if not opcode.stack_after:
            return
        length = len(argument) if isinstance(argument, str | bytes | bytearray) else 0
        made = parts.pop() if opcode.name in CHANGING else _Extent(length)
        self.sizes += made.take(parts)
        if made.depth > DEPTH:
            raise Refused(f"objects more than {DEPTH} deep in one another")
        self.stack.append(made)


def check_budget(file: BinaryIO) -> None:
    """Reads the pickle that begins at the place of ``file``, to its end, without building anything.

    Raises:
        Refused: it would take more time, memory or depth than any file of weights or images does.
        ValueError: it is damaged.
    """
    budget = _Budget()
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if number >= OPCODES:
                raise Refused(f"a pickle of more than {OPCODES:,} opcodes")
            budget.step(opcode, argument)
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError("the pickle is damaged") from error
