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
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gin

if not hasattr(gin, "configurable"):  # a folder named gin is importable without the package
    raise ImportError("gin-config is not installed, only a folder named gin was found: pip install gin-config")

import gin.config
from gin import config_parser

from ratiograph import config_check, config_files
from ratiograph.config_reader import Reader, find, imported, is_saved, parse_text, short
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
    writable,
)

__all__ = [
    "COMPONENT_MODULES",
    "Config",
    "ConfigError",
    "build",
    "check_files",
    "differences",
    "is_component",
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
    "ratiograph.text_encoders",
    "ratiograph.lora",
    "ratiograph.word_encoder",
    "ratiograph.data.captioned",
    "ratiograph.objective",
    "ratiograph.denoisers",
    "ratiograph.guidance",
    "ratiograph.preconditioning",
    "ratiograph.networks.unet",
    "ratiograph.networks.edm",
    "ratiograph.networks.stable_diffusion",
    "ratiograph.networks.classifier",
    "ratiograph.networks.captioned_unet",
    "ratiograph.networks.ink_colour",
    "ratiograph.teachers.mixture",
    "ratiograph.teachers.stable_diffusion",
    "ratiograph.students",
    "ratiograph.ratios",
    "ratiograph.ratio_losses",
    "ratiograph.positives",
    "ratiograph.warm_start",
    "ratiograph.samplers",
    "ratiograph.optim",
    "ratiograph.optim_8bit",
    "ratiograph.networks.checkpointing",
    "ratiograph.loggers",
    "ratiograph.denoising_weights",
    "ratiograph.conditions",
    "ratiograph.data.stream",
    "ratiograph.data.latents",
    "ratiograph.evaluation.digits",
    "ratiograph.evaluation.captions",
    "ratiograph.evaluation.features",
    "ratiograph.evaluation.metrics",
    "ratiograph.evaluation.alignment",
    "ratiograph.evaluation.sources",
    "ratiograph.evaluation.protocol",
    "ratiograph.evaluation.mixture",
    "ratiograph.distillation",
    "ratiograph.ratio_training",
    "ratiograph.denoiser_training",
    "ratiograph.classifier_training",
    "ratiograph.experiment",
)

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


def is_component(make: Callable) -> bool:
    """Whether gin files may name ``make``: a class of ours, or of a module that one of them imported."""
    known = _components.get(make.__name__)
    return known is not None and known.make is make


def _registered() -> frozenset[str]:
    """The modules whose components are known: a saved configuration that imports one of them runs nothing new."""
    return frozenset(component.make.__module__ for component in _components.values())


def _register_module(module: str) -> None:
    imported = importlib.import_module(module)
    public = [getattr(imported, name) for name in getattr(imported, "__all__", ())]
    own = [o for o in public if getattr(o, "__module__", None) == module]
    own = [o for o in own if inspect.isclass(o) or inspect.isfunction(o)]
    if not hasattr(imported, "__all__"):
        raise ConfigError(f"{module} has no __all__, the list of names that gin files may use: add it.")
    for make in own:
        known = _components.get(make.__name__)
        if known is not None and known.make is not make:
            raise ConfigError(
                f"{module} has a component {make.__name__}, which is the name of one of {known.make.__module__}: "
                "call it something else."
            )
    register(*own)


def _load_components() -> None:
    for module in COMPONENT_MODULES:
        _register_module(module)


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
    reader = Reader(_register_module, imported(bindings) | _registered())
    for name in gin_files:
        reader.file(find(str(name), None, "flag --gin_file"), saved=is_saved(name))
    for line in bindings:
        reader.text(line, f"flag --gin_param '{line}'")
    for key, value in (overrides or {}).items():
        _override(reader, key, value)
    check_values(reader.statements, _components)
    graph = config_check.check_use(root, reader.statements, _components)
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


def check_files(cfg: Config) -> None:
    """Whether the weights and shards that ``cfg`` names are there, in milliseconds and without building anything.

    Raises:
        FileNotFoundError: some are not: a line for each, with what names it and how to get it.
    """
    config_files.check_files(cfg, _components)


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

    A parameter that the saved one leaves out, since its component had no such parameter then, has its default there.

    Args:
        ignore: bindings that may differ, e.g. ``["Experiment.steps"]``.
    """
    here = _lines(_text(cfg), "here")
    there = _lines(Path(path).read_text(encoding="utf-8"), short(Path(path).resolve()))
    with suppress(ConfigError):  # one that no longer fits is taken as it stands
        filled = parse([str(path)], root=cfg.root)
        there = {**_lines(_text(filled), "there"), **there}
    keys = [key for key in {**there, **here} if key not in ignore and there.get(key) != here.get(key)]
    return [f"{key} is {there.get(key, 'absent')} there and {here.get(key, 'absent')} here" for key in keys]


def _lines(text: str, source: str) -> dict[str, str]:
    reader = Reader(_register_module, frozenset())
    for statement, where in parse_text(text, source):
        if not isinstance(statement, config_parser.ImportStatement):  # the other folder's file runs nothing here
            reader.add(statement, where)
    return {str(s): literal(s.value) for s in reader.statements}
