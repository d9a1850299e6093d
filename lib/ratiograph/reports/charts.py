"""Charts of a report as inline SVG: lines over training, dots over noise levels, a calibration curve.

A *series* is a name with one value a step; a value that was not finite is NaN here and a gap in the line. Lines
of many points are drawn twice: the raw values faint, and over them a centred Gaussian average, in the scale of
the axis or, against a ``Guide``, in plain scale. Colours are the classes ``c0`` to ``c5`` of report.css, so
that a chart follows the page into dark mode and print.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from ratiograph.training.logs import significant

__all__ = [
    "Axis",
    "Guide",
    "axis_name",
    "bin_chart",
    "calibration_chart",
    "clipped",
    "frame",
    "gaps_note",
    "line_chart",
    "log_ticks",
    "nice_ticks",
    "path_data",
    "smooth",
    "smooth_on",
    "step_range",
    "tick_label",
    "unit_words",
    "value_axis",
]

COLOURS = 6
POINTS = 400  # drawn a line: more than a screen resolves, few enough for a light page
WIDTH, HEIGHT = 360, 214  # of the view box; about the size on screen, so that text keeps its size
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 38


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
    """Gaussian average of each value's neighbours, ``width`` points in standard deviation.

    NaN stays NaN, and the others ignore it. At the ends the average is over the neighbours there are.
    """
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


@dataclass(frozen=True)
class Guide:
    """What values are read against: a dashed line at ``value``, which is kept in view.

    Args:
        value: of the line.
        shade: (low, high) of a tinted band, or None.
        ends: (low, high) of the axis; None fits it to the values.
        log: the axis is logarithmic, and shows at least half and twice ``value`` > 0. Values beyond a factor of 10^4
            are drawn at that factor.
    """

    value: float
    shade: tuple[float, float] | None = None
    ends: tuple[float, float] | None = None
    log: bool = False

    def drawn(self, values: np.ndarray) -> np.ndarray:
        return np.clip(values, self.value * 1e-4, self.value * 1e4) if self.log else values

    def axis(self, low: float, high: float) -> Axis:
        if self.ends:
            return Axis(*self.ends, HEIGHT - BOTTOM, TOP)
        if self.log:
            low, high = min(low, self.value / 2), max(high, self.value * 2)
            air = (high / low) ** 0.05
            return Axis(low / air, high * air, HEIGHT - BOTTOM, TOP, log=True)
        low, high = min(low, self.value), max(high, self.value)
        air = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
        return Axis(low - air, high + air, HEIGHT - BOTTOM, TOP)

    def svg(self, y: Axis) -> str:
        parts = []
        if self.shade:
            top, base = y(self.shade[1]), y(self.shade[0])
            box = f'y="{top:.1f}" width="{WIDTH - RIGHT - LEFT}" height="{base - top:.1f}"'
            parts.append(f'<rect class="shade" x="{LEFT}" {box}/>')
        at = f'y1="{y(self.value):.1f}" y2="{y(self.value):.1f}"'
        return "".join([*parts, f'<line class="guide" x1="{LEFT}" x2="{WIDTH - RIGHT}" {at}/>'])


def value_axis(drawn: Mapping[str, np.ndarray], smoothed: Mapping[str, np.ndarray], guide: Guide | None) -> Axis:
    """The vertical axis: all of the averages and all but the wildest 1 % of the raw values, with a little air.

    Without a guide it is logarithmic where every value is positive and the averages span more than a factor of 20.
    """
    raw = np.concatenate([values[np.isfinite(values)] for values in drawn.values()])
    curves = np.concatenate([values[np.isfinite(values)] for values in smoothed.values()])
    log = raw.min() > 0 and curves.max() > 20 * curves.min()
    low, high = np.quantile(raw, [0.005, 0.995])
    low, high = float(min(low, curves.min())), float(max(high, curves.max()))
    if guide:
        return guide.axis(low, high)
    if log:
        air = (high / low) ** 0.05
        return Axis(low / air, high * air, HEIGHT - BOTTOM, TOP, log=True)
    air = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    floor = 0.0 if 0 <= low < 0.4 * high else low - air  # zero is shown where it is near
    return Axis(floor, high + air, HEIGHT - BOTTOM, TOP)


def path_data(steps: Sequence[float], values: np.ndarray, x: Axis, y: Axis) -> str:
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
    """One or more series over training, as an HTML figure; report.js shows values under the pointer.

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
    arrays = {name: np.asarray(values, dtype=float) for name, values in series.items()}
    arrays = {name: np.where(np.isfinite(values), values, np.nan) for name, values in arrays.items()}
    drawn = {name: guide.drawn(values) for name, values in arrays.items()} if guide else arrays
    width = 0.015 * len(steps) if len(steps) >= 20 else 0.0
    y = value_axis(drawn, {name: smooth(values, width) for name, values in drawn.items()}, guide)
    smoothed = {name: smooth_on(values, width, log=y.log and not guide) for name, values in drawn.items()}
    x = Axis(*(float(s) for s in step_range(steps)), LEFT, WIDTH - RIGHT)
    shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), POINTS)).round().astype(int))
    places = [steps[index] for index in shown]
    lines = []
    for index, name in enumerate(drawn):
        if not width:
            lines.append(_dotted(places, drawn[name][shown], x, y, index % COLOURS))
            continue
        for kind, values in (("raw", drawn[name]), ("curve", smoothed[name])):
            lines.append(f'<path class="{kind} c{index % COLOURS}" d="{path_data(places, values[shown], x, y)}"/>')
    ticks = [tick for tick in nice_ticks(x.low, x.high) if tick == round(tick)]
    marks = [(tick, f"{tick:,.0f}" if tick < 1e8 else tick_label(tick)) for tick in ticks]
    content = f"{frame(x, y, marks, axis_name(where))}{guide.svg(y) if guide else ''}{clipped(lines)}"
    values = {name: array[shown] for name, array in arrays.items()}
    chart = _figure(
        (group, title, unit_words(unit, y)), "over training", content, pointed(x, places, values, where), arrays
    )
    return chart.replace("</figure>", f"{gaps_note(arrays)}</figure>")


def bin_chart(title: str, unit: str, series: Mapping[str, Sequence[float | None]], *, guide: Guide) -> str:
    """Values in bins of increasing noise, as dots joined by lines.

    Args:
        title, unit: as of ``line_chart``.
        series: name -> [N] values, None where a bin is empty; at least one is not.
        guide: what the values are read against.
    """
    arrays = {name: np.array(values, dtype=float) for name, values in series.items()}  # None => NaN
    drawn = {name: guide.drawn(values) for name, values in arrays.items()}
    bins = list(range(1, len(next(iter(arrays.values()))) + 1))
    x, y = Axis(0.5, bins[-1] + 0.5, LEFT, WIDTH - RIGHT), value_axis(drawn, drawn, guide)
    lines = [_dotted(bins, values, x, y, index % COLOURS) for index, values in enumerate(drawn.values())]
    marks = [(1, "least noise"), (bins[-1], "most noise")]
    content = f"{frame(x, y, marks, 'noise level')}{guide.svg(y)}{clipped(lines)}"
    data = pointed(x, bins, arrays, f"noise level # of {bins[-1]}")
    return _figure(("", title, unit_words(unit, y)), "by noise level", content, data, arrays, last=False)


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
    known = np.array([row for row in rows if None not in row[:2]], dtype=float)
    d, real, shares = known.T
    x, y = Axis(0.0, 1.0, LEFT, WIDTH - RIGHT), Axis(0.0, 1.0, HEIGHT - BOTTOM, TOP)
    wide, base, tallest = 0.6 * (x(1) - x(0)) / len(predicted), y(0), (y(0) - y(1)) / 3 / max(shares.max(), 1e-12)
    bars = [
        f'<rect class="share" x="{x(at) - wide / 2:.1f}" y="{base - tallest * size:.1f}" width="{wide:.1f}" '
        f'height="{tallest * size:.1f}"/>'
        for at, size in zip(d, shares, strict=True)
    ]
    diagonal = f'<line class="guide" x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}"/>'
    marks = [(tick, tick_label(tick)) for tick in nice_ticks(0, 1)]
    content = f"{frame(x, y, marks, 'D')}{clipped([*bars, diagonal, _dotted(d, real, x, y, 0)])}"
    arrays = {"observed share of real ones": real, "share of all samples": shares}
    data = pointed(x, [round(float(value), 3) for value in d], arrays, "D = #")
    return _figure(("", title, ' <span class="unit">over D</span>'), "over D", content, data, arrays, last=False)


def _dotted(places: Sequence[float], values: np.ndarray, x: Axis, y: Axis, colour: int) -> str:
    dots = "".join(
        f'<circle class="c{colour}" cx="{x(at):.1f}" cy="{y(value):.1f}" r="2.6"/>'
        for at, value in zip(places, values, strict=True)
        if math.isfinite(value)
    )
    return f'<path class="curve c{colour}" d="{path_data(places, values, x, y)}"/>{dots}'


def pointed(x: Axis, places: Sequence[float], values: Mapping[str, np.ndarray], where: str) -> dict:
    """What report.js shows under the pointer."""
    return {
        "where": where,
        "steps": list(places),
        "x": [round(x(place), 1) for place in places],
        "series": [[significant(value) for value in array] for array in values.values()],
    }


def _figure(
    heading: tuple[str, str, str],
    over: str,
    content: str,
    data: dict,
    arrays: Mapping[str, np.ndarray],
    *,
    last: bool = True,
) -> str:
    """The chart in its card; ``last`` shows the last values until the pointer asks for others."""
    group, title, unit = heading
    spoken = escape(f"{group} {title} {over}".strip())
    return (
        f'<figure class="chart" data-chart="{escape(json.dumps(data, separators=(",", ":")))}">'
        f"<figcaption><span><i>{escape(group)}</i> <b>{escape(title)}</b>{unit}</span>"
        f"{_readout(arrays, last=last)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{spoken}">{content}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" hidden="hidden"/></svg>'
        f"{_legend(arrays, last=last)}</figure>"
    )


def smooth_on(values: np.ndarray, width: float, *, log: bool) -> np.ndarray:
    return np.exp(smooth(np.log(values), width)) if log else smooth(values, width)


def step_range(steps: Sequence[int]) -> tuple[float, float]:
    low, high = (0 if steps[0] < 0.2 * steps[-1] else steps[0]), steps[-1]
    return (low, high) if high > low else (low - 1, high + 1)


def frame(x: Axis, y: Axis, marks: Sequence[tuple[float, str]], name: str) -> str:
    """Grid lines and numbers of the vertical axis, what is written at places of the horizontal one, and its name."""
    parts = []
    for tick in y.ticks():
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{tick_label(tick)}</text>')
    for place, label in marks:
        beyond = x(place) + 3 * len(label) > WIDTH  # a letter is about 6 wide
        anchor, at = ("end", WIDTH - RIGHT) if beyond else ("middle", x(place))
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{anchor}">{escape(label)}</text>')
    base = HEIGHT - BOTTOM
    parts.append(f'<text class="axis-name" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}">{escape(name)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    return "".join(parts)


def clipped(lines: Sequence[str]) -> str:
    """An inner svg cuts what leaves the plot, without the ids that a clip path would need."""
    width, height = WIDTH - RIGHT - LEFT + 4, HEIGHT - BOTTOM - TOP + 4
    box = f'x="{LEFT - 2}" y="{TOP - 2}" width="{width}" height="{height}"'
    return f'<svg {box} viewBox="{LEFT - 2} {TOP - 2} {width} {height}">{"".join(lines)}</svg>'


def axis_name(where: str) -> str:
    """'training steps' for places that are named 'step #', 'training images' for '# images'."""
    return f"training {where.replace('#', '').strip().removesuffix('s')}s"


def unit_words(unit: str, y: Axis) -> str:
    words = ", ".join(word for word in (unit, "log scale" if y.log else "") if word)
    return f' <span class="unit">{escape(words)}</span>' if words else ""


def _last(values: np.ndarray) -> float:
    return float(values[np.isfinite(values)][-1])


def _readout(arrays: Mapping[str, np.ndarray], *, last: bool) -> str:
    """Where the value under the pointer appears. Several series have it in the legend."""
    value = significant(_last(next(iter(arrays.values())))) if last and len(arrays) == 1 else ""
    return f"<output>{value}</output>"


def _legend(arrays: Mapping[str, np.ndarray], *, last: bool) -> str:
    if len(arrays) == 1:
        return ""
    items = "".join(
        f'<li class="c{index % COLOURS}">{escape(name)} '
        f"<output>{significant(_last(values)) if last else ''}</output></li>"
        for index, (name, values) in enumerate(arrays.items())
    )
    return f'<ul class="legend">{items}</ul>'


def gaps_note(arrays: Mapping[str, np.ndarray]) -> str:
    """A warning where values were not finite."""
    broken = [name for name, values in arrays.items() if not np.isfinite(values).all()]
    return f'<p class="gaps">gaps in {escape(", ".join(broken))}: not finite there</p>' if broken else ""
