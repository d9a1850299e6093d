"""A grid of the teacher's samples from the noise of the student's grids, for the report.

All grids of a run start from one fixed noise z. This one starts from the same z under the same conditions and shows the
teacher's samples, by Heun's sampler in many evaluations. Place k of both grids has the same z.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ratiograph import config
from ratiograph.core.distributed import is_main
from ratiograph.core.files import write_atomically
from ratiograph.data.latents import picture
from ratiograph.reports.run_files import TEACHER, check_run
from ratiograph.tasks.distillation import Distillation
from ratiograph.tasks.student_files import load_conditions
from ratiograph.training import devices, trainer
from ratiograph.training.experiment import Experiment
from ratiograph.training.logs import make_grid

__all__ = ["draw_once", "draw_teacher", "save_teacher"]

PREVIEW = 2  # stream of the run's seed for the noise of its grids, as in the trainer


def draw_teacher(workdir: Path, evaluations: int, device: str = "auto", *, bindings: Sequence[str] = ()) -> Path:
    """Writes ``samples/teacher.png`` into a run's folder; the file holds the number of evaluations as text.

    Args:
        workdir: of a run with a teacher and a config.gin. The run may still be training.
        evaluations: passes of the teacher a sample.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        bindings: lines of gin on top of config.gin.

    Returns:
        Path of the grid.

    Raises:
        FileNotFoundError, ValueError: no run, no teacher in it, its weights or conditions are not there, or its samples
            are no images.
    """
    check_run(workdir)
    if not (workdir / "config.gin").is_file():
        raise ValueError(f"{workdir} has no config.gin, which says what its teacher is")
    experiment = config.build(config.parse([str(workdir / "config.gin")], bindings))
    task, place = experiment.task, devices.choose_device(device)
    if getattr(task, "teacher", None) is None:
        raise ValueError(f"{workdir} has no teacher to draw: leave out --teacher_evaluations")
    torch.manual_seed(trainer.step_seed(experiment.seed, 0))
    if experiment.precision == "fp64":
        task.double()
    task.prepare(place, devices.autocast_dtype(experiment.precision, place))
    load_conditions(task.conditions, workdir)
    generator = torch.Generator(place).manual_seed(trainer.step_seed(experiment.seed, PREVIEW))
    path = save_teacher(task.eval(), workdir, experiment.preview_samples, generator, evaluations)
    if path is None:
        raise ValueError(f"the teacher of {workdir} makes points and not images: leave out --teacher_evaluations")
    return path


def draw_once(experiment: Experiment, workdir: Path, device: torch.device) -> None:
    """Writes the grid of a run that this process has just trained, unless there is one; all ranks must call.

    Args:
        experiment: with its task prepared. Without a teacher or ``teacher_evaluations`` nothing is written.
        workdir: of the run.
        device: of the task.
    """
    task, evaluations = experiment.task, experiment.teacher_evaluations
    if not evaluations or getattr(task, "teacher", None) is None or (workdir / TEACHER).exists():
        return
    with task.parallel.whole():
        if is_main():
            generator = torch.Generator(device).manual_seed(trainer.step_seed(experiment.seed, PREVIEW))
            save_teacher(task, workdir, experiment.preview_samples, generator, evaluations)


def save_teacher(
    task: Distillation, workdir: Path, samples: int, generator: torch.Generator, evaluations: int
) -> Path | None:
    """Writes the grid of a prepared task.

    Args:
        task: with a teacher.
        workdir: of its run.
        samples: number of samples of a grid of the run.
        generator: seeded as for each of those grids.
        evaluations: passes of the teacher a sample.

    Returns:
        Path of the grid, None if the samples are no images.
    """
    with torch.no_grad():
        made = picture(task.teacher_sampler(evaluations)(samples, generator))
    if made.ndim != 4:
        return None
    grid, about = Image.fromarray(make_grid(made)), PngInfo()
    about.add_text("evaluations", str(evaluations))
    write_atomically(workdir / TEACHER, lambda file: grid.save(file, format="PNG", pnginfo=about))
    return workdir / TEACHER
