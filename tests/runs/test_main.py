"""The command line: what each flag overrides, what a run leaves first, and one clear line for every mistake."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import create_autospec

import pytest
from absl.testing import flagsaver

from ratiograph import command_line, config
from ratiograph.training import checkpoints, logs, trainer
from ratiograph.training.checkpoint_manager import config_digest
from ratiograph.training.preemption import Preempted

ROOT = Path(__file__).resolve().parents[2]
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
    assert callable(arguments.pop("check_held"))
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
        r"error: out/config.gin: .*Adam\.lr is 0\.0002 there and 0\.5 here\. "
        r"Give another --workdir.*: --allow_change=Adam\.lr\n",
        error,
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


@pytest.mark.parametrize("allowed", ["Adam.lr", "Adam"])
def test_a_change_that_is_allowed_is_taken_and_recorded(main, capsys, allowed):
    main("--workdir=out")
    finished("out")
    change = ("--workdir=out", "--gin_param=Adam.lr=0.5")
    assert main(*change, "--allow_change=Adam.betas")[0] == 2
    assert main(*change, f"--allow_change={allowed}")[0] == 0
    assert main(*change)[0] == 0
    assert "Adam.lr = 0.5\n" in Path("out/config.gin").read_text()
    found = [(entry["step"], entry["changes"]) for entry in logs.read_history(Path("out"))]
    assert found == [(0, {}), (10, {"Adam.lr": ["0.0002", "0.5"]}), (10, {})]
    page = Path("out/report.html").read_text()
    assert "<p>from step 10: Adam.lr 0.0002 → 0.5</p>" in page
    assert main("--workdir=out", "--allow_change=Adm.lr")[0] == 2
    assert (
        "--allow_change=Adm.lr: neither this configuration nor the run's has such a binding" in capsys.readouterr().err
    )


def test_a_component_may_change_to_another(main, capsys):
    main("--workdir=out", "--gin_param=LogNormalSigma.mean=-1.0")
    finished("out")
    change = ("--workdir=out", "--gin_param=DenoiserTraining.times=@KarrasIndex()")
    assert main(*change)[0] == 2
    allowed = re.findall(r"--allow_change=(\S+)", capsys.readouterr().err)
    assert "DenoiserTraining.times" in allowed
    assert any(name.startswith("LogNormalSigma.") for name in allowed)
    names = ("DenoiserTraining.times", "LogNormalSigma", "KarrasIndex")
    assert main(*change, *(f"--allow_change={name}" for name in names))[0] == 0


def test_a_change_that_ends_before_a_checkpoint_leaves_no_trace(main, monkeypatch):
    main("--workdir=out")
    finished("out")
    before = Path("out/config.gin").read_bytes(), Path("out/history.jsonl").read_bytes()

    def refused(*_, **__):
        raise ValueError("a checkpoint of another graph")

    monkeypatch.setattr(trainer, "train", refused)
    change = ("--workdir=out", "--gin_param=Adam.lr=0.5", "--allow_change=Adam.lr")
    assert main(*change)[0] == 1
    assert (Path("out/config.gin").read_bytes(), Path("out/history.jsonl").read_bytes()) == before

    def saved(*_, check_held, **__):
        check_held()
        raise ValueError("the disk is full")

    monkeypatch.setattr(trainer, "train", saved)
    assert main(*change)[0] == 1
    assert "Adam.lr = 0.5\n" in Path("out/config.gin").read_text()
    assert [entry["changes"] for entry in logs.read_history(Path("out"))] == [{}, {"Adam.lr": ["0.0002", "0.5"]}]


@pytest.mark.parametrize("name", ["config.gin", "report.html", "student.safetensors", "samples/step_00000000.png"])
def test_a_stranger_s_file_is_not_written_over(main, capsys, name):
    path = Path("theirs") / name
    path.parent.mkdir(parents=True)
    path.write_text("theirs\n")
    assert main("--workdir=theirs")[0] == 2
    assert f"{path} is there already, and theirs is no run's folder" in capsys.readouterr().err
    assert [p for p in Path("theirs").rglob("*") if p.is_file()] == [path]
    path.rename("theirs/slurm-7.out")
    assert main("--workdir=theirs")[0] == 0


def test_a_folder_is_a_run_s_without_its_lock(main):
    main("--workdir=out")
    Path("out/.lock").unlink()
    assert main("--workdir=out")[0] == 0


@pytest.mark.parametrize("text", [None, b"", b"\x00" * 64, b"Adam.lr = 0.5"])
def test_where_the_configuration_is_lost_the_checkpoint_s_digest_decides(main, capsys, text):
    main("--workdir=out")
    saved = Path("out/config.gin")
    whole = saved.read_bytes()
    digest = config_digest(whole.decode())
    checkpoints.save(Path("out/checkpoints"), 3, {"step": 3, "task": {}, "run": {"config": digest}})
    saved.unlink() if text is None else saved.write_bytes(text)
    assert main("--workdir=out", "--gin_param=Adam.lr=0.5")[0] == 2
    assert "out/config.gin is lost or torn, and the checkpoint of step 3 was made with" in capsys.readouterr().err
    assert main("--workdir=out")[0] == 0
    assert saved.read_bytes() == whole


def test_other_files_in_the_folder_of_checkpoints_are_left_alone(main):
    main("--workdir=out")
    path = finished("out")
    for name in ("step_best.pt", "step_00000090 (copy).pt"):
        path.with_name(name).write_bytes(b"")
    assert main("--workdir=out")[0] == 0


def test_temporaries_of_ended_processes_are_removed_and_others_stay(main):
    gone = subprocess.Popen(["true"])
    gone.wait()
    here = Path("out/samples")
    here.mkdir(parents=True)
    left = [Path(f"out/.student.safetensors.{gone.pid}.tmp"), here / f".step_00000002.png.{gone.pid}.tmp"]
    kept = [here / f".step_00000002.png.{os.getppid()}.tmp", here / ".notes.tmp"]
    for path in left + kept:
        path.write_bytes(b"")
    assert main("--workdir=out")[0] == 0
    assert [path.exists() for path in left + kept] == [False, False, True, True]


def test_loader_settings_may_change(main):
    main("--workdir=out")
    finished("out")
    lines = [f"--gin_param=ShardStream.{line}" for line in ("workers=1", "prefetch=2", "memory_megabytes=8")]
    assert main("--workdir=out", *lines)[0] == 0
    assert main("--workdir=out", "--gin_param=ShardStream.shuffle_buffer=7")[0] == 2


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
