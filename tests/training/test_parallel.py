"""Whole runs by several processes: the parameters of one process's run, also when the number changes on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ratiograph import config
from ratiograph.core import distributed
from ratiograph.training import checkpoints, trainer

ROOT = Path(__file__).resolve().parents[2]
LINES = [
    *("Experiment.evaluator = None", "Experiment.log_every = 1", "Experiment.preview_samples = 4"),
    *("UNet.channels = 16", "EDM.weights = None", "ShardStream.workers = 0"),
]
RUN = [
    *("launch/main.py", "--gin_file=gin/mnist_sba.gin", "--batch_size=8", "--precision=fp64"),
    *(f"--gin_param={line}" for line in LINES),
]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(ranks: int, *flags: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, *RUN, *flags]


def run(ranks: int, workdir: Path, *flags: str) -> str:
    done = subprocess.run(
        command(ranks, f"--workdir={workdir}", *flags), cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def networks(workdir: Path, step: int) -> dict[str, torch.Tensor]:
    found, state = checkpoints.latest(workdir / "checkpoints")
    assert found == step
    return {f"{n}.{key}": v for n, tensors in state["task"]["networks"].items() for key, v in tensors.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run of one process."""
    workdir = tmp_path_factory.mktemp("alone")
    run(1, workdir, "--steps=4")
    return workdir


def assert_same_run(found: Path, expected: Path) -> None:
    networks_found, networks_expected = networks(found, 4), networks(expected, 4)
    assert networks_found.keys() == networks_expected.keys()
    for name, value in networks_expected.items():
        torch.testing.assert_close(networks_found[name], value, rtol=1e-6, atol=1e-9, msg=name)
    lines = [[json.loads(line) for line in (w / "metrics.jsonl").read_text().splitlines()] for w in (expected, found)]
    for one, two in zip(*lines, strict=True):
        assert one["loss/student_score"] == pytest.approx(two["loss/student_score"], rel=1e-6)
        assert one["loss/ratio"] == pytest.approx(two["loss/ratio"], rel=1e-6)
    students = [load_file(workdir / "student.safetensors") for workdir in (expected, found)]
    for name, value in students[0].items():
        torch.testing.assert_close(students[1][name], value, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.slow
def test_two_processes_then_one_take_the_steps_of_one(alone, tmp_path):
    worker = "--gin_param=ShardStream.workers = 1"
    shown = run(2, tmp_path, "--steps=2", worker)
    assert "2 processes, each a copy of the weights, cpu, networks in fp64" in shown
    run(1, tmp_path, "--steps=4", worker)
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
def test_one_process_then_two_with_shards_and_micro_batches_take_the_steps_of_one(alone, tmp_path):
    run(1, tmp_path, "--steps=2", "--gin_param=Experiment.accumulation = 4")
    shown = run(2, tmp_path, "--steps=4", "--parallel=fsdp", "--gin_param=Experiment.accumulation = 2")
    assert "resumed from step 2 of 4" in shown
    assert_same_run(tmp_path, alone)
    assert (tmp_path / "samples" / "step_00000004.png").read_bytes() == (
        alone / "samples" / "step_00000004.png"
    ).read_bytes()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("batch_size = 5", "batch_size=5 is of all 2 processes together and must be a multiple of 2"),
        ("accumulation = 3", "accumulation=3 must divide the 4 samples that a process has of a step"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused(tmp_path, monkeypatch, line, message):
    lines = ["Experiment.batch_size = 8", f"Experiment.{line}", "Experiment.steps = 1", "Experiment.evaluator = None"]
    experiment = config.build(config.parse(["gin/mixture2d_scores.gin"], lines))
    monkeypatch.setattr(distributed, "ranks", lambda: 2)
    with pytest.raises(ValueError, match=message):
        trainer.train(experiment, workdir=tmp_path, device="cpu")


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_with_one_checkpoint(tmp_path):
    process = subprocess.Popen(
        command(2, f"--workdir={tmp_path}", "--steps=100000"),
        cwd=ROOT, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        metrics = tmp_path / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGUSR1)
        process.wait(120)
    finally:
        process.kill()
    (step,) = checkpoints.steps(tmp_path / "checkpoints")
    assert checkpoints.latest(tmp_path / "checkpoints")[0] == step >= 2
