"""The variance of omega before and after f-distill's two normalisations (§4, Fig. 5b), where everything is exact.

Notation: teacher p and student q are Gaussian mixtures, so that l = log p_t/q_t is exact at every noise level t, of
quantile u under p(t). The *miscalibrated* ratio stands for a classifier that is still learning: at step k of K it says

    l + BIAS cos(2 pi u) + DRIFT sin(2 pi k / K) + SPREAD N(0, 1),

off by a function of the time, by one of the step, and by noise. Only the first two can be normalised away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from paper_figures.drawing import TABLE, new_figure, set_title
from ratiograph.algebra.noising import VarianceExploding
from ratiograph.algebra.normalization import MeanNormalized, RatioNormalized
from ratiograph.algebra.times import KarrasIndex
from ratiograph.algebra.weightings import Weighting
from ratiograph.core.types import Condition
from ratiograph.networks.teachers.mixture import RingMixture

__all__ = ["draw_normalized_weights", "normalized_weights"]

BIAS, DRIFT, SPREAD = 1.0, 0.5, 0.3
TEACHER = RingMixture(modes=8, radius=1.0, std=0.15)
STUDENT = RingMixture(modes=8, radius=0.96, std=0.16, weights=[1.0, 1.5, 1.0, 1.5, 1.0, 1.5, 1.0, 1.5])
NOISING = VarianceExploding(sigma_min=0.002, sigma_max=80.0)
TIMES = KarrasIndex(low=0.2, high=0.8)

STAGES = ("before", "ratio by its mean in time bins", "then ω by its batch mean")
MARKS = {STAGES[0]: ("#777777", "o", 8), STAGES[1]: ("#0072B2", "s", 6), STAGES[2]: ("#D55E00", "D", 4.5)}


def log_ratios(steps: int, batch_size: int, generator: torch.Generator) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """(l [B], t [B]) of every step for the exact and for the miscalibrated ratio, at the same samples of q."""
    exact, miscalibrated = [], []
    for step in range(steps):
        x0 = STUDENT.sample(batch_size, generator, dtype=torch.float64)
        t = TIMES(NOISING, batch_size, generator).double()
        noise = torch.randn(x0.shape, dtype=torch.float64, generator=generator)
        noisy = NOISING.add_noise(x0, t, noise)
        l = TEACHER.log_density(noisy, Condition()) - STUDENT.log_density(noisy, Condition())  # noqa: E741
        bias = BIAS * torch.cos(2 * math.pi * TIMES.quantile(NOISING, t)) + DRIFT * math.sin(2 * math.pi * step / steps)
        error = bias + SPREAD * torch.randn(batch_size, dtype=torch.float64, generator=generator)
        exact.append((l, t))
        miscalibrated.append((l + error, t))
    return {"exact": exact, "miscalibrated": miscalibrated}


def normalized_weights(*, steps: int = 300, batch_size: int = 256, seed: int = 0) -> list[dict]:
    """Variance of omega over the samples of a run of ``steps`` steps, at each stage of the normalisation.

    Args:
        steps: batches, the student standing still.
        batch_size: samples of each.
        seed: of the samples.

    Returns:
        Rows with the ``ratio``, the ``stage``, the ``normalized_variance`` Var/E^2 over all samples of all steps, and
        ``step_variance``, the same of the batch means: the variation of the step size from step to step.
    """
    ratios = log_ratios(steps, batch_size, torch.Generator().manual_seed(seed))
    rows = []
    for row in TABLE:
        for name, batches in ratios.items():
            for stage, weighting in zip(STAGES, _stages(row.weighting), strict=True):
                # One scale for all steps: it cancels in the variances, and keeps the largest omega finite.
                log_weight = torch.stack([weighting.log_weight(l, t) for l, t in batches])  # noqa: E741
                omega = (log_weight - log_weight.max()).exp()
                rows.append(
                    {
                        "weighting": row.label,
                        "ratio": name,
                        "stage": stage,
                        "normalized_variance": _relative_variance(omega.flatten()),
                        "step_variance": _relative_variance(omega.mean(1)),
                    }
                )
    return rows


def _stages(weighting: Weighting) -> tuple[Weighting, ...]:
    """The row alone, after the first stage, and after both; each with statistics of its own."""
    stages = (
        weighting,
        RatioNormalized(weighting=weighting),
        MeanNormalized(weighting=RatioNormalized(weighting=weighting)),
    )
    for stage in stages:
        stage.connect(NOISING, TIMES)
    return stages


def _relative_variance(values: Tensor) -> float:
    return float(values.var(correction=0) / values.mean().square())


def draw_normalized_weights(rows: Sequence[Mapping]) -> Figure:
    """A line of dots for each row of the table, one dot a stage."""
    figure, axes = new_figure(12.5, 4.6, 3, sharey=True)
    panels = (
        ("exact", "normalized_variance", "Var[ω] / E[ω]², exact ratio"),
        ("miscalibrated", "normalized_variance", "Var[ω] / E[ω]², miscalibrated ratio"),
        ("miscalibrated", "step_variance", "Var/E² of the means of batches (0 after both)"),
    )
    names = [row.label for row in TABLE if row.label != "KL"]
    for axis, (ratio, key, title) in zip(axes, panels, strict=True):
        table = {(row["weighting"], row["stage"]): row[key] for row in rows if row["ratio"] == ratio}
        stages = STAGES[: 2 if key == "step_variance" else 3]
        for height, name in enumerate(names):
            values = [table[name, stage] for stage in stages]
            axis.plot([min(values), max(values)], [height, height], color="#cccccc", linewidth=1.2, zorder=1)
            for value, stage in zip(values, stages, strict=True):
                colour, marker, size = MARKS[stage]
                axis.plot(value, height, marker, color=colour, markersize=size, label=stage if not height else None)
        axis.set(xscale="log")
        set_title(axis, title)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure
