"""The job scripts on a real SLURM of one node: asked to end a run saves, is requeued, goes on and completes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ratiograph.training import checkpoints
from slurm_cluster import Cluster, missing

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "launch" / "slurm"
LINES = ["Experiment.evaluator = None", "Experiment.log_every = 5", "Experiment.checkpoint_every = 1000"]
LINES += ["Experiment.batch_size = 8", "MLP.width = 8", "student/Adam.cooldown = None"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as cluster:
        cluster.environment |= {"PYTHON": sys.executable}
        yield cluster


def flags(workdir, steps, precision="fp32"):
    lines = ["--gin_file=gin/mixture2d_scores.gin", *(f"--gin_param={line}" for line in LINES)]
    return [*lines, f"--steps={steps}", "--seed=7", f"--workdir={workdir}", "--device=cpu", f"--precision={precision}"]


def submit(cluster, script, workdir, *options, steps=200, precision="fp32"):
    output = workdir.with_suffix(".out")
    wanted = flags(workdir, steps, precision)
    return cluster.submit(f"--output={output}", *options, SCRIPTS / script, *wanted, cwd=ROOT), output


def under_way(cluster, job, workdir, output):
    """Returns once the job has logged a step."""

    def logged():
        assert cluster.job(job)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"), output.read_text()
        return steps_logged(workdir)

    cluster.until(logged, 180)


def steps_logged(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.mark.parametrize("script", ["single_node.sbatch", "multi_node.sbatch"])
def test_asked_to_end_a_run_is_requeued_and_completes(cluster, tmp_path, script):
    workdir = tmp_path / "run"
    job, output = submit(cluster, script, workdir, "--nodes=1")
    under_way(cluster, job, workdir, output)
    cluster("scancel", "--batch", "--signal=USR1", job)
    ended = cluster.ended(job)
    text = output.read_text()
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("COMPLETED", "1", "0:0"), text
    stopped = int(text.split("stopped by SIGUSR1 after step ")[1].split()[0])
    assert 0 < stopped < 200
    assert f"resumed from step {stopped} of 200" in text
    assert text.count("networks in fp32") == 1
    assert f"done: {workdir / 'report.html'}" in text
    assert checkpoints.steps(workdir / "checkpoints") == [stopped, 200]
    assert steps_logged(workdir)[-1] == 200
    assert "Experiment.seed = 7\n" in (workdir / "config.gin").read_text()


def test_a_signal_to_the_run_itself_requeues_too(cluster, tmp_path):
    """As where a cluster signals the steps of a job and not its script."""
    workdir = tmp_path / "run"
    job, output = submit(cluster, "multi_node.sbatch", workdir, "--nodes=1")
    under_way(cluster, job, workdir, output)
    cluster("scancel", "--signal=USR1", job)
    ended = cluster.ended(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output.read_text()


def test_two_tasks_of_srun_train_together_are_requeued_and_take_the_steps_of_one(cluster, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    command = [sys.executable, "launch/main.py", *flags(alone, 60, "fp64")]
    one = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert one.returncode == 0, one.stderr
    tasks = ["--nodes=1", "--ntasks-per-node=2"]
    job, output = submit(cluster, "multi_node.sbatch", together, *tasks, steps=60, precision="fp64")
    under_way(cluster, job, together, output)
    cluster("scancel", "--batch", "--signal=USR1", job)
    ended = cluster.ended(job)
    text = output.read_text()
    assert (ended["JobState"], ended["Restarts"], ended["NumTasks"]) == ("COMPLETED", "1", "2"), text
    assert text.count("2 processes, each a copy of the weights, cpu, networks in fp64") == 1
    stopped = int(text.split("stopped by SIGUSR1 after step ")[1].split()[0])
    assert text.count(f"resumed from step {stopped} of 60") == 1
    found, expected = networks(together, 60), networks(alone, 60)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=name)


def networks(workdir, step):
    done, state = checkpoints.latest(workdir / "checkpoints")
    assert done == step
    return {f"{node}.{key}": v for node, held in state["task"]["networks"].items() for key, v in held.items()}


def test_a_cancelled_run_saves_and_stays_cancelled(cluster, tmp_path):
    workdir = tmp_path / "run"
    job, output = submit(cluster, "single_node.sbatch", workdir, steps=100_000)
    under_way(cluster, job, workdir, output)
    cluster("scancel", job)
    ended = cluster.ended(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), output.read_text()
    text = cluster.until(lambda: "stopped by" in output.read_text() and output.read_text(), 30)
    stopped = int(text.split("stopped by SIGTERM after step ")[1].split()[0])
    assert checkpoints.steps(workdir / "checkpoints") == [stopped]


def test_a_run_that_fails_is_not_requeued(cluster, tmp_path):
    job, output = submit(cluster, "single_node.sbatch", tmp_path / "run", steps=0)
    ended = cluster.ended(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), output.read_text()
    assert "steps" in output.read_text()


def test_an_ablation_is_an_array_whose_interrupted_cell_resumes(cluster, tmp_path):
    vary = "--vary=student/Adam.lr = 0.001, 0.002, 0.003"
    lines = [f"--gin_param={line}" for line in LINES if "evaluator" not in line]
    lines += ["--gin_param=MixtureEvaluator.samples = 500", "--steps=100"]
    folder = tmp_path / "runs"
    command = [sys.executable, ROOT / "tools" / "ablate.py", "--gin_file=gin/mixture2d_scores.gin", vary, *lines]
    command += [f"--folder={folder}", "--device=cpu"]
    output = f"--sbatch=--output={tmp_path}/%A_%a.out"
    done = subprocess.run(
        [*command, "--slurm", output], cwd=ROOT, env=cluster.environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    job = done.stdout.split("job ")[1].split(":")[0]
    cells = [folder / f"student_Adam.lr={lr}" for lr in ("0.001", "0.002", "0.003")]
    cluster.until(lambda: steps_logged(cells[0]), 120)
    cluster("scancel", "--batch", "--signal=USR1", f"{job}_0")
    states = [cluster.ended(f"{job}_{index}") for index in range(3)]
    logs = [(cell / "log.txt").read_text() for cell in cells]
    assert [state["JobState"] for state in states] == ["COMPLETED"] * 3, logs
    assert [state["Restarts"] for state in states] == ["1", "0", "0"]
    assert ["resumed from step" in log for log in logs] == [True, False, False]
    assert [steps_logged(cell)[-1] for cell in cells] == [100] * 3
    table = subprocess.run([*command, "--table_only"], cwd=ROOT, capture_output=True, text=True)
    assert table.returncode == 0, table.stderr
    rows = json.loads((folder / "table.json").read_text())["rows"]
    assert [row["setting"]["student/Adam.lr"] for row in rows] == ["0.001", "0.002", "0.003"]
    for row, cell in zip(rows, cells, strict=True):
        measured = json.loads((cell / "evaluation.json").read_text())["rows"][-1]["energy_distance"]
        assert row["values"]["energy_distance"]["mean"] == measured
