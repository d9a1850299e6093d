"""The command line: what each flag overrides, what a run leaves first, and one clear line for every mistake."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import create_autospec

import pytest
from absl.testing import flagsaver

from ratiograph import command_line, config
from ratiograph.training import trainer
from ratiograph.training.preemption import Preempted

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "launch" / "main.py"

RUN = """
DATA = 'mnist'
Experiment.task = @DenoiserTraining()
Experiment.data = @ShardStream()
Experiment.steps = 20
Experiment.batch_size = 4
ShardStream.urls = %DATA
DenoiserTraining.denoiser = @EDM()
EDM.network = @UNet()
UNet.channels = 16
DenoiserTraining.noising = @VarianceExploding()
DenoiserTraining.times = @LogNormalSigma()
DenoiserTraining.optimizer = @Adam()
DenoiserTraining.ema = @EMA()
DenoiserTraining.sampler = @HeunSampler()
"""

spec = importlib.util.spec_from_file_location("launch_main", SCRIPT)
launch = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launch)


@pytest.fixture
def main(tmp_path, monkeypatch):
    """main(*flags) -> (exit code, calls of the trainer) with run.gin in the current folder and a trainer that notes."""
    monkeypatch.chdir(tmp_path)
    Path("run.gin").write_text(RUN)
    calls = []
    noted = create_autospec(trainer.train, side_effect=lambda experiment, **named: calls.append((experiment, named)))
    monkeypatch.setattr(trainer, "train", noted)

    def main(*flags, gin_file="run.gin"):
        argv = ["main.py", *([f"--gin_file={gin_file}"] if gin_file else []), *flags]
        with flagsaver.flagsaver():
            rest = launch.FLAGS(argv)[1:]
            code_of = command_line.configuration_code
            return command_line.call(launch.main, rest, code_of=code_of, interrupted=launch.INTERRUPTED), calls

    return main


def finished(folder, step=10):
    """A checkpoint's file, as a run would have left it."""
    path = Path(folder) / "checkpoints" / f"step_{step:08d}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"checkpoint")
    return path


def test_flags_override_the_file_and_the_gin_lines(main):
    code, [(experiment, arguments)] = main(
        "--steps=7", "--seed=3", "--batch_size=5", "--precision=fp32", "--data=mnist-heldout", "--device=cpu",
        "--gin_param=Experiment.steps=9", "--gin_param=Adam.lr=0.5", "--workdir=out",
    )  # fmt: skip
    assert code == 0
    assert (experiment.steps, experiment.seed, experiment.batch_size, experiment.precision) == (7, 3, 5, "fp32")
    assert experiment.data.urls == "mnist-heldout"
    assert experiment.task.optimizer.lr == 0.5
    assert arguments == {"workdir": Path("out"), "device": "cpu", "mode": "auto"}


def test_workdir_is_named_after_the_last_file_and_holds_the_configuration(main):
    Path("second.gin").write_text("Adam.lr = 0.25\n")
    code, [(experiment, arguments)] = main("--gin_file=second.gin")
    assert (code, arguments["workdir"]) == (0, Path("runs/second"))
    again = config.build(config.parse(["runs/second/config.gin"]))
    assert again.task.optimizer.lr == experiment.task.optimizer.lr == 0.25
    assert again.steps == 20


def test_rerunning_resumes_and_more_steps_extend(main):
    assert main("--workdir=out")[0] == 0
    finished("out")
    assert main("--workdir=out")[0] == 0
    assert main("--workdir=out", "--steps=40")[0] == 0
    assert "Experiment.steps = 40" in Path("out/config.gin").read_text()


def test_another_configuration_does_not_touch_a_run(main, capsys):
    main("--workdir=out")
    kept = finished("out")
    before = Path("out/config.gin").read_bytes()
    code, calls = main("--workdir=out", "--gin_param=Adam.lr=0.5")
    assert (code, len(calls)) == (2, 1)
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"error: out/config.gin: .*Adam\.lr is 0\.0002 there and 0\.5 here\. Give another --workdir.*\n", error
    )
    assert (Path("out/config.gin").read_bytes(), kept.read_bytes()) == (before, b"checkpoint")


def test_what_no_step_depends_on_may_change(main):
    main("--workdir=out")
    finished("out")
    changes = ("log_every=7", "checkpoint_every=9", "keep_every=18", "max_bad_steps=3", "hang_minutes=1.5")
    assert main("--workdir=out", *(f"--gin_param=Experiment.{change}" for change in changes))[0] == 0
    # As a folder of before these values existed.
    saved = Path("out/config.gin")
    saved.write_text(re.sub(r"Experiment\.(keep_every|hang_minutes).*\n", "", saved.read_text()))
    assert main("--workdir=out")[0] == 0


def test_a_folder_in_use_is_left_alone(main, capsys):
    main("--workdir=out")
    before = Path("out/config.gin").read_bytes()
    script = "from ratiograph.training.workdir import locked\nwith locked('out'):\n    print(flush=True)\n    input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        code, calls = main("--workdir=out", "--gin_param=Adam.lr=0.5")
        other.stdin.close()
    assert (code, len(calls)) == (1, 1)
    assert capsys.readouterr().err.startswith(f"error: another run is using out: process {other.pid} on ")
    assert Path("out/config.gin").read_bytes() == before
    assert main("--workdir=out")[0] == 0


@pytest.mark.parametrize(("error", "code"), [(Preempted("stopped by SIGTERM"), 75), (KeyboardInterrupt(), 130)])
def test_a_run_that_was_ended_says_how_to_go_on(main, monkeypatch, capsys, error, code):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(trainer, "train", fail)
    assert main()[0] == code
    assert re.match("stopped by SIGTERM$|ended at once; the same command goes on", capsys.readouterr().err)


def test_a_run_without_a_checkpoint_may_change(main):
    main("--workdir=out")
    assert main("--workdir=out", "--gin_param=Adam.lr=0.5")[0] == 0
    assert "Adam.lr = 0.5" in Path("out/config.gin").read_text()


def test_noresume_refuses_a_folder_with_results(main, capsys):
    assert main("--workdir=out", "--noresume")[0] == 0
    finished("out")
    code, calls = main("--workdir=out", "--noresume")
    assert (code, len(calls)) == (2, 1)
    assert "out already holds checkpoints/step_00000010.pt" in capsys.readouterr().err


def test_dry_run_prints_the_graph_and_leaves_nothing(main, capsys):
    code, calls = main("--dry_run", "--data=no/such/file.tar")
    assert (code, calls) == (0, [])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "experiment: Experiment  steps=20  batch_size=4"
    assert any(re.search(r"network: UNet .* [\d.]+ k parameters", line) for line in lines)
    assert [p.name for p in Path().iterdir()] == ["run.gin"]


def test_a_dry_run_takes_a_gpu_that_is_elsewhere_and_no_device_that_is_nowhere(main, capsys):
    assert main("--dry_run", "--device=cuda:3")[0] == 0
    assert main("--dry_run", "--device=gpu")[0] == 1
    assert "--device=gpu is no device: give auto, cpu, cuda or cuda:N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gin_param=Adam.lrr=1"], "flag --gin_param 'Adam.lrr=1': Adam has no parameter 'lrr'. Did you mean 'lr'?"),
        (
            ["--precision=fp23"],
            "flag --precision: Experiment.precision takes 'auto' or 'fp32' or 'bf16' or 'fp64', not 'fp23'",
        ),
        (["--teacher=x.safetensors"], "flag --teacher: this configuration has no macro TEACHER"),
        (["--gin_param=Adam.lr=-1"], "flag --gin_param 'Adam.lr=-1': Adam.lr takes a finite number above 0, not -1"),
        (["--gin_file=rnu.gin"], "flag --gin_file: there is no file 'rnu.gin'. Did you mean 'run.gin'?"),
        (["other.gin"], "'other.gin' is no flag. Did you mean --gin_file=other.gin?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(flags, message, main, capsys):
    code, calls = main(*flags)
    assert (code, calls) == (2, [])
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not Path("runs").exists()


def test_no_file_says_which_flag_is_missing(main, capsys):
    assert main(gin_file="")[0] == 2
    assert "--gin_file=gin/mnist_sba.gin" in capsys.readouterr().err


def test_failed_run_is_exit_code_1_with_a_traceback_on_request(main, monkeypatch, capsys):
    def fail(*_, **__):
        raise ValueError("shard 3 is damaged")

    monkeypatch.setattr(trainer, "train", fail)
    assert main()[0] == 1
    line = fail.__code__.co_firstlineno + 1
    assert capsys.readouterr().err == f"error: {__file__}:{line} (in fail): shard 3 is damaged\n"
    assert main("--verbose_errors")[0] == 1
    assert "Traceback" in capsys.readouterr().err


def test_help_teaches_without_loading_torch():
    done = subprocess.run([sys.executable, "-X", "importtime", SCRIPT, "--help"], capture_output=True, text=True)
    for words in ("--gin_file=gin/mnist_sba.gin", "Experiment.steps", "macro DATA", "macro TEACHER", "--noresume"):
        assert words in done.stdout
    assert " torch\n" not in done.stderr


def test_script_runs_from_any_folder(tmp_path):
    command = [sys.executable, SCRIPT, "--gin_file=gin/mnist_teacher.gin", "--dry_run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("experiment: Experiment  steps=")
    assert list(tmp_path.iterdir()) == []


def test_a_run_beyond_the_steps_asked_for_keeps_its_configuration(main, capsys):
    assert main("--workdir=here")[0] == 0
    saved = Path("here/config.gin").read_text()
    Path("here/checkpoints").mkdir()
    Path("here/checkpoints/step_00000020.pt").write_bytes(b"")
    assert main("--workdir=here", "--steps=20")[0] == 0
    assert main("--workdir=here", "--steps=19")[0] == 2
    assert "here is at step 20 already, beyond the 19 asked for: ask for --steps=20 or more" in capsys.readouterr().err
    assert Path("here/config.gin").read_text() == saved


def test_a_misspelt_flag_ends_with_the_code_of_a_wrong_command_line(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.parse_flags(["main.py", "--stesp=3"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: Unknown command line flag 'stesp'. Did you mean: steps ? (--help lists all)\n"
    )
