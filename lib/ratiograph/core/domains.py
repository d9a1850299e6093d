"""Domains of numbers, declared beside a component's annotations and checked when a configuration is read.

A parameter ``lr: Positive`` takes finite numbers above 0; ``betas: tuple[Fraction, Fraction]`` two in [0, 1);
``share: Annotated[float, Interval(gt=0, le=1)]`` is a domain of one's own. The markers ``Gt, Ge, Lt, Le, Interval,
MinLen`` are those of the package annotated-types; components of a user's own may use them alike. Without a marker a
``float`` is any finite number, and an ``int`` any that fits into 64 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, GroupedMetadata, Gt, Interval, Le, Lt, MaxLen, MinLen

__all__ = [
    "Fraction",
    "NonNegative",
    "NonNegativeInt",
    "OrInfinite",
    "Positive",
    "PositiveInt",
    "UnitInterval",
    "describe_domain",
    "in_domain",
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
PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]

_WORDS = {Gt: ("gt", "above"), Ge: ("ge", "at least"), Lt: ("lt", "below"), Le: ("le", "at most")}


def _flat(markers: tuple) -> Iterator[object]:
    for marker in markers:
        if isinstance(marker, GroupedMetadata):
            yield from marker
        else:
            yield marker


def in_domain(value: object, markers: tuple = ()) -> bool:
    """Whether ``value`` fulfils the markers of its annotation; what is no number is only measured by its length.

    Args:
        value: of a configuration.
        markers: what follows the type in ``Annotated[...]``; none for a plain ``int`` or ``float``.
    """
    markers = tuple(_flat(markers))
    if isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return False
        if math.isnan(value) or (math.isinf(value) and not any(isinstance(m, OrInfinite) for m in markers)):
            return False
    return all(_fulfils(value, marker) for marker in markers)


def _fulfils(value: object, marker: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match marker:
        case Gt(gt=bound):
            return not number or value > bound
        case Ge(ge=bound):
            return not number or value >= bound
        case Lt(lt=bound):
            return not number or value < bound
        case Le(le=bound):
            return not number or value <= bound
        case MinLen(min_length=least):
            return not hasattr(value, "__len__") or len(value) >= least
        case MaxLen(max_length=most):
            return not hasattr(value, "__len__") or len(value) <= most
    return True  # a marker of another library


def describe_domain(markers: tuple) -> str:
    """The markers in words: 'above 0 and at most 1'; '' where there are none."""
    words = []
    for marker in _flat(markers):
        for kind, (field, word) in _WORDS.items():
            if isinstance(marker, kind):
                words.append(f"{word} {getattr(marker, field):g}")
        if isinstance(marker, MinLen):
            words.append(f"with at least {marker.min_length} entries")
        if isinstance(marker, MaxLen):
            words.append(f"with at most {marker.max_length} entries")
        if isinstance(marker, OrInfinite):
            words.append("possibly infinite")
    return " and ".join(words)
