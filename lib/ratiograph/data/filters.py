"""Which captioned samples a stream takes, judged by the caption and by the fields of the sample's ``.json`` member.

Fields are found by name whatever their case; LAION, COYO and img2dataset call the same thing differently, and of the
names that a filter knows the first that a sample has counts. A field that is there without a value (null, NaN) leaves
its sample out, a field that is not there at all is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ratiograph.data.shards import DamagedSample
from ratiograph.data.tars import shown

__all__ = ["Filters"]

NSFW_LEVELS = ("UNLIKELY", "UNSURE", "NSFW")  # LAION's, in their order


@dataclass(frozen=True)
class _FieldFilter:
    """``keep(value)`` of the fields ``names``, each a tuple of names for one thing; ``reason`` is for the accounts."""

    argument: str
    reason: str
    names: tuple[tuple[str, ...], ...]
    keep: Callable[..., bool]

    def __call__(self, place: str, fields: Mapping[str, object]) -> str | None:
        values = [self._value(place, fields, names) for names in self.names]
        if any(value is None or value != value for value in values):
            return f"{self.reason} unknown"
        try:
            return None if self.keep(*values) else self.reason
        except (TypeError, ValueError, OverflowError) as error:
            said = shown(" and ".join(map(str, values)))
            raise DamagedSample(
                f"{place} has '{said}' as its {self.reason}, which {self.argument} cannot judge"
            ) from error

    def _value(self, place: str, fields: Mapping[str, object], names: Sequence[str]) -> object:
        found = [fields[name] for name in names if name in fields]
        if not found:
            raise DamagedSample(
                f"{place} has no field {' or '.join(map(repr, names))} in its .json, which {self.argument} needs: "
                "leave this filter out, or write the shards with the field"
            )
        return found[0]


def _at_least(least: float, *values: object) -> bool:
    return all(float(value) >= least for value in values)


def _at_most(most: float, value: object) -> bool:
    return float(value) <= most


def _among(allowed: Sequence[str], value: object) -> bool:
    return str(value).upper() in allowed


class Filters:
    """The filters that are on. Arguments are those of `captioned.CaptionedStream`; ``stream`` names it in messages.

    Raises:
        ValueError: an argument outside its domain.
    """

    def __init__(
        self,
        *,
        stream: str,
        minimum_aesthetic: float | None,
        minimum_side: int | None,
        maximum_watermark: float | None,
        maximum_nsfw: str | float | None,
        caption_length: Sequence[int] | None,
    ):
        if isinstance(maximum_nsfw, str) and maximum_nsfw not in NSFW_LEVELS:
            raise ValueError(f"{stream}.maximum_nsfw is '{maximum_nsfw}': choose of {NSFW_LEVELS}, or a probability.")
        if caption_length is not None and (len(caption_length) != 2 or not 0 <= caption_length[0] <= caption_length[1]):
            raise ValueError(f"{stream}.caption_length is {caption_length}: give (least, most) in characters.")
        self.length = caption_length
        self.fields: list[_FieldFilter] = []
        if minimum_aesthetic is not None:
            names = ("aesthetic", "aesthetic_score", "aesthetic_score_laion_v2")
            self._add(f"{stream}.minimum_aesthetic", "aesthetic", [names], partial(_at_least, minimum_aesthetic))
        if minimum_side is not None:
            names = [("original_height", "height"), ("original_width", "width")]
            self._add(f"{stream}.minimum_side", "side", names, partial(_at_least, minimum_side))
        if maximum_watermark is not None:
            names = ("pwatermark", "watermark_score")
            self._add(f"{stream}.maximum_watermark", "watermark", [names], partial(_at_most, maximum_watermark))
        if isinstance(maximum_nsfw, str):
            allowed = NSFW_LEVELS[: NSFW_LEVELS.index(maximum_nsfw) + 1]
            self._add(f"{stream}.maximum_nsfw", "nsfw", [("nsfw",)], partial(_among, allowed))
        elif maximum_nsfw is not None:
            names = ("punsafe", "nsfw_score_opennsfw2", "nsfw_score")
            self._add(f"{stream}.maximum_nsfw", "nsfw", [names], partial(_at_most, maximum_nsfw))

    def _add(self, argument: str, reason: str, names: Sequence[tuple[str, ...]], keep: Callable[..., bool]) -> None:
        self.fields.append(_FieldFilter(argument, reason, tuple(names), keep))

    def __bool__(self) -> bool:
        return bool(self.fields) or self.length is not None

    def rejects(self, place: str, caption: str, fields: Callable[[], Mapping[str, object]]) -> str | None:
        """Why a sample is left out, or None.

        Args:
            place: the sample's name for messages.
            caption: its caption.
            fields: gives the values of its ``.json`` by names in lower case, asked only if a filter needs them.

        Raises:
            DamagedSample: a field is missing, or no value of its kind.
        """
        if self.length is not None and not self.length[0] <= len(caption) <= self.length[1]:
            return "caption length"
        reasons = (judge(place, fields()) for judge in self.fields)
        return next((reason for reason in reasons if reason), None)
