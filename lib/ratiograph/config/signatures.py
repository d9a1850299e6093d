"""Components by their constructors' signatures, and whether a configuration's values fit them.

Notation as in `values`: statements, references, macros. A value fits if it has the type of the parameter's annotation;
a reference fits if what it builds does.
"""

from __future__ import annotations

import collections.abc
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from annotated_types import Predicate

from ratiograph.config.values import REQUIRED, ConfigError, Macro, Reference, Statement, expand, parts, suggest
from ratiograph.core.domains import OrInfinite, describe_domain, fault_of, in_domain, unheld
from ratiograph.core.tracebacks import described

__all__ = ["Component", "Parameter", "accepts", "check_values", "describe_type"]


@dataclass(frozen=True)
class Parameter:
    """A keyword argument. ``default`` is ``inspect.Parameter.empty`` where a value must be given."""

    annotation: object
    default: object

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


@dataclass(frozen=True)
class Component:
    """A class or function that a configuration may name, with its keyword arguments in signature order."""

    name: str
    make: Callable
    parameters: Mapping[str, Parameter]

    @classmethod
    def of(cls, make: Callable) -> Component:
        """Reads the signature; an annotation whose names are imported for type checkers alone is not checked.

        Raises:
            ConfigError: an annotation that cannot be evaluated or checked, or a default that it does not take.
        """
        function = make.__init__ if inspect.isclass(make) else make
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        signature = list(inspect.signature(function).parameters.values())[1 if inspect.isclass(make) else 0 :]
        parameters = {
            p.name: Parameter(_resolve(p.annotation, function, f"{make.__name__}.{p.name}"), p.default)
            for p in signature
            if p.kind in named
        }
        for name, parameter in parameters.items():
            _check_declared(f"{make.__name__}.{name}", parameter)
        return cls(make.__name__, make, parameters)

    def product(self) -> object:
        """The type of what it builds, or ``Any`` where a function does not say."""
        if inspect.isclass(self.make):
            return self.make
        return _resolve(self.make.__annotations__.get("return", typing.Any), self.make, f"{self.name}'s result")


def _resolve(annotation: object, function: Callable, what: str) -> object:
    if annotation is inspect.Parameter.empty:
        return typing.Any
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, getattr(function, "__globals__", {}))
    except NameError:  # imported under TYPE_CHECKING only
        return typing.Any
    except Exception as error:
        raise ConfigError(f"{what}: its annotation {annotation} cannot be evaluated: {described(error)}.") from error


def _check_declared(what: str, parameter: Parameter) -> None:
    """ConfigError for markers that cannot be checked, and a default that a configuration could not write back."""
    level = [parameter.annotation]
    while level:
        annotation = level.pop()
        arguments = typing.get_args(annotation)
        marked = typing.get_origin(annotation) is typing.Annotated
        if marked and (fault := fault_of(arguments[1:])):
            raise ConfigError(f"{what}: its annotation has {fault}.")
        level += arguments[:1] if marked else arguments
    value = parameter.default
    plain = all(isinstance(part, bool | int | float | str | list | tuple | Mapping) for part in parts(value))
    if plain and not accepts(parameter.annotation, value, {}):
        why = next(filter(None, map(unheld, parts(value))), "")
        takes = describe_type(parameter.annotation)
        raise ConfigError(f"{what}: its default {value!r} is not {takes}, which it takes{why and f': {why}'}.")


def describe_type(annotation: object) -> str:
    """An annotation in words: 'float', 'int or None', "'a' or 'b'", 'Sequence of Term'."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        kind = {float: "a finite number", int: "a whole number"}.get(arguments[0]) or describe_type(arguments[0])
        joint = " " if arguments[0] in (int, float) else ", "
        return f"{kind}{joint}{describe_domain(arguments[1:])}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(a) for a in arguments)
    if origin is typing.Literal:
        return " or ".join(repr(a) for a in arguments)
    if origin is collections.abc.Callable or origin is type:
        return "an unbuilt component (@Name without parentheses)"
    if origin in (dict, collections.abc.Mapping) and len(arguments) == 2:
        return f"dict of {describe_type(arguments[0])} to {describe_type(arguments[1])}"
    if origin is not None and arguments:
        of = " and ".join(describe_type(a) for a in arguments if a is not Ellipsis)
        return f"{'list' if origin is collections.abc.Sequence else origin.__name__} of {of}"
    return "None" if annotation in (None, type(None)) else getattr(annotation, "__name__", str(annotation))


def accepts(annotation: object, value: object, components: Mapping[str, Component], markers: tuple = ()) -> bool:
    """Whether ``value`` (macros expanded) has the type and domain of ``annotation``; an int is a float.

    ``markers`` stand beside the annotation that this one is part of.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is typing.Any or isinstance(annotation, typing.TypeVar):
        return True
    if origin is typing.Annotated:
        inside = (*markers, *arguments[1:])
        return accepts(arguments[0], value, components, inside) and _fulfils(value, arguments[1:], markers)
    if origin in (typing.Union, types.UnionType):
        return any(accepts(a, value, components, markers) for a in arguments)
    if isinstance(value, Reference):
        return _accepts_reference(annotation, value, components)
    if annotation is None or annotation is type(None):
        return value is None
    if origin is typing.Literal:
        return any(type(a) is type(value) and a == value for a in arguments)
    if annotation in (int, float):
        return _is_number(annotation, value) and not unheld(value, markers)
    kind = origin or annotation
    if not inspect.isclass(kind):
        return True
    if getattr(kind, "_is_protocol", False) and not getattr(kind, "_is_runtime_protocol", False):
        return False  # structural types of our own are for components
    return _accepts_container(origin, arguments, value, components, markers) if arguments else isinstance(value, kind)


def _fulfils(value: object, own: tuple, outer: tuple) -> bool:
    """Whether ``value`` fulfils its ``own`` markers; a predicate is not asked about what is not built yet."""
    unbuilt = any(isinstance(part, Reference) for part in parts(value))
    infinite = tuple(m for m in outer if isinstance(m, OrInfinite))
    return in_domain(value, (*(m for m in own if not (unbuilt and isinstance(m, Predicate))), *infinite))


def _is_number(annotation: type, value: object) -> bool:
    return isinstance(value, (int, float) if annotation is float else int) and not isinstance(value, bool)


def _accepts_container(
    origin: type, arguments: tuple, value: object, components: Mapping[str, Component], markers: tuple
) -> bool:
    if isinstance(value, str) or not isinstance(value, origin):
        return False
    if isinstance(value, Mapping) and len(arguments) == 2:
        pairs = [(arguments[0], k) for k in value] + [(arguments[1], v) for v in value.values()]
    elif origin is tuple and Ellipsis not in arguments:
        pairs = list(zip(arguments, value, strict=False))
        if len(arguments) != len(value):
            return False
    else:
        pairs = [(arguments[0], v) for v in value]
    return all(accepts(annotation, item, components, markers) for annotation, item in pairs)


def _accepts_reference(annotation: object, value: Reference, components: Mapping[str, Component]) -> bool:
    kind = typing.get_origin(annotation) or annotation
    if not value.build:
        return kind in (collections.abc.Callable, type)
    product = components[value.name].product()
    product = typing.get_origin(product) or product
    if product is typing.Any:
        return True
    if not inspect.isclass(kind) or not inspect.isclass(product):
        return False
    if getattr(kind, "_is_protocol", False):  # structural: it has what the protocol's body defines
        wanted = [name for name in vars(kind) if not name.startswith("_") or name == "__call__"]
        return all(hasattr(product, name) for name in wanted)
    return issubclass(product, kind)


def check_values(statements: Iterable[Statement], components: Mapping[str, Component]) -> None:
    """Every name in every statement exists and every value has its parameter's type.

    Statements that a later one replaces are checked too: a typing mistake is one wherever it stands.

    Raises:
        ConfigError: an unknown component, parameter or macro; a value of the wrong type.
    """
    statements = list(statements)
    macros = {s.parameter: s for s in statements if not s.name}
    for s in statements:
        if s.name and s.name not in components:
            raise ConfigError(f"{s.where}: there is no component '{s.name}'.{suggest(s.name, components)}")
        if not s.name and s.parameter in components:
            raise ConfigError(f"{s.where}: '{s.parameter}' is a component; write `{s.parameter}.<parameter> = ...`.")
        if s.name and s.parameter not in components[s.name].parameters:
            valid = components[s.name].parameters
            raise ConfigError(
                f"{s.where}: {s.name} has no parameter '{s.parameter}'."
                + (suggest(s.parameter, valid) if valid else " It takes none.")
            )
        for part in parts(s.value):
            if isinstance(part, Reference):
                _check_reference(part, s, components)
    for s in statements:  # after every reference, those of macros too, is known to exist
        if s.name:
            _check_type(s, expand(s.value, macros, s.where), components, _source(s.value, macros))


def _check_reference(reference: Reference, s: Statement, components: Mapping[str, Component]) -> None:
    if reference.name not in components:
        near = suggest(reference.name, components)
        raise ConfigError(f"{s.where}: {s} = {reference}: there is no component '{reference.name}'.{near}")
    base = components[reference.name].make
    if reference.build and _unfinished(base):
        kinds = [n for n, c in components.items() if inspect.isclass(c.make) and not _unfinished(c.make)]
        raise ConfigError(
            f"{s.where}: {s} = {reference}: {reference.name} is abstract; name one of its kinds: "
            f"{', '.join(n for n in sorted(kinds) if issubclass(components[n].make, base))}."
        )


def _unfinished(make: Callable) -> bool:
    """Whether a class leaves a method to its subclasses: declared abstract, or all it does is to say so."""
    if not inspect.isclass(make):
        return False
    methods = [m for _, m in inspect.getmembers(make, inspect.isfunction) if m.__module__ == make.__module__]
    return inspect.isabstract(make) or any(m.__code__.co_names == ("NotImplementedError",) for m in methods)


def _source(value: object, macros: Mapping[str, Statement]) -> str:
    """Where the macro stands that a whole value is, for a message: it may be another file, or a flag."""
    if not isinstance(value, Macro) or value.name not in macros:
        return ""
    return _source(macros[value.name].value, macros) or f" {value} is set in {macros[value.name].where}."


def _check_type(s: Statement, value: object, components: Mapping[str, Component], source: str) -> None:
    annotation = components[s.name].parameters[s.parameter].annotation
    if value == Macro(REQUIRED) or accepts(annotation, value, components):
        return
    remedy = ""
    if isinstance(value, Reference):
        got = f"{value}, which builds a {describe_type(components[value.name].product())}"
        if not value.build and accepts(annotation, Reference(value.scope, value.name), components):
            got, remedy = f"the unbuilt {value}", f" Write `{value}()`."
    else:
        why = next(filter(None, map(unheld, parts(value))), "")
        got = f"{value!r}: {why}" if why else f"{value!r} ({type(value).__name__})"
        choices = [str(a) for a in typing.get_args(annotation) if isinstance(a, str)]
        remedy = suggest(value, choices) if isinstance(value, str) and choices else ""
    raise ConfigError(f"{s.where}: {s} takes {describe_type(annotation)}, not {got}.{remedy}{source}")
