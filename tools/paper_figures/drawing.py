"""Shared by all figures: the table's rows with their colours, a style, labels at the ends of lines, saving.

Notation: *rows* are a figure's numbers, dicts with the same keys; a *curve* is the rows of one label, in order.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ratiograph.algebra.weightings import BE, KL, LR, LS, SBA, Jeffreys, SoftenedReverseKL, SquaredHellinger, Weighting
from ratiograph.core.files import write_atomically
from ratiograph.data.lettering import in_figure

__all__ = ["PALETTE", "TABLE", "Row", "columns", "curves", "label_ends", "new_figure", "save", "set_title", "spread"]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's colours without the yellow, which white paper swallows; safe for the colour-blind."""

STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same figure on every machine
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "ratiograph",  # the same bytes every time
}


@dataclass(frozen=True)
class Row:
    """A row of the table of weightings, as it is drawn."""

    label: str
    weighting: Weighting
    colour: str
    dashes: str = "-"


TABLE = (
    Row("KL", KL(), "#000000"),
    Row("LR / Jensen–Shannon", LR(), "#0072B2"),
    Row("softened reverse KL", SoftenedReverseKL(), "#56B4E9"),
    Row("BE / forward KL", BE(), "#D55E00"),
    Row("Jeffreys", Jeffreys(), "#E69F00"),
    Row("squared Hellinger", SquaredHellinger(), "#CC79A7"),
    Row("LS (SBA λ = 1)", LS(), "#009E73", "--"),
    Row("SBA λ = 0.5", SBA(lam=0.5), "#6CC5A4", "--"),
    Row("SBA λ = 3", SBA(lam=3.0), "#00795A", "--"),
    Row("SBA λ = 5", SBA(lam=5.0), "#005640", "--"),
    Row("SBA λ = 10", SBA(lam=10.0), "#002E22", "--"),
)
"""Every row of the table of weightings, once for each omega. Solid: does not fall with l, except the softened reverse
KL; dashed: Di-Bregman's lambda > 0, which falls. SBA's lambda = -1, -1/2, 0 are BE, squared Hellinger and KL."""


def new_figure(
    width: float, height: float, panels: int, *, rows: int = 1, **subplots: object
) -> tuple[Figure, np.ndarray]:
    """A figure of ``width`` x ``height`` inches without a display; its axes [panels], or [rows, panels] if rows > 1."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, panels, squeeze=False, **subplots)
    return figure, axes if rows > 1 else axes[0]


def curves(rows: Sequence[Mapping], key: str = "weighting") -> dict[str, list[Mapping]]:
    """The rows by their value of ``key``, in the order of first appearance."""
    grouped: dict[str, list[Mapping]] = {}
    for row in rows:
        grouped.setdefault(row[key], []).append(row)
    return grouped


def columns(rows: Sequence[Mapping], *names: str) -> list[np.ndarray]:
    """The named columns as float arrays."""
    return [np.array([row[name] for row in rows], dtype=float) for name in names]


def set_title(axis: Axes, text: str, *, pad: float = 8) -> None:
    """Writes a panel's title, from its left edge on."""
    axis.set_title(text, loc="left", fontsize=11, pad=pad)


def label_ends(axis: Axes, ends: Sequence[tuple[str, float, str]], *, size: float = 9.0) -> None:
    """Writes each label right of the axes at the height its line ends at, pushed apart where they would overlap.

    Args:
        axis: with its final limits and scales.
        ends: (label, y in data coordinates, colour); a y beyond the limits is labelled at the nearer one.
        size: of the type, in points.
    """
    low, high = axis.get_ylim()
    to_pixels, to_axes = axis.transData.transform, axis.transAxes.inverted().transform
    ends = sorted(ends, key=lambda end: end[1])
    heights = [to_axes(to_pixels((axis.get_xlim()[1], min(max(y, low), high))))[1] for _, y, _ in ends]
    inches = axis.figure.get_size_inches()[1] * axis.get_position().height
    for (label, _, colour), height in zip(ends, spread(heights, 1.3 * size / 72 / inches), strict=True):
        axis.annotate(
            in_figure(label),
            (1.015, height),
            xycoords="axes fraction",
            color=colour,
            fontsize=size,
            va="center",
            annotation_clip=False,
        )


def spread(heights: Sequence[float], step: float) -> list[float]:
    """The heights nearest to those given, ascending in [0, 1], that are at least ``step`` apart.

    Neighbours that overlap form a block about their mean height, moved inside [0, 1]; blocks that touch merge.

    Args:
        heights: ascending, in [0, 1]; together they must have room.
        step: smallest distance.
    """

    def lowest(block: list[float]) -> float:
        room = step * (len(block) - 1)
        return min(max(sum(block) / len(block) - room / 2, 0), max(1 - room, 0))

    blocks: list[list[float]] = []
    for height in heights:
        blocks.append([height])
        while len(blocks) > 1 and lowest(blocks[-1]) < lowest(blocks[-2]) + step * len(blocks[-2]) - 1e-9:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return [lowest(block) + step * k for block in blocks for k in range(len(block))]


def save(figure: Figure, rows: Sequence[Mapping], stem: Path) -> list[Path]:
    """Writes ``stem``.png, .svg and .csv; returns their paths.

    Raises:
        ValueError: a file cannot be written.
    """
    paths = []
    with mpl.rc_context(STYLE):
        for suffix, options in ((".png", {}), (".svg", {"metadata": {"Date": None}})):
            path = stem.with_name(stem.name + suffix)
            write_atomically(path, lambda file, f=suffix[1:], o=options: figure.savefig(file, format=f, **o))
            paths.append(path)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    paths.append(stem.with_name(stem.name + ".csv"))
    write_atomically(paths[-1], text.getvalue().encode())
    return paths
