"""The gin edge: the only module that knows gin. Files, flags and overrides become one checked configuration.

Components are plain classes with typed keyword arguments; every name in ``__all__`` of a module listed in
`COMPONENT_MODULES` may be used in a gin file under its bare name. Gin itself accepts unknown scopes, unused
macros and bindings, and values of any type without a word; `parse` turns each into a `ConfigError` that names
file, line and the nearest valid name, before anything is built.

Three rules differ from plain gin. A macro is its text: ``%NET`` stands for the value of the line
``NET = ...`` in the scope where it is *used*. A file that several files include is read once, at its
first mention, so that a later include does not undo the lines in between. An ``import`` line registers
the ``__all__`` of that module; in the ``config.gin`` that a run left, which may come from someone else, it must
be one that this program knows or that the command line names: ``--gin_param='import my.module'``.
"""

from __future__ import annotations

import importlib
import importlib.util  # gin 0.5 reports a missing file through it without importing it
import inspect
import io
import re
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gin

if not hasattr(gin, "configurable"):  # a folder named gin is importable without the package
    raise ImportError("gin-config is not installed, only a folder named gin was found: pip install gin-config")

import gin.config
from gin import config_parser

from ratiograph import config_check
from ratiograph.config_values import (
    Component,
    ConfigError,
    Macro,
    Reference,
    Statement,
    assignment,
    check_values,
    expand,
    literal,
    spell,
    suggest,
    writable,
)

__all__ = [
    "COMPONENT_MODULES",
    "Config",
    "ConfigError",
    "build",
    "differences",
    "parse",
    "register",
    "save",
    "to_dict",
]

COMPONENT_MODULES = (
    "ratiograph.noising",
    "ratiograph.augmentation",
    "ratiograph.times",
    "ratiograph.weightings",
    "ratiograph.normalization",
    "ratiograph.directions",
    "ratiograph.targets",
    "ratiograph.rewards",
    "ratiograph.reward_images",
    "ratiograph.reward_models",
    "ratiograph.reward_preferences",
    "ratiograph.autoencoder",
    "ratiograph.data.captioned",
    "ratiograph.objective",
    "ratiograph.denoisers",
    "ratiograph.guidance",
    "ratiograph.preconditioning",
    "ratiograph.networks.unet",
    "ratiograph.networks.edm",
    "ratiograph.networks.stable_diffusion",
    "ratiograph.networks.classifier",
    "ratiograph.teachers.mixture",
    "ratiograph.teachers.stable_diffusion",
    "ratiograph.students",
    "ratiograph.ratios",
    "ratiograph.ratio_losses",
    "ratiograph.positives",
    "ratiograph.warm_start",
    "ratiograph.samplers",
    "ratiograph.optim",
    "ratiograph.denoising_weights",
    "ratiograph.conditions",
    "ratiograph.data.stream",
    "ratiograph.data.latents",
    "ratiograph.evaluation.digits",
    "ratiograph.evaluation.mixture",
    "ratiograph.distillation",
    "ratiograph.ratio_training",
    "ratiograph.denoiser_training",
    "ratiograph.classifier_training",
    "ratiograph.experiment",
)

CHECKOUT = Path(__file__).resolve().parents[2]

SAVED = "config.gin"
"""What runs leave is called so; such a file runs no code of its own choice."""

_components: dict[str, Component] = {}


@dataclass(frozen=True)
class Config:
    """A checked configuration. ``graph`` holds what is built; ``macros`` the macro lines in use."""

    root: str
    graph: config_check.Graph
    macros: Mapping[str, Statement]
    imports: tuple[str, ...] = ()

    def values(self) -> dict[tuple[str, str], dict[str, object]]:
        """Every instance's parameters in signature order, defaults included where gin can write them."""
        return {
            (scope, name): {
                parameter: given[parameter].value if parameter in given else p.default
                for parameter, p in _components[name].parameters.items()
                if parameter in given or (not p.required and writable(p.default))
            }
            for (scope, name), given in self.graph.instances.items()
        }


# --- components ---------------------------------------------------------------------------------------------


def register(*components: Callable) -> None:
    """Makes classes and functions available to gin files under their bare names; the classes stay untouched.

    Raises:
        AssertionError: two different components of one name.
    """
    for make in components:
        name = make.__name__
        known = _components.get(name)
        assert known is None or known.make is make, f"two components named {name}: {known.make} and {make}"
        if known is None:
            gin.register(name, module="ratiograph")(make)
            _components[name] = Component.of(make)


def _register_module(module: str) -> None:
    imported = importlib.import_module(module)
    public = [getattr(imported, name) for name in getattr(imported, "__all__", ())]
    own = [o for o in public if getattr(o, "__module__", None) == module]
    register(*(o for o in own if inspect.isclass(o) or inspect.isfunction(o)))


def _load_components() -> None:
    for module in COMPONENT_MODULES:
        _register_module(module)


# --- reading ------------------------------------------------------------------------------------------------


class _Delegate(config_parser.ParserDelegate):
    """Records references and macros instead of resolving them: mistakes in them are reported our way."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        scope, _, name = scoped_configurable_name.rpartition("/")
        return Reference(scope, name, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


@dataclass
class _Reader:
    """Collects the statements of files and flags in order. ``done`` files are not included again.

    ``known``: modules that a saved configuration may import.
    """

    statements: list[Statement]
    imports: list[str]
    done: set[Path]
    known: frozenset[str] = frozenset(COMPONENT_MODULES)

    def file(self, path: Path, stack: tuple[Path, ...] = (), *, saved: bool) -> None:
        self.done.add(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{_short(path)}: cannot be read as text: {error}") from error
        for statement, where in _parse(text, _short(path)):
            if isinstance(statement, config_parser.IncludeStatement):
                included = _find(statement.filename, path, where)
                if included in (*stack, path):
                    chain = " -> ".join(_short(p) for p in (*stack, path, included))
                    raise ConfigError(f"{where}: files include each other in a circle: {chain}. Remove one include.")
                if included not in self.done:
                    self.file(included, (*stack, path), saved=saved or _is_saved(statement.filename))
            else:
                if saved:
                    self.check_import(statement, where)
                self.add(statement, where)

    def check_import(self, statement: Any, where: str) -> None:
        """Refuses an import that a saved file, or one that it includes, asks for on its own."""
        if isinstance(statement, config_parser.ImportStatement) and statement.module not in self.known:
            raise ConfigError(
                f"{where}: a saved configuration asks to run code, import {statement.module}. If you know and trust that "
                f"module, name it: --gin_param='import {statement.module}'."
            )

    def text(self, text: str, where: str) -> None:
        found = list(_parse(text, where))
        if not found:
            raise ConfigError(f"{where}: holds no binding. Write Component.parameter=value or MACRO=value.")
        for statement, _ in found:
            if isinstance(statement, config_parser.IncludeStatement):
                raise ConfigError(f"{where}: a flag cannot include a file; use --gin_file={statement.filename}.")
            self.add(statement, where)

    def add(self, statement: Any, where: str) -> None:
        if isinstance(statement, config_parser.ImportStatement):
            try:
                _register_module(statement.module)
            except ModuleNotFoundError as error:
                raise ConfigError(f"{where}: cannot import {statement.module}: {error}.") from error
            self.imports.append(statement.module)
        elif isinstance(statement, config_parser.BindingStatement):
            if not statement.arg_name and statement.scope:
                macro = spell(statement.scope, statement.selector)
                raise ConfigError(f"{where}: '{macro}' names no parameter; write `{macro}.<parameter> = ...`.")
            name, parameter = statement.selector, statement.arg_name
            name, parameter = (name, parameter) if parameter else ("", name)
            self.statements.append(Statement(statement.scope, name, parameter, statement.value, where))


def _parse(text: str, source: str) -> Iterator[tuple[Any, str]]:
    """Statements of gin text with where each stands; ``source`` is a file's name or the whole flag."""

    def at(line: int) -> str:
        return source if source.startswith("flag ") else f"{source}:{line}"

    parser = None
    try:
        parser = config_parser.ConfigParser(io.StringIO(text + "\n"), _Delegate())
        for statement in parser:
            yield statement, at(statement.location.line_num)
    except tokenize.TokenError as error:
        message, (line, _) = error.args
        message = "a bracket or a string is not closed" if message.startswith("EOF") else message
        raise ConfigError(f"{at(line)}: {message}.") from error
    except TypeError as error:
        line = parser.current_token.start[0]
        raise ConfigError(f"{at(line)}: {error}: a dict's keys are numbers or strings.") from error
    except SyntaxError as error:
        raise ConfigError(f"{at(error.lineno or 1)}: {_explain(error, text)}") from error


PYTHON = {"true": "True", "false": "False", "none": "None", "null": "None", "inf": "1e999", "-inf": "-1e999"}


def _explain(error: SyntaxError, text: str) -> str:
    """What is wrong with a line and how to write it, from gin's own words."""
    line = (error.text or text).strip()
    word = re.search(r"Failed to parse token '(-?[A-Za-z_][\w./-]*)'", error.msg)
    if line.startswith("include"):
        return f"cannot read `{line}`. Write include 'folder/file.gin', with the quotes."
    if word and word[1].lower() in PYTHON:
        return f"cannot read the value in `{line}`. Write {PYTHON[word[1].lower()]}."
    if word:
        name = word[1]
        kinds = f"Write '{name}' for a string, @{name}() for a component, %{name} for a macro."
        return f"cannot read the value in `{line}`. {kinds}"
    if error.msg.startswith("Expected newline"):
        return f"cannot read `{line}`: the value is followed by more. A value is a literal, not an expression."
    message = error.msg.strip().splitlines()[0].rstrip(".").replace("Malformatted", "malformed")
    message = f"cannot read `{line}`: {message[0].lower()}{message[1:]}."
    return f"{message} A line reads `Component.parameter = value`."


def _find(name: str, including: Path | None, where: str) -> Path:
    """Where a file is: beside the including one, under its ``gin`` folder, from here, from the checkout."""
    if including is None:
        folders = [Path.cwd(), CHECKOUT]
    else:
        roots = [p for p in including.parents if p.name == "gin"]
        folders = [including.parent, *roots, Path.cwd(), CHECKOUT / "gin", CHECKOUT]
    tried = dict.fromkeys((folder / Path(name).expanduser()).resolve() for folder in folders)
    for path in tried:
        if path.is_file():
            return path
    beside = [p.name for path in tried for p in path.parent.glob("*.gin")]
    near = suggest(Path(name).name, beside)
    looked = ", ".join(dict.fromkeys(_short(path) for path in tried))
    raise ConfigError(f"{where}: there is no file '{name}'.{near} Looked for {looked}.")


def _short(path: Path) -> str:
    """The path as a person would type it: relative to here or to the checkout where it lies below."""
    for base in (Path.cwd(), CHECKOUT):
        if path.is_relative_to(base):
            return str(path.relative_to(base))
    return str(path)


# --- the public functions -----------------------------------------------------------------------------------


def _text(cfg: Config) -> str:
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
    root: str = "Experiment",
) -> Config:
    """Reads and checks a configuration; a later line wins over an earlier one.

    Args:
        gin_files: paths, relative to here or to the checkout, read in this order.
        bindings: lines such as ``"SBA.lam = 3.0"`` from the command line, read after the files.
        overrides: values that flags give, read last: ``{"Experiment.steps": 400, "DATA": "mnist"}``. The
            flag is named after the last part in small letters.
        root: the component that `build` builds.

    Raises:
        ConfigError: the first mistake found: where, what, and the nearest valid name.
    """
    _load_components()
    reader = _Reader([], [], set(), _imported(bindings).union(COMPONENT_MODULES))
    for name in gin_files:
        reader.file(_find(str(name), None, "flag --gin_file"), saved=_is_saved(name))
    for line in bindings:
        reader.text(line, f"flag --gin_param '{line}'")
    for key, value in (overrides or {}).items():
        _override(reader, key, value)
    check_values(reader.statements, _components)
    graph = config_check.check_use(root, reader.statements, _components)
    macros = {s.parameter: s for s in reader.statements if s.parameter in graph.macros and not s.name}
    return Config(root, graph, macros, tuple(dict.fromkeys(reader.imports)))


def _is_saved(name: str | Path) -> bool:
    """By the name it is asked for: a link may lead to a file of another name."""
    return Path(name).name == SAVED


def _imported(bindings: Sequence[str]) -> frozenset[str]:
    """The modules that the command line imports."""
    statements = (s for line in bindings for s, _ in _parse(line, f"flag --gin_param '{line}'"))
    return frozenset(s.module for s in statements if isinstance(s, config_parser.ImportStatement))


def _override(reader: _Reader, key: str, value: object) -> None:
    name, _, parameter = key.rpartition(".")
    where = f"flag --{parameter.lower()}"
    if not name and not any(not s.name and s.parameter == key for s in reader.statements):
        raise ConfigError(
            f"{where}: this configuration has no macro {key}, so the flag would change nothing. "
            f"Use %{key} in a gin file, or set the parameter itself with --gin_param."
        )
    reader.statements.append(Statement("", name, parameter, value, where))


def build(cfg: Config) -> Any:
    """Builds the root with everything below it.

    Raises:
        ConfigError: a component refuses its values (with its own message), or a configured one was not built.
    """
    gin.clear_config()
    for (scope, name), values in cfg.values().items():
        for parameter, value in values.items():
            text = literal(expand(value, cfg.macros, cfg.root))
            gin.bind_parameter((scope, name, parameter), gin.config.parse_value(text))
    try:
        built = gin.get_configurable(cfg.root)()
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(_refusal(cfg, error)) from error
    operative = {(scope, selector.rpartition(".")[2]) for scope, selector in gin.config._OPERATIVE_CONFIG}
    for node, given in cfg.graph.instances.items():
        if node not in operative and node not in cfg.graph.unbuilt:
            lines = ", ".join(f"{s} ({s.where})" for s in given.values())
            raise ConfigError(f"@{spell(*node)}() was configured but never built; unused: {lines}.")
    return built


def _refusal(cfg: Config, error: Exception) -> str:
    """A constructor's own message after the place that built it, without what gin adds to it per caller."""
    message, *callers = re.split(r"\n  In call to configurable '", str(error))
    if not callers:
        return message
    found = re.match(r"(\w+)' .*?(?: in scope '(.*)')?$", callers[0])
    node = (found[2] or "", found[1])
    site = cfg.graph.sites.get(node)
    place = f"{site.where}: {site} = @{spell(*node)}()" if site else spell(*node)
    return f"{place}: {message}"


def save(cfg: Config, path: str | Path) -> None:
    """Writes the whole configuration, defaults included, as one gin file that parses to the same one."""
    path = Path(path)
    aside = path.with_name(path.name + ".partial")
    aside.write_text(_text(cfg), encoding="utf-8")
    aside.replace(path)


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


def differences(cfg: Config, path: str | Path, *, ignore: Sequence[str] = ()) -> list[str]:
    """Where ``cfg`` and a saved configuration differ: 'SBA.lam is 0.5 there and 2.0 here', one a binding.

    Args:
        ignore: bindings that may differ, e.g. ``["Experiment.steps"]``.
    """
    here = _lines(_text(cfg), "here")
    there = _lines(Path(path).read_text(encoding="utf-8"), _short(Path(path).resolve()))
    keys = [key for key in {**there, **here} if key not in ignore and there.get(key) != here.get(key)]
    return [f"{key} is {there.get(key, 'absent')} there and {here.get(key, 'absent')} here" for key in keys]


def _lines(text: str, source: str) -> dict[str, str]:
    reader = _Reader([], [], set())
    for statement, where in _parse(text, source):
        if not isinstance(statement, config_parser.ImportStatement):  # the other folder's file runs nothing here
            reader.add(statement, where)
    return {str(s): literal(s.value) for s in reader.statements}
