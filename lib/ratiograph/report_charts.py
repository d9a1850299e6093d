"""Charts of a report as inline SVG and HTML: lines over training steps, bars over classes.

A *series* is a name with one value a step; a value that was not finite is NaN here and a gap in the line.
Lines are drawn twice: the raw values faint, and over them a centred Gaussian average in the scale of the
axis. Colours are the classes ``c0`` to ``c5`` of report.css, so that a chart follows the page into dark mode
and print.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from ratiograph.logs import significant

__all__ = ["Axis", "bar_chart", "line_chart", "log_ticks", "mini_bars", "nice_ticks", "smooth", "tick_label"]

_COLOURS = 6
_POINTS = 400  # drawn a line: more than a screen resolves, few enough for a light page
_WIDTH, _HEIGHT = 360, 200  # of the view box; about the size on screen, so that text keeps its size
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 8, 24


def tick_label(value: float) -> str:
    """A number on an axis, without padding zeros: 0, 0.25, 2,000, 1e-5."""
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.6f}".rstrip("0").rstrip(".")


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten in [low, high], low < high: at most ``count`` + 1 of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis in [low, high], 0 < low < high: 1, 2, 5 a decade, or decades where there are many."""
    exponents = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    decades = [float(f"1e{exponent}") for exponent in exponents]
    stride = math.ceil(len(decades) / 6)
    mantissas = (1, 2, 5) if high <= 200 * low else (1,)
    ticks = [m * decade for decade in decades[::stride] for m in mantissas]
    return [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]


def smooth(values: np.ndarray, width: float) -> np.ndarray:
    """Gaussian average of each value's neighbours, ``width`` points in standard deviation; NaN stays NaN,
    others
    ignore it. At the ends the average is over the neighbours there are."""
    if width < 0.5 or len(values) < 3:
        return values.copy()
    reach = min(math.ceil(3 * width), len(values) - 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="full")[reach : reach + len(values)]
    weight = np.convolve(known.astype(float), kernel, mode="full")[reach : reach + len(values)]
    return np.where(known, total / np.where(weight > 0, weight, 1), np.nan)


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels: ``low`` -> ``start``, ``high`` -> ``end``, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        ticks = log_ticks(self.low, self.high) if self.log else []
        return ticks if len(ticks) >= 2 else nice_ticks(self.low, self.high)


def _value_axis(series: Mapping[str, np.ndarray], smoothed: Mapping[str, np.ndarray]) -> Axis:
    """The vertical axis: all of the averages and all but the wildest 1 % of the raw values, with a little
    air.

    Logarithmic where every value is positive and the averages span more than a factor of 20.
    """
    raw = np.concatenate([values[np.isfinite(values)] for values in series.values()])
    curves = np.concatenate([values[np.isfinite(values)] for values in smoothed.values()])
    log = raw.min() > 0 and curves.max() > 20 * curves.min()
    low, high = np.quantile(raw, [0.005, 0.995])
    low, high = float(min(low, curves.min())), float(max(high, curves.max()))
    if log:
        air = (high / low) ** 0.05
        return Axis(low / air, high * air, _HEIGHT - _BOTTOM, _TOP, log=True)
    air = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    floor = 0.0 if 0 <= low < 0.4 * high else low - air  # zero is shown where it is near
    return Axis(floor, high + air, _HEIGHT - _BOTTOM, _TOP)


def _path(steps: Sequence[float], values: np.ndarray, x: Axis, y: Axis) -> str:
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


def line_chart(group: str, title: str, unit: str, steps: Sequence[int], series: Mapping[str, Sequence[float]]) -> str:
    """One or more series over the training steps, as an HTML figure; report.js shows values under the
    pointer.

    Args:
        group: what the chart belongs to, in front of the title; may be "".
        title: what is drawn.
        unit: of the values; "" for a pure number.
        steps: [N] ascending, N >= 1.
        series: name -> [N] values, NaN where there is none; at least one is finite. A single one needs no
            legend.

    Returns:
        HTML of the figure.
    """
    arrays = {name: np.asarray(values, dtype=float) for name, values in series.items()}
    arrays = {name: np.where(np.isfinite(values), values, np.nan) for name, values in arrays.items()}
    width = 0.015 * len(steps) if len(steps) >= 20 else 0.0
    y = _value_axis(arrays, {name: smooth(values, width) for name, values in arrays.items()})
    smoothed = {name: _smooth_on(values, width, log=y.log) for name, values in arrays.items()}
    x = Axis(*(float(s) for s in _step_range(steps)), _LEFT, _WIDTH - _RIGHT)
    shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _POINTS)).round().astype(int))
    shown_steps = [steps[index] for index in shown]
    lines = []
    for index, name in enumerate(arrays):
        if width:
            raw = _path(shown_steps, arrays[name][shown], x, y)
            lines.append(f'<path class="raw c{index % _COLOURS}" d="{raw}"/>')
        curve = _path(shown_steps, smoothed[name][shown], x, y)
        lines.append(f'<path class="curve c{index % _COLOURS}" d="{curve}"/>')
    data = {
        "steps": shown_steps,
        "x": [round(x(step), 1) for step in shown_steps],
        "series": [[significant(value) for value in arrays[name][shown]] for name in arrays],
    }
    heading = f"<i>{escape(group)}</i> <b>{escape(title)}</b>{_unit(unit, y)}"
    spoken = escape(f"{group} {title} over training steps".strip())
    return (
        f'<figure class="chart" data-chart="{escape(json.dumps(data, separators=(",", ":")))}">'
        f"<figcaption><span>{heading}</span>{_readout(arrays)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{spoken}">'
        f"{_frame(x, y)}{_clipped(lines)}"
        f'<line class="cursor" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" hidden="hidden"/></svg>'
        f"{_legend(arrays)}{_gaps(arrays)}</figure>"
    )


def _smooth_on(values: np.ndarray, width: float, *, log: bool) -> np.ndarray:
    return np.exp(smooth(np.log(values), width)) if log else smooth(values, width)


def _step_range(steps: Sequence[int]) -> tuple[float, float]:
    low, high = (0 if steps[0] < 0.2 * steps[-1] else steps[0]), steps[-1]
    return (low, high) if high > low else (low - 1, high + 1)


def _frame(x: Axis, y: Axis) -> str:
    """Grid lines and numbers of both axes."""
    parts = []
    for tick in y.ticks():
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{tick_label(tick)}</text>')
    for tick in (tick for tick in nice_ticks(x.low, x.high) if tick == round(tick)):
        anchor, at = ("end", _WIDTH - _RIGHT) if x(tick) > _WIDTH - _RIGHT - 12 else ("middle", x(tick))
        parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - 7}" text-anchor="{anchor}">{tick_label(tick)}</text>')
    base = _HEIGHT - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    return "".join(parts)


def _clipped(lines: Sequence[str]) -> str:
    """An inner svg cuts what leaves the plot, without the ids that a clip path would need."""
    width, height = _WIDTH - _RIGHT - _LEFT + 4, _HEIGHT - _BOTTOM - _TOP + 4
    box = f'x="{_LEFT - 2}" y="{_TOP - 2}" width="{width}" height="{height}"'
    return f'<svg {box} viewBox="{_LEFT - 2} {_TOP - 2} {width} {height}">{"".join(lines)}</svg>'


def _unit(unit: str, y: Axis) -> str:
    words = ", ".join(word for word in (unit, "log scale" if y.log else "") if word)
    return f' <span class="unit">{escape(words)}</span>' if words else ""


def _last(values: np.ndarray) -> float:
    return float(values[np.isfinite(values)][-1])


def _readout(arrays: Mapping[str, np.ndarray]) -> str:
    """Where the value under the pointer appears; the last value until then. Several series have it in the legend."""
    if len(arrays) > 1:
        return "<output></output>"
    return f"<output>{significant(_last(next(iter(arrays.values()))))}</output>"


def _legend(arrays: Mapping[str, np.ndarray]) -> str:
    if len(arrays) == 1:
        return ""
    items = "".join(
        f'<li class="c{index % _COLOURS}">{escape(name)} <output>{significant(_last(values))}</output></li>'
        for index, (name, values) in enumerate(arrays.items())
    )
    return f'<ul class="legend">{items}</ul>'


def _gaps(arrays: Mapping[str, np.ndarray]) -> str:
    """A warning where values were not finite."""
    broken = [name for name, values in arrays.items() if not np.isfinite(values).all()]
    return f'<p class="gaps">gaps in {escape(", ".join(broken))}: not finite there</p>' if broken else ""


def bar_chart(labels: Sequence[str], series: Mapping[str, Sequence[float]]) -> str:
    """Groups of bars, one group a label and one bar a series, with the values in a table below.

    Args:
        labels: [N] of the groups, e.g. class names.
        series: name -> [N] values >= 0, e.g. the fraction of samples in each class.

    Returns:
        HTML; bars are percentages of the plot's height, so that the chart fits any width.
    """
    top = max(max((value for values in series.values() for value in values), default=0.0), 1e-12)
    ticks = nice_ticks(0.0, top * 1.05)
    limit = max(top * 1.05, ticks[-1])
    grid = "".join(
        f'<div class="rule" style="bottom:{100 * tick / limit:.2f}%"><span>{tick_label(tick)}</span></div>'
        for tick in ticks
    )
    groups = []
    for position, label in enumerate(labels):
        bars = "".join(
            f'<i class="c{index % _COLOURS}" style="height:{100 * max(values[position], 0) / limit:.2f}%" '
            f'title="{escape(name)}, {escape(label)}: {significant(values[position], 3)}"></i>'
            for index, (name, values) in enumerate(series.items())
        )
        groups.append(f'<div class="group"><div class="bars">{bars}</div><span>{escape(label)}</span></div>')
    legend = "".join(f'<li class="c{index % _COLOURS}">{escape(name)}</li>' for index, name in enumerate(series))
    head = "".join(f"<th>{escape(label)}</th>" for label in labels)
    rows = "".join(
        f"<tr><th>{escape(name)}</th>" + "".join(f"<td>{value:.3f}</td>" for value in values) + "</tr>"
        for name, values in series.items()
    )
    return (
        f'<figure class="histogram"><ul class="legend">{legend}</ul>'
        f'<div class="plot"><div class="rules">{grid}</div>{"".join(groups)}</div></figure>'
        f'<div class="scroll"><table class="numbers small"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def mini_bars(values: Sequence[float]) -> str:
    """A list of numbers >= 0 as bars the height of a line of text; the numbers are its tooltip."""
    top = max([*values, 1e-12])
    heights = [16 * max(value, 0) / top for value in values]
    bars = "".join(
        f'<rect x="{6 * index}" width="5" y="{16 - height:.1f}" height="{height:.1f}"/>'
        for index, height in enumerate(heights)
    )
    words = ", ".join(significant(value, 3) for value in values)
    width = 6 * max(len(values), 1)
    return f'<svg class="mini" viewBox="0 0 {width} 16" width="{width}" height="16"><title>{words}</title>{bars}</svg>'
