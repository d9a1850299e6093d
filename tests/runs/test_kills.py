"""SIGKILL at any instant, saves included: rerunning the same command gives the run that would have been, to the bit."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ratiograph.training import checkpoints

ROOT = Path(__file__).resolve().parents[2]

# Imports once and forks a process for every run, so that a run is under way within a fraction of a second. A line of
# JSON in: {"argv", "log", "folder", "after", "saves"}; one out: {"code", "saving", "seconds"}. A run is killed once
# ``after`` seconds have passed, counted from the moment when it began to write a checkpoint for the ``saves``-th time.
DRIVER = """
import importlib.util, json, os, signal, sys, time
from pathlib import Path
import torch
import torch.utils.tensorboard
from ratiograph import command_line, config
from ratiograph.training import trainer
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("launch_main", sys.argv[1])
launch = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launch)
config.parse(["gin/mixture2d_scores.gin"])

def child(order):
    log = os.open(order["log"], os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 3
    try:
        launch.FLAGS(order["argv"])
        code = command_line.call(launch.main, [])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

def saving(folder, pid):
    return os.path.isdir(folder) and any(name.endswith(f".{pid}.tmp") for name in os.listdir(folder))

for line in sys.stdin:
    order = json.loads(line)
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        child(order)
    deadline, ended, saves, inside = None, 0, 0, False
    while not ended:
        ended, status = os.waitpid(pid, os.WNOHANG)
        was_inside, inside = inside, saving(order["folder"], pid)
        saves += inside and not was_inside
        if saves >= order["saves"] and deadline is None and order["after"] is not None:
            deadline = (time.monotonic() if order["saves"] else started) + order["after"]
        if not ended and deadline is not None and time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            break
        time.sleep(5e-4)
    code = os.waitstatus_to_exitcode(status)
    found = {"code": code, "saving": saving(order["folder"], pid), "seconds": time.monotonic() - started}
    print(json.dumps(found), flush=True)
"""


class Runs:
    """Runs of one command, each in a process of its own that may be killed."""

    def __init__(self, steps):
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, ROOT / "launch" / "main.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        values = ["batch_size = 8", "log_every = 5", "checkpoint_every = 2", "evaluator = None"]
        lines = [*(f"Experiment.{value}" for value in values), "MLP.width = 8", "student/Adam.cooldown = None"]
        self.flags = [f"--gin_param={line}" for line in lines] + [f"--steps={steps}", "--device=cpu"]

    def run(self, workdir, after=None, saves=0):
        """What became of one run: code, whether a checkpoint was in the making, seconds, and its output."""
        log = workdir.with_suffix(".txt")
        log.write_text("")  # a run may be killed before it does that
        argv = ["main.py", "--gin_file=gin/mixture2d_scores.gin", *self.flags, f"--workdir={workdir}"]
        order = {"argv": argv, "log": str(log), "after": after, "saves": saves}
        order["folder"] = str(workdir / "checkpoints")
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline()) | {"output": log.read_text()}

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def records(workdir):
    """The lines of metrics.jsonl without what a clock or the process decides."""
    own = ("seconds", "rate/", "memory/", "data/")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(own)} for line in lines]


@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_again_and_again_a_run_ends_where_it_would_have(tmp_path, kills):
    rng, steps = random.Random(kills), 20 * kills
    runs, folder = Runs(steps), tmp_path / "killed"
    try:
        whole = runs.run(tmp_path / "whole")
        assert whole["code"] == 0, whole["output"]
        short = runs.run(folder, after=0.0, saves=1)["seconds"]  # until the first save; it counts as a kill
        done, in_saves, fresh, resumed = 1, 1, 0, []
        while done < kills:
            before = checkpoints.steps(folder / "checkpoints")
            saves = rng.choice([0, 0, 0, 1, 2, 4])
            found = runs.run(folder, after=rng.uniform(0, 0.01 if saves else 2 * short), saves=saves)
            assert found["code"] == -9, found["output"]
            done += 1
            in_saves += found["saving"]
            if "resumed from step" in found["output"]:
                resumed.append(int(found["output"].split("resumed from step ")[1].split()[0]))
                assert resumed[-1] == before[-1]
            if "networks in fp32" in found["output"]:  # what a run says that begins at step 0
                fresh += 1
                assert not before, f"started over although there was a checkpoint of step {before[-1]}"
        last = runs.run(folder)
        assert last["code"] == 0, last["output"]
    finally:
        runs.close()
    print(
        f"{done} kills, {in_saves} in saves, {fresh} starts, resumed at {resumed} of {steps}, {short:.2f} s to a save"
    )
    assert in_saves >= kills // 4
    assert resumed == sorted(resumed)
    expected, ended = (checkpoints.latest(tmp_path / name / "checkpoints") for name in ("whole", "killed"))
    assert (expected[0], ended[0]) == (steps, steps)
    assert compare(expected[1]["task"], ended[1]["task"]) > 100
    assert records(tmp_path / "whole") == records(folder)
    for name in ("student.safetensors", "ratio.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes()[-1000:] == (folder / name).read_bytes()[-1000:]


def compare(a, b, where="task"):
    """The number of tensors in two states that are bit-equal everywhere."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
        return 1
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        return sum(compare(value, b[key], f"{where}.{key}") for key, value in a.items())
    if isinstance(a, list | tuple):
        assert len(a) == len(b), where
        return sum(compare(x, y, f"{where}.{k}") for k, (x, y) in enumerate(zip(a, b, strict=True)))
    assert a == b, where
    return 0
