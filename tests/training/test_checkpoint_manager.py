"""checkpoint_manager.py: what is kept, what is written behind the run's back, and what a failed write does."""

import itertools
import json
import subprocess
import threading
from contextlib import suppress

import pytest
import torch

from ratiograph import config
from ratiograph.config.tree import Node
from ratiograph.training import checkpoints, trainer
from ratiograph.training.checkpoint_manager import CheckpointManager, check_graph, config_digest, graph_nodes


def task(step, size=64):
    return {"weight": torch.full((size,), float(step)), "name": "x"}


def save(manager, step, **named):
    manager.save(step, task(step, **named), {"samples": 4 * step})
    manager.wait()


def test_the_last_k_every_nth_and_the_best_are_kept(tmp_path):
    metrics = {10: 5.0, 20: 2.0, 30: 3.0, 40: 4.0, 50: 2.0, 60: 9.0, 70: 8.0, 80: 7.0}
    with CheckpointManager(tmp_path, keep_last=2, keep_every=30, best_metric="evaluation/x") as manager:
        improved = []
        for step, value in metrics.items():
            improved.append(manager.improves(step, {"evaluation/x": value}))
            save(manager, step)
    assert improved == [True, True, *[False] * 6]
    assert checkpoints.steps(tmp_path) == [20, 30, 60, 70, 80]


def test_the_best_survives_a_resume_and_is_told(tmp_path):
    with CheckpointManager(tmp_path, keep_last=1, best_metric="evaluation/x") as manager:
        for step, value in ((10, 5.0), (20, 2.0), (30, 3.0)):
            manager.improves(step, {"evaluation/x": value})
            save(manager, step)
    with CheckpointManager(tmp_path, keep_last=1, best_metric="evaluation/x") as manager:
        assert manager.latest()[0] == 30
        assert manager.best == (20, 2.0)
        assert not manager.improves(40, {"evaluation/x": 2.5})
        save(manager, 40)
        assert checkpoints.steps(tmp_path) == [20, 40]
        assert manager.improves(50, {"evaluation/x": 1.5})
        save(manager, 50)
    assert checkpoints.steps(tmp_path) == [50]
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 50, "evaluation/x": 1.5}


def test_a_metric_that_the_evaluator_does_not_give_is_named():
    manager = CheckpointManager("nowhere", best_metric="evaluation/fid")
    with pytest.raises(ValueError, match=r"best_metric='evaluation/fid'.*evaluation/mmd, evaluation/recall"):
        manager.improves(1, {"evaluation/mmd": 1.0, "evaluation/recall": 0.5})
    assert not manager.improves(1, {})


def test_what_is_written_is_the_state_at_the_moment_of_saving(tmp_path, monkeypatch):
    """The run goes on while the thread writes; tensors that occur twice are written once."""
    write, go = checkpoints.save, threading.Event()
    monkeypatch.setattr(checkpoints, "save", lambda *a, **k: go.wait(10) and write(*a, **k))
    weight = torch.arange(100_000.0)
    state = {"first": weight, "second": {"again": weight, "view": weight[10:]}, "list": [weight, (1, None)]}
    with CheckpointManager(tmp_path) as manager:
        manager.save(3, state, {})
        weight.mul_(-1)
        go.set()
        manager.wait()
        step, found = manager.latest()
    expected = torch.arange(100_000.0)
    assert (step, found["task"]["list"][1]) == (3, (1, None))
    for tensor in (found["task"]["first"], found["task"]["second"]["again"], found["task"]["list"][0]):
        assert torch.equal(tensor, expected)
    assert torch.equal(found["task"]["second"]["view"], expected[10:])
    assert (tmp_path / "step_00000003.pt").stat().st_size < 2.1 * 400_000  # the weight and its view, not four copies


def test_saves_do_not_overlap(tmp_path, monkeypatch):
    running, most = [], []
    write = checkpoints.save

    def counted(*arguments):
        running.append(1)
        most.append(len(running))
        threading.Event().wait(0.05)
        running.pop()
        return write(*arguments)

    monkeypatch.setattr(checkpoints, "save", counted)
    with CheckpointManager(tmp_path) as manager:
        for step in range(1, 6):
            manager.save(step, task(step), {})
    assert most == [1] * 5
    assert checkpoints.steps(tmp_path) == [4, 5]


def test_what_cannot_be_saved_is_refused_by_the_call_itself(tmp_path):
    with (
        CheckpointManager(tmp_path) as manager,
        pytest.raises(ValueError, match=r"state\['task'\]\['f'\] is a builtins"),
    ):
        manager.save(1, {"f": print}, {})


def mount(folder, *options):
    """Mounts a small tmpfs, or skips the test where that is not allowed."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    """A file system of 2 MiB."""
    mount(tmp_path / "disk", "-o", "size=2M")
    yield tmp_path / "disk"
    subprocess.run(["umount", tmp_path / "disk"], check=True)


def test_a_full_disk_is_told_at_the_next_step_and_the_earlier_checkpoint_is_intact(disk):
    with CheckpointManager(disk / "checkpoints") as manager:
        save(manager, 100, size=200_000)
        manager.save(200, task(200, size=400_000), {})
        manager._thread.join()
        with pytest.raises(ValueError, match=r"cannot write .*step_00000200\.pt: No space left on device.*intact"):
            manager.poll()
        assert [p.name for p in (disk / "checkpoints").glob("*.pt")] == ["step_00000100.pt"]
        assert not list((disk / "checkpoints").glob(".*"))
        step, state = manager.latest()
        assert (step, state["task"]["weight"][0]) == (100, 100)
        save(manager, 200, size=50_000)  # once there is room
        assert manager.latest()[0] == 200


def test_a_run_on_a_disk_that_fills_up_ends_cleanly_and_goes_on_when_there_is_room(disk, tmp_path):
    def ring(workdir, fill_at=None):
        torch.manual_seed(0)
        values = ["batch_size = 8", "checkpoint_every = 2", "log_every = 100", "evaluator = None"]
        lines = ["MLP.width = 8", *(f"Experiment.{value}" for value in values)]
        experiment = config.build(config.parse(["gin/mixture2d_scores.gin"], lines, {"Experiment.steps": 8}))
        step, taken = experiment.task.step, itertools.count(1)

        def filling(*arguments):
            if next(taken) == fill_at:
                with suppress(OSError), open(disk / "other", "wb", buffering=0) as file:
                    while file.write(b"x" * 4096):
                        pass
            return step(*arguments)

        experiment.task.step = filling
        trainer.train(experiment, workdir=workdir, device="cpu")

    ring(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"cannot write .*: No space left on device.*the same command continues"):
        ring(disk / "run", fill_at=5)
    # The checkpoint of step 4 may have been in the making.
    assert checkpoints.steps(disk / "run" / "checkpoints") in ([2], [2, 4])
    (disk / "other").unlink()
    ring(disk / "run")
    ends = [checkpoints.latest(folder / "checkpoints") for folder in (tmp_path / "whole", disk / "run")]
    assert [step for step, _ in ends] == [8, 8]
    students = [state["task"]["networks"]["student"] for _, state in ends]
    for name, value in students[0].items():
        assert torch.equal(value, students[1][name]), name


def test_a_read_only_disk_is_told_and_the_earlier_checkpoint_is_intact(disk):
    manager = CheckpointManager(disk / "checkpoints")
    save(manager, 100)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    manager.save(200, task(200), {})
    with pytest.raises(ValueError, match=r"Read-only file system.*earlier files are intact"):
        manager.wait()
    assert manager.latest()[0] == 100


def test_leaving_raises_what_the_last_write_met(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"), CheckpointManager(tmp_path / "file") as manager:
        manager.save(1, task(1), {})


def test_graph_nodes_blame_the_node_that_differs():
    def node(name, cls, parameters=0, *children):
        return Node(name, cls, children=children, parameters=parameters)

    here = node("task", "T", 30, node("student", "OneStep", 30, node("network", "MLP", 30)), node("w", "KL"))
    there = node("task", "T", 20, node("student", "OneStep", 20, node("network", "MLP", 20)), node("r", "SBA"))
    nodes = graph_nodes(here)
    assert nodes == {"student": "OneStep", "student.network": "MLP with 30 weights of its own", "w": "KL"}
    check_graph(nodes, dict(nodes), "x")
    expected = (
        "run/checkpoints is a checkpoint of another graph: student.network is MLP with 30 weights of its own here and "
        "MLP with 20 weights of its own there; w is KL here and absent there; r is absent here and SBA there. "
    )
    with pytest.raises(ValueError, match="another graph") as error:
        check_graph(nodes, graph_nodes(there), "run/checkpoints")
    assert str(error.value).startswith(expected)


def test_the_configuration_s_digest_ignores_what_concerns_the_run_alone():
    assert config_digest("") == ""
    one = config_digest("Experiment.steps = 5\nAdam.lr = 0.1\n")
    assert config_digest("Experiment.steps = 9\nAdam.lr = 0.1\n") == one
    assert config_digest("Experiment.steps = 9\nAdam.lr = 0.2\n") != one
