"""Evaluating a finished run once more gives what the run itself found, and any metric that it did not know."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ratiograph import config
from ratiograph.reports.run_and_report import run_and_report

ROOT = Path(__file__).resolve().parents[2]
LINES = [
    "Experiment.steps = 2",
    "Experiment.seed = 5",
    "Experiment.precision = 'fp32'",
    "MixtureEvaluator.samples = 50",
    "MixtureEvaluator.repeats = 2",
]


def tool(*flags):
    command = [sys.executable, ROOT / "tools/evaluate_run.py", *flags]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run of two steps."""
    workdir = tmp_path_factory.mktemp("run")
    cfg = config.parse([str(ROOT / "gin/mixture2d_scores.gin")], LINES, {})
    config.save(cfg, workdir / "config.gin")
    torch.manual_seed(5)
    run_and_report(config.build(cfg), workdir=workdir, device="cpu")
    return workdir


def test_finds_what_the_run_found(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    found = json.loads((workdir / "evaluation.json").read_text())
    (workdir / "evaluation.json").write_text('{"rows": []}')  # as an evaluator of older metrics might have left it
    (workdir / "report.html").unlink()
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "before.json").unlink()
    done = tool(f"--workdir={workdir}", "--device=cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(workdir / "evaluation.json")
    again = json.loads((workdir / "evaluation.json").read_text())
    assert [row["name"] for row in again["rows"]] == ["fresh target samples", "student before training", "student"]
    assert again["rows"][1] != again["rows"][2]
    assert again == found
    assert "energy distance to the target" in (workdir / "report.html").read_text()


def test_another_document_leaves_the_run_alone(finished, tmp_path):
    earlier = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    out = tmp_path / "more.json"
    done = tool(f"--workdir={finished}", f"--out={out}", "--gin_param=MixtureEvaluator.samples = 70", "--device=cpu")
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == earlier
    assert {row["samples"] for row in json.loads(out.read_text())["rows"]} == {2 * 70}


def test_folder_of_no_run_is_one_clear_line(tmp_path):
    done = tool(f"--workdir={tmp_path}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path} has no config.gin: give the folder of a run as --workdir\n"
