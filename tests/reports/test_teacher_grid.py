"""teacher_grid.py: the teacher's samples are drawn at the very noise of the run's own grids."""

import numpy as np
import pytest
import torch
from PIL import Image

from ratiograph import config
from ratiograph.networks.samplers import HeunSampler
from ratiograph.reports.run_and_report import run_and_report
from ratiograph.reports.teacher_grid import draw_teacher
from ratiograph.tasks.distillation import Distillation
from ratiograph.training import trainer
from ratiograph.training.logs import make_grid

TINY = [
    "EDM.weights = None",
    "UNet.channels = 16",
    "Experiment.batch_size = 4",
    "Experiment.precision = 'fp32'",
    "Experiment.preview_samples = 4",
    "Experiment.evaluator = None",
    "Experiment.steps = 1",
    "Experiment.teacher_evaluations = 5",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step, with the grid of the student before it."""
    workdir = tmp_path_factory.mktemp("run")
    cfg = config.parse(["gin/mnist_sba.gin"], TINY)
    config.save(cfg, workdir / "config.gin")
    torch.manual_seed(0)
    run_and_report(config.build(cfg), workdir=workdir, device="cpu")
    return workdir


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_a_run_draws_it_at_its_end(run):
    # The first test of this file: the next ones draw it anew.
    own = pixels(run / "samples" / "teacher.png")
    with Image.open(run / "samples" / "teacher.png") as grid:
        assert grid.info["evaluations"] == "5"
    assert np.abs(pixels(draw_teacher(run, 5, "cpu")) - own).max() <= 1
    assert np.abs(pixels(draw_teacher(run, 35, "cpu")) - own).max() > 1


def test_noise_and_conditions_are_those_of_the_student_s_grids(run, monkeypatch):
    """With the student in the teacher's place, the grid is the run's own before its first step."""
    monkeypatch.setattr(Distillation, "teacher_sampler", lambda task, evaluations: task.student_sampler)
    found = pixels(draw_teacher(run, 35, "cpu"))
    own = pixels(run / "samples" / "step_00000000.png")
    assert np.abs(found - own).max() <= 1  # a rounding of the last bit


def test_the_grid_is_the_teacher_s_by_heun_s_sampler(run):
    path = draw_teacher(run, 5, "cpu")
    assert path == run / "samples" / "teacher.png"
    experiment = config.build(config.parse([str(run / "config.gin")]))
    torch.manual_seed(trainer.step_seed(0, 0))
    experiment.task.prepare(torch.device("cpu"), None)
    task = experiment.task.eval()
    generator = torch.Generator().manual_seed(trainer.step_seed(0, 2))
    condition = task.conditions.preview(4, task.student, generator)
    noise = task.student.noise(4, generator)
    with torch.no_grad():
        samples = HeunSampler.for_evaluations(5).sample(task.teacher, noise, condition)
    assert np.abs(pixels(path) - make_grid(samples).astype(int)).max() <= 1
    with Image.open(path) as grid:
        assert grid.info["evaluations"] == "5"


def test_runs_without_a_teacher_or_images_are_refused(tmp_path):
    for name, message in (("mnist_dijs", "has no teacher to draw"), ("mixture2d_scores", "points and not images")):
        workdir = tmp_path / name
        workdir.mkdir()
        config.save(config.parse([f"gin/{name}.gin"]), workdir / "config.gin")
        with pytest.raises(ValueError, match=message):
            draw_teacher(workdir, 3, "cpu")
    with pytest.raises(FileNotFoundError, match="no run at"):
        draw_teacher(tmp_path / "absent", 3)
