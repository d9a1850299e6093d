"""Domains of numbers, declared beside a component's annotations and checked when a configuration is read.

A parameter ``lr: Positive`` takes numbers above 0; ``betas: Annotated[Sequence[Fraction], Len(2, 2)]`` two in [0, 1);
``share: Annotated[float, Interval(gt=0, le=1)]`` is a domain of one's own. The markers ``Gt, Ge, Lt, Le, Interval, Len,
MultipleOf, Predicate`` are those of the package annotated-types; components of a user's own may use them alike. Bounds
beside a container hold for the numbers in it, lengths and predicates for the container. With or without a marker a
``float`` is 0 or a number that float32 holds, as networks compute in it, and an ``int`` has 64 bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

from annotated_types import (
    BaseMetadata,
    Ge,
    GroupedMetadata,
    Gt,
    Interval,
    Le,
    Lt,
    MaxLen,
    MinLen,
    MultipleOf,
    Predicate,
)

__all__ = [
    "Depth",
    "Exponent",
    "Fraction",
    "NonNegative",
    "NonNegativeInt",
    "OrInfinite",
    "Positive",
    "PositiveInt",
    "Scale",
    "UnitInterval",
    "describe_domain",
    "fault_of",
    "in_domain",
    "unheld",
]


@dataclass(frozen=True)
class OrInfinite:
    """Marks a number that may be infinite: ``limit: Annotated[float, Gt(0), OrInfinite()]``."""


Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, lt=1)]
"""[0, 1): decays, dropout, shares that must leave something."""
UnitInterval = Annotated[float, Interval(ge=0, le=1)]
"""[0, 1]: probabilities."""
Scale = Annotated[float, Interval(ge=1e-15, le=1e15)]
"""Noise levels and standard deviations: above 0, and float32 holds their squares."""
Exponent = Annotated[float, Interval(ge=0.1, le=100)]
"""EDM's rho: x^rho and x^(1/rho) of a `Scale` are numbers."""
PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
Depth = Annotated[int, Interval(ge=1, le=1000)]
"""Layers, blocks, bins and updates a step, each of which costs memory or a pass."""

_WORDS = {
    Gt: ("gt", "above {}"),
    Ge: ("ge", "at least {}"),
    Lt: ("lt", "below {}"),
    Le: ("le", "at most {}"),
    MultipleOf: ("multiple_of", "a multiple of {}"),
    MinLen: ("min_length", "not fewer than {} entries"),
    MaxLen: ("max_length", "not more than {} entries"),
    Predicate: ("func", "such that {} holds"),
    OrInfinite: ("__class__", "or infinite"),
}


def _flat(markers: tuple) -> Iterator[object]:
    for marker in markers:
        if isinstance(marker, GroupedMetadata):
            yield from marker
        else:
            yield marker


def unheld(value: object, markers: tuple = ()) -> str:
    """Why no parameter may have the number ``value``, whatever its bounds; '' where one may, and for what is no number.

    Args:
        value: of a configuration.
        markers: as for `in_domain`; `OrInfinite` allows infinity.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if isinstance(value, int):
        return "" if -(2**63) <= value < 2**63 else "whole numbers have 64 bits"
    if math.isinf(value) and any(isinstance(m, OrInfinite) for m in markers):
        return ""
    if not math.isfinite(value):
        return "numbers are finite"
    return "" if value == 0 or 1.2e-38 < abs(value) < 3.4e38 else "float32 holds 0 and sizes from 1.2e-38 to 3.4e38"


def in_domain(value: object, markers: tuple = ()) -> bool:
    """Whether ``value`` fulfils the markers of its annotation: bounds are for numbers, itself or those in a container.

    Args:
        value: of a configuration.
        markers: what follows the type in ``Annotated[...]``; none for a plain ``int`` or ``float``.
    """
    return not unheld(value, markers) and all(_fulfils(value, marker) for marker in _flat(markers))


def _fulfils(value: object, marker: object) -> bool:
    match marker:
        case Predicate(func=holds):
            return _holds(holds, value)
        case MinLen(min_length=least):
            return not hasattr(value, "__len__") or len(value) >= least
        case MaxLen(max_length=most):
            return not hasattr(value, "__len__") or len(value) <= most
    if isinstance(value, list | tuple | Mapping):
        return all(_fulfils(item, marker) for item in (value.values() if isinstance(value, Mapping) else value))
    if not _is_number(value):
        return True
    match marker:
        case Gt(gt=bound):
            return value > bound
        case Ge(ge=bound):
            return value >= bound
        case Lt(lt=bound):
            return value < bound
        case Le(le=bound):
            return value <= bound
        case MultipleOf(multiple_of=unit) if isinstance(value, int) and isinstance(unit, int):
            return value % unit == 0
        case MultipleOf(multiple_of=unit):  # 0.3 / 0.1 is not 3 in floating point
            return not math.isfinite(value) or math.isclose(value, round(value / unit) * unit, rel_tol=1e-9)
    return True  # a marker of another library


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _holds(predicate: Callable[[object], object], value: object) -> bool:
    try:
        return bool(predicate(value))
    except Exception:  # a predicate for other values, such as str.isupper for a number
        return False


def fault_of(markers: tuple) -> str:
    """Why a marker cannot be checked: 'Gt('a'): the bound is no number'; '' where all can or are another library's."""
    for marker in _flat(markers):
        known = [field for kind, (field, _) in _WORDS.items() if isinstance(marker, kind)]
        if isinstance(marker, BaseMetadata) and not known:
            return f"{marker!r}: a marker that is not checked here"
        if not known or isinstance(marker, Predicate | OrInfinite):
            continue
        bound = getattr(marker, known[0])
        if not _is_number(bound) or math.isnan(bound):
            return f"{marker!r}: the bound is no number"
        if isinstance(marker, MultipleOf) and (bound <= 0 or unheld(bound)):
            return f"{marker!r}: the unit is no finite number above 0"
    return ""


def describe_domain(markers: tuple) -> str:
    """The markers in words: 'above 0 and at most 1'; '' where there are none."""
    found = [(m, *words) for m in _flat(markers) for kind, words in _WORDS.items() if isinstance(m, kind)]
    bounds = [word.format(_short(getattr(m, field))) for m, field, word in found]
    words = " and ".join(bounds).replace("and or", "or")
    return re.sub(r"not fewer than (\d+) entries and not more than \1 entries", r"\1 entries", words)


def _short(bound: object) -> object:
    return f"{bound:g}" if isinstance(bound, float) else getattr(bound, "__name__", bound)
