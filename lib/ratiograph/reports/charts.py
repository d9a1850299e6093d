"""Charts of a report as inline SVG: lines over training, dots over noise levels, a calibration curve.

A *curve* is one series: its steps (or images) [N], ascending, with the values [N] logged there; a value that is not
finite is a gap in the line. Lines of many points are drawn twice: the raw values faint, and over them a centred
Gaussian average, taken of the logarithms where the axis is logarithmic and has no ``Guide``. Colours are the classes
``c0`` to ``c5`` of report.css, so that a chart follows the page into dark mode and print.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from ratiograph.reports.axes import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Guide,
    frame,
    nice_ticks,
    smooth,
    step_axis,
    tick_label,
    value_axis,
)
from ratiograph.reports.page import breakable
from ratiograph.training.logs import significant

__all__ = ["Curve", "bin_chart", "calibration_chart", "colour_class", "line_chart", "overlay_chart"]

COLOURS = 6
POINTS = 300  # drawn a line, and places that the pointer stops at: what a screen resolves
SMOOTHED = 20  # points from which a line is averaged
FAINT = 3  # runs up to which raw values are drawn too; more of them would hide the averages

Curve = tuple[Sequence[float], Sequence[float]]
"""(steps [N], values [N])."""


def colour_class(index: int) -> str:
    """Classes of report.css for the series number ``index``: six colours, dashed from the seventh on."""
    dashes = index // COLOURS % 3
    return f"c{index % COLOURS}{f' dash{dashes}' if dashes else ''}"


def line_chart(
    group: str,
    title: str,
    unit: str,
    steps: Sequence[int],
    series: Mapping[str, Sequence[float]],
    *,
    guide: Guide | None = None,
    where: str = "step #",
) -> str:
    """One or more series of one run over training, as an HTML figure; report.js shows values under the pointer.

    Args:
        group: what the chart belongs to, in front of the title; may be "".
        title: what is drawn.
        unit: of the values; "" for a pure number.
        steps: [N] ascending, N >= 1: training steps, or images.
        series: name -> [N] values, NaN where there is none; at least one is finite. A single one needs no
            legend.
        guide: what the values are read against.
        where: names a place under the pointer; "#" stands for its number.

    Returns:
        HTML of the figure.
    """
    arrays = _arrays(series)
    places = dict.fromkeys(arrays, np.asarray(steps, dtype=float))
    classes = [colour_class(index) for index in range(len(arrays))]
    plot, unit, data = _over_training(
        *(places, arrays, classes, guide, where, unit), dotted=len(steps) < SMOOTHED, faint=True
    )
    last = [_last(values) for values in arrays.values()]
    spoken = f"{group} {title} over training".strip()
    return _figure((group, title, unit), spoken, plot, data, _legend(arrays, last), last, _gaps_note(arrays))


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
    """One metric of several runs over training, a line a run, as an HTML figure with a legend.

    Args:
        group, title, unit, guide, where: as of `line_chart`.
        curves: by run, each with a finite value and at its own steps.
        colours: number of each run on the page.
        dotted: marks each value, where they are few; a run's only one is marked anyway.
    """
    steps = {run: np.asarray(x, dtype=float) for run, (x, _) in curves.items()}
    arrays = _arrays({run: values for run, (_, values) in curves.items()})
    classes = [colour_class(colours[run]) for run in curves]
    plot, unit, data = _over_training(
        *(steps, arrays, classes, guide, where, unit), dotted=dotted, faint=len(curves) <= FAINT
    )
    last = {run: _last(values) for run, values in arrays.items()}
    ends = ", ".join(f"{run} ends at {value}" for run, value in last.items())
    legend = [
        (kind, f"<span>{breakable(run)}</span>", value)
        for kind, (run, value) in zip(classes, last.items(), strict=True)
    ]
    spoken = f"{group} {title} of {len(last)} runs: {ends}"
    return _figure((group, title, unit), spoken, plot, data, legend, (), _gaps_note(arrays))


def _over_training(
    steps: Mapping[str, np.ndarray],
    values: Mapping[str, np.ndarray],
    classes: Sequence[str],
    guide: Guide | None,
    where: str,
    unit: str,
    *,
    dotted: bool,
    faint: bool,
) -> tuple[str, str, dict]:
    """(content of the plot, HTML of the unit, data for the pointer) of series by name, each at its own steps."""
    drawn = {name: guide.clip(array) for name, array in values.items()} if guide else values
    widths = {name: 0.015 * len(v) if len(v) >= SMOOTHED and not dotted else 0.0 for name, v in drawn.items()}
    y = value_axis(drawn, {name: smooth(drawn[name], widths[name]) for name in drawn}, guide)
    x = step_axis(min(own[0] for own in steps.values()), max(own[-1] for own in steps.values()))
    lines = []
    for (name, raw), kind in zip(drawn.items(), classes, strict=True):
        width, average = widths[name], raw
        if width:
            average = np.exp(smooth(np.log(raw), width)) if y.log and not guide else smooth(raw, width)
        dots = dotted or np.isfinite(raw).sum() == 1  # a line through one value would not be seen
        lines += _line(steps[name], raw, average, x, y, kind, dots=dots, faint=faint and bool(width) and not dots)
    marks = [(tick, tick_label(tick)) for tick in nice_ticks(x.low, x.high) if tick == round(tick)]
    place = where.replace("#", "").strip().removesuffix("s")  # 'step #' and '# images'
    content = f"{frame(x, y, marks, f'training {place}s')}{guide.svg(y) if guide else ''}{_clipped(lines)}"
    return content, _unit(unit, y), _pointer_data(x, steps, values, where)


def bin_chart(title: str, unit: str, series: Mapping[str, Sequence[float | None]], *, guide: Guide) -> str:
    """Values in bins of increasing noise, as dots joined by lines.

    Args:
        title, unit: as of `line_chart`.
        series: name -> [N] values, None where a bin is empty; at least one is not.
        guide: what the values are read against.
    """
    arrays = {name: np.array(values, dtype=float) for name, values in series.items()}  # None => NaN
    drawn = {name: guide.clip(values) for name, values in arrays.items()}
    bins = np.arange(1, len(next(iter(arrays.values()))) + 1)
    x, y = Axis(0.5, bins[-1] + 0.5, LEFT, RIGHT), value_axis(drawn, drawn, guide)
    lines = [
        line for index, own in enumerate(drawn.values()) for line in _line(bins, own, own, x, y, colour_class(index))
    ]
    marks = [(1, "least noise"), (bins[-1], "most noise")]
    content = f"{frame(x, y, marks, 'noise level')}{guide.svg(y)}{_clipped(lines)}"
    data = _pointer_data(x, dict.fromkeys(arrays, bins), arrays, f"noise level # of {bins[-1]}")
    return _figure(("", title, _unit(unit, y)), f"{title} by noise level", content, data, _legend(arrays))


def calibration_chart(
    title: str, predicted: Sequence[float | None], observed: Sequence[float | None], share: Sequence[float | None]
) -> str:
    """P(real) that was observed over the one that was predicted, with the diagonal where both are equal.

    Args:
        title: of the chart.
        predicted: [N] mean D of each level of D, None where nothing fell; at least one is not.
        observed: [N] share of real samples among those; None at the same places.
        share: [N] of all samples in each level, the largest drawn as a third of the plot's height.
    """
    rows = zip(predicted, observed, share, strict=True)
    d, real, shares = np.array([row for row in rows if None not in row[:2]], dtype=float).T
    x, y = Axis(0.0, 1.0, LEFT, RIGHT), Axis(0.0, 1.0, BOTTOM, TOP)
    wide, tallest = 0.6 * (RIGHT - LEFT) / len(predicted), (BOTTOM - TOP) / 3 / max(shares.max(), 1e-12)
    bars = [
        f'<rect class="share" x="{x(at) - wide / 2:.1f}" y="{BOTTOM - tallest * size:.1f}" width="{wide:.1f}" '
        f'height="{tallest * size:.1f}"/>'
        for at, size in zip(d, shares, strict=True)
    ]
    diagonal = f'<line class="guide" x1="{LEFT}" y1="{BOTTOM}" x2="{RIGHT}" y2="{TOP}"/>'
    marks = [(tick, tick_label(tick)) for tick in nice_ticks(0, 1)]
    content = frame(x, y, marks, "D") + _clipped([*bars, diagonal, *_line(d, real, real, x, y, "c0")])
    arrays = {"observed share of real ones": real, "share of all samples": shares}
    data = _pointer_data(x, dict.fromkeys(arrays, d.round(3)), arrays, "D = #")
    unit = ' <span class="unit">over D</span>'
    return _figure(("", title, unit), f"{title} over D", content, data, _legend(arrays))


# -- parts -------------------------------------------------------------------------------------------------------------


def _arrays(series: Mapping[str, Sequence[float]]) -> dict[str, np.ndarray]:
    """Float arrays, NaN where a value is not finite."""
    arrays = {name: np.asarray(values, dtype=float) for name, values in series.items()}
    return {name: np.where(np.isfinite(values), values, np.nan) for name, values in arrays.items()}


def _thinned(count: int) -> np.ndarray:
    """Indices of at most ``POINTS`` of ``count`` values, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, POINTS)).round().astype(int))


def _line(
    steps: np.ndarray,
    raw: np.ndarray,
    average: np.ndarray,
    x: Axis,
    y: Axis,
    kind: str,
    *,
    dots: bool = True,
    faint: bool = False,
) -> list[str]:
    """The averages as a line, below it the raw values as a faint one, or dots on them."""
    shown = _thinned(len(steps))
    paths = {"raw": raw, "curve": average} if faint else {"curve": average}
    parts = [
        f'<path class="{name} {kind}" d="{_path_data(steps[shown], values[shown], x, y)}"/>'
        for name, values in paths.items()
    ]
    if dots:
        parts += [
            f'<circle class="{kind}" cx="{x(at):.1f}" cy="{y(value):.1f}" r="2.6"/>'
            for at, value in zip(steps, raw, strict=True)
            if math.isfinite(value) and (value > 0 or not y.log)
        ]
    return parts


def _path_data(steps: Sequence[float], values: np.ndarray, x: Axis, y: Axis) -> str:
    """SVG path data through the finite values, lifted over the gaps."""
    parts, pen = [], "M"
    for step, value in zip(steps, values, strict=True):
        if math.isfinite(value) and (value > 0 or not y.log):
            parts.append(f"{pen}{x(step):.1f} {y(value):.1f}")
            pen = "L"
        else:
            pen = "M"
    if len(parts) == 1:
        parts.append("h.1")  # one point: a dot, by the round cap of the line
    return "".join(parts)


def _clipped(lines: Sequence[str]) -> str:
    """An inner svg cuts what leaves the plot, without the ids that a clip path would need."""
    left, top, width, height = LEFT - 2, TOP - 2, RIGHT - LEFT + 4, BOTTOM - TOP + 4
    box = f'x="{left}" y="{top}" width="{width}" height="{height}"'
    return f'<svg {box} viewBox="{left} {top} {width} {height}">{"".join(lines)}</svg>'


def _pointer_data(x: Axis, steps: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray], where: str) -> dict:
    """What report.js shows under the pointer: of each series the nearest value it has, "–" beyond its ends."""
    places = np.unique(np.concatenate(list(steps.values())))
    places = places[_thinned(len(places))]
    series = []
    for name, own in steps.items():
        right = np.clip(np.searchsorted(own, places), 1, max(len(own) - 1, 1))
        left = right - 1
        right = np.minimum(right, len(own) - 1)
        nearest = np.where(places - own[left] <= own[right] - places, left, right)
        inside = (places >= own[0]) & (places <= own[-1])
        texts = [significant(values[name][index]) for index in nearest]
        series.append([text if known else "–" for text, known in zip(texts, inside, strict=True)])
    numbers = [int(place) if place == int(place) else float(place) for place in places]
    return {"where": where, "steps": numbers, "x": [round(x(place), 1) for place in places], "series": series}


def _figure(
    heading: tuple[str, str, str],
    spoken: str,
    content: str,
    data: dict,
    legend: Sequence[tuple[str, str, str]],
    last: Sequence[str] = (),
    note: str = "",
) -> str:
    """The chart in its card.

    Args:
        heading: (group, title, HTML of the unit).
        spoken: text that is read out for the plot.
        content: SVG of the plot.
        data: as of `_pointer_data`.
        legend: (classes, HTML, value) of each series; a chart without one shows its single value in the heading.
        last: value of each series that is shown while no pointer is on the chart.
        note: HTML below.
    """
    group, title, unit = heading
    items = "".join(f'<li class="{kind}">{name} <output>{value}</output></li>' for kind, name, value in legend)
    items = f'<ul class="legend">{items}</ul>' if items else ""
    return (
        f'<figure class="chart" data-chart="{escape(json.dumps(data, separators=(",", ":")))}">'
        f"<figcaption><span><i>{escape(group)}</i> <b>{escape(title)}</b>{unit}</span>"
        f"<output>{last[0] if last and not legend else ''}</output></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(spoken)}">{content}'
        f'<line class="cursor" y1="{TOP}" y2="{BOTTOM}" hidden="hidden"/></svg>'
        f"{items}{note}</figure>"
    )


def _legend(names: Sequence[str], values: Sequence[str] = ()) -> list[tuple[str, str, str]]:
    """The legend of several series of one run; a single one has none."""
    shown = values or [""] * len(names)
    items = zip(names, shown, strict=True)
    several = len(names) > 1
    return [(colour_class(index), escape(name), value) for index, (name, value) in enumerate(items) if several]


def _unit(unit: str, y: Axis) -> str:
    words = ", ".join(word for word in (unit, "log scale" if y.log else "") if word)
    return f' <span class="unit">{escape(words)}</span>' if words else ""


def _last(values: np.ndarray) -> str:
    return significant(float(values[np.isfinite(values)][-1]))


def _gaps_note(arrays: Mapping[str, np.ndarray]) -> str:
    """A warning where values were not finite."""
    broken = [name for name, values in arrays.items() if not np.isfinite(values).all()]
    return f'<p class="gaps">gaps in {escape(", ".join(broken))}: not finite there</p>' if broken else ""
