"""Two runs of the benchmark against each other: what became slower or larger, beyond noise.

Notation: a *measure* is one number of a record, smaller is better; its *change* is new / old. Medians of n rounds
have a standard error (`timing.standard_error`); a change is a regression where log(new / old) exceeds both the
tolerance and three standard errors of the difference, an improvement where it falls below minus both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.timing import standard_error

__all__ = ["Change", "compared", "render"]

KEY = ("bench", "gin_file", "gin_param", "network", "precision", "batch_size")
"""What two records must agree in to be of the same measurement."""
RATIOS = ("step_over_floor", "units", "wait_share", "peak_memory_gb", "planned_memory_gb", "flops")
"""Measures that carry from machine to machine; seconds do not."""
SIGMAS = 3.0


@dataclass(frozen=True)
class Change:
    """One measure of one measurement in both runs. ``noise``: standard error of log(new / old), None if unknown."""

    of: str
    measure: str
    old: float
    new: float
    noise: float | None
    tolerance: float

    @property
    def ratio(self) -> float:
        """new / old."""
        return self.new / self.old if self.old else 1.0 if self.new == self.old else math.inf

    @property
    def worse(self) -> bool:
        """Whether it is a regression."""
        return self.verdict in ("slower", "larger")

    @property
    def verdict(self) -> str:
        """ "slower" or "larger" for a regression, "better" for an improvement, "" for neither."""
        bar = max(self.tolerance, SIGMAS * (self.noise or 0.0))
        change = math.log(self.ratio) if self.ratio > 0 else -math.inf
        if change > bar:
            return "slower" if self.measure.endswith("seconds") else "larger"
        return "better" if change < -bar else ""


def compared(
    old: Sequence[Mapping[str, object]], new: Sequence[Mapping[str, object]], tolerance: float = 0.05
) -> list[Change]:
    """Every measure that the last records of a measurement in both runs have.

    Args:
        old, new: records, as of `timing.read_records`.
        tolerance: relative change that counts for nothing.

    Raises:
        ValueError: the runs have no measurement in common.
    """
    before, after = ({_key(record): record for record in records} for records in (old, new))
    shared = [key for key in before if key in after]
    if not shared:
        raise ValueError("the two have no measurement in common: the same gin files, precision and batch in both")
    return [change for key in shared for change in _changes(before[key], after[key], tolerance)]


def _key(record: Mapping[str, object]) -> str:
    return repr([record.get(name) or None for name in KEY])


def _name(record: Mapping[str, object]) -> str:
    files = [str(name).removeprefix("gin/").removesuffix(".gin") for name in record.get("gin_file", [])]
    parts = [record.get("network"), *files, *record.get("gin_param", []), record.get("precision")]
    return f"{record['bench']} {' '.join(str(part) for part in parts if part)}, batch {record.get('batch_size')}"


def _changes(old: Mapping[str, object], new: Mapping[str, object], tolerance: float) -> list[Change]:
    name, found = _name(new), []
    for measure in RATIOS:
        if isinstance(old.get(measure), int | float) and isinstance(new.get(measure), int | float):
            found.append(Change(name, measure, old[measure], new[measure], None, tolerance))
    if old["hardware"]["device"] != new["hardware"]["device"]:
        return found
    rounds = old.get("rounds_seconds", {}), new.get("rounds_seconds", {})
    times = _seconds(old), _seconds(new)
    for variant in [variant for variant in times[0] if variant in times[1]]:
        errors = [standard_error(each.get(variant, [])) for each in rounds]
        noise = None if None in errors else math.hypot(*errors)
        found.append(Change(name, f"{variant}, seconds", times[0][variant], times[1][variant], noise, tolerance))
    return found


def _seconds(record: Mapping[str, object]) -> dict[str, float]:
    """Median seconds of each variant of a record."""
    rows = {str(row.get("variant") or row.get("pass")): row["seconds"] for row in _rows(record)}
    return rows | ({"step": record["seconds"]} if "seconds" in record else {})


def _rows(record: Mapping[str, object]) -> list[Mapping[str, object]]:
    rows = [*record.get("rows", []), *record.get("passes", [])]
    return [row for row in rows if "seconds" in row and ("variant" in row or "pass" in row)]


def render(changes: Sequence[Change]) -> str:
    """A line a measure: old, new, new / old, what noise explains, and the verdict."""
    lines, last = [], None
    for change in changes:
        if change.of != last:
            lines.append(change.of)
            last = change.of
        noise = "     ?" if change.noise is None else f"{100 * change.noise:5.1f}%"
        lines.append(
            f"  {change.measure:52}{change.old:>12.5g}{change.new:>12.5g}{change.ratio:>8.3f}x  ± {noise}  "
            f"{change.verdict}"
        )
    worse = sum(change.worse for change in changes)
    return "\n".join([*lines, f"{worse} of {len(changes)} measures are worse beyond noise"])
