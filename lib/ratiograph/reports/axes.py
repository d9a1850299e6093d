"""The axes of a chart: scales, ticks, running averages, and the reference value that a curve is read against.

Values are mapped to the pixels of one plot, ``WIDTH`` by ``HEIGHT`` with margins; a value that is not finite is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

__all__ = ["Axis", "Guide", "frame", "log_ticks", "nice_ticks", "smooth", "step_axis", "tick_label", "value_axis"]

WIDTH, HEIGHT = 360, 214  # of the view box; about the size on screen, so that text keeps its size
LEFT, RIGHT, TOP, BOTTOM = 46, 350, 8, 176  # edges of the plot in it


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


def padded(low: float, high: float, *, log: bool = False, zero: bool = False) -> Axis:
    """A vertical axis over [low, high] with a little air; ``zero``: it starts at 0 where that is near."""
    if log:
        air = (high / low) ** 0.05
        return Axis(low / air, high * air, BOTTOM, TOP, log=True)
    air = 0.05 * (high - low)
    if air <= 1e-9 * abs(high):  # a constant, but for rounding
        air = abs(high) or 1.0
    return Axis(0.0 if zero and 0 <= low < 0.4 * high else low - air, high + air, BOTTOM, TOP)


@dataclass(frozen=True)
class Guide:
    """A reference value, drawn as a dashed line that is always in view.

    Args:
        value: the reference.
        shade: (low, high) of a tinted band, or None.
        ends: (low, high) of the axis; None fits it to the values.
        log: the axis is logarithmic, and shows at least half and twice ``value`` > 0. Values beyond a factor of 10^4
            are drawn at that factor.
    """

    value: float
    shade: tuple[float, float] | None = None
    ends: tuple[float, float] | None = None
    log: bool = False

    def clip(self, values: np.ndarray) -> np.ndarray:
        """The values as they are drawn."""
        return np.clip(values, self.value * 1e-4, self.value * 1e4) if self.log else values

    def axis(self, low: float, high: float) -> Axis:
        """The vertical axis for values in [low, high]."""
        if self.ends:
            return Axis(*self.ends, BOTTOM, TOP)
        factor = 2 if self.log else 1
        return padded(min(low, self.value / factor), max(high, self.value * factor), log=self.log)

    def svg(self, y: Axis) -> str:
        """The band and the line."""
        line = f'<line class="guide" x1="{LEFT}" x2="{RIGHT}" y1="{y(self.value):.1f}" y2="{y(self.value):.1f}"/>'
        if not self.shade:
            return line
        top, base = y(self.shade[1]), y(self.shade[0])
        box = f'y="{top:.1f}" width="{RIGHT - LEFT}" height="{base - top:.1f}"'
        return f'<rect class="shade" x="{LEFT}" {box}/>{line}'


def value_axis(drawn: Mapping[str, np.ndarray], smoothed: Mapping[str, np.ndarray], guide: Guide | None) -> Axis:
    """The vertical axis: all of the averages, and all but the wildest 1 % of the raw values.

    Without a guide it is logarithmic where every value is positive and the averages span more than a factor of 20.
    """
    raw, curves = (np.concatenate([v[np.isfinite(v)] for v in arrays.values()]) for arrays in (drawn, smoothed))
    low, high = np.quantile(raw, [0.005, 0.995])
    low, high = float(min(low, curves.min())), float(max(high, curves.max()))
    if guide:
        return guide.axis(low, high)
    return padded(low, high, log=raw.min() > 0 and curves.max() > 20 * curves.min(), zero=True)


def step_axis(first: float, last: float) -> Axis:
    """The horizontal axis of training steps or images in [first, last]; it starts at 0 where that is near."""
    low = 0.0 if first < 0.2 * last else float(first)
    return Axis(low, float(last), LEFT, RIGHT) if last > low else Axis(low - 1, low + 1, LEFT, RIGHT)


def frame(x: Axis, y: Axis, marks: Sequence[tuple[float, str]], name: str) -> str:
    """Grid lines and numbers of the vertical axis, the ``marks`` (place, text) of the horizontal one, and its name."""
    parts = []
    for tick in y.ticks():
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{tick_label(tick)}</text>')
    for place, label in marks:
        beyond = x(place) + 3 * len(label) > WIDTH  # a letter is about 6 wide
        anchor, at = ("end", RIGHT) if beyond else ("middle", x(place))
        parts.append(f'<text x="{at:.1f}" y="{BOTTOM + 16}" text-anchor="{anchor}">{escape(label)}</text>')
    parts.append(f'<text class="axis-name" x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 6}">{escape(name)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>')
    return "".join(parts)
