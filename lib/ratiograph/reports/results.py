"""The results of a report: evaluation rows as a table, class shares as bars.

A *row* is one sampler's measurements, a *metric* one measurement of every row; both come from evaluation.json, in the
form that `reports.run_report` documents. Colours are the classes ``c0`` to ``c5`` of report.css.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ratiograph.reports.axes import nice_ticks, tick_label
from ratiograph.reports.charts import colour_class
from ratiograph.reports.page import breakable, table, table_row
from ratiograph.training.logs import significant

__all__ = ["bar_chart", "better_words", "class_charts", "mini_bars", "results_table", "spread"]

_ACROSS = 7  # metrics that stand side by side; more stand below one another
_BELOW = 9  # rows beyond which they stand below one another after all
_COUNTS = {"evaluations": "network evaluations", "samples": "samples"}


def results_table(
    evaluation: Mapping[str, Any], *, caption: str = "Measured by this run's evaluator"
) -> tuple[str, str]:
    """Rows below one another or, where there are many metrics, side by side.

    Args:
        evaluation: what evaluation.json holds. A row may also have ``compared``: among the compared rows the best
            number of a metric with a better end is bold, unless numbers of samples differ or all are alike.
        caption: of the table.

    Returns:
        (HTML, sentence): the table, and what is the same in every row. Both are empty if there are no rows.
    """
    rows = evaluation.get("rows") or []
    if not rows:
        return "", ""
    described = evaluation.get("metrics") or {}
    known = {"name", "highlight", "compared", *_COUNTS, *described}
    others = dict.fromkeys(key for row in rows for key in row if key not in known)
    keys = [key for key in (*_COUNTS, *described, *others) if any(row.get(key) is not None for row in rows)]
    sentence = ""
    if len({row.get("samples") for row in rows}) == 1 and "samples" in keys:
        sentence = f"{rows[0]['samples']:,} samples in every row."
        keys.remove("samples")
    cells = {key: _column([row.get(key) for row in rows]) for key in keys}
    about = {key: described.get(key) or {} for key in keys}
    best = {key: _best(rows, key, cells[key], about[key].get("better")) for key in keys}
    for error, key in [(key, about[key].get("of")) for key in keys]:
        if key in cells:  # a standard error stands beside its number
            del cells[error]
            cells[key] = [
                f"{cell} ± {spread(row[error])}" if _is_number(row.get(error)) else cell
                for cell, row in zip(cells[key], rows, strict=True)
            ]
    if "evaluations" in cells:  # real samples took none
        cells["evaluations"] = ["–" if cell == "0" else cell for cell in cells["evaluations"]]
    for key, column in cells.items():
        cells[key] = [f"<b>{cell}</b>" if index in best[key] else cell for index, cell in enumerate(column)]
    heads = {key: _head(key, about[key]) for key in cells}
    names, kinds = [breakable(str(row["name"])) for row in rows], [_mark(row) for row in rows]
    if len(cells) > _ACROSS and len(rows) <= _BELOW:  # a line a metric, a column a row
        columns = ['<span class="unseen">metric</span>', *names]
        lines = [table_row(heads[key], cells[key], cell_kinds=kinds) for key in cells]
        return table(caption, columns, lines, kind="numbers tall", head_kinds=["", *kinds]), sentence
    by_row = [[column[index] for column in cells.values()] for index in range(len(rows))]
    lines = [table_row(*line, kind=kind) for *line, kind in zip(names, by_row, kinds, strict=True)]
    return table(caption, ['<span class="unseen">sampler</span>', *heads.values()], lines), sentence


def _best(rows: Sequence[Mapping[str, Any]], key: str, cells: Sequence[str], better: str | None) -> set[int]:
    """Indices of the rows whose number is best as it is written; none where there is nothing to choose."""
    values = {
        index: row[key]
        for index, row in enumerate(rows)
        if row.get("compared") and _is_number(row.get(key)) and math.isfinite(row[key])
    }
    if better not in ("lower", "higher") or len({rows[index].get("samples") for index in values}) != 1:
        return set()
    top = cells[(min if better == "lower" else max)(values, key=values.__getitem__)]
    best = {index for index in values if cells[index] == top}
    return best if len(best) < len(values) else set()


def better_words(about: Mapping[str, Any]) -> str:
    """'lower is better', of what evaluation.json says ``about`` a metric; "" where it has no better end."""
    better = about.get("better")
    return f"{better} is better" if better in ("lower", "higher") else ""


def _head(key: str, about: Mapping[str, Any]) -> str:
    label = breakable(str(about.get("label") or _COUNTS.get(key) or key.replace("_", " ")))
    words = better_words(about)
    return f'{label} <span class="better">{words}</span>' if words else label


def _mark(row: Mapping[str, Any]) -> str:
    """The class of the row that a run is about, or of one that compared rows are read against."""
    if "compared" in row:
        return "" if row["compared"] else "reference"
    return "highlight" if row.get("highlight") else ""


def _column(values: Sequence[Any]) -> list[str]:
    """Cells of one metric: integers whole, other numbers with the same decimals, lists as small bars."""
    numbers = [value for value in values if _is_number(value) and math.isfinite(value)]
    decimals = 0
    if any(isinstance(value, float) for value in numbers):
        sizes = [abs(value) for value in numbers if value]
        decimals = min(max(2 - math.floor(math.log10(statistics.median_low(sizes))), 0), 4) if sizes else 0
    least = 10 ** (1 - decimals) if decimals == 4 else 0.5 * 10**-decimals  # below it a number keeps two digits
    cells = []
    for value in values:
        if value is None:
            cells.append("–")
        elif isinstance(value, bool):
            cells.append("yes" if value else "no")
        elif isinstance(value, str):
            cells.append(escape(value))
        elif isinstance(value, Sequence):
            cells.append(mini_bars(value))
        elif not math.isfinite(value):
            cells.append(escape(significant(value)))
        else:
            cells.append(significant(value, 2) if 0 < abs(value) < least else f"{value:,.{decimals}f}")
    return cells


def spread(error: float) -> str:
    """A standard error with two significant digits, without an exponent where that is readable: 0.013, 0.000021."""
    if not 1e-7 < error < 1e6:
        return significant(error, 2)
    return f"{error:,.{max(1 - math.floor(math.log10(error)), 0)}f}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def class_charts(evaluation: Mapping[str, Any]) -> str:
    """The histograms of evaluation.json as bars over classes; "" if there are none."""
    found = evaluation.get("histograms") or []
    charts = []
    for histogram in [found] if isinstance(found, Mapping) else found:
        series = {str(one["name"]): [float(v) for v in one["values"]] for one in histogram["series"]}
        labels = [str(label) for label in histogram["labels"]]
        heading = f"<h3>{escape(str(histogram['title']))}</h3>" if histogram.get("title") else ""
        charts.append(heading + bar_chart(labels, series))
    return "".join(charts)


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
            f'<i class="{colour_class(index)}" style="height:{100 * max(values[position], 0) / limit:.2f}%" '
            f'title="{escape(name)}, {escape(label)}: {significant(values[position], 3)}"></i>'
            for index, (name, values) in enumerate(series.items())
        )
        groups.append(f'<div class="group"><div class="bars">{bars}</div><span>{escape(label)}</span></div>')
    legend = "".join(f'<li class="{colour_class(index)}">{escape(name)}</li>' for index, name in enumerate(series))
    rows = [table_row(escape(name), [f"{value:.3f}" for value in values]) for name, values in series.items()]
    heads = ['<span class="unseen">series</span>', *map(escape, labels)]
    return (
        f'<figure class="histogram"><ul class="legend">{legend}</ul>'
        f'<div class="plot" aria-hidden="true"><div class="rules">{grid}</div>{"".join(groups)}</div></figure>'
        f"{table('Values of the bars', heads, rows, kind='numbers small', seen=False)}"
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
