"""What one line of a configuration says, and how it is written.

A *statement* is one line ``scope/Component.parameter = value`` or ``MACRO = value``. A *value* is a Python
literal, a *reference* ``@scope/Component()`` or a *macro* ``%NAME``, nested in lists, tuples and dicts as one
likes. This module does not know gin; `signatures` checks values, `usage` follows the references from the root.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

__all__ = [
    "REQUIRED",
    "ConfigError",
    "Macro",
    "Reference",
    "Statement",
    "assignment",
    "expand",
    "literal",
    "parts",
    "spell",
    "suggest",
    "writable",
]

REQUIRED = "gin.REQUIRED"  # ``%gin.REQUIRED`` marks a value that a later line or a flag has to give


class ConfigError(ValueError):
    """A mistake in a configuration: the message says where, what, and what to write instead."""


@dataclass(frozen=True)
class Reference:
    """``@scope/name()`` builds the component at every use; without parentheses ``build`` is False."""

    scope: str
    name: str
    build: bool = True

    def __repr__(self) -> str:
        return f"@{spell(self.scope, self.name)}{'()' if self.build else ''}"


@dataclass(frozen=True)
class Macro:
    """``%name``: the value of the line ``name = value``, put in its place."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True)
class Statement:
    """One line. ``name`` is the component, '' for a macro; ``where`` is 'file:line' or 'flag --steps'.

    ``typed`` says that it stands on the command line and not in a file, which somebody else may have written.
    """

    scope: str
    name: str
    parameter: str
    value: object
    where: str
    typed: bool = False

    @property
    def key(self) -> tuple[str, str, str]:
        return self.scope, self.name, self.parameter

    def __str__(self) -> str:
        return f"{spell(self.scope, self.name)}.{self.parameter}" if self.name else self.parameter


# --- spelling -----------------------------------------------------------------------------------------------


def spell(scope: str, name: str) -> str:
    """'scope/name', or 'name' outside every scope."""
    return f"{scope}/{name}" if scope else name


def suggest(name: str, valid: Iterable[str]) -> str:
    """' Did you mean ...?' for the nearest valid name in any case, else ' Valid: ...' for a short list."""
    valid = sorted(set(valid))
    folded = {v.casefold(): v for v in reversed(valid)}
    near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)
    if near:
        return f" Did you mean '{folded[near[0]]}'?"
    return f" Valid: {', '.join(valid)}." if 0 < len(valid) <= 24 else ""


# --- values -------------------------------------------------------------------------------------------------


def parts(value: object) -> Iterator[object]:
    """``value`` and everything nested in it."""
    yield value
    if isinstance(value, Mapping):
        nested = [*value.keys(), *value.values()]
    else:
        nested = value if isinstance(value, list | tuple) else []
    for item in nested:
        yield from parts(item)


def expand(value: object, macros: Mapping[str, Statement], where: str, seen: tuple[str, ...] = ()) -> object:
    """``value`` with every macro replaced by its own value.

    Raises:
        ConfigError: a macro that no line defines, or that is defined through itself.
    """
    if isinstance(value, Macro) and value.name != REQUIRED:
        if value.name in seen:
            raise ConfigError(f"{where}: {' -> '.join(f'%{n}' for n in (*seen, value.name))} goes round in a circle.")
        if value.name not in macros:
            raise ConfigError(
                f"{where}: no line defines the macro %{value.name}.{suggest(value.name, macros)} "
                f"Define it with a line `{value.name} = ...`."
            )
        return expand(macros[value.name].value, macros, where, (*seen, value.name))
    if isinstance(value, Mapping):
        return {expand(k, macros, where, seen): expand(v, macros, where, seen) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(expand(v, macros, where, seen) for v in value)
    return value


# --- writing ------------------------------------------------------------------------------------------------


def literal(value: object) -> str:
    """A value as gin reads it back."""
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return "1e999" if value > 0 else "-1e999"  # gin has no word for infinity, but this overflows to it
    if isinstance(value, Mapping):
        return "{" + ", ".join(_items(value)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_items(value)) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(_items(value)) + ("," if len(value) == 1 else "") + ")"
    return repr(value)


def _items(value: Mapping | list | tuple) -> list[str]:
    if isinstance(value, Mapping):
        return [f"{literal(k)}: {literal(v)}" for k, v in value.items()]
    return [literal(v) for v in value]


def writable(value: object) -> bool:
    """Whether ``literal`` gives text that reads back as ``value``: plain Python literals without NaN."""
    if isinstance(value, Mapping):
        return all(writable(k) and writable(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(writable, value))
    return value is None or (type(value) in (bool, int, float, str) and value == value)


def assignment(spelled: str, value: object) -> str:
    """``spelled = value``, a long list or dict with one item a line."""
    line = f"{spelled} = {literal(value)}"
    if len(line) <= 100 or not isinstance(value, Mapping | list | tuple):
        return line
    opening, closing = literal(type(value)())
    return "\n".join([f"{spelled} = {opening}", *(f"    {item}," for item in _items(value)), closing])
