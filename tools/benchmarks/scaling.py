"""Weak scaling: the images a second of N processes against N times those of one, the batch of a process kept.

Notation: ``seconds[n]`` are the seconds of each timed step of n processes, which end together as they exchange
gradients; the efficiency of n is median(seconds[1]) / median(seconds[n]), 1 where an exchange costs nothing.

Launches alternate between the numbers of processes, so that a slow minute of the machine affects all of them. The work
of an exchange shows in a process's CPU seconds a step, which other programs hardly change; any further loss is waiting.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks import step
from benchmarks.timing import request
from ratiograph.core import distributed
from ratiograph.training import devices

__all__ = ["efficiencies", "step_seconds", "weak_scaling"]

TOOLS = str(Path(__file__).resolve().parents[1])


def step_seconds(
    ranks: int, *, gin_file: Sequence[str], gin_param: Sequence[str] = (), batch_size: int, steps: int, device: str
) -> dict[str, list[float]]:
    """Each of ``steps`` training steps by ``ranks`` processes of one thread each, random weights and images.

    Args:
        ranks: number of processes.
        gin_file: the distillation.
        gin_param: further lines.
        batch_size: samples of one process.
        steps: steps timed, after two that are not.
        device: "cpu" or "cuda", each process its own.

    Returns:
        ``seconds`` of each step, ``cpu_seconds`` of the main process in each.

    Raises:
        ValueError: the processes failed; ends with what they said.
    """
    order = request(gin_file, gin_param, batch_size=batch_size, steps=steps) | {"device": device}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *launcher, "-m", __name__, json.dumps(order)]
    path = os.pathsep.join([TOOLS, *filter(None, [os.environ.get("PYTHONPATH")])])  # so that it finds this module
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise ValueError(f"{ranks} processes could not take the steps: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def efficiencies(seconds: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """Efficiency of each number of processes in ``seconds``, which has 1."""
    alone = statistics.median(seconds[1])
    return {ranks: alone / statistics.median(each) for ranks, each in seconds.items()}


def weak_scaling(
    *,
    gin_file: Sequence[str],
    gin_param: Sequence[str] = (),
    batch_size: int,
    ranks: Sequence[int] = (1, 2),
    steps: int = 10,
    rounds: int = 3,
    device: str = "cpu",
) -> dict[str, object]:
    """The record of a weak scaling: a row for each number of processes.

    Args:
        gin_file: the distillation.
        gin_param: further lines.
        batch_size: samples of one process.
        ranks: numbers of processes, 1 among them.
        steps: steps timed a launch.
        rounds: launches of each number.
        device: "cpu" or "cuda".
    """
    launch = {"gin_file": gin_file, "gin_param": gin_param, "batch_size": batch_size, "steps": steps, "device": device}
    seconds: dict[int, list[float]] = {number: [] for number in ranks}
    cpu_seconds: dict[int, list[float]] = {number: [] for number in ranks}
    for _, number in itertools.product(range(rounds), ranks):
        measured = step_seconds(number, **launch)
        seconds[number] += measured["seconds"]
        cpu_seconds[number] += measured["cpu_seconds"]
    found = efficiencies(seconds)
    rows = [
        {
            "processes": number,
            "seconds": statistics.median(seconds[number]),
            "cpu_seconds": statistics.median(cpu_seconds[number]),
            "images_per_second": number * batch_size / statistics.median(seconds[number]),
            "efficiency": found[number],
        }
        for number in ranks
    ]
    run = request(gin_file, gin_param, batch_size=batch_size, steps=steps, rounds=rounds)
    return {"bench": "scaling", **run, "rows": rows}


def _take_steps(gin_file: Sequence[str], gin_param: Sequence[str], batch_size: int, steps: int, device: str) -> None:
    """This process's part of ``step_seconds``; the main one prints it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    place = devices.choose_device(device)
    distributed.start(place)
    bench = step.prepared(gin_file, gin_param, "auto", batch_size, place)
    marks = []
    for _ in range(steps + 2):
        bench.step()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        marks.append((time.perf_counter(), time.process_time()))
    if distributed.is_main():
        clocks = zip(("seconds", "cpu_seconds"), zip(*marks[1:], strict=True), strict=True)
        print(json.dumps({name: [b - a for a, b in itertools.pairwise(clock)] for name, clock in clocks}), flush=True)
    distributed.stop()


if __name__ == "__main__":
    _take_steps(**json.loads(sys.argv[1]))
