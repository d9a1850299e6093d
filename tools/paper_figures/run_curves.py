"""Figures that compare runs: metrics over training (Di-Bregman Fig. 1, 4, 5), samples before and after it (score-free
paper, Fig. 3).

Notation: ``runs`` are folders of runs, finished or in progress, by the label they are drawn under. What a run lacks is
left out; that no run has anything to draw is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from paper_figures.drawing import columns, curves, label_ends, new_figure, set_title
from ratiograph.core.foreign import read_json, read_text, shown
from ratiograph.data.images import BadImage, read_image
from ratiograph.data.lettering import in_figure
from ratiograph.reports.evaluation_file import fields_of, read_evaluation
from ratiograph.reports.run_files import grids
from ratiograph.training.logs import read_metrics, significant

__all__ = ["draw_initialisations", "draw_lambda_curves", "find_runs", "initialisations", "label_of", "lambda_curves"]

METRICS = {"frechet_distance": "Fréchet distance", "inception_score": "inception score of the classifier"}
LAMBDAS = {"KL": 0.0, "ReverseKL": 0.0, "LS": 1.0, "BE": -1.0, "ForwardKL": -1.0, "SquaredHellinger": -0.5}
"""SBA's lambda of the other weightings e^(-lambda l)."""


def binding(folder: Path, name: str) -> str | None:
    """The text bound to ``name`` in the run's config.gin, or None."""
    config = Path(folder) / "config.gin"
    text = read_text(config) if config.is_file() else ""
    found = re.search(rf"^{re.escape(name)}\s*=\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else None


def lam_of(folder: Path) -> float:
    """SBA's lambda of the run's weighting; infinite where it is none of that family, or no number."""
    weighting = (binding(folder, "WEIGHTING") or "").strip("@()")
    if weighting == "SBA":
        return _number(binding(folder, "SBA.lam") or "1.0", math.inf)
    return LAMBDAS.get(weighting, math.inf)


def _number(text: str, otherwise: float) -> float:
    try:
        return float(text)
    except ValueError:
        return otherwise


def label_of(folder: Path) -> str:
    """The legend of a run, from its config.gin: the weighting and lambda; else the folder's name."""
    weighting, lam = (binding(folder, "WEIGHTING") or "").strip("@()"), lam_of(folder)
    if not weighting:
        return Path(folder).name
    if weighting == "SBA":
        return f"λ = {lam:g}"
    return f"λ = {lam:g} ({weighting})" if math.isfinite(lam) else weighting


def find_runs(folder: Path) -> dict[str, Path]:
    """The runs inside ``folder`` by label, lambda ascending; runs of one label are told apart by their folders' names.

    Raises:
        ValueError: there is none.
    """
    found = sorted((path.parent for path in Path(folder).glob("*/config.gin")), key=lambda run: (lam_of(run), run.name))
    if not found:
        raise ValueError(f"{shown(folder)} holds no folder with a config.gin: give the folder the runs are in")
    labels = [label_of(run) for run in found]
    return {
        label if labels.count(label) == 1 else f"{label}, {run.name}": run
        for label, run in zip(labels, found, strict=True)
    }


def lambda_curves(runs: Mapping[str, Path]) -> list[dict]:
    """Metrics of each run over the images it has seen.

    They are the metrics logged under ``evaluation/`` while training, and where a run logged none, what its before.json
    and evaluation.json say of the student before and after training.

    Returns:
        Rows with ``run``, ``images`` and the metrics, NaN where the run did not measure one.

    Raises:
        ValueError: no run has a metric.
    """
    rows = []
    for label, folder in runs.items():
        size = binding(folder, "Experiment.batch_size") or ""
        batch = int(size) if size.isdecimal() else 1
        for record in _logged(folder) or _final(folder):
            values = {name: record.get(f"evaluation/{name}") for name in METRICS}
            values = {name: math.nan if value is None else value for name, value in values.items()}
            if any(map(math.isfinite, values.values())):
                images = record.get("images")
                rows.append({"run": label, "images": record["step"] * batch if images is None else images, **values})
    if not rows:
        names = ", ".join(f"evaluation/{name}" for name in METRICS)
        raise ValueError(f"no run has {names} in its metrics.jsonl, nor an evaluation.json: train with an evaluator")
    return rows


def _logged(folder: Path) -> list[dict]:
    """Lines of metrics.jsonl that hold an evaluation."""
    return [
        record
        for record in read_metrics(Path(folder) / "metrics.jsonl")
        if any(f"evaluation/{name}" in record for name in METRICS)
    ]


def _final(folder: Path) -> list[dict]:
    """The evaluations before and after training as lines of metrics.jsonl."""
    steps = [record["step"] for record in read_metrics(Path(folder) / "metrics.jsonl")]
    records = [(0, "before.json"), (max(steps, default=0), "evaluation.json")]
    return [
        {"step": step, **{f"evaluation/{name}": row[name] for name in METRICS if name in row}}
        for step, row in ((step, _student(Path(folder) / name)) for step, name in records)
        if row
    ]


def _student(path: Path) -> dict | None:
    """The last row of a before.json or evaluation.json: the student's."""
    if not path.is_file():
        return None
    rows = read_evaluation(path).get("rows") if path.name == "evaluation.json" else read_json(path)
    with fields_of(path, "Resume the run, which writes it again"):
        row = dict(rows[-1]) if rows else {}
        return {name: float(row[name]) for name in METRICS if row.get(name) is not None}


def draw_lambda_curves(rows: Sequence[Mapping]) -> Figure:
    """A panel for each metric that some run has."""
    present = [name for name in METRICS if np.isfinite(columns(rows, name)[0]).any()]
    figure, axes = new_figure(6.5 * len(present), 4.6, len(present))
    by_run = curves(rows, "run")
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.88, len(by_run)))
    for axis, name in zip(axes, present, strict=True):
        ends = []
        for (label, mine), colour in zip(by_run.items(), colours, strict=True):
            images, values = columns(mine, "images", name)
            kept = np.isfinite(values)
            if kept.any():
                axis.plot(images[kept] / 1000, values[kept], "o-", color=colour, markersize=4, clip_on=False)
                ends.append((label, float(values[kept][-1]), mpl.colors.to_hex(colour)))
        if name == "frechet_distance":
            axis.set(yscale="log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
        axis.set(xlabel="training images, thousands")
        axis.set_xlim(0, max(row["images"] for row in rows) / 1000)
        set_title(axis, METRICS[name])
        label_ends(axis, ends)
    return figure


def initialisations(runs: Mapping[str, Path]) -> list[dict]:
    """The first and the last sample grid of each run.

    Returns:
        Rows with ``run``, ``stage`` ("before" or "after"), ``step``, ``file``, and the student's ``frechet_distance``
        then, NaN if it was not measured.

    Raises:
        ValueError: a run has no sample grids, or only one.
    """
    rows = []
    for label, folder in runs.items():
        found = list(grids(Path(folder)).items())
        if len(found) < 2:
            raise ValueError(f"{shown(folder)}/samples holds {len(found)} grids: give runs that have passed a preview")
        for stage, (step, path), name in (("before", found[0], "before.json"), ("after", found[-1], "evaluation.json")):
            row = _student(Path(folder) / name) or {}
            distance = row.get("frechet_distance", math.nan)
            file = str(Path(folder) / path)
            rows.append({"run": label, "stage": stage, "step": step, "file": file, "frechet_distance": distance})
    return rows


def draw_initialisations(rows: Sequence[Mapping], *, side: int = 4) -> Figure:
    """A column for each run: samples before training over those after, the first ``side`` x ``side`` of each grid."""
    by_run = curves(rows, "run")
    figure, axes = new_figure(2.6 * len(by_run), 5.9, len(by_run), rows=2)
    for column, (label, pair) in zip(np.asarray(axes).T, by_run.items(), strict=True):
        for axis, row in zip(column, pair, strict=True):
            try:
                image = read_image(Path(row["file"])).convert("RGB")
            except BadImage as error:
                raise ValueError(f"{shown(row['file'])} {error}: delete it, or make it again") from error
            # make_grid lays out 8 images a row, with a gap of 2 pixels before each and after the last.
            edge = 2 + side * (image.width - 2) // 8
            axis.imshow(np.asarray(image.crop((0, 0, edge, min(edge, image.height)))))
            axis.set_axis_off()
            distance = row["frechet_distance"]
            measured = f", FD {significant(distance, 3)}" if math.isfinite(distance) else ""
            heading = f"{in_figure(label)}\n" if row["stage"] == "before" else ""
            set_title(axis, f"{heading}step {row['step']:,}{measured}")
    return figure
