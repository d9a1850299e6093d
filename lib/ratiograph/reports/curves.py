"""The curves of a page: every metric of one run over training, or of several runs over each other.

*Records* are the objects of a run's metrics.jsonl, ascending in their steps. Curves of several runs are drawn over
training steps where a step is of as many samples in all runs, and over training images where it is not.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ratiograph.reports.axes import Guide
from ratiograph.reports.charts import Curve, line_chart, overlay_chart
from ratiograph.reports.evaluation_file import finite
from ratiograph.reports.page import chart_section
from ratiograph.reports.ratio_checks import GUIDES

__all__ = ["curves_of", "curves_section", "horizontal", "label_of", "run_curves", "series_chart", "unit_of"]

_TOGETHER = {"field": "norms", "cosine": "cosines"}  # groups read against each other in one chart, and its title
_UNITS = (  # the first pattern found in a metric's name gives its unit
    (r"^field/", "rms at the image"),
    (r"steps_per_second$", "steps per second"),
    (r"images_per_second$", "images per second"),
    (r"per_second$", "per second"),
    (r"fraction$|accuracy", "fraction"),
    (r"seconds$", "s"),
    (r"^gradient/|gradient_norm", "norm"),
    (r"^memory/", "GB"),
    (r"^reward/", "log R"),
)
_ORDER = ("loss", "field", "ratio")  # groups that stand first
_MACHINE = ("rate", "data", "memory", "faults")  # groups that stand last

Records = Sequence[Mapping[str, Any]]


def label_of(name: str) -> str:
    """What a metric is called in a chart of its group."""
    return name.partition("/")[2].replace("_", " ") or name


def unit_of(name: str) -> str:
    """The unit of a metric's values, "" for a pure number and where the metric's label says it."""
    unit = next((unit for pattern, unit in _UNITS if re.search(pattern, name)), "")
    return "" if unit in label_of(name) else unit


def _groups(records: Records, elsewhere: Collection[str] = ()) -> dict[str, list[str]]:
    """Names of the metrics with a finite value that are not shown ``elsewhere``, by group, in the page's order."""
    known = {name for record in records for name, value in record.items() if finite(value)}
    names = dict.fromkeys(name for record in records for name in record if name in known)
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=_rank):
        hidden = name in ("step", "seconds", "images", *elsewhere) or name.startswith("evaluation/")
        if not hidden:
            groups.setdefault(name.partition("/")[0], []).append(name)
    return groups


def _rank(name: str) -> int:
    group = name.partition("/")[0]
    return _ORDER.index(group) if group in _ORDER else len(_ORDER) + (group in _MACHINE)


# -- one run -----------------------------------------------------------------------------------------------------------


def run_curves(records: Records, elsewhere: Collection[str] = ()) -> str:
    """The section of one run: a chart a metric, or one a group where its metrics are read against each other.

    Args:
        records: of metrics.jsonl.
        elsewhere: metrics that the page shows in another place.
    """
    charts = []
    for group, names in _groups(records, elsewhere).items():
        shared: dict[object, list[str]] = {}  # in some groups metrics logged at the same steps share a chart
        for name in names:
            logged = tuple(index for index, record in enumerate(records) if name in record)
            shared.setdefault(logged if group in _TOGETHER else name, []).append(name)
        for members in shared.values():
            labels = {name: label_of(name) for name in members}
            title = label_of(members[0]) if len(members) == 1 else _TOGETHER[group]
            charts.append(series_chart(records, group.replace("_", " "), title, unit_of(members[0]), labels))
    hint = "Over training steps. Faint: logged values; strong: their running average. Point at a chart to read values."
    return chart_section("Curves", "".join(charts), hint)


def series_chart(
    records: Records, group: str, title: str, unit: str, labels: Mapping[str, str], *, guide: Guide | None = None
) -> str:
    """One chart of the metrics ``labels`` (name -> label) over the steps that logged any of them; see `line_chart`."""
    known = [record for record in records if any(name in record for name in labels)]
    series = {label: _values(known, name) for name, label in labels.items()}
    return line_chart(group, title, unit, [record["step"] for record in known], series, guide=guide)


def _values(records: Records, name: str) -> list[float]:
    return [record[name] if finite(record.get(name)) else math.nan for record in records]


# -- several runs ------------------------------------------------------------------------------------------------------


def curves_section(runs: Mapping[str, Records]) -> str:
    """The section of several runs: one chart a metric, with the runs that have it; "" if nothing was logged."""
    axis, where, over = horizontal(runs)
    colours = {run: index for index, run in enumerate(runs)}
    charts = [
        overlay_chart(
            *(group.replace("_", " "), label_of(name), unit_of(name), curves_of(runs, name, axis), colours),
            guide=GUIDES.get(name) or GUIDES.get(group),
            where=where,
        )
        for group, names in _groups(list(itertools.chain(*runs.values()))).items()
        for name in names
    ]
    hint = (
        f"Over training {over}. A line is a running average, with the last logged value in the legend. A metric that "
        "some runs do not log is drawn for the others."
    )
    return chart_section("Curves", "".join(charts), hint)


def horizontal(runs: Mapping[str, Records]) -> tuple[str, str, str]:
    """The horizontal axis of several runs: key of the records, how a place on it is named, and its name for a hint."""
    records = list(itertools.chain(*runs.values()))
    counted = [record for record in records if finite(record.get("images"))]
    sizes = {round(record["images"] / record["step"]) for record in counted if record["step"] > 0}
    if len(sizes) > 1 and len(counted) == len(records):
        return "images", "# images", "images, as batches differ"
    return "step", "step #", "steps"


def curves_of(runs: Mapping[str, Records], name: str, axis: str) -> dict[str, Curve]:
    """The metric's curve of every run that has a finite value of it, over the key ``axis`` of its records."""
    curves = {}
    for run, records in runs.items():
        known = [record for record in records if name in record]
        values = _values(known, name)
        if any(map(math.isfinite, values)):
            curves[run] = ([record[axis] for record in known], values)
    return curves
