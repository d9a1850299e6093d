"""One metric of several runs in one chart: a line a run, each at its own steps, in the run's colour.

A *curve* is a run's steps (or images) [N], ascending, with the values [N] logged there, NaN where a value was not
finite. The colour of the run number i is the class ``c<i mod 6>`` of report.css, dashed from the seventh run on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from ratiograph.reports.charts import (
    BOTTOM,
    COLOURS,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Guide,
    axis_name,
    clipped,
    frame,
    gaps_note,
    nice_ticks,
    path_data,
    smooth,
    smooth_on,
    step_range,
    tick_label,
    unit_words,
    value_axis,
)
from ratiograph.reports.page import breakable
from ratiograph.training.logs import significant

__all__ = ["Curve", "colour_class", "overlay_chart"]

POINTS = 250  # drawn a line, and places that the pointer stops at
FAINT = 3  # runs up to which raw values are drawn too; more of them would hide the averages

Curve = tuple[Sequence[float], Sequence[float]]
"""(steps [N], values [N])."""


def colour_class(index: int) -> str:
    """Classes of report.css for the run number ``index``."""
    dashes = index // COLOURS % 3
    return f"c{index % COLOURS}{f' dash{dashes}' if dashes else ''}"


def overlay_chart(
    group: str,
    title: str,
    unit: str,
    curves: Mapping[str, Curve],
    colours: Mapping[str, int],
    *,
    guide: Guide | None = None,
    where: str = "step #",
    dotted: bool = False,
) -> str:
    """The curves as an HTML figure with a legend; report.js shows values under the pointer.

    Args:
        group: what the chart belongs to, in front of the title; may be "".
        title: what is drawn.
        unit: of the values; "" for a pure number.
        curves: by run, each with a finite value.
        colours: number of each run on the page.
        guide: what the values are read against.
        where: names a place under the pointer; "#" stands for its number.
        dotted: marks each value, where they are few; a run's only one is marked anyway.
    """
    steps = {run: np.asarray(x, dtype=float) for run, (x, _) in curves.items()}
    values = {run: np.asarray(y, dtype=float) for run, (_, y) in curves.items()}
    values = {run: np.where(np.isfinite(y), y, np.nan) for run, y in values.items()}
    drawn = {run: guide.drawn(y) for run, y in values.items()} if guide else values
    widths = {run: 0.015 * len(y) if len(y) >= 20 and not dotted else 0.0 for run, y in drawn.items()}
    y = value_axis(drawn, {run: smooth(drawn[run], widths[run]) for run in drawn}, guide)
    ends = [min(x[0] for x in steps.values()), max(x[-1] for x in steps.values())]
    x = Axis(*(float(end) for end in step_range(ends)), LEFT, WIDTH - RIGHT)
    lines = []
    for run in drawn:
        averaged = smooth_on(drawn[run], widths[run], log=y.log and not guide)
        lines += _lines(steps[run], drawn[run], averaged, x, y, colour_class(colours[run]), len(drawn), dotted=dotted)
    ticks = [tick for tick in nice_ticks(x.low, x.high) if tick == round(tick)]
    marks = [(tick, f"{tick:,.0f}" if tick < 1e6 else tick_label(tick)) for tick in ticks]
    content = f"{frame(x, y, marks, axis_name(where))}{guide.svg(y) if guide else ''}{clipped(lines)}"
    last = {run: significant(float(one[np.isfinite(one)][-1])) for run, one in values.items()}
    data = _pointed(x, steps, values, where)
    spoken = (
        f"{group} {title} of {len(last)} runs: {', '.join(f'{run} ends at {value}' for run, value in last.items())}"
    )
    legend = "".join(
        f'<li class="{colour_class(colours[run])}"><span>{breakable(run)}</span> <output>{value}</output></li>'
        for run, value in last.items()
    )
    return (
        f'<figure class="chart" data-chart="{escape(json.dumps(data, separators=(",", ":")))}">'
        f"<figcaption><span><i>{escape(group)}</i> <b>{escape(title)}</b>{unit_words(unit, y)}</span>"
        f'<output></output></figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(spoken)}">'
        f'{content}<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" hidden="hidden"/></svg>'
        f'<ul class="legend">{legend}</ul>{gaps_note(values)}</figure>'
    )


def _lines(
    steps: np.ndarray,
    raw: np.ndarray,
    averaged: np.ndarray,
    x: Axis,
    y: Axis,
    colour: str,
    runs: int,
    *,
    dotted: bool,
) -> list[str]:
    """A run's line; dots on its values, or the values themselves, faint, below it."""
    shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), POINTS)).round().astype(int))
    parts = [f'<path class="curve {colour}" d="{path_data(steps[shown], averaged[shown], x, y)}"/>']
    if dotted or np.isfinite(raw).sum() == 1:  # a line through one value would not be seen
        dots = ((at, value) for at, value in zip(steps, raw, strict=True) if math.isfinite(value))
        dots = ((at, value) for at, value in dots if value > 0 or not y.log)
        parts += [f'<circle class="{colour}" cx="{x(at):.1f}" cy="{y(value):.1f}" r="2.6"/>' for at, value in dots]
    elif runs <= FAINT and not np.array_equal(raw, averaged, equal_nan=True):
        parts.insert(0, f'<path class="raw {colour}" d="{path_data(steps[shown], raw[shown], x, y)}"/>')
    return parts


def _pointed(x: Axis, steps: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray], where: str) -> dict:
    """What report.js shows under the pointer: of each run the nearest value it logged, "–" beyond its ends."""
    places = np.unique(np.concatenate(list(steps.values())))
    places = places[np.unique(np.linspace(0, len(places) - 1, min(len(places), POINTS)).round().astype(int))]
    series = []
    for run, own in steps.items():
        right = np.clip(np.searchsorted(own, places), 1, max(len(own) - 1, 1))
        left = right - 1
        right = np.minimum(right, len(own) - 1)
        nearest = np.where(places - own[left] <= own[right] - places, left, right)
        inside = (places >= own[0]) & (places <= own[-1])
        texts = [significant(values[run][index]) for index in nearest]
        series.append([text if known else "–" for text, known in zip(texts, inside, strict=True)])
    numbers = [int(place) if place == int(place) else float(place) for place in places]
    return {"where": where, "steps": numbers, "x": [round(x(place), 1) for place in places], "series": series}
