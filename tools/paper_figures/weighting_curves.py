"""Figures of the weightings themselves: the variance of omega, the generators h and f, and omega.

Notation: l = log p/q, r = q/p = e^-l, rho = p/q = e^l; m is the distance of two unit Gaussians and NV the normalised
variance Var_q[omega] / E_q[omega]^2. Rows have a key ``weighting``, the label in ``drawing.TABLE``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator
from torch import Tensor

from paper_figures import weight_variance
from paper_figures.drawing import TABLE, Row, columns, curves, label_ends, new_figure, set_title

__all__ = [
    "draw_h_curves",
    "draw_normalized_variance",
    "draw_weighting_curves",
    "h_curves",
    "normalized_variance",
    "weighting_curves",
]

BAR = 0.02
"""Relative error that Monte Carlo is held to."""
TOP = 1e5
"""Largest NV that is drawn, and that samples are spent on."""


def normalized_variance(*, samples: int, seed: int = 0, step: float = 0.25, largest: float = 4.0) -> list[dict]:
    """NV of every row over m (f-distill Fig. 5a): exact, and from samples of the library's weightings.

    Args:
        samples: of a plain Monte Carlo estimate; importance sampling takes a tenth.
        seed: of the samples.
        step: between two m of Monte Carlo; the exact values lie five times as densely.
        largest: last m.

    Returns:
        Rows with ``m`` and ``exact``; while 0 < NV < ``TOP`` the predicted relative ``standard_error`` of Monte Carlo;
        and at every fifth of those m ``monte_carlo`` and ``importance_sampling``. NaN elsewhere.
    """
    rows = []
    for row in TABLE:
        for k in range(1, round(5 * largest / step) + 1):
            m = k * step / 5
            exact = float(weight_variance.closed_form(row.weighting, torch.tensor(m, dtype=torch.float64)))
            drawn = 0 < exact < TOP
            error = weight_variance.standard_error(row.weighting, m, samples) if drawn else math.nan
            plain, weighed = math.nan, math.nan
            if drawn and k % 5 == 0:
                generator = torch.Generator().manual_seed(seed + k)
                plain = weight_variance.monte_carlo(row.weighting, m, samples, generator)
                weighed = weight_variance.importance_sampling(row.weighting, m, samples // 10, generator)
            rows.append(
                {
                    "weighting": row.label,
                    "m": m,
                    "exact": exact,
                    "standard_error": error,
                    "monte_carlo": plain,
                    "importance_sampling": weighed,
                }
            )
    return rows


def draw_normalized_variance(rows: Sequence[Mapping]) -> Figure:
    """NV over m with both estimates (left), and their relative errors over m (right)."""
    figure, (left, right) = new_figure(12.5, 5.2, 2, width_ratios=(1.2, 1))
    largest = max(row["m"] for row in rows)
    left.set(yscale="log", ylim=(1e-3, TOP), xlim=(0, largest), xlabel="distance m of the two Gaussians")
    set_title(left, "Var[ω] / E[ω]² under q", pad=20)
    right.set(yscale="log", ylim=(1e-6, 2), xlim=(0, largest), xlabel="distance m of the two Gaussians")
    set_title(right, "relative error of estimates from samples", pad=20)
    ends = []
    for row in TABLE:
        m, exact, error, plain, weighed = columns(
            curves(rows)[row.label], "m", "exact", "standard_error", "monte_carlo", "importance_sampling"
        )
        if not exact.any():
            ends.append((f"{row.label}: 0 at every m", 0.0, row.colour))
            continue
        left.plot(m, exact, row.dashes, color=row.colour)
        _label_exit(left, row, m, exact, ends)
        right.plot(m, error, row.dashes, color=row.colour, linewidth=1, alpha=0.7)
        inside = 3 * error <= BAR
        for axis, dots, crosses in ((left, plain, weighed), (right, abs(plain / exact - 1), abs(weighed / exact - 1))):
            axis.plot(m, crosses, "x", color=row.colour, markersize=5, markeredgewidth=1.2)
            axis.plot(m[inside], dots[inside], "o", color=row.colour, markersize=4.5)
            axis.plot(m[~inside], dots[~inside], "o", color=row.colour, markerfacecolor="none", markersize=4.5)
    label_ends(left, ends)
    right.axhline(BAR, color="#444444", linewidth=1.2, linestyle=":")
    right.text(1.01 * largest, BAR, "2 %", color="#444444", va="center")
    right.legend(handles=_marks(), loc="lower right", fontsize=8.5, frameon=True, framealpha=1, edgecolor="#cccccc")
    return figure


def _label_exit(axis: Axes, row: Row, m: np.ndarray, exact: np.ndarray, ends: list[tuple[str, float, str]]) -> None:
    """Labels a curve above the axes where it leaves them early, and otherwise at the right."""
    above = np.flatnonzero(exact >= TOP)
    if not len(above) or m[above[0]] > 0.7 * m[-1]:
        ends.append((row.label, float(exact[-1]), row.colour))
        return
    short = row.label.removeprefix("SBA ")
    axis.annotate(
        short, (m[above[0]], 1.015), xycoords=("data", "axes fraction"), color=row.colour, ha="center", fontsize=9
    )


def _marks() -> list[Line2D]:
    """Legend of the marks."""
    grey = {"color": "#444444", "markersize": 4.5, "linewidth": 1}
    return [
        Line2D([], [], marker="o", linestyle="none", label="samples of q, three s.e. ≤ 2 %", **grey),
        Line2D([], [], marker="o", linestyle="none", markerfacecolor="none", label="samples of q, beyond that", **grey),
        Line2D([], [], label="their s.e. as predicted", **grey),
        Line2D([], [], marker="x", linestyle="none", label="importance sampling, a tenth of the samples", **grey),
    ]


def _normalised(row: Row, at: Tensor) -> tuple[Tensor, Tensor]:
    """h(r) and f(rho) at r, rho = ``at``: value and slope 0 and curvature 1 at 1."""
    one = torch.ones((), dtype=torch.float64, requires_grad=True)
    curvature = float(row.weighting.log_weight(torch.zeros(1), torch.zeros(1)).exp())
    curved = []
    for generator in (row.weighting.h, row.weighting.f):
        value = generator(one)
        (slope,) = torch.autograd.grad(value, one)
        curved.append((generator(at) - value.detach() - slope * (at - 1)) / curvature)
    return curved[0], curved[1]


def h_curves(*, largest: float = 8.0, points: int = 161) -> list[dict]:
    """Generators of every row (Di-Bregman Table 1; f-distill Fig. 3 and Table 1), made comparable.

    h is fixed only up to an affine function, so h and f have value and slope 0 at 1 here, and are divided by omega(1)
    = h''(1) = f''(1). f(rho) = rho h(1/rho) holds for the normalised ones as well.

    Args:
        largest: ratios go from 1 / ``largest`` to ``largest``, equidistant in their logarithm.
        points: how many; odd, so that 1 is among them.

    Returns:
        Rows with ``ratio``, ``h`` at r = ratio and ``f`` at rho = ratio.
    """
    at = torch.linspace(-math.log(largest), math.log(largest), points, dtype=torch.float64).exp()
    rows = []
    for row in TABLE:
        h, f = _normalised(row, at)
        rows += [
            {"weighting": row.label, "ratio": x, "h": y, "f": z}
            for x, y, z in zip(at.tolist(), h.tolist(), f.tolist(), strict=True)
        ]
    return rows


def draw_h_curves(rows: Sequence[Mapping]) -> Figure:
    """h over r and f over rho."""
    figure, axes = new_figure(12.5, 4.8, 2)
    for axis, key, title in (
        (axes[0], "h", "Bregman generator h(r), r = q/p"),
        (axes[1], "f", "f-divergence generator f(ρ), ρ = p/q"),
    ):
        ends = []
        for row in TABLE:
            ratio, value = columns(curves(rows)[row.label], "ratio", key)
            axis.plot(ratio, value, row.dashes, color=row.colour)
            ends.append((row.label, float(value[-1]), row.colour))
        axis.set(xlim=(ratio[0], ratio[-1]), ylim=(-0.2, 6), xscale="log", xlabel="r" if key == "h" else "ρ")
        set_title(axis, title)
        axis.xaxis.set_major_locator(FixedLocator([0.125, 0.25, 0.5, 1, 2, 4, 8]))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(FixedLocator([]))
        label_ends(axis, ends)
    return figure


def weighting_curves(*, largest: float = 4.0, points: int = 161) -> list[dict]:
    """omega of every row over l (f-distill Fig. 4b), divided by omega at l = 0.

    Args:
        largest: l goes from -``largest`` to ``largest``.
        points: how many; odd, so that l = 0 is among them.

    Returns:
        Rows with ``log_ratio``, ``r``, ``rho``, ``omega`` as the table of the papers has it, and ``relative`` omega.
    """
    l = torch.linspace(-largest, largest, points, dtype=torch.float64)  # noqa: E741
    rows = []
    for row in TABLE:
        omega = row.weighting.log_weight(l, torch.zeros_like(l)).exp()
        rows += [
            {"weighting": row.label, "log_ratio": x, "r": math.exp(-x), "rho": math.exp(x), "omega": y, "relative": z}
            for x, y, z in zip(l.tolist(), omega.tolist(), (omega / omega[points // 2]).tolist(), strict=True)
        ]
    return rows


def draw_weighting_curves(rows: Sequence[Mapping]) -> Figure:
    """omega over l on a logarithmic axis, and over r and rho on linear ones."""
    figure, axes = new_figure(15, 4.6, 3, width_ratios=(1.15, 1, 1))
    panels = (("log_ratio", (-4, 4), "l = log p/q"), ("r", (0, 3), "r = q/p"), ("rho", (0, 3), "ρ = p/q"))
    for axis, (key, limits, label) in zip(axes, panels, strict=True):
        ends = []
        for row in TABLE:
            x, omega = columns(curves(rows)[row.label], key, "relative")
            axis.plot(x, omega, row.dashes, color=row.colour)
            order = np.argsort(x)
            ends.append((row.label, float(np.interp(limits[1], x[order], omega[order])), row.colour))
        axis.set(xlim=limits, ylim=(0, 3), xlabel=label)
        if key == "log_ratio":
            axis.set(yscale="log", ylim=(1e-2, 1e2))
        set_title(axis, f"ω({label[0]}) / ω at p = q")
        label_ends(axis, ends)
    return figure
