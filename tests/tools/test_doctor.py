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
from tools_here import call, tool

ROOT = Path(__file__).resolve().parents[2]
ASSETS = Path(importlib.util.find_spec("ratiograph").origin).parent / "assets"


def examine(workdir, *changes, gin="gin/mnist_sba.gin", device="cpu", **more):
    found = doctor_checks.findings([gin], changes, {}, workdir=workdir, device=device, **more)
    return {finding.subject: finding for finding in found}


def failing(found):
    return {subject: finding.found for subject, finding in found.items() if not finding.ok}


def test_a_run_that_would_start_passes_and_nothing_is_left(tmp_path):
    found = examine(tmp_path / "runs" / "a")
    assert failing(found) == {}
    assert list(tmp_path.iterdir()) == []
    assert list(found)[1:] == [
        "configuration",
        "device",
        "memory",
        "loggers",
        "weights",
        "data",
        "workdir",
        "disk space",
    ]
    assert "64 samples 1x28x28" in found["data"].found
    assert " GB of networks, gradients, optimisers and averages; " in found["memory"].found
    # Two kept and one in the making.
    assert "at most 3 checkpoints of" in found["disk space"].found


@pytest.mark.parametrize(
    ("change", "subject", "message"),
    [
        ("TEACHER = 'nowhere.safetensors'", "files", "no weights at nowhere.safetensors"),
        ("UNet.channels = 32", "weights", "does not fit EDM: network.* has shape"),
        ("DATA = 'no-{0..3}.tar'", "files", "4 of 4 shards do not exist, the first is no-0.tar"),
        ("ShardStream.resolution = 32", "data", "28x28"),
        (
            "UNet.resolution = 32",
            "data",
            "the data's samples are 1x28x28, and student.denoiser (UNet) is for 1x32x32: configure the network",
        ),
        ("Experiment.accumulation = 7", "memory", "Experiment.accumulation=7 must divide the"),
        (
            "ShardStream.labels = True\nUNet.classes = 9",
            "data",
            "has the class label 9, and the networks know classes 0",
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
    assert list(found) == ["weights"]
    assert "is not a whole safetensors file" in found["weights"]


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


def test_a_folder_is_judged_as_a_launch_judges_it(tmp_path):
    run, strange = tmp_path / "run", tmp_path / "strange"
    checkpoints.save(run / "checkpoints", 70, {"x": torch.zeros(3), "run": {}})
    config.save(config.parse(["gin/mnist_sba.gin"]), run / "config.gin")
    assert examine(run)["workdir"].found.endswith("to go on from step 70")
    assert "finished: the command makes its page anew" in examine(run, "Experiment.steps = 70")["workdir"].found
    other = ["SBA.lam = 0.25"]
    assert "another configuration: SBA.lam " in failing(examine(run, *other))["workdir"]
    assert "step 70 with 1 changes" in examine(run, *other, allowed=["SBA.lam"])["workdir"].found
    assert "beyond the 60 asked for" in failing(examine(run, "Experiment.steps = 60"))["workdir"]
    (run / "checkpoints" / "step_00000070.pt").write_bytes(b"torn")
    assert "every checkpoint" in failing(examine(run))["workdir"]
    strange.mkdir()
    (strange / "report.html").write_text("mine")
    assert "is no run's folder" in failing(examine(strange))["workdir"]
    assert [path.name for path in strange.iterdir()] == ["report.html"]


def test_a_warm_start_without_a_run_is_found(tmp_path):
    lines = ["Distillation.warm_start = @WarmStart()", f"WarmStart.run = '{tmp_path}/stage1'"]
    expected = f"{tmp_path}/stage1 holds no checkpoint: run what it is to start from first"
    ((subject, found),) = failing(examine(tmp_path / "run", *lines)).items()
    assert subject == "files"
    assert found.endswith(f": {expected}")
    checkpoints.save(tmp_path / "stage1" / "checkpoints", 5, {})
    assert failing(examine(tmp_path / "run", *lines)) == {}


def test_a_device_that_is_not_there_is_found(tmp_path):
    found = examine(tmp_path, gin="gin/mixture2d_scores.gin", device="gpu0")
    assert set(failing(found)) == {"device", "memory"}
    assert "gpu0" in found["device"].found
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
    assert "fails  files: TEACHER = 'x' (flag --teacher; change it by --teacher=...): no weights at x. Give" in told
    code, told = run("--gin_file=gin/mnist_sba.gin", "--gin_param=SBA.lamb=1")
    assert (code, told.count("\n")) == (1, 3)
    assert told.splitlines()[1].startswith(
        "fails  configuration: flag --gin_param 'SBA.lamb=1': SBA has no parameter 'lamb'"
    )


def test_what_no_check_expects_is_one_line(tmp_path, monkeypatch):
    def check(experiment):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(doctor_checks, "check_encoders", check)
    assert failing(examine(tmp_path)) == {"data": "RuntimeError: first second"}


GIN = [path for path in sorted((ROOT / "gin").glob("*.gin")) if not path.name.startswith("sd15")]


@pytest.mark.parametrize("path", GIN, ids=lambda path: path.stem)
def test_every_shipped_run_whose_files_are_there_passes(path, tmp_path):
    assert failing(examine(tmp_path / "run", gin=str(path))) == {}


def test_a_folder_in_diffusers_format_passes_and_what_it_lacks_is_said_as_a_launch_says_it(tmp_path):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    import tiny_runs

    macros, gin = tiny_runs.material(tmp_path, "sd15"), "gin/sd15_reward_tilt.gin"
    lines = tiny_runs.bindings([gin], macros, steps=1)

    def launched():
        given = [f"--gin_file={gin}", f"--workdir={tmp_path / 'run'}", "--device=cpu"]
        command = [sys.executable, "launch/main.py", *given, *(f"--gin_param={line}" for line in lines)]
        return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)

    assert failing(examine(tmp_path / "run", *lines, gin=gin)) == {}
    done = launched()
    assert done.returncode == 0, done.stderr
    Path(macros["EMPTY_PROMPT"]).unlink()
    (Path(macros["TEACHER"]) / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    told = doctor_checks.findings([gin], lines, {}, workdir=tmp_path / "run", device="cpu")
    missing = [finding.found for finding in told if not finding.ok]
    assert len(missing) == 2
    assert "no autoencoder at Autoencoder.weights" in missing[0] + missing[1]
    assert "no file at EmptyPrompt.file" in missing[0] + missing[1]
    said = launched().stderr
    assert all(f"\n  {line}\n" in said for line in missing)
