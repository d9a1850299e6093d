"""The curves of several runs over each other, and the quality of their samples while they train.

*Records* are the objects of a run's metrics.jsonl, ascending in their steps. Curves are drawn over training steps where
a step is of as many samples in all runs, and over training images where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ratiograph.reports.charts import Guide
from ratiograph.reports.overlay import Curve, overlay_chart
from ratiograph.reports.page import section
from ratiograph.reports.run_files import finite
from ratiograph.reports.run_report import curve_groups, unit_of

__all__ = ["curves_section", "quality_section"]

GUIDES = {  # what the metrics of a name or group are read against
    "ratio/mean_exp_student": Guide(1.0, shade=(0.8, 1.2), log=True),
    "ratio/mean_exp_real": Guide(1.0, shade=(0.8, 1.2), log=True),
    "ratio/accuracy": Guide(0.5, ends=(0.0, 1.0)),
    "cosine": Guide(0.0, ends=(-1.0, 1.0)),
}

Records = Mapping[str, Sequence[Mapping[str, Any]]]


def _axis(runs: Records) -> tuple[str, str]:
    """Key of the horizontal axis, and how to name a place on it."""
    sizes = {
        round(record["images"] / record["step"])
        for records in runs.values()
        for record in records
        if record["step"] > 0 and finite(record.get("images"))
    }
    everywhere = all(finite(record.get("images")) for records in runs.values() for record in records)
    return ("images", "# images") if len(sizes) > 1 and everywhere else ("step", "step #")


def _curves(runs: Records, name: str, axis: str) -> dict[str, Curve]:
    """The metric's curve of every run that has a finite value of it."""
    curves = {}
    for run, records in runs.items():
        known = [record for record in records if name in record]
        values = [record[name] if finite(record[name]) else math.nan for record in known]
        if any(map(math.isfinite, values)):
            curves[run] = ([record[axis] for record in known], values)
    return curves


def curves_section(runs: Records) -> str:
    """One chart a metric, with the runs that have it; "" if nothing was logged."""
    axis, where = _axis(runs)
    colours = {run: index for index, run in enumerate(runs)}
    charts = []
    for group, names in curve_groups([record for records in runs.values() for record in records]).items():
        for name in names:
            title, unit = name.partition("/")[2].replace("_", " ") or name, unit_of(name)
            unit = "" if unit in title else unit
            guide = GUIDES.get(name) or GUIDES.get(group)
            curves = _curves(runs, name, axis)
            charts.append(
                overlay_chart(group.replace("_", " "), title, unit, curves, colours, guide=guide, where=where)
            )
    hint = (
        f"Over training {'steps' if axis == 'step' else 'images, as batches differ'}. A line is a running average, "
        "with the last logged value in the legend. A metric that some runs do not log is drawn for the others."
    )
    return section("Curves", f'<div class="charts">{"".join(charts)}</div>', hint) if charts else ""


def quality_section(runs: Records, described: Mapping[str, Mapping[str, Any]]) -> str:
    """Charts of evaluation/*: Fréchet distance and the like against training steps; "" if nothing was measured.

    Args:
        runs: records by run.
        described: what the evaluations say of each metric, for labels and directions.
    """
    axis, where = _axis(runs)
    colours = {run: index for index, run in enumerate(runs)}
    records = [record for one in runs.values() for record in one]
    names = dict.fromkeys(key for record in records for key in record if key.startswith("evaluation/"))
    charts = []
    for name in names:
        key = name.partition("/")[2]
        curves = _curves(runs, name, axis)
        if key == "collapsed" or not curves:
            continue
        about = described.get(key) or {}
        unit = {"lower": "lower is better", "higher": "higher is better"}.get(about.get("better") or "", "")
        title = str(about.get("label") or key.replace("_", " "))
        charts.append(overlay_chart("", title, unit, curves, colours, where=where, dotted=True))
    hint = (
        f"Over training {'steps' if axis == 'step' else 'images, as batches differ'}, on fewer samples than in the "
        "table of results: compare the points with each other, not with it."
    )
    title = "Quality over training"
    return section(title, f'<div class="charts">{"".join(charts)}</div>', hint) if charts else ""
