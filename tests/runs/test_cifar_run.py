"""CIFAR-10 as a user runs it: an official teacher's names, shards, a shipped recipe at full network size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from official import official_state
from ratiograph.networks.architectures.edm import DDPMPP

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "launch/main.py"]


def run(*command: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, timeout=900)


def pictures(folder: Path, count: int) -> None:
    """Smooth coloured pictures in ten folders, one a class."""
    generator = np.random.default_rng(0)
    for k in range(count):
        small = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        path = folder / f"class{k % 10}" / f"{k:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC).save(path)


@pytest.mark.slow
def test_a_published_row_at_full_size_on_pictures_made_here(tmp_path, monkeypatch):
    monkeypatch.setenv("RATIOGRAPH_CACHE", str(tmp_path / "cache"))
    pictures(tmp_path / "pictures", 40)
    shards = run(
        sys.executable, "tools/make_shards.py", "folder", tmp_path / "pictures", tmp_path / "data",
        "--name=tiny", "--labels=folders", "--resolution=32", "--shards=1",
    )  # fmt: skip
    assert shards.returncode == 0, shards.stderr
    torch.manual_seed(0)
    network = DDPMPP(classes=10)
    torch.save(official_state(network), tmp_path / "teacher.pt")
    done = run(
        *LAUNCH, "--gin_file=gin/papers/f_distill/cifar10_jensen_shannon.gin", f"--workdir={tmp_path}/run",
        f"--teacher={tmp_path}/teacher.pt", f"--data={tmp_path}/data/tiny-000000.tar",
        "--steps=2", "--batch_size=2", "--gin_param=Experiment.log_every=1", "--gin_param=Experiment.preview_samples=4",
        "--gin_param=Experiment.teacher_evaluations=1",
        "--gin_param=Distillation.student_score_updates=1", "--gin_param=Distillation.ratio_updates=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert all(np.isfinite(value) for name, value in row.items() if name.startswith(("loss/", "gradient/")))
        # Four copies of 55.7M parameters in float32, Adam's two moments of two of them, gradients: over 2 GB.
        assert 1.5 < row["memory/peak_gb"] < 8
    assert rows[0]["gradient/student"] == 0  # teacher and student score are one network until the first update
    assert rows[1]["gradient/student"] > 0
    assert "memory" in done.stdout + done.stderr
    again = run(*LAUNCH, f"--gin_file={tmp_path}/run/config.gin", f"--workdir={tmp_path}/run", "--steps=3")
    assert again.returncode == 0, again.stderr
    assert "resumed from step 2" in again.stdout + again.stderr


def test_a_missing_teacher_and_missing_shards_are_one_line(tmp_path):
    recipe = "--gin_file=gin/papers/f_distill/cifar10_jensen_shannon.gin"
    small = [
        "--gin_param=DDPMPP.channels=16",
        "--gin_param=DDPMPP.blocks=1",
        "--gin_param=TeacherFeatureRatio.width=16",
    ]
    gone = run(*LAUNCH, recipe, *small, f"--workdir={tmp_path}/run", "--teacher=gone.pkl", "--batch_size=2")
    assert gone.returncode == 1
    first, teacher, shards = gone.stderr.strip().splitlines()
    assert first == "error: 2 things that this run reads are missing:"
    assert "no weights at gone.pkl. Give --teacher " in teacher
    assert "edm-cifar10-32x32-cond-vp.pkl" in teacher
    assert "10 of 10 shards do not exist, the first is data/cifar10/cifar10-000000.tar" in shards
