"""Grids of runs: the rows and axes of an ablation, and the folder of each of its runs.

A *row* is gin files, lines of gin after them, and the rows whose results it needs. An *axis* is a binding with several
values; every row is repeated at every *setting*, one value of each axis. A *line* is a row at a setting: one line of
the table. A *cell* is a line at a seed: one run, in a folder of its own,

    FOLDER/seed_<seed>/<setting>/<row>         without the parts that the grid does not have

``{runs}`` in a binding stands for the folder above ``<row>``, where a row finds what the rows it needs have left, at
the same seed and setting.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import math
import re
import tomllib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ratiograph.core.foreign import read_text, shown

__all__ = ["Cell", "Grid", "Row", "cells_of", "parse_axis", "read_grid", "slug", "with_needs"]

_LONGEST = 100  # characters of a slug; file systems allow 255 bytes


@dataclass(frozen=True, kw_only=True)
class Row:
    """One configuration of a grid.

    Args:
        name: as the table shows it; '' for the only row of a grid that is all axes.
        gin_files: read in order, as ``--gin_file``.
        bindings: lines of gin after the files; ``{runs}`` is the folder of the runs.
        needs: names of the rows that must finish first.
        steps: optimisation steps; None leaves them to the gin files.
        published: values from a paper by metric, shown beside the measured ones.
    """

    name: str
    gin_files: tuple[str, ...]
    bindings: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    steps: int | None = None
    published: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Rows, axes, and what the table and the figure show of them.

    Args:
        name: of the markers and the default folder.
        rows: at least one, by unique names.
        axes: gin text of every value by the binding that takes it, such as ``{"SBA.lam": ("-1", "0.5")}``.
        title: of the table and the figure.
        columns: metrics of evaluation.json, "seconds" and "steps"; all of them when empty.
        curve: metric of metrics.jsonl that the figure draws over the samples seen; '' draws the first column instead.
        source: the file that it was read from; '' for one that the command line spells out.

    Raises:
        ValueError: two rows of one name, a needed row that is missing, or rows that need each other in a circle.
    """

    name: str
    rows: tuple[Row, ...]
    axes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    title: str = ""
    columns: tuple[str, ...] = ()
    curve: str = ""
    source: str = ""

    def __post_init__(self):
        names = [row.name for row in self.rows]
        if (runs := len(names) * math.prod(map(len, self.axes.values()))) > 100_000:
            raise ValueError(f"the grid has {runs:,} runs a seed, more than 100,000: give fewer values")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two rows are named '{name}': rename one")
        ready: set[str] = set()
        for row in self.rows:
            for name in row.needs:
                if name not in names:
                    raise ValueError(f"row '{row.name}' needs '{name}', which is no row.{_near(name, names)}")
        while blocked := [row for row in self.rows if row.name not in ready]:
            freed = {row.name for row in blocked if ready.issuperset(row.needs)}
            if not freed:
                circle = ", ".join(f"'{row.name}'" for row in blocked)
                raise ValueError(f"the rows {circle} need each other in a circle: remove one of their needs")
            ready |= freed

    def settings(self) -> list[dict[str, str]]:
        """Every combination of the axes' values; one empty setting without axes."""
        return [dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values())]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run. ``index`` is its place in the grid, ``needs`` are the folders of runs that must finish first.

    ``lines`` are those of the grid's file ``source``, which somebody else may have written; ``typed`` are the command
    line's own, which follow them.
    """

    index: int
    row: Row
    setting: Mapping[str, str]
    seed: int | None
    folder: Path
    source: str
    lines: tuple[str, ...]
    typed: tuple[str, ...]
    needs: tuple[Path, ...]

    @property
    def bindings(self) -> tuple[str, ...]:
        """Every line of gin after the files."""
        return (*self.lines, *self.typed)

    @property
    def name(self) -> str:
        """Row, setting and seed in words, unique in the grid."""
        seed = [] if self.seed is None else [f"seed {self.seed}"]
        return ", ".join([label(self.row, self.setting), *seed])


def label(row: Row, setting: Mapping[str, str]) -> str:
    """A line in words: 'JensenShannon, SBA.lam = 0.5'."""
    return ", ".join([*([row.name] if row.name else []), *(f"{key} = {value}" for key, value in setting.items())])


def slug(name: str) -> str:
    """A folder name: letters, digits and ``. = + -`` are kept, all else is ``_``; long names end in a digest.

    Raises:
        ValueError: nothing of the name is left.
    """
    text = re.sub(r"@|\(\)", "", unicodedata.normalize("NFC", name))
    text = re.sub(r"\s*=\s*", "=", text)
    text = re.sub(r"_+", "_", "".join(c if c.isalnum() or c in ".=+-" else "_" for c in text)).strip("_.")
    if not text:
        raise ValueError(f"the row name {name!r} holds no letter or digit to name a folder by")
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST - 9]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


# --- reading ------------------------------------------------------------------------------------------------

_GRID_KEYS = {"title": str, "gin_file": (str, list), "bindings": list, "steps": int}
_GRID_KEYS |= {"columns": list, "curve": str, "axes": dict, "rows": list}
_ROW_KEYS = {"name": str, "gin_file": (str, list), "bindings": list, "needs": list, "steps": int, "published": dict}


def read_grid(path: str | Path) -> Grid:
    """The grid of a TOML file.

    Top level: ``gin_file`` (a path or a list of them), ``title``, ``bindings`` and ``steps`` of every row, ``columns``,
    ``curve``, the table ``[axes]`` and ``[[rows]]`` with ``name``, ``bindings``, ``gin_file`` in place of the common
    one, ``needs``, ``steps`` and ``published``.

    Raises:
        ValueError: no such file, no TOML, or a key or value that a grid does not have; the message names the row.
    """
    path = Path(path)
    try:
        return _grid(path, tomllib.loads(read_text(path)))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{shown(path)} is no TOML: {shown(error)}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _grid(path: Path, document: Mapping) -> Grid:
    _check_keys(document, _GRID_KEYS, "the grid")
    axes = {}
    for key, values in document.get("axes", {}).items():
        if not isinstance(values, list) or not values:
            raise ValueError(f'the axis {key} needs a list of values, such as [0.5, 1.0]; its key in quotes: "{key}"')
        axes[key] = tuple(value if isinstance(value, str) else repr(value) for value in values)
    rows = document.get("rows", [{"name": ""}] if axes else [])
    if not rows:
        raise ValueError("it has neither [[rows]] nor [axes]: there is nothing to run")
    return Grid(
        name=path.stem,
        source=str(path),
        title=document.get("title", ""),
        rows=tuple(_row(row, document, number) for number, row in enumerate(rows, 1)),
        axes=axes,
        columns=tuple(_strings(document, "columns", "the grid")),
        curve=document.get("curve", ""),
    )


def _row(row: Mapping, document: Mapping, number: int) -> Row:
    if not isinstance(row, Mapping) or not isinstance(row.get("name"), str):
        raise ValueError(f"row {number} has no name: add name = '...'")
    what = f"row '{row['name']}'"
    _check_keys(row, _ROW_KEYS, what)
    files = _strings(row, "gin_file", what) or _strings(document, "gin_file", "the grid")
    if not files:
        raise ValueError(f"{what} has no gin file: add gin_file = '...' to it or at the top")
    if not all(type(value) in (int, float) for value in row.get("published", {}).values()):
        raise ValueError(f"{what}: a published value is no number")
    return Row(
        name=row["name"],
        gin_files=tuple(files),
        bindings=(*_strings(document, "bindings", "the grid"), *_strings(row, "bindings", what)),
        needs=tuple(_strings(row, "needs", what)),
        steps=row.get("steps", document.get("steps")),
        published=row.get("published", {}),
    )


def _check_keys(given: Mapping, known: Mapping, what: str) -> None:
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{what} has the unknown key '{key}'.{_near(key, known)} Known: {', '.join(known)}.")
        if not isinstance(value, known[key]) or isinstance(value, bool):
            raise ValueError(f"{what}: the value of '{key}' is a {type(value).__name__}, which it cannot be")


def _strings(given: Mapping, key: str, what: str) -> list[str]:
    values = given.get(key, [])
    values = [values] if isinstance(values, str) else values
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{what}: '{key}' is a list of strings, got {values}")
    return values


def parse_axis(text: str) -> tuple[str, tuple[str, ...]]:
    """``"SBA.lam = -1, 0.5"`` => ``("SBA.lam", ("-1", "0.5"))``; commas inside brackets and strings stay.

    Raises:
        ValueError: no '=', or an empty value.
    """
    key, equals, rest = text.partition("=")
    values, depth, quote = [""], 0, ""
    for c in rest:
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        else:
            depth += (c in "([{") - (c in ")]}")
        if c == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += c
    values = [value.strip() for value in values]
    if not equals or not key.strip() or not all(values):
        raise ValueError(f"--vary='{text}': write BINDING = value, value, ... such as 'SBA.lam = -1, 0.5'")
    return key.strip(), tuple(values)


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


# --- cells --------------------------------------------------------------------------------------------------


def cells_of(
    grid: Grid, folder: str | Path, *, seeds: Sequence[int] = (), bindings: Sequence[str] = (), steps: int | None = None
) -> list[Cell]:
    """Every run of the grid, in the order of its rows; a function of the arguments only.

    Args:
        grid: its rows and axes.
        folder: of the runs.
        seeds: repeat every line at each; none leaves the seed to the gin files.
        bindings: lines of gin after those of the rows.
        steps: in place of the rows' own.

    Raises:
        ValueError: two runs would share a folder, or what a terminal would show holds control characters.
    """
    cells, taken = [], {}
    for seed, row, setting in itertools.product(seeds or [None], grid.rows, grid.settings()):
        above = Path(folder) if seed is None else Path(folder) / f"seed_{seed}"
        if setting and row.name:
            above /= slug(label(Row(name="", gin_files=()), setting))
        run_steps = steps or row.steps
        lines = (
            *(line.replace("{runs}", above.as_posix()) for line in row.bindings),
            *(f"{key} = {value}" for key, value in setting.items()),
        )
        typed = (
            *([f"Experiment.steps = {run_steps}"] if run_steps else []),
            *([] if seed is None else [f"Experiment.seed = {seed}"]),
            *bindings,
        )
        cell = Cell(
            index=len(cells),
            row=row,
            setting=setting,
            seed=seed,
            folder=above / slug(row.name or label(row, setting)),
            source=grid.source,
            lines=lines if grid.source else (),
            typed=typed if grid.source else (*lines, *typed),
            needs=tuple(above / slug(name) for name in row.needs),
        )
        if not re.sub(r"[\n\t]", "", "".join((cell.name, *row.gin_files, *lines))).isprintable():
            raise ValueError(f"row {shown(cell.name)!r}: its name, files or bindings hold control characters")
        other = taken.setdefault(str(cell.folder).casefold(), cell)  # some file systems ignore case
        if other is not cell:
            raise ValueError(f"'{other.name}' and '{cell.name}' would share the folder {cell.folder}: rename one row")
        cells.append(cell)
    return cells


def with_needs(wanted: Sequence[Cell], cells: Sequence[Cell]) -> list[Cell]:
    """``wanted`` and all that they need, in the order of ``cells``."""
    by_folder = {cell.folder: cell for cell in cells}
    found, waiting = set(), [cell.folder for cell in wanted]
    while waiting:
        folder = waiting.pop()
        if folder not in found:
            found.add(folder)
            waiting += by_folder[folder].needs
    return [cell for cell in cells if cell.folder in found]
