"""Which captioned samples a stream takes, judged by the caption and by the fields of the sample's ``.json`` member.

Fields are found by name whatever their case. LAION, COYO and img2dataset have different names for one thing: a filter
takes the first of its names that the sample has. A sample whose field has no value (null, NaN) is left out; a field
that does not exist is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Len

from ratiograph.core.domains import NonNegativeInt, UnitInterval
from ratiograph.core.foreign import shown
from ratiograph.data.raw_samples import DamagedSample

__all__ = ["Filters"]

NSFW_LEVELS = ("UNLIKELY", "UNSURE", "NSFW")  # LAION's, in their order


@dataclass(frozen=True)
class _FieldFilter:
    """Keeps the samples for which ``keep(limit, *values)`` holds.

    ``names`` has one tuple for each value: the names that its field may have. ``argument`` is the filter's name in
    messages, ``reason`` the name under which rejected samples are counted.
    """

    argument: str
    reason: str
    names: Sequence[Sequence[str]]
    keep: Callable[..., bool]
    limit: float | str

    def __call__(self, place: str, fields: Mapping[str, object]) -> str | None:
        values = [self._value(place, fields, names) for names in self.names]
        if any(value is None or value != value for value in values):
            return f"{self.reason} unknown"
        try:
            return None if self.keep(self.limit, *values) else self.reason
        except (TypeError, ValueError, OverflowError) as error:
            text = shown(" and ".join(map(str, values)))
            raise DamagedSample(
                f"{place} has '{text}' as its {self.reason}, which {self.argument} cannot judge"
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


def _at_most_level(most: str, value: object) -> bool:
    return str(value).upper() in NSFW_LEVELS[: NSFW_LEVELS.index(most) + 1]


AESTHETIC = ("aesthetic", "aesthetic_score", "aesthetic_score_laion_v2")
SIDES = (("original_height", "height"), ("original_width", "width"))
WATERMARK = ("pwatermark", "watermark_score")
UNSAFE = ("punsafe", "nsfw_score_opennsfw2", "nsfw_score")


class Filters:
    """All filters of a stream. Arguments are those of `captioned.CaptionedStream`; ``stream`` is its name in messages.

    Raises:
        ValueError: an argument outside its domain.
    """

    def __init__(
        self,
        *,
        stream: str,
        minimum_aesthetic: float | None,
        minimum_side: NonNegativeInt | None,
        maximum_watermark: UnitInterval | None,
        maximum_nsfw: str | UnitInterval | None,
        caption_length: Annotated[Sequence[NonNegativeInt], Len(2, 2)] | None,
    ):
        if isinstance(maximum_nsfw, str) and maximum_nsfw not in NSFW_LEVELS:
            raise ValueError(f"{stream}.maximum_nsfw is '{maximum_nsfw}': choose of {NSFW_LEVELS}, or a probability.")
        if caption_length is not None and (len(caption_length) != 2 or not 0 <= caption_length[0] <= caption_length[1]):
            raise ValueError(f"{stream}.caption_length is {caption_length}: give (least, most) in characters.")
        self.length = caption_length
        nsfw = (("nsfw",), _at_most_level) if isinstance(maximum_nsfw, str) else (UNSAFE, _at_most)
        filters = (
            _FieldFilter(f"{stream}.minimum_aesthetic", "aesthetic", [AESTHETIC], _at_least, minimum_aesthetic),
            _FieldFilter(f"{stream}.minimum_side", "side", SIDES, _at_least, minimum_side),
            _FieldFilter(f"{stream}.maximum_watermark", "watermark", [WATERMARK], _at_most, maximum_watermark),
            _FieldFilter(f"{stream}.maximum_nsfw", "nsfw", [nsfw[0]], nsfw[1], maximum_nsfw),
        )
        self.fields = [field for field in filters if field.limit is not None]

    def __bool__(self) -> bool:
        return bool(self.fields) or self.length is not None

    def rejects(self, place: str, caption: str, fields: Callable[[], Mapping[str, object]]) -> str | None:
        """Why a sample is left out, or None.

        Args:
            place: the sample's name for messages.
            caption: its caption.
            fields: gives the values of its ``.json`` by names in lower case; called only if a filter needs them.

        Raises:
            DamagedSample: a field is missing, or no value of its kind.
        """
        if self.length is not None and not self.length[0] <= len(caption) <= self.length[1]:
            return "caption length"
        reasons = (field(place, fields()) for field in self.fields)
        return next((reason for reason in reasons if reason), None)
