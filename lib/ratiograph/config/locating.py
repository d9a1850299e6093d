"""Checks, in milliseconds and before anything is built, that the files a configuration names exist.

A component that reads files has a static or class method ``locate``, whose arguments are some of its constructor's. It
looks for local files, fetches those of the Hugging Face hub, reads none, and raises where one cannot be had. A
component in the place of an argument is handed to it as its class.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from ratiograph.config.components import components
from ratiograph.config.configuration import Config
from ratiograph.config.values import Macro, Reference, expand, spell
from ratiograph.core.files import expanded

__all__ = ["check_files", "missing_files"]

FLAGS = {"DATA": "--data=...", "TEACHER": "--teacher=..."}
"""Macros that have a flag of their own."""


def check_files(cfg: Config) -> None:
    """Asks every component of a configuration for its files, in milliseconds and without building anything.

    Raises:
        FileNotFoundError: some are missing: one line for each, with what names it and how to get it.
    """
    lines = missing_files(cfg)
    if len(lines) > 1:
        lines = [f"{len(lines)} things that this run reads are missing:", *(f"  {line}" for line in lines)]
    if lines:
        raise FileNotFoundError("\n".join(lines))


def missing_files(cfg: Config) -> list[str]:
    """A line for each missing file or folder; one line where several components miss the same."""
    lines: dict[str, str] = {}
    for (scope, name), values in cfg.values().items():
        locate = getattr(components[name].make, "locate", None)
        if locate is None or (scope, name) in cfg.graph.unbuilt:
            continue
        try:
            locate(**_arguments(cfg, locate, values))
        except (FileNotFoundError, ValueError) as error:
            source = error.filename if isinstance(error, FileNotFoundError) else None
            named = f"{_given(cfg, (scope, name), source)}: {error}" if source else str(error)
            lines.setdefault(source if _absent(source) else str(error), named)
    return list(lines.values())


def _absent(source: str | None) -> bool:
    """Whether ``source`` itself is missing, so that one line covers all parts that it should hold."""
    return source is not None and "://" not in source and not expanded(source).exists()


def _arguments(cfg: Config, locate: object, values: Mapping[str, object]) -> dict[str, object]:
    """Those of ``values`` that ``locate`` takes."""
    wanted = [name for name in inspect.signature(locate).parameters if name in values]
    plain = {name: expand(values[name], cfg.macros, name) for name in wanted}
    return {
        name: components[value.name].make if isinstance(value, Reference) else value for name, value in plain.items()
    }


def _given(cfg: Config, node: tuple[str, str], source: str) -> str:
    """The line that says ``source``, where it stands, and how to say something else."""
    for parameter, statement in cfg.graph.instances[node].items():
        value, line = statement.value, f"{spell(*node)}.{parameter}"
        while isinstance(value, Macro):
            line, statement = value.name, cfg.macros[value.name]
            value = statement.value
        if value == source:
            change = FLAGS.get(line, f"--gin_param=\"{line}='...'\"")
            return f"{line} = {source!r} ({statement.where}; change it by {change})"
    return f"{spell(*node)}"
