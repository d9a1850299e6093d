"""omega against the difference of the scores, in a run (f-distill §5.2, Fig. 6).

Notation: at noisy samples x_t of the student, ``score_difference`` = |s_q - s_p|, ``denoised_difference`` =
|mu_q - mu_p| with |s_q - s_p| = alpha |mu_q - mu_p| / sigma^2, ``sigma`` relative to alpha, ``log_ratio`` l. s_p comes
from the teacher, s_q from the student score, l from the run's ratio estimator: none is exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from paper_figures.drawing import TABLE, columns, label_ends, new_figure, set_title
from ratiograph.core.contracts import Evaluation
from ratiograph.tasks.distillation import Distillation
from ratiograph.tasks.student_files import read_experiment
from ratiograph.training import checkpoints

__all__ = ["correlations", "draw_score_difference", "grouped_weights", "load_run", "percentiles", "score_difference"]

DRAWN = TABLE[:8]
"""Without the SBAs of lambda >= 3, whose mean is that of a handful of samples and would hide the others."""
BINS = 8
"""Groups of about the same time."""
DIFFERENCES = {"score_difference": "|s_q − s_p|", "denoised_difference": "|μ_q − μ_p|"}


def load_run(workdir: Path, device: torch.device) -> tuple[Distillation, int]:
    """The task of a run at its newest checkpoint, in float32, and the checkpoint's step.

    Raises:
        FileNotFoundError: the folder has no config.gin.
        ValueError: it has no checkpoint, or the run has no teacher, student score and ratio.
    """
    task = read_experiment(workdir, memory=True).task
    missing = [name for name in ("teacher", "student_score", "ratio") if getattr(task, name, None) is None]
    if missing:
        raise ValueError(f"the run in {workdir} has no {' and no '.join(missing)}, which this figure compares")
    found = checkpoints.latest(workdir / "checkpoints")
    if found is None:
        raise ValueError(f"{workdir}/checkpoints is empty: wait for the run's first checkpoint")
    step, state = found
    task.prepare(device, None)
    modules = {name: task.trained()[name] for name in ("student", "student_score", "ratio")}
    networks = {name: weights for name, weights in state["task"]["networks"].items() if name in modules}
    checkpoints.load_strict(modules, networks, source=workdir / "checkpoints")
    return task.eval(), step


@torch.no_grad()
def score_difference(task: Distillation, *, samples: int, generator: torch.Generator, batch: int = 256) -> list[dict]:
    """Both differences and l at noisy samples of the student, at times of the run's objective.

    Args:
        task: prepared and trained.
        samples: how many; f-distill takes 6,400.
        generator: on the task's device.
        batch: samples a pass.

    Returns:
        Rows with ``sigma``, ``score_difference``, ``denoised_difference``, ``log_ratio``, and ``quantile``, the share
        of the objective's p(t) below the sample's time.
    """
    rows: list[dict] = []
    for start in range(0, samples, batch):
        size = min(batch, samples - start)
        condition = task.student.condition(size, generator)
        evaluation = task.evaluate(task.student(task.student.noise(size, generator), condition), condition, generator)
        rows += _rows(evaluation, task.times.quantile(task.noising, evaluation.noisy.t))
    return rows


def _rows(evaluation: Evaluation, quantile: torch.Tensor) -> list[dict]:
    noisy = evaluation.noisy
    distance = (evaluation.student_score_denoised - evaluation.teacher_denoised).double().flatten(1).norm(dim=1)
    values = {
        "quantile": quantile,
        "sigma": noisy.sigma / noisy.alpha,
        "score_difference": noisy.alpha / noisy.sigma.double().square() * distance,
        "denoised_difference": distance,
        "log_ratio": evaluation.log_ratio,
    }
    lists = [value.double().cpu().tolist() for value in values.values()]
    return [dict(zip(values, numbers, strict=True)) for numbers in zip(*lists, strict=True)]


def percentiles(rows: Sequence[Mapping], by: str, *, bins: int = 1) -> np.ndarray:
    """Where each row's ``by`` stands in (0, 100) among the rows of its bin of the time; with one bin, among all."""
    difference, quantile = columns(rows, by, "quantile")
    found = np.empty(len(rows))
    for group in np.array_split(np.argsort(quantile), bins):
        found[group] = 100 * (_ranks(difference[group]) - 0.5) / len(group)
    return found


def grouped_weights(rows: Sequence[Mapping], percentile: np.ndarray, *, groups: int = 20) -> dict[str, np.ndarray]:
    """Mean omega over its overall mean, in ``groups`` of equal size sorted by ``percentile``; [groups] by label."""
    (log_ratio,) = columns(rows, "log_ratio")
    l = torch.from_numpy(log_ratio[np.argsort(percentile)])  # noqa: E741
    means = {}
    for row in TABLE:
        log_weight = row.weighting.log_weight(l, torch.zeros_like(l))
        omega = (log_weight - (torch.logsumexp(log_weight, 0) - math.log(len(l)))).exp()
        means[row.label] = np.array([float(group.mean()) for group in omega.tensor_split(groups)])
    return means


def correlations(rows: Sequence[Mapping], by: str, *, bins: int = BINS) -> dict[str, tuple[float, float, float]]:
    """Correlations of omega with ``by``: Pearson's, Spearman's, and the mean of Spearman's over ``bins`` of the time.

    omega is a function of l alone, increasing or decreasing: Spearman's differ between rows in the sign only. The last
    number is free of what the noise level does to both sides.

    Returns:
        The three by label, NaN for KL, whose omega is constant.
    """
    log_ratio, difference, quantile = columns(rows, "log_ratio", by, "quantile")
    inside = [group for group in np.array_split(np.argsort(quantile), bins) if len(group) > 2]
    found = {}
    for row in TABLE:
        l = torch.from_numpy(log_ratio)  # noqa: E741
        omega = row.weighting.log_weight(l, torch.zeros_like(l)).exp().numpy()
        within = [_correlation(_ranks(omega[group]), _ranks(difference[group])) for group in inside]
        overall = _correlation(_ranks(omega), _ranks(difference))
        found[row.label] = (_correlation(omega, difference), overall, float(np.mean(within)))
    return found


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, equal ones averaged."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[index]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else math.nan


def draw_score_difference(rows: Sequence[Mapping]) -> Figure:
    """l over |s_q - s_p|, and omega in groups sorted by it: among all samples, and among those of one bin of time."""
    figure, axes = new_figure(15, 4.6, 3, width_ratios=(1.1, 1, 1))
    difference, log_ratio, sigma = columns(rows, "score_difference", "log_ratio", "sigma")
    dots = axes[0].scatter(difference, log_ratio, c=np.log10(sigma), s=5, alpha=0.6, cmap="viridis", linewidths=0)
    bar = figure.colorbar(dots, ax=axes[0], label="log10 of σ/α", pad=0.02)
    bar.outline.set_visible(False)
    bar.solids.set_alpha(1)
    axes[0].set(xscale="log", xlabel=r"$|s_q - s_p|$")
    set_title(axes[0], f"l = log p/q of {len(rows):,} samples")
    for axis, bins, among in ((axes[1], 1, "all samples"), (axes[2], BINS, "samples of about the same time")):
        weights = grouped_weights(rows, percentiles(rows, "score_difference", bins=bins))
        ends = []
        for row in DRAWN:
            means = weights[row.label]
            axis.plot(100 * (np.arange(len(means)) + 0.5) / len(means), means, row.dashes, color=row.colour)
            ends.append((row.label, float(means[-1]), row.colour))
        axis.set(xlim=(0, 100), xlabel=f"percentile of $|s_q - s_p|$ among {among}")
        set_title(axis, "mean of ω / overall mean")
        label_ends(axis, ends)
    return figure
