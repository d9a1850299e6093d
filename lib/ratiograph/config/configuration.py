"""The gin edge: the only module that knows gin. Files, flags and overrides become one checked configuration.

Components are plain classes with typed keyword arguments; every name in ``__all__`` of a module listed in
`COMPONENT_MODULES` may be used in a gin file under its bare name. Gin itself accepts unknown scopes, unused
macros and bindings, and values of any type without a word; `parse` turns each into a `ConfigError` that names
file, line and the nearest valid name, before anything is built.

Three rules differ from plain gin. A macro is its text: ``%NET`` stands for the value of the line
``NET = ...`` in the scope where it is *used*. A file that several files include is read once, at its
first mention, so that a later include does not undo the lines in between. An ``import`` line registers
the ``__all__`` of that module, which the command line has to name too, ``--gin_param='import my.module'``: a file may
come from someone else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gin
import gin.config

from ratiograph.config import usage
from ratiograph.config.components import components, known_modules, load_components, register_module
from ratiograph.config.reader import Reader, check_commands, find, imported
from ratiograph.config.signatures import check_values
from ratiograph.config.values import (
    ConfigError,
    Macro,
    Reference,
    Statement,
    assignment,
    expand,
    literal,
    spell,
    writable,
)
from ratiograph.core.files import write_atomically
from ratiograph.core.foreign import shown
from ratiograph.core.tracebacks import own_line

__all__ = ["Config", "build", "parse", "save", "text", "to_dict"]

REFUSALS = (ValueError, TypeError, ArithmeticError, LookupError, AssertionError, RuntimeError, MemoryError, OSError)
"""What constructors, torch's included, raise for values that they cannot work with."""


@dataclass(frozen=True)
class Config:
    """A checked configuration. ``graph`` holds what is built; ``macros`` the macro lines in use."""

    root: str
    graph: usage.Graph
    macros: Mapping[str, Statement]
    imports: tuple[str, ...] = ()

    def values(self) -> dict[tuple[str, str], dict[str, object]]:
        """Every instance's parameters in signature order, defaults included where gin can write them."""
        return {
            (scope, name): {
                parameter: given[parameter].value if parameter in given else p.default
                for parameter, p in components[name].parameters.items()
                if parameter in given or (not p.required and writable(p.default))
            }
            for (scope, name), given in self.graph.instances.items()
        }


# --- the public functions -----------------------------------------------------------------------------------


def text(cfg: Config) -> str:
    """The whole configuration, defaults included, as one gin file that parses to the same one."""
    lines = [*(f"import {module}" for module in cfg.imports)]
    lines += [assignment(name, s.value) for name, s in cfg.macros.items()]
    for (scope, name), values in cfg.values().items():
        lines += ["", *(assignment(f"{spell(scope, name)}.{p}", v) for p, v in values.items())] if values else []
    return "\n".join(lines).strip() + "\n"


def parse(
    gin_files: Sequence[str],
    bindings: Sequence[str] = (),
    overrides: Mapping[str, object] | None = None,
    *,
    untrusted: Mapping[str, Sequence[str]] | None = None,
    root: str = "Experiment",
) -> Config:
    """Reads and checks a configuration; a later line wins over an earlier one.

    Args:
        gin_files: paths, relative to here or to the checkout, read in this order.
        bindings: lines such as ``"SBA.lam = 3.0"`` from the command line, read after the files.
        overrides: values that flags give, read last: ``{"Experiment.steps": 400, "DATA": "mnist"}``. The
            flag is named after the last part in small letters.
        untrusted: further lines by the name of the file that they come from, read between files and ``bindings``; as
            those of gin files, they run no code and no command that ``bindings`` or ``overrides`` do not name.
        root: the component that `build` builds.

    Raises:
        ConfigError: the first mistake found: where, what, and the nearest valid name.
    """
    load_components()
    reader = Reader(register_module, imported(bindings) | known_modules())
    for name in gin_files:
        reader.file(find(str(name), None, "flag --gin_file"))
    for source, lines in (untrusted or {}).items():
        for line in lines:
            reader.text(line, f"{shown(source)}, '{shown(line)}'", typed=False)
    for line in bindings:
        reader.text(line, f"flag --gin_param '{line}'")
    for key, value in (overrides or {}).items():
        _override(reader, key, value)
    check_commands({s.key: s for s in reader.statements}.values())
    check_values(reader.statements, components)
    graph = usage.check_use(root, reader.statements, components)
    macros = {s.parameter: s for s in reader.statements if s.parameter in graph.macros and not s.name}
    return Config(root, graph, macros, tuple(dict.fromkeys(reader.imports)))


def _override(reader: Reader, key: str, value: object) -> None:
    name, _, parameter = key.rpartition(".")
    where = f"flag --{parameter.lower()}"
    if not name and not any(not s.name and s.parameter == key for s in reader.statements):
        raise ConfigError(
            f"{where}: this configuration has no macro {key}, so the flag would change nothing. "
            f"Use %{key} in a gin file, or set the parameter itself with --gin_param."
        )
    reader.statements.append(Statement("", name, parameter, value, where, typed=True))


def build(cfg: Config) -> Any:
    """Builds the root with everything below it.

    Raises:
        ConfigError: a component, or a library that it calls, cannot be made of its values (with its own message; the
            exception is the cause), or a configured one was not built.
    """
    gin.clear_config()
    for (scope, name), values in cfg.values().items():
        for parameter, value in values.items():
            text = literal(expand(value, cfg.macros, cfg.root))
            gin.bind_parameter((scope, name, parameter), gin.config.parse_value(text))
    try:
        built = gin.get_configurable(cfg.root)()
    except Exception as error:
        own = own_line(error)
        if not isinstance(error, REFUSALS) and not own:
            raise
        raise ConfigError(_refusal(cfg, error, own)) from error
    operative = {(scope, selector.rpartition(".")[2]) for scope, selector in gin.config._OPERATIVE_CONFIG}
    for node, given in cfg.graph.instances.items():
        if node not in operative and node not in cfg.graph.unbuilt:
            lines = ", ".join(f"{s} ({s.where})" for s in given.values())
            raise ConfigError(f"@{spell(*node)}() was configured but never built; unused: {lines}.")
    return built


def _refusal(cfg: Config, error: Exception, own: str) -> str:
    """A constructor's own message after the place that built it, without what gin adds to it per caller.

    ``own`` is the line of a user's own module that raised it, if any.
    """
    message, *callers = re.split(r"\n  In call to configurable '", str(error))
    message = message.strip().partition("\n")[0]  # torch goes on with frames of C++
    if not isinstance(error, ValueError | OSError):  # of a library, in its own words
        own = f"{own}: " if own else ""
        message = f"cannot be built with these values: {own}{type(error).__name__}: {shown(message)}"
    if not callers:
        return message
    found = re.match(r"(\w+)' .*?(?: in scope '(.*)')?$", callers[0])
    node = (found[2] or "", found[1])
    site = cfg.graph.sites.get(node)
    place = f"{site.where}: {site} = @{spell(*node)}()" if site else spell(*node)
    return f"{place}: {message}"


def save(cfg: Config, path: str | Path) -> None:
    """Writes ``text(cfg)``.

    Raises:
        ValueError: the file cannot be written; an earlier one is intact.
    """
    write_atomically(Path(path), text(cfg).encode())


def to_dict(cfg: Config) -> dict[str, Any]:
    """Flat: ``{"DATA": "mnist", "student_score/UNet.width": 32, ...}``; references are written as strings."""

    def plain(value: object) -> Any:
        if isinstance(value, Mapping):
            return {str(plain(k)): plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return repr(value) if isinstance(value, Reference | Macro) else value

    flat = {name: plain(s.value) for name, s in cfg.macros.items()}
    for (scope, name), values in cfg.values().items():
        flat |= {f"{spell(scope, name)}.{parameter}": plain(value) for parameter, value in values.items()}
    return flat
