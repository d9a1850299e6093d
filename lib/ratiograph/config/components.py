"""The components that gin files may name.

They are found, not listed: every public class of the rooms below whose constructor takes keyword arguments alone. A
module of a user's own registers all classes and functions of its ``__all__``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util  # gin 0.5 reports a missing file through it without importing it
import inspect
import pkgutil
from collections.abc import Callable

import gin
from torch import nn

import ratiograph
from ratiograph.config.signatures import Component
from ratiograph.config.values import ConfigError

if not hasattr(gin, "configurable"):  # a folder named gin is importable without the package
    raise ImportError("gin-config is not installed, only a folder named gin was found: pip install gin-config")

__all__ = ["components", "is_component", "known_modules", "load_components", "register", "register_module"]

ROOMS = ("algebra", "data", "networks", "training", "tasks", "evaluation")

components: dict[str, Component] = {}
"""By name, of all modules that have been registered."""


def register(*made: Callable) -> None:
    """Makes classes and functions available to gin files under their bare names; the classes stay untouched.

    Raises:
        AssertionError: two different components of one name.
        ConfigError: a signature that cannot be checked, see `Component.of`.
    """
    for make in made:
        name = make.__name__
        known = components.get(name)
        assert known is None or known.make is make, f"two components named {name}: {known.make} and {make}"
        if known is None:
            component = Component.of(make)
            gin.register(name, module="ratiograph")(make)
            components[name] = component


def is_component(make: Callable) -> bool:
    """Whether gin files may name ``make``: a class of ours, or of a module that one of them imported."""
    known = components.get(make.__name__)
    return known is not None and known.make is make


def known_modules() -> frozenset[str]:
    """The modules whose components are known: a saved configuration that imports one of them runs nothing new."""
    return frozenset(component.make.__module__ for component in components.values())


def register_module(module: str) -> None:
    """Imports a user's module and registers what its ``__all__`` lists.

    Raises:
        ConfigError: it has no ``__all__``, a component with the name of another module's, a network that cannot be
            hashed, as torch does, or a signature that cannot be checked.
        Exception: whatever the module raises while it is imported.
    """
    imported = importlib.import_module(module)
    if not hasattr(imported, "__all__"):
        raise ConfigError(f"{module} has no __all__, the list of names that gin files may use: add it.")
    absent = [name for name in imported.__all__ if not hasattr(imported, name)]
    if absent:
        raise ConfigError(f"{module} lists {absent[0]!r} in its __all__ and does not define it.")
    own = [o for o in _public(imported) if inspect.isclass(o) or inspect.isfunction(o)]
    for make in own:
        known = components.get(make.__name__)
        if known is not None and known.make is not make:
            raise ConfigError(
                f"{module} has a component {make.__name__}, which is the name of one of {known.make.__module__}: "
                "call it something else."
            )
        if inspect.isclass(make) and issubclass(make, nn.Module) and make.__hash__ is None:
            raise ConfigError(
                f"{module}: {make.__name__} compares by value, and torch needs modules that can be hashed: write "
                "@dataclass(eq=False), or define no __eq__."
            )
    register(*own)


@functools.cache
def load_components() -> None:
    """Registers the components of all rooms; later calls do nothing."""
    for room in ROOMS:
        package = importlib.import_module(f"{ratiograph.__name__}.{room}")
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            register(*filter(_takes_keywords_alone, _public(importlib.import_module(found.name))))


def _public(module: object) -> list[object]:
    """What a module defines and lists in ``__all__``."""
    named = [getattr(module, name) for name in getattr(module, "__all__", ())]
    return [o for o in named if getattr(o, "__module__", None) == module.__name__]


def _takes_keywords_alone(made: object) -> bool:
    if not inspect.isclass(made) or issubclass(made, BaseException) or getattr(made, "_is_protocol", False):
        return False
    _, *parameters = inspect.signature(made.__init__).parameters.values()
    return all(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
