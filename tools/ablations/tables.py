"""What the runs of a grid have measured, as Markdown, JSON and CSV.

Notation as in `grids`. The *highlighted* row of an evaluation.json is the one marked ``highlight``, or its last one;
every other is a *reference*, the same for all runs of a grid unless it depends on the configuration. A *column* is a
metric of the highlighted row, or "seconds" (training time) or "steps", from the last line of metrics.jsonl.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ablations.grids import Cell, Grid, label
from ratiograph.reports.evaluation_file import read_evaluation
from ratiograph.reports.markdown import code, plain, table
from ratiograph.training.logs import read_metrics

__all__ = ["Column", "Line", "Result", "Table", "read_result", "tabulate"]

MISSING = "–"
PUBLISHED = "published (other data)"
_OWN = {"seconds": "training, s", "steps": "steps"}
_ARROWS = {"lower": " ↓", "higher": " ↑"}


@dataclass(frozen=True)
class Result:
    """What one finished run left: numbers by column, its reference rows, its metrics' descriptions and its log."""

    values: Mapping[str, float]
    references: Sequence[Mapping[str, Any]]
    metrics: Mapping[str, Mapping[str, str | None]]
    log: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Column:
    """``key`` in the results, ``label`` for people, ``better`` "lower", "higher" or None."""

    key: str
    label: str
    better: str | None


@dataclass(frozen=True, eq=False)
class Line:
    """One line of the table: a row at a setting, with the result of every finished seed."""

    name: str
    setting: Mapping[str, str]
    label: str
    folders: Sequence[Path]
    results: Sequence[Result | None]
    published: Mapping[str, float] = field(default_factory=dict)

    def values(self, key: str) -> list[float]:
        """The column's value of every finished run that has it."""
        return [result.values[key] for result in self.results if result and key in result.values]

    def mean(self, key: str) -> float | None:
        """Over seeds; None without a finished run or where a value is not finite or beyond 1e100."""
        values = self.values(key)
        return statistics.fmean(values) if values and all(map(_is_moderate, values)) else None


def read_result(folder: Path) -> Result | None:
    """The result of a run, or None before its end; a run without an evaluator has only seconds and steps.

    Raises:
        ValueError: evaluation.json or metrics.jsonl is damaged.
    """
    path = folder / "evaluation.json"
    if not path.exists() and not any(folder.glob("*.safetensors")):
        return None
    document = read_evaluation(path)
    rows = document.get("rows") or [{}]
    own = next((row for row in rows if row.get("highlight")), rows[-1])
    log = read_metrics(folder / "metrics.jsonl")
    numbers = {key: log[-1][key] for key in _OWN if log and key in log[-1]} | {"steps": log[-1]["step"] if log else 0}
    numbers |= {key: value for key, value in own.items() if _is_number(value)}
    return Result(numbers, [row for row in rows if row is not own], document.get("metrics") or {}, log)


def _is_number(value: object) -> bool:
    """Also True of a bool, whose mean over seeds is the share of runs that it holds for."""
    return isinstance(value, int | float)


def _is_moderate(value: float) -> bool:
    """Whether sums of such numbers are finite; NaN is not."""
    return abs(value) < 1e100


@dataclass(frozen=True)
class Table:
    """The lines of a grid with their columns."""

    grid: Grid
    lines: Sequence[Line]
    columns: Sequence[Column]

    @property
    def results(self) -> list[Result]:
        """Of every finished run."""
        return [result for line in self.lines for result in line.results if result]

    def best(self, column: Column) -> list[Line]:
        """The lines whose mean is best as it is written; none where no end is better or all lines tie."""
        means = [(line.mean(column.key), line) for line in self.lines if line.mean(column.key) is not None]
        if column.better is None or not means:
            return []
        top, written = (min if column.better == "lower" else max)(value for value, _ in means), self.written(column)
        best = [line for value, line in means if written(value) == written(top)]
        return best if len(best) < len(means) else []

    def references(self) -> dict[str, dict[str, tuple[float, float]]]:
        """(least, largest) value over all runs, by the reference row's name and column."""
        found: dict[str, dict[str, tuple[float, float]]] = {}
        for row in (row for result in self.results for row in result.references):
            for key in (column.key for column in self.columns):
                if _is_number(row.get(key)):
                    low, high = found.setdefault(row["name"], {}).get(key, (math.inf, -math.inf))
                    found[row["name"]][key] = min(low, row[key]), max(high, row[key])
        return found

    def written(self, column: Column) -> Callable[[float], str]:
        """How the column writes a number: with three significant digits of its median size."""
        shown = [abs(v) for line in self.lines for v in line.values(column.key) if math.isfinite(v) and v]
        size = math.floor(math.log10(statistics.median(shown))) if shown else 0
        decimals = 0 if column.key in _OWN else min(max(2 - size, 0), 6)
        return lambda value: f"{value:,.{decimals}f}"

    # ------------------------------------------------------------------------------------------- documents

    def markdown(self, command: str) -> str:
        """The table with one line above it that says the ``command`` that made it."""
        finished, runs = len(self.results), sum(len(line.results) for line in self.lines)
        missing = f" {runs - finished} of {runs} runs are missing." if finished < runs else ""
        many = any(len(line.results) > 1 for line in self.lines)
        seeds = " Mean ± standard deviation (runs)." if many else ""
        title = f"{plain(self.grid.title)}. " if self.grid.title else ""
        named = any(line.name for line in self.lines)
        axes = list(self.grid.axes)
        published = list(dict.fromkeys(key for line in self.lines for key in line.published))
        formats = {column.key: self.written(column) for column in self.columns}

        heads = [*(["configuration"] if named or not axes else []), *map(code, axes)]
        ahead = len(heads)
        heads += [plain(column.label) + _ARROWS.get(column.better or "", "") for column in self.columns]
        heads += [f"{plain(self._label(key))}, {PUBLISHED}" for key in published]
        rows = []
        for name, values in self.references().items():
            spans = [_span(values.get(column.key), formats[column.key]) for column in self.columns]
            rows.append([f"*{plain(name)}*", *[""] * (ahead - 1), *spans, *[""] * len(published)])
        for line in (line for line in self.lines if not self._only_needed(line)):
            names = [*([line.name] if named or not axes else []), *line.setting.values()]
            cells = [self._cell(line, column, formats[column.key]) for column in self.columns]
            paper = [f"{line.published[key]:g}" if key in line.published else "" for key in published]
            rows.append([*map(plain, names), *cells, *paper])
        body = table(heads, rows, left=ahead)
        return f"{title}Made by {code(command)}.{seeds}{missing}\n\n{body}"

    def document(self, command: str) -> dict[str, Any]:
        """What table.json holds: every value with its mean and standard deviation."""
        rows = []
        for line in self.lines:
            values = {
                column.key: {"mean": line.mean(column.key), "std": _deviation(found), "values": found}
                for column in self.columns
                if (found := line.values(column.key))
            }
            folders = [str(folder) for folder in line.folders]
            rows.append({"name": line.name, "setting": line.setting, "folders": folders, "values": values})
            rows[-1] |= {"published": line.published} if line.published else {}
        columns = [{"key": c.key, "label": c.label, "better": c.better} for c in self.columns]
        head = {"title": self.grid.title, "command": command, "columns": columns}
        return {**head, "references": self.references(), "rows": rows}

    def csv(self) -> str:
        """One line a run, as unrounded numbers."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["row", *self.grid.axes, "folder", *(column.key for column in self.columns)])
        for line in self.lines:
            for folder, result in zip(line.folders, line.results, strict=True):
                values = [result.values.get(column.key, "") if result else "" for column in self.columns]
                writer.writerow([line.name, *line.setting.values(), folder, *values])
        return text.getvalue()

    def _only_needed(self, line: Line) -> bool:
        """Whether the line's runs are done and have no column at all: other rows only start from them."""
        return all(line.results) and not any(line.values(column.key) for column in self.columns)

    def _label(self, key: str) -> str:
        described = next((result.metrics[key] for result in self.results if key in result.metrics), {})
        return described.get("label") or key

    def _cell(self, line: Line, column: Column, written: Callable[[float], str]) -> str:
        values, mean = line.values(column.key), line.mean(column.key)
        if not values:
            return MISSING
        if mean is None:
            return "not finite"
        text = f"**{written(mean)}**" if line in self.best(column) else written(mean)
        if len(line.results) > 1:
            spread = f" ± {written(_deviation(values))}" if len(values) > 1 else ""
            return f"{text}{spread} ({len(values)})"
        return text


def _deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation, from two finite values on."""
    return statistics.stdev(values) if len(values) > 1 and all(map(_is_moderate, values)) else None


def _span(found: tuple[float, float] | None, written: Callable[[float], str]) -> str:
    if found is None:
        return ""
    low, high = map(written, found)
    return low if low == high else f"{low} to {high}"


def tabulate(grid: Grid, cells: Sequence[Cell]) -> Table:
    """Reads the results of every cell.

    Raises:
        ValueError: a column of the grid that no finished run has measured.
    """
    lines: dict[str, list[Cell]] = {}
    for cell in cells:
        lines.setdefault(label(cell.row, cell.setting), []).append(cell)
    read = [
        Line(
            name=same[0].row.name,
            setting=same[0].setting,
            label=name,
            folders=[cell.folder for cell in same],
            results=[read_result(cell.folder) for cell in same],
            published=same[0].row.published,
        )
        for name, same in lines.items()
    ]
    table = Table(grid, read, ())
    keys = grid.columns or _all_keys(table.results)
    known = {key: None for result in table.results for key in result.values}
    evaluated = any(result.metrics for result in table.results)
    for key in keys:
        if evaluated and key not in known and key not in _OWN:
            raise ValueError(f"no finished run has the column '{key}': choose from {', '.join(known)}")
    described = {key: value for result in table.results for key, value in result.metrics.items()}
    columns = []
    for key in keys:
        about = described.get(key, {})
        columns.append(Column(key, _OWN.get(key) or about.get("label") or key, about.get("better")))
    return Table(grid, read, columns)


def _all_keys(results: Sequence[Result]) -> list[str]:
    """The metrics that the runs describe, then training time."""
    return [*dict.fromkeys(key for result in results for key in result.metrics), "seconds"]
