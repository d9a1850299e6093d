"""loggers.py: every service is told the values that were logged, in one run over resumes, and none ends a run."""

import importlib.util
import io
import json
import math
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from rich.console import Console

from ratiograph import config
from ratiograph.training import trainer
from ratiograph.training.loggers import Logger, TensorBoard, Trackio, WeightsAndBiases, bindings, kept_id
from ratiograph.training.logs import read_metrics
from ratiograph.training.run_logger import RunLogger

PICTURE = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
CONFIG = "DATA = 'mnist'\n\nExperiment.steps = 3\nUNet.multipliers = (\n    1,\n    2,\n)\n"


def interrupted(workdir, loggers, console=None):
    """A run that logs steps 10, 20 and 30, ends, and goes on from step 20."""
    for resume, steps in ((0, (10, 20, 30)), (20, (30,))):
        with RunLogger(
            workdir,
            100,
            images_per_step=8,
            loggers=loggers,
            config=CONFIG,
            resume_step=resume,
            console=console or Console(file=io.StringIO(), width=200),
        ) as log:
            for step in steps:
                log.log(step, {"loss/a": step / 4, "loss/b": math.nan})
            log.image(30, "samples", PICTURE)


class FakeWandb(ModuleType):
    """Takes what wandb takes, and keeps it."""

    class errors:
        class UsageError(Exception):
            pass

    def __init__(self):
        super().__init__("wandb")
        self.started, self.defined, self.rows, self.finished, self.refusal = [], [], [], 0, None

    def Settings(self, **settings):
        return settings

    def Image(self, picture):
        return ("image", picture)

    def init(self, **arguments):
        if self.refusal:
            raise self.refusal
        self.started.append(arguments)
        return SimpleNamespace(
            define_metric=lambda name, step_metric=None: self.defined.append((name, step_metric)),
            log=self.rows.append,
            finish=lambda: setattr(self, "finished", self.finished + 1),
            offline=False,
            url="https://example.org/run",
        )


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_is_told_each_value_in_one_run_over_resumes(tmp_path, wandb):
    console = Console(file=io.StringIO(), width=200)
    interrupted(tmp_path / "run", [WeightsAndBiases(project="p", group="g", tags=["a"])], console)
    first, second = wandb.started
    assert first["id"] == second["id"] == (tmp_path / "run" / "wandb.id").read_text().strip()
    assert (first["project"], first["name"], first["group"], first["tags"]) == ("p", "run", "g", ["a"])
    assert first["resume"] == "allow"
    assert first["config"] == {"DATA": "'mnist'", "Experiment.steps": "3", "UNet.multipliers": "(1,2,)"}
    assert wandb.defined[:2] == [("step", None), ("*", "step")]
    values = [(row["step"], row["loss/a"], row["images"]) for row in wandb.rows if "loss/a" in row]
    assert values == [(10, 2.5, 80), (20, 5.0, 160), (30, 7.5, 240), (30, 7.5, 240)]
    assert math.isnan(wandb.rows[0]["loss/b"])
    pictures = [row for row in wandb.rows if "samples" in row]
    assert [row["step"] for row in pictures] == [30, 30]
    np.testing.assert_array_equal(pictures[0]["samples"][1], PICTURE)
    assert wandb.finished == 2
    assert "Weights & Biases: https://example.org/run" in console.file.getvalue()


def test_who_has_not_logged_in_is_told_before_the_first_step(tmp_path, wandb):
    wandb.refusal = wandb.errors.UsageError("no API key")
    with pytest.raises(ValueError, match=r"no API key\. Log in once by 'wandb login', or set WANDB_MODE=offline"):
        interrupted(tmp_path, [WeightsAndBiases()])


def test_a_service_that_does_not_answer_is_left_out(tmp_path, wandb):
    wandb.refusal = ConnectionError("no route to host")
    console = Console(file=io.StringIO(), width=200)
    interrupted(tmp_path, [WeightsAndBiases()], console)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20, 30]
    told = "WeightsAndBiases does not log: no route to host; left out of this run"
    assert console.file.getvalue().count(told) == 2  # once a process


class Broken(Logger):
    """Fails at every second call."""

    def __init__(self):
        self.calls, self.taken = 0, []

    def scalars(self, step, values):
        self.calls += 1
        if self.calls % 2:
            raise ConnectionError("the network\nis down")
        self.taken.append(step)

    def close(self):
        raise ConnectionError("the network is down")


def test_a_logger_that_fails_is_told_once_and_asked_again(tmp_path):
    console, broken = Console(file=io.StringIO(), width=200), Broken()
    with RunLogger(tmp_path, 100, loggers=[broken, TensorBoard()], console=console) as log:
        for step in (1, 2, 3, 4):
            log.log(step, {"loss/a": step})
    assert broken.taken == [2, 4]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    told = [line for line in console.file.getvalue().splitlines() if "does not log" in line]
    assert told == ["Broken does not log: the network is down; the run goes on, and asks it again the next time"]


@pytest.mark.parametrize(("logger", "package"), [(WeightsAndBiases, "wandb"), (Trackio, "trackio")])
def test_a_missing_package_is_told_before_anything_is_built(tmp_path, monkeypatch, logger, package):
    monkeypatch.setitem(sys.modules, package, None)
    experiment = config.build(config.parse(["gin/mixture2d_scores.gin"], [], {}))
    object.__setattr__(experiment, "loggers", [logger()])
    experiment.task.prepare = lambda *_: pytest.fail("prepared")
    with pytest.raises(ValueError, match=f"{logger.__name__} needs {package} .*: pip install {package}$"):
        trainer.train(experiment, workdir=tmp_path, device="cpu")


def test_a_run_s_loggers_come_from_gin(tmp_path, wandb):
    """And a run that logs elsewhere takes the very steps of one that does not."""
    sizes = ["MLP.width = 8", "Experiment.batch_size = 8", "Experiment.evaluator = None", "Experiment.log_every = 1"]
    losses = []
    for name, lines in (
        ("plain", []),
        ("told", ["import ratiograph.training.loggers", "Experiment.loggers = [@WeightsAndBiases()]"]),
    ):
        torch.manual_seed(0)
        parsed = config.parse(["gin/mixture2d_scores.gin"], [*sizes, *lines], {"Experiment.steps": 2})
        trainer.train(config.build(parsed), workdir=tmp_path / name, device="cpu")
        losses.append([line["loss/student_score"] for line in read_metrics(tmp_path / name / "metrics.jsonl")])
    assert losses[0] == losses[1] == [row["loss/student_score"] for row in wandb.rows]
    assert (tmp_path / "plain" / "tensorboard").is_dir()
    assert not (tmp_path / "told" / "tensorboard").exists()


def test_an_id_is_kept(tmp_path):
    made = kept_id(tmp_path / "x.id")
    assert re.fullmatch(r"[0-9a-f]{8}", made)
    assert kept_id(tmp_path / "x.id") == made != kept_id(tmp_path / "y.id")


def test_bindings_are_those_of_the_configuration(tmp_path):
    cfg = config.parse(["gin/mnist_sba.gin"], [], {})
    config.save(cfg, tmp_path / "config.gin")
    found, expected = bindings((tmp_path / "config.gin").read_text()), config.to_dict(cfg)
    assert found.keys() == expected.keys()
    assert found["SBA.lam"] == repr(expected["SBA.lam"])


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_loggers import interrupted
from ratiograph.training.loggers import Trackio, WeightsAndBiases
interrupted(Path(sys.argv[2]), [{logger}()])
"""


def in_a_process(logger, workdir, **environment):
    """Services start threads and processes of their own, which end with this one."""
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", SCRIPT.format(logger=logger), here, str(workdir)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_wandb_itself_offline(tmp_path):
    in_a_process("WeightsAndBiases", tmp_path / "run", WANDB_MODE="offline")
    identity = (tmp_path / "run" / "wandb.id").read_text().strip()
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert len(files) == 2  # one a process, both of one run
    written = b"".join(file.read_bytes() for file in files)
    for value in (b"loss/a", b"2.5", b"7.5", b"UNet.multipliers"):
        assert value in written
    pictures = list((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/samples_*.png"))
    assert len(pictures) == 2


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="needs trackio")
def test_trackio_itself(tmp_path):
    in_a_process("Trackio", tmp_path / "run", TRACKIO_DIR=str(tmp_path / "trackio"))
    with sqlite3.connect(tmp_path / "trackio" / "ratiograph.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in rows} == {f"run-{(tmp_path / 'run' / 'trackio.id').read_text().strip()}"}
    told = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert [(step, row["loss/a"]) for step, row in told if "loss/a" in row] == [
        (10, 2.5),
        (20, 5),
        (30, 7.5),
        (30, 7.5),
    ]
    assert [step for step, row in told if "samples" in row] == [30, 30]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), FileNotFoundError(2, "No such file")])
def test_a_failure_of_tensorboard_s_own_thread_is_one_line(tmp_path, monkeypatch, capfd, error):
    hook, out = threading.excepthook, io.StringIO()
    with RunLogger(tmp_path, 9, loggers=[TensorBoard()], console=Console(file=out, width=200)) as log:
        log.log(1, {"loss/x": 1.0})
        monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", Mock(side_effect=error))
        for step in (2, 3, 4):
            log.log(step, {"loss/x": 1.0})
            time.sleep(0.05)
    assert out.getvalue().count("TensorBoard does not log: ") == 1
    assert "Traceback" not in capfd.readouterr().err
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert threading.excepthook is hook


def test_a_torn_id_is_replaced(tmp_path):
    (tmp_path / "id").write_bytes(b"\xff\xfe\x00")
    assert re.fullmatch(r"[0-9a-f]{8}", kept_id(tmp_path / "id"))
