"""doctor_checks.py: each thing that would end a run later is found beforehand, with its remedy; other runs pass."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import doctor_checks
from ratiograph import config
from ratiograph.training import checkpoints
from ratiograph.training.workdir import locked
from tools_here import call, tool

ROOT = Path(__file__).resolve().parents[1]
ASSETS = Path(importlib.util.find_spec("ratiograph").origin).parent / "assets"


def examine(workdir, *changes, gin="gin/mnist_sba.gin", device="cpu"):
    cfg = config.parse([gin], changes)
    with torch.device("meta"):
        experiment = config.build(cfg)
    return {finding.subject: finding for finding in doctor_checks.examine(experiment, workdir=workdir, device=device)}


def failing(found):
    return {subject: finding.found for subject, finding in found.items() if not finding.ok}


def test_a_run_that_would_start_passes_and_nothing_is_left(tmp_path):
    found = examine(tmp_path / "runs" / "a")
    assert failing(found) == {}
    assert list(tmp_path.iterdir()) == []
    assert "every tensor of EDM is there" in found["fit of teacher"].found
    assert "a sample 1x28x28" in found["data"].found
    # Two kept and one in the making.
    assert "at most 3 checkpoints of" in found["disk space"].found


@pytest.mark.parametrize(
    ("change", "subject", "message"),
    [
        ("TEACHER = 'nowhere.safetensors'", "weights of task.student.denoiser", "no weights at nowhere.safetensors"),
        ("UNet.channels = 32", "fit of teacher", "does not fit EDM: network.* has shape"),
        ("DATA = 'no-{0..3}.tar'", "data", "4 of 4 shards do not exist, the first is no-0.tar"),
        ("ShardStream.resolution = 32", "data", "28x28"),
        (
            "UNet.resolution = 32",
            "data",
            "the data's samples are 1x28x28, and student.denoiser (UNet) is for 1x32x32: configure the network",
        ),
    ],
)
def test_what_would_fail_is_named(tmp_path, change, subject, message):
    found = failing(examine(tmp_path, change))
    assert subject in found
    assert message.split(".*")[0] in found[subject]


def test_a_torn_weight_file_is_found(tmp_path):
    path = tmp_path / "teacher.safetensors"
    shutil.copy(ASSETS / "mnist_teacher.safetensors", path)
    assert failing(examine(tmp_path / "run", f"TEACHER = '{path}'")) == {}
    path.write_bytes(path.read_bytes()[:-1000])
    found = failing(examine(tmp_path / "run", f"TEACHER = '{path}'"))
    assert sorted(found) == ["fit of student.denoiser", "fit of student_score", "fit of teacher"]
    assert all("is not a whole safetensors file" in text for text in found.values())


def test_a_disk_that_is_too_small_is_found(tmp_path, monkeypatch):
    with torch.device("meta"):
        task = config.build(config.parse(["gin/mnist_sba.gin"])).task
    trained = sum(p.numel() * 4 for p in task.parameters() if p.requires_grad)
    # 350 steps with one kept every 100, the last two, one in the making, and the final weights.
    wanted = 4 * trained * (3 + 3) + trained
    for free, ok in ((wanted - 1, False), (wanted, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        finding = examine(tmp_path, "Experiment.keep_every = 100")["disk space"]
        assert finding.ok is ok, finding
    assert finding.found.endswith(f"at most 6 checkpoints of {4 * trained / 1e6:,.1f} MB")


def test_a_workdir_in_use_or_of_no_use_is_found(tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file: choose another --workdir" in failing(examine(tmp_path / "file" / "run"))["workdir"]
    script = (
        "from ratiograph.training.workdir import locked\n"
        + f"with locked({str(tmp_path)!r}):\n    print(flush=True)\n    input()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        found = failing(examine(tmp_path))["workdir"]
        other.stdin.close()
    assert found.startswith(f"another run is using {tmp_path}: process {other.pid}")


def test_a_run_that_would_go_on_says_from_where(tmp_path):
    checkpoints.save(tmp_path / "checkpoints", 70, {"x": torch.zeros(3)})
    assert examine(tmp_path)["workdir"].found.endswith("to go on from step 70")
    with locked(tmp_path):
        pass
    (tmp_path / "checkpoints" / "step_00000070.pt").write_bytes(b"torn")
    assert "every checkpoint" in failing(examine(tmp_path))["workdir"]


def test_a_warm_start_without_a_run_is_found(tmp_path):
    lines = ["Distillation.warm_start = @WarmStart()", f"WarmStart.run = '{tmp_path}/stage1'"]
    expected = f"{tmp_path}/stage1 holds no checkpoint: run what it is to start from first"
    assert failing(examine(tmp_path / "run", *lines)) == {f"warm start from {tmp_path}/stage1": expected}
    checkpoints.save(tmp_path / "stage1" / "checkpoints", 5, {})
    assert failing(examine(tmp_path / "run", *lines)) == {}


def test_a_device_that_is_not_there_is_found(tmp_path):
    found = examine(tmp_path, gin="gin/mixture2d_scores.gin", device="gpu0")
    assert failing(found) == {"device": "--device=gpu0 is no device: give auto, cpu, cuda or cuda:N"}
    assert found["data"].found == "none is needed"


def test_the_command_ends_with_1_where_something_would_fail(tmp_path, capsys):
    def run(*options):
        with tool("doctor") as command:
            code = call(command, f"--workdir={tmp_path / 'run'}", "--device=cpu", *options)
        return code, capsys.readouterr().out

    code, told = run("--gin_file=gin/mixture2d_scores.gin")
    assert code == 0
    assert told.endswith("the run would start\n")
    code, told = run("--gin_file=gin/mnist_sba.gin", "--teacher=x")
    assert code == 1
    assert "fails  weights of task.student.denoiser: no weights at x: give the path" in told
    code, told = run("--gin_file=gin/mnist_sba.gin", "--gin_param=SBA.lamb=1")
    assert (code, told.count("\n")) == (1, 2)
    assert told.startswith("fails  configuration: flag --gin_param 'SBA.lamb=1': SBA has no parameter 'lamb'")
