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

from ratiograph import checkpoints

ROOT = Path(__file__).resolve().parents[1]
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


def test_two_processes_then_one_take_the_steps_of_one(tmp_path):
    run(1, tmp_path / "one", "--steps=4")
    shown = run(2, tmp_path / "two", "--steps=2", "--gin_param=ShardStream.workers = 1")
    assert "2 processes, cpu, networks in fp64" in shown
    run(1, tmp_path / "two", "--steps=4", "--gin_param=ShardStream.workers = 1")
    expected, found = networks(tmp_path / "one", 4), networks(tmp_path / "two", 4)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=name)
    lines = [
        [json.loads(line) for line in (tmp_path / w / "metrics.jsonl").read_text().splitlines()] for w in ("one", "two")
    ]
    for one, two in zip(*lines, strict=True):
        assert one["loss/student_score"] == pytest.approx(two["loss/student_score"], rel=1e-6)
        assert one["loss/ratio"] == pytest.approx(two["loss/ratio"], rel=1e-6)
    assert (tmp_path / "two" / "student.safetensors").is_file()


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


def test_a_batch_that_the_processes_cannot_share_is_refused(tmp_path):
    done = subprocess.run(
        command(2, f"--workdir={tmp_path}", "--batch_size=5"), cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "batch_size=5 is of all 2 processes together and must be a multiple of 2" in done.stderr
