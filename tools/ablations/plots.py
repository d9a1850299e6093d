"""The figure of an ablation: a metric over the samples seen, over a numeric axis, or as one dot a line.

Notation as in `grids` and `tables`. A *series* is one line of the chart: its points, their mean over seeds where there
are several, and its name beside the last point.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ablations.tables import Column, Line, Table
from paper_figures.drawing import spread
from ratiograph.core.files import write_atomically
from ratiograph.data.lettering import in_figure

__all__ = ["draw", "save"]

INK, QUIET, RULE, ACCENT = "#23262b", "#6b7078", "#e4e2dd", "#2c66a8"
COLOURS = ("#2c66a8", "#d0692b", "#3c8d61", "#8759b0", "#b8436a", "#8b8478", "#1f9aa8", "#a3892b")
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "svg.hashsalt": "ratiograph",  # the same figure is the same file
}
LOG_SPAN = 20  # a positive axis that spans more than this factor is logarithmic
LOG_CURVE = 5  # the same for curves of training, which fall fast at first
LABEL_HEIGHT = 0.19  # inches from one name beside its line to the next


@dataclass(frozen=True)
class _Series:
    """``mean`` and ``runs`` are (x, y) points, of the mean over runs and of each run; ``spread`` is one for a point."""

    name: str
    mean: Sequence[tuple[float, float]]
    runs: Sequence[Sequence[tuple[float, float]]] = ()
    spread: Sequence[float] = ()


def draw(table: Table) -> Figure | None:
    """The grid's curve over the samples seen if it names one; else its first column over the axis with at least three
    numbers, or as one dot a line. None while there is nothing to draw.

    Raises:
        ValueError: no run has logged the curve.
    """
    with mpl.rc_context(STYLE):
        if table.grid.curve:
            return _draw_curves(table) if table.results else None
        column = next((c for c in table.columns if any(line.mean(c.key) is not None for line in table.lines)), None)
        if column is None:
            return None
        axis = _numeric_axis(table)
        return _draw_sweep(table, column, axis) if axis else _draw_dots(table, column)


def save(figure: Figure, folder: Path) -> list[Path]:
    """Writes figure.png and figure.svg into the folder."""
    paths = [folder / "figure.png", folder / "figure.svg"]
    with mpl.rc_context(STYLE):
        write_atomically(paths[0], lambda file: figure.savefig(file, format="png", dpi=200))
        write_atomically(paths[1], lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))
    return paths


def _new(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _is_log(values: Sequence[float], span: float) -> bool:
    return min(values) > 0 and max(values) > span * min(values)


def _plain_ticks(axis) -> None:
    """Ticks of a logarithmic axis as plain numbers at 1, 2 and 5 times powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if 1e-3 <= value < 1e5 else f"{value:.0e}"))


def _short(line: Line, without: str = "") -> str:
    """A line in as few words as tell it apart: 'JensenShannon, lam 0.5'; ``without`` is an axis to leave out."""
    parameters = [key.rpartition(".")[2] for key in line.setting]
    names = parameters if len(set(parameters)) == len(parameters) else line.setting
    shown = [(name, line.setting[key]) for name, key in zip(names, line.setting, strict=True) if key != without]
    values = [f"{name} {value.removeprefix('@').removesuffix('()')}" for name, value in shown]
    return ", ".join([*([line.name] if line.name else []), *values])


# --- lines --------------------------------------------------------------------------------------------------


def _draw_curves(table: Table) -> Figure:
    key = table.grid.curve
    logs = {_short(line): [result.log for result in line.results if result] for line in table.lines}
    unit = "images" if all("images" in r for runs in logs.values() for log in runs for r in log if key in r) else "step"
    series = []
    for name, runs in logs.items():
        points = [[(r[unit], r[key]) for r in log if r.get(key) is not None] for log in runs]
        if any(points):
            series.append(_Series(name, _mean_curve([p for p in points if p]), [p for p in points if p]))
    if not series:
        logged = sorted({name for result in table.results for record in result.log for name in record})
        raise ValueError(f"no run has logged the curve '{key}': choose from {', '.join(logged)}")
    metric = key.rpartition("/")[2]
    about = next((result.metrics[metric] for result in table.results if metric in result.metrics), {})
    column = Column(metric, about.get("label") or key, about.get("better"))
    most = max(x for s in series for x, _ in s.mean)
    scale, word = (1e6, ", millions") if most >= 2e6 else (1e3, ", thousands") if most >= 2e3 else (1, "")
    name = ("samples seen" if unit == "images" else "steps") + word
    return _draw_series(table, series, column, name, scale=scale)


def _mean_curve(runs: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean over runs where all of them have a point."""
    tables = [dict(points) for points in runs]
    return [(x, statistics.fmean(t[x] for t in tables)) for x in tables[0] if all(x in t for t in tables)]


def _numeric_axis(table: Table) -> str | None:
    """The axis with most values, all of them numbers and at least three."""
    numeric = {key: values for key, values in table.grid.axes.items() if None not in map(_number, values)}
    longest = max(numeric, key=lambda key: len(numeric[key]), default=None)
    return longest if longest and len(numeric[longest]) >= 3 else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _draw_sweep(table: Table, column: Column, axis: str) -> Figure:
    groups: dict[str, list[Line]] = {}
    for line in table.lines:
        if line.mean(column.key) is not None:
            groups.setdefault(_short(line, axis), []).append(line)
    series = []
    for name, lines in groups.items():
        lines = sorted(lines, key=lambda line: float(line.setting[axis]))
        mean = [(float(line.setting[axis]), line.mean(column.key)) for line in lines]
        values = [line.values(column.key) for line in lines]
        spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        series.append(_Series(name, mean, spread=spread if any(spread) else ()))
    return _draw_series(table, series, column, axis, markers=True)


def _draw_series(
    table: Table, series: Sequence[_Series], column: Column, x_name: str, *, scale: float = 1, markers: bool = False
) -> Figure:
    """Lines with their names beside their last points."""
    height = max(4.3, 1 + LABEL_HEIGHT * len(series))
    figure, axes = _new(7.6, height)
    for index, s in enumerate(series):
        look = _look(index)
        for points in s.runs if len(s.runs) > 1 else ():
            axes.plot([x / scale for x, _ in points], [y for _, y in points], **look, alpha=0.3, linewidth=0.9)
        x, y = [x / scale for x, _ in s.mean], [y for _, y in s.mean]
        axes.plot(x, y, **look, linewidth=1.8, marker="o" if markers else None, markersize=5, label=s.name)
        if s.spread:
            axes.errorbar(x, y, s.spread, color=look["color"], linestyle="none", elinewidth=1.2, capsize=3)
    values = [y for s in series for points in [s.mean, *s.runs] for _, y in points]
    if _is_log(values, LOG_CURVE if not markers else LOG_SPAN):
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
    elif 0 <= min(values) < 0.4 * max(values):
        axes.set_ylim(bottom=0)
    axes.margins(x=0.03)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set(xlabel=in_figure(x_name), ylabel=_title(column))
    _mark_references(table, column, values, _level_marker(axes), log=axes.get_yscale() == "log")
    axes.set_ylim(axes.get_ylim())  # the names stand where the lines end from here on
    _name_lines(axes, [s for s in series if s.name], scale, LABEL_HEIGHT / (height - 1))
    axes.set_title(in_figure(table.grid.title), loc="left", fontsize=11, fontweight="bold", pad=12)
    return figure


def _look(index: int) -> dict[str, str]:
    """Colour and dashes of a line: every colour solid first, then dashed, then dotted."""
    dashes = ("-", "--", ":", "-.")[index // len(COLOURS) % 4]
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": dashes}


def _name_lines(axes: Axes, series: Sequence[_Series], scale: float, gap: float) -> None:
    """Each line's name at the right of the chart, level with its last point as far as names ``gap`` apart allow."""
    to_share = axes.transData + axes.transAxes.inverted()
    ends = [(to_share.transform((s.mean[-1][0] / scale, s.mean[-1][1])), s.name) for s in series]
    ends.sort(key=lambda end: end[0][1])
    colours = {line.get_label(): line.get_color() for line in axes.get_lines()}
    for ((x, y), name), height in zip(ends, spread([y for (_, y), _ in ends], gap), strict=True):
        style = {"color": colours[name], "annotation_clip": False, "va": "center"}
        leader = {"arrowstyle": "-", "color": colours[name], "linewidth": 0.7, "alpha": 0.6}
        leader |= {"shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)}  # from the middle of the name's left edge
        share = {"xycoords": "axes fraction", "textcoords": "axes fraction"}
        axes.annotate(in_figure(name), (x, y), (1.035, height), arrowprops=leader, **share, **style)


# --- dots ---------------------------------------------------------------------------------------------------


def _draw_dots(table: Table, column: Column) -> Figure:
    """One dot a line with its value, the best in the accent colour; whiskers are the deviation over seeds."""
    figure, axes = _new(7.6, 1.25 + 0.3 * len(table.lines))
    best, written, values = table.best(column), table.written(column), []
    for row, line in enumerate(table.lines):
        mean, found = line.mean(column.key), line.values(column.key)
        axes.axhline(row, color=RULE, linewidth=0.8, zorder=0)
        text, colour = ("–", QUIET) if mean is None else (written(mean), ACCENT if line in best else INK)
        weight = "bold" if line in best else "normal"
        axes.annotate(
            text, (1.015, row), xycoords=("axes fraction", "data"), va="center", color=colour, fontweight=weight
        )
        if mean is None:
            continue
        values += [mean, *found]
        axes.plot([mean], [row], "o", color=colour if line in best else "#8a94a3", markersize=7.5, label=line.label)
        if len(found) > 1:
            axes.plot(found, [row] * len(found), "o", color=INK, markersize=3, markeredgewidth=0, alpha=0.7)
            axes.errorbar([mean], [row], xerr=statistics.stdev(found), color="#8a94a3", elinewidth=2, zorder=1)
    axes.set_ylim(len(table.lines) - 0.5, -0.5)
    axes.set_yticks(range(len(table.lines)), [in_figure(_short(line)) for line in table.lines], color=INK)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    if _is_log(values, LOG_SPAN):
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)
    else:
        axes.ticklabel_format(axis="x", useOffset=False)
    axes.margins(x=0.06)
    axes.set_xlabel(_title(column))
    _mark_references(table, column, values, _column_marker(axes), log=axes.get_xscale() == "log")
    axes.set_title(in_figure(table.grid.title), loc="left", fontsize=11, fontweight="bold", pad=18)
    return figure


# --- references ---------------------------------------------------------------------------------------------


def _title(column: Column) -> str:
    return in_figure(f"{column.label}, {column.better} is better" if column.better else column.label)


def _mark_references(
    table: Table, column: Column, values: Sequence[float], mark: Callable[[float, str], None], *, log: bool
) -> None:
    """Marks the references that are the same for all runs and no further out than half the span of the runs."""
    place = math.log if log else float
    low, high = place(min(values)), place(max(values))
    margin = 0.5 * (high - low) or 0.5 * abs(high)
    for name, found in _constant(table.references(), column.key).items():
        if (found > 0 or not log) and low - margin <= place(found) <= high + margin:
            mark(found, name)


def _constant(references: Mapping[str, Mapping[str, tuple[float, float]]], key: str) -> dict[str, float]:
    spans = {name: found[key] for name, found in references.items() if key in found}
    return {name: low for name, (low, high) in spans.items() if math.isclose(low, high, rel_tol=1e-6)}


_RULE = {"color": QUIET, "linewidth": 1, "linestyle": (0, (4, 3)), "zorder": 1}
_NAME = {"textcoords": "offset points", "fontsize": 8, "color": QUIET}


def _level_marker(axes: Axes) -> Callable[[float, str], None]:
    def mark(value: float, name: str) -> None:
        axes.axhline(value, **_RULE)
        axes.annotate(in_figure(name), (0, value), xytext=(4, 3), xycoords=("axes fraction", "data"), **_NAME)

    return mark


def _column_marker(axes: Axes) -> Callable[[float, str], None]:
    def mark(value: float, name: str) -> None:
        axes.axvline(value, **_RULE)
        axes.annotate(
            in_figure(name), (value, 1), xytext=(0, 3), xycoords=("data", "axes fraction"), ha="center", **_NAME
        )

    return mark
