"""Where the configurations of runs differ, by what they mean and not by how they are written.

A *binding* is a parameter of a component, ``student/Adam.lr``, with its value. Two configurations mean the same if
their bindings have equal values once macros are put in: the order of lines, of a dict's keys, the name of a macro,
``1e-4`` against ``0.0001``, ``3`` against ``3.0`` and a list against a tuple are no differences, and neither is a
default that one file spells out and an older one does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ratiograph.config.components import components
from ratiograph.config.configuration import Config, parse
from ratiograph.config.reader import gin_text, parse_text, short
from ratiograph.config.values import ConfigError, Statement, expand, literal, spell

__all__ = ["ABSENT", "Change", "Difference", "bindings", "changes", "differences", "full_bindings", "read_bindings"]

ABSENT = "–"
"""Written for a run that has no such component."""

Bindings = Mapping[str, object]


@dataclass(frozen=True)
class Difference:
    """A binding and what it is in each run, in gin's words; ``ABSENT`` where a run does not have it."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """A binding with another value there than here, in gin's words; 'absent' without such a component."""

    name: str
    there: str
    here: str

    def __str__(self) -> str:
        return f"{self.name} is {self.there} there and {self.here} here"


def read_bindings(path: Path) -> dict[str, object]:
    """The bindings of a saved configuration, in file order, with macros replaced by their values.

    Nothing is imported or built, so that the file of a run by another version, or by modules that are not here, can be
    read too.

    Raises:
        ConfigError: the file cannot be read, is not gin, or a macro is missing in it.
    """
    lines = [
        _statement(line, where) for line, where in parse_text(gin_text(path), short(path)) if hasattr(line, "value")
    ]
    macros = {line.parameter: line for line in lines if not line.name}
    return {str(line): expand(line.value, macros, line.where) for line in lines if line.name}


def _statement(line: Any, where: str) -> Statement:
    name, parameter = (line.selector, line.arg_name) if line.arg_name else ("", line.selector)
    return Statement(line.scope, name, parameter, line.value, where)


def full_bindings(path: Path, root: str = "Experiment") -> dict[str, object]:
    """As ``read_bindings``, with the present defaults of parameters that the file leaves out.

    A file that no longer fits the components is taken as it stands.

    Raises:
        ConfigError: as ``read_bindings``.
    """
    found = read_bindings(path)
    try:
        return {**bindings(parse([str(path)], root=root)), **found}
    except (ConfigError, ImportError):
        return found


def bindings(cfg: Config) -> dict[str, object]:
    """All bindings of a checked configuration, defaults included, with macros replaced by their values."""
    return {
        f"{spell(scope, name)}.{parameter}": expand(value, cfg.macros, cfg.root)
        for (scope, name), values in cfg.values().items()
        for parameter, value in values.items()
    }


def changes(cfg: Config, path: str | Path) -> list[Change]:
    """Where ``cfg`` and a saved configuration differ, without parameters on which no step of a run depends.

    A component's class lists those by name in its ``harmless``.

    Args:
        cfg: the configuration "here".
        path: the saved one "there"; parameters that it leaves out have their present defaults.

    Raises:
        ConfigError: as ``read_bindings``.
    """
    found = differences({"there": full_bindings(Path(path), cfg.root), "here": bindings(cfg)})
    rows = [(d.name, *("absent" if value == ABSENT else value for value in d.values)) for d in found]
    return [Change(*row) for row in rows if not _is_harmless(row[0])]


def _is_harmless(binding: str) -> bool:
    component, _, parameter = binding.rpartition("/")[2].rpartition(".")
    known = components.get(component)
    return known is not None and parameter in getattr(known.make, "harmless", ())


def differences(runs: Mapping[str, Bindings]) -> list[Difference]:
    """The bindings that are not the same in all runs.

    Args:
        runs: bindings by run.

    Returns:
        One a binding, with its value in every run, those of Experiment first, then by component as they come.
    """
    names = dict.fromkeys(name for bindings in runs.values() for name in bindings)
    places = {component: place for place, component in enumerate(dict.fromkeys(map(_component, names)))}
    order = sorted(names, key=lambda name: (_component(name) != "Experiment", places[_component(name)]))
    found = []
    for name in order:
        given = [bindings.get(name, _Absent) for bindings in runs.values()]
        if any(_meaning(value) != _meaning(given[0]) for value in given):
            found.append(Difference(name, tuple(ABSENT if value is _Absent else literal(value) for value in given)))
    return found


class _Absent:
    """Stands for the value of a binding that a run does not have."""


def _component(name: str) -> str:
    return name.rpartition(".")[0]


def _meaning(value: object) -> object:
    """Equal for values that mean the same, and only for those."""
    if isinstance(value, Mapping):
        return {str(key): _meaning(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(map(_meaning, value))
    return ("bool", value) if isinstance(value, bool) else value  # Python's True is equal to 1
