"""The commands of tools/bench.py: each takes what its flags ask for."""

from __future__ import annotations

import ast
from pathlib import Path

import torch
from absl import flags

from benchmarks import changes, network, plan, printing, results_table, scaling, step, suite, timing
from benchmarks.data_wait import bench_data
from marked_text import insert
from ratiograph.reports.evaluation_file import fields_of
from ratiograph.training import devices

__all__ = ["MEASUREMENTS", "run"]

FLAGS = flags.FLAGS


def common() -> dict[str, object]:
    """The arguments that most measurements share."""
    return {"gin_file": FLAGS.gin_file, "gin_param": FLAGS.gin_param, "batch_size": FLAGS.batch_size}


def sizes() -> dict[str, object]:
    """The network's arguments of --size."""
    try:
        found = {name: ast.literal_eval(value) for name, value in (each.split("=", 1) for each in FLAGS.size)}
        if any(isinstance(value, int | float) and value < 0 for value in found.values()):
            raise ValueError("a size is negative")
        return found
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"--size={' '.join(FLAGS.size)}: write an argument and its value, e.g. channels=64") from error


def of_network(device: torch.device) -> dict[str, object]:
    """The record of one network's forward and backward passes."""
    settings = network.SETTINGS if FLAGS.settings == "all" else [each.strip() for each in FLAGS.settings.split(";")]
    given = {"settings": settings, "batch_size": FLAGS.batch_size, "rounds": FLAGS.rounds, "device": device}
    return network.bench_network(FLAGS.network, sizes=sizes(), **given)


def of_data(device: torch.device) -> dict[str, object]:
    """The record of a run's data."""
    given = {"precision": FLAGS.precision, "steps": FLAGS.rounds, "made_up": FLAGS.made_up, "device": device}
    return bench_data(**common(), **given)


def of_scaling(device: torch.device) -> dict[str, object]:
    """The record of weak scaling."""
    if not FLAGS.gin_file:
        raise ValueError("say which step to scale: --gin_file=gin/mnist_js.gin")
    return scaling.weak_scaling(**common(), rounds=FLAGS.rounds, device=device.type)


def of_plan(device: torch.device) -> dict[str, object]:
    """The record of a plan."""
    return plan.bench_plan(**common(), precision="bf16" if FLAGS.precision == "auto" else FLAGS.precision)


MEASUREMENTS = {
    "network": of_network,
    "step": lambda device: step.bench_step(**common(), precision=FLAGS.precision, rounds=FLAGS.rounds, device=device),
    "precisions": lambda device: step.bench_precisions(**common(), rounds=FLAGS.rounds, device=device),
    "data": of_data,
    "scaling": of_scaling,
    "plan": of_plan,
}
"""By name: device => the record of one measurement."""


def measure(kind: str) -> None:
    """Takes one measurement, writes its record and prints it."""
    before, device = timing.load(), devices.choose_device(FLAGS.device)
    record = MEASUREMENTS[kind](device) | {"load": before}
    print(printing.shown(timing.append_record(Path(FLAGS.out), record, device)))


def compare(old: str, new: str) -> int:
    """Prints what changed between two runs; 3 if something became worse."""
    runs = []
    for name, _, start in (each.partition("@") for each in (old, new)):
        runs.append(timing.read_records(Path(name), start))
        with fields_of(Path(name), "Remove the line that does"):
            for record in runs[-1]:  # against itself: a field that is missing shows here
                changes.render(changes.compared([record], [record]))
    found = changes.compared(*runs, tolerance=FLAGS.tolerance)
    print(changes.render(found))
    return 3 if any(change.worse for change in found) else 0


def table() -> None:
    """Prints the table of everything measured, and writes it to --page."""
    records = timing.read_records(Path(FLAGS.out))
    with fields_of(Path(FLAGS.out), "Remove the line that does"):
        text = results_table.render(records)
    print(text)
    if FLAGS.page:
        insert(Path(FLAGS.page), "bench", text)


def gpu() -> None:
    """Measures steps of all configurations until the time is up."""
    device = "cuda" if FLAGS.device == "auto" else FLAGS.device
    devices.choose_device(device)
    flags_of_all = [f"--device={device}", f"--out={FLAGS.out}"]
    counts = suite.run(suite.steps(FLAGS.tiny), minutes=FLAGS.minutes, common=flags_of_all)
    print(", ".join(f"{count} {name}" for name, count in counts.items()))


COMMANDS = {"compare": (compare, 2), "table": (table, 0), "gpu": (gpu, 0)}
"""By name: (what to do, how many names it takes)."""


def run(kind: str | None = None, *names: str) -> int | None:
    """Does what the command line asks for; the exit code.

    Raises:
        ValueError: the command line or a configuration is wrong.
    """
    known = [*MEASUREMENTS, *COMMANDS]
    if kind not in known:
        raise ValueError(f"say what to do, {', '.join(known)} (not {' '.join([kind or 'nothing', *names])})")
    command, expected = COMMANDS.get(kind, (None, 0))
    if len(names) != expected:
        raise ValueError(f"{kind} takes {expected} names beside flags, not {len(names)}")
    if command:
        return command(*names)
    if kind == "plan" and not FLAGS.gin_file:  # every configuration of the table, each in a process of its own
        suite.run(suite.plans(FLAGS.precision), minutes=float("inf"), common=[f"--out={FLAGS.out}"])
    else:
        measure(kind)
    return 0
