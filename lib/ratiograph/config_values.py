"""What one line of a configuration says, checked against the signature of the component that it names.

A *statement* is one line ``scope/Component.parameter = value`` or ``MACRO = value``. A *value* is a Python
literal, a *reference* ``@scope/Component()`` or a *macro* ``%NAME``, nested in lists, tuples and dicts as one
likes. This module does not know gin; `config_check` follows the references from the root.
"""

from __future__ import annotations

import collections.abc
import difflib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

__all__ = [
    "REQUIRED",
    "Component",
    "ConfigError",
    "Macro",
    "Parameter",
    "Reference",
    "Statement",
    "accepts",
    "assignment",
    "check_values",
    "describe_type",
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
    """One line. ``name`` is the component, '' for a macro; ``where`` is 'file:line' or 'flag --steps'."""

    scope: str
    name: str
    parameter: str
    value: object
    where: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.scope, self.name, self.parameter

    def __str__(self) -> str:
        return f"{spell(self.scope, self.name)}.{self.parameter}" if self.name else self.parameter


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
        """Reads the signature; an annotation that cannot be resolved is not checked."""
        function = make.__init__ if inspect.isclass(make) else make
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        signature = list(inspect.signature(function).parameters.values())[1 if inspect.isclass(make) else 0 :]
        parameters = {
            p.name: Parameter(_resolve(p.annotation, function), p.default) for p in signature if p.kind in named
        }
        return cls(make.__name__, make, parameters)

    def product(self) -> object:
        """The type of what it builds, or ``Any`` where a function does not say."""
        if inspect.isclass(self.make):
            return self.make
        return _resolve(self.make.__annotations__.get("return", typing.Any), self.make)


def _resolve(annotation: object, function: Callable) -> object:
    if annotation is inspect.Parameter.empty:
        return typing.Any
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, getattr(function, "__globals__", {}))
    except NameError:  # imported under TYPE_CHECKING only
        return typing.Any


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


def describe_type(annotation: object) -> str:
    """An annotation in words: 'float', 'int or None', "'a' or 'b'", 'Sequence of Term'."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
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


def accepts(annotation: object, value: object, components: Mapping[str, Component]) -> bool:
    """Whether ``value`` (macros expanded) may be passed for ``annotation``; an int is a fine float."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is typing.Any or isinstance(annotation, typing.TypeVar):
        return True
    if origin is typing.Annotated:
        return accepts(arguments[0], value, components)
    if origin in (typing.Union, types.UnionType):
        return any(accepts(a, value, components) for a in arguments)
    if isinstance(value, Reference):
        return _accepts_reference(annotation, value, components)
    if annotation is None or annotation is type(None):
        return value is None
    if origin is typing.Literal:
        return any(type(a) is type(value) and a == value for a in arguments)
    if annotation in (int, float):
        return isinstance(value, (int, float) if annotation is float else int) and not isinstance(value, bool)
    if origin is None:
        return isinstance(value, annotation) if inspect.isclass(annotation) else True
    return _accepts_container(origin, arguments, value, components)


def _accepts_container(origin: type, arguments: tuple, value: object, components: Mapping[str, Component]) -> bool:
    if isinstance(value, str) or not isinstance(value, origin):
        return False
    if isinstance(value, Mapping):
        pairs = [(arguments[0], k) for k in value] + [(arguments[1], v) for v in value.values()]
    elif origin is tuple and Ellipsis not in arguments:
        pairs = list(zip(arguments, value, strict=False))
        if len(arguments) != len(value):
            return False
    else:
        pairs = [(arguments[0], v) for v in value]
    return all(accepts(annotation, item, components) for annotation, item in pairs)


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
        got = f"{value!r} ({type(value).__name__})"
        choices = [str(a) for a in typing.get_args(annotation) if isinstance(a, str)]
        remedy = suggest(value, choices) if isinstance(value, str) and choices else ""
    raise ConfigError(f"{s.where}: {s} takes {describe_type(annotation)}, not {got}.{remedy}{source}")


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
