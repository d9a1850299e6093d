"""The quality of the samples while a run trains: charts of the metrics evaluation/*, and a warning of collapse.

*Records* are the objects of metrics.jsonl, ascending in their steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from ratiograph.reports.charts import line_chart, overlay_chart
from ratiograph.reports.curves import curves_of, horizontal
from ratiograph.reports.evaluation_file import finite
from ratiograph.reports.page import chart_section
from ratiograph.reports.results import better_words

__all__ = ["collapse_banner", "quality_charts", "quality_section"]

Records = Sequence[Mapping[str, Any]]

FEWER = "on fewer samples than in the table of results: compare the points with each other, not with it."


def _measured(records: Records, described: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """(name, title, unit) of each metric evaluation/*; that of collapse has no chart."""
    names = dict.fromkeys(name for record in records for name in record if name.startswith("evaluation/"))
    for name in names:
        key = name.partition("/")[2]
        about = described.get(key) or {}
        if key != "collapsed":
            yield name, str(about.get("label") or key.replace("_", " ")), better_words(about)


def quality_charts(records: Records, described: Mapping[str, Any]) -> str:
    """The section of one run: charts of evaluation/* against the training images.

    Args:
        records: of metrics.jsonl.
        described: the ``metrics`` of evaluation.json, for labels and directions; may be {}.

    Returns:
        HTML; "" if nothing was measured while training.
    """
    charts = []
    for name, title, unit in _measured(records, described):
        known = [record for record in records if finite(record.get(name)) and finite(record.get("images"))]
        if known:
            images, values = [r["images"] for r in known], [r[name] for r in known]
            charts.append(line_chart("", title, unit, images, {title: values}, where="# images"))
    return chart_section("Quality over training images", "".join(charts), FEWER.capitalize())


def quality_section(runs: Mapping[str, Records], described: Mapping[str, Mapping[str, Any]]) -> str:
    """The section of several runs: charts of evaluation/* against training steps; "" if nothing was measured.

    Args:
        runs: records by run.
        described: what the evaluations say of each metric, for labels and directions.
    """
    axis, where, over = horizontal(runs)
    colours = {run: index for index, run in enumerate(runs)}
    charts = []
    for name, title, unit in _measured(list(itertools.chain(*runs.values())), described):
        curves = curves_of(runs, name, axis)
        if curves:
            charts.append(overlay_chart("", title, unit, curves, colours, where=where, dotted=True))
    return chart_section("Quality over training", "".join(charts), f"Over training {over}, {FEWER}")


def collapse_banner(records: Records, evaluation: Mapping[str, Any]) -> str:
    """A warning if the student has collapsed, or had while training; "" otherwise.

    A student that was collapsed at the first measurements only, before it had learnt, is not warned of.
    """
    seen = [
        (record["step"], record["evaluation/collapsed"] >= 0.5)
        for record in records
        if finite(record.get("evaluation/collapsed"))
    ]
    turned = next((step for (_, before), (step, now) in itertools.pairwise(seen) if now and not before), None)
    rows = [row for row in evaluation.get("rows") or [] if row.get("highlight") and row.get("collapsed") is not None]
    ended = seen[-1][1] if seen else False
    collapsed = any(row["collapsed"] for row in rows) if rows else ended
    when = f" It was first seen at step {turned:,}." if turned is not None else ""
    if collapsed:
        head, text = (
            "The student has collapsed.",
            f"It makes few kinds of samples, or nearly the same one.{when} {_CURE}",
        )
    elif turned is not None or ended:
        last = "still so at the last measurement while training" if ended else "no longer so at the last one"
        final = ", but not in the final evaluation" if rows else ""
        head, text = "The student collapsed while training.", f"{when.strip()} This was {last}{final}. {_CURE}"
    else:
        return ""
    return f'<div class="banner" role="alert"><b>{head}</b> {escape(text)}</div>'


_CURE = (
    "Look at the grids and the class shares, then run again with a lower learning rate of the student, more updates of "
    "the critics a step, or a smaller coefficient of the GAN term."
)
