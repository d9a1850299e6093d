"""A whole run: the picture of its graph, training, the teacher's grid and the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ratiograph.core import distributed
from ratiograph.reports import graph_picture, teacher_grid
from ratiograph.reports.run_report import write_report
from ratiograph.training import devices, trainer
from ratiograph.training.experiment import Experiment

__all__ = ["run_and_report"]


def run_and_report(
    experiment: Experiment,
    *,
    workdir: Path,
    device: str = "auto",
    mode: str = "auto",
    check_held: Callable[[], None] = lambda: None,
) -> Path:
    """Trains ``experiment`` with `trainer.train`, and writes the pictures and the report of the run.

    Args:
        experiment: what to run; all ranks of a distributed run must call.
        workdir: folder of the run, which gets ``graph.svg``, ``samples/teacher.png`` where the experiment asks for
            ``teacher_evaluations``, and ``report.html`` beside what training leaves.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        mode: how several processes hold the networks, as of `parallel.choose`.
        check_held: as of `trainer.train`.

    Returns:
        The path of ``report.html``.

    Raises:
        ValueError, Preempted: as of `trainer.train`.
    """
    workdir = Path(workdir)
    if distributed.is_main():
        graph_picture.save(experiment, workdir)
    trainer.train(experiment, workdir=workdir, device=device, mode=mode, check_held=check_held)
    teacher_grid.draw_once(experiment, workdir, devices.choose_device(device))
    if distributed.is_main():
        write_report(workdir)
    return workdir / "report.html"
