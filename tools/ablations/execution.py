"""Running the cells of a grid: on this machine, several at a time, or as job arrays of a SLURM cluster.

Notation as in `grids`. Every cell is a process of its own running launch/main.py, so that an interrupted one resumes
by main's rule. A *wave* is the cells that need nothing but cells of earlier waves. A *finished* run has its
evaluation.json or, without an evaluator, its final weights.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ablations.grids import Cell
from ratiograph import config
from ratiograph.core.files import clear_storage_errors
from ratiograph.core.foreign import shown
from ratiograph.training.logs import read_metrics

__all__ = [
    "Ended",
    "array_indices",
    "check",
    "command",
    "environment",
    "is_finished",
    "last_error",
    "run_cells",
    "spell_command",
    "submit",
    "waves",
]

MAIN = Path(__file__).resolve().parents[2] / "launch" / "main.py"
GRACE = 60  # seconds that a stopped run has to write what it must
POLL = 0.1  # seconds between looks at the running processes


@dataclass(frozen=True)
class Ended:
    """How a cell ended: ``error`` is '' for a finished one, ``seconds`` the time it ran."""

    cell: Cell
    error: str
    seconds: float


def command(cell: Cell, device: str) -> list[str]:
    """The launch/main.py command line of a cell."""
    files = [f"--gin_file={name}" for name in cell.row.gin_files]
    lines = [f"--gin_param={line}" for line in cell.bindings]
    return [sys.executable, str(MAIN), *files, *lines, f"--workdir={cell.folder}", f"--device={device}"]


def environment(threads: int) -> dict[str, str]:
    """This process's environment with ``threads`` threads for each run."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def spell_command(arguments: Sequence[str]) -> str:
    """A command line as a person would type it: quotes only around flag values that need them."""

    def quoted(text: str) -> str:
        return f'"{text}"' if "'" in text and not set(text) & set('"$`\\!') else shlex.quote(text)

    pairs = [argument.partition("=") if argument.startswith("--") else ("", "", argument) for argument in arguments]
    return " ".join(f"{name}{equals}{quoted(value) if value or not name else ''}" for name, equals, value in pairs)


def last_error(log: Path) -> str:
    """The last ``error:`` line of a log, or its last line that is not empty."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return shown(
        next((line for line in reversed(lines) if line.startswith("error:")), (lines or ["no output"])[-1]), 1000
    )


def check(cell: Cell) -> config.Config:
    """The cell's configuration, built once without memory for its weights to find what parsing cannot.

    The run's own process takes every line from its command line and so trusts it: what a grid's file asks to run is
    refused here, before that process starts.

    Raises:
        ValueError: a mistake in it, or its grid's file asks to run code or a command that this command line does not
            name; the message names the row.
    """
    try:
        cfg = config.parse(cell.row.gin_files, cell.typed, untrusted={cell.source: cell.lines})
        with torch.device("meta"):
            config.build(cfg)
    except (ValueError, OSError) as error:
        raise ValueError(f"row '{cell.name}': {error}") from error
    return cfg


def is_finished(cell: Cell, cfg: config.Config) -> bool:
    """Whether the cell's folder holds this very run, to its last step.

    Raises:
        ValueError: the folder holds results of another configuration, or of a longer run.
    """
    weights = list(cell.folder.glob("*.safetensors"))
    results = [*weights, *cell.folder.glob("checkpoints/*.pt"), *cell.folder.glob("evaluation.json")]
    saved = cell.folder / "config.gin"
    if not results or not saved.exists():
        return False
    remedy = "Give another --folder or row name, or delete the folder"
    if differing := config.changes(cfg, saved):
        raise ValueError(f"row '{cell.name}': {cell.folder} holds another run: {differing[0]}. {remedy}")
    values = config.to_dict(cfg)
    logged = read_metrics(cell.folder / "metrics.jsonl")
    done, steps = (logged[-1]["step"] if logged else 0), values["Experiment.steps"]
    if done > steps:
        raise ValueError(f"row '{cell.name}': {cell.folder} holds {done} steps, and {steps} are asked for. {remedy}")
    ended = (cell.folder / "evaluation.json").exists() if values.get("Experiment.evaluator") else bool(weights)
    return ended and done == steps


# --- here ---------------------------------------------------------------------------------------------------


def run_cells(
    cells: Sequence[Cell],
    done: Collection[Path],
    *,
    processes: int,
    threads: int,
    devices: Sequence[str],
    report: Callable[[Ended], None],
) -> list[Ended]:
    """Runs ``cells``, each after those it needs; a failure ends only what needs it.

    Args:
        cells: what to run.
        done: folders of finished runs.
        processes: runs at a time.
        threads: of each run.
        devices: given out in turn, so that as many runs as there are devices at a time have one each.
        report: called as each cell ends.

    Returns:
        How each cell ended, in that order.

    Raises:
        KeyboardInterrupt: once SIGINT or SIGTERM has stopped the runs; each resumes from its last checkpoint.
    """
    waiting, slots, ended = list(cells), list(range(processes)), []
    finished, failed = set(done), set()
    running: dict[subprocess.Popen, tuple[Cell, int, float]] = {}

    def end(cell: Cell, error: str, seconds: float) -> None:
        (failed if error else finished).add(cell.folder)
        ended.append(Ended(cell, error, seconds))
        report(ended[-1])

    with _noted_signals() as asked:
        while waiting or running:
            if asked:
                asked.clear()  # a second one is noted while the runs are stopped
                _stop(list(running), asked)
                raise KeyboardInterrupt
            for cell in [cell for cell in waiting if failed.intersection(cell.needs)]:
                waiting.remove(cell)
                end(cell, f"it needs {next(f for f in cell.needs if f in failed)}, which failed", 0.0)
            for cell in [cell for cell in waiting if finished.issuperset(cell.needs)][: len(slots)]:
                waiting.remove(cell)
                slot = slots.pop(0)
                running[_start(cell, devices[slot % len(devices)], threads)] = cell, slot, time.monotonic()
            assert running or not waiting, "cells wait for what nobody runs"
            time.sleep(POLL if running else 0)
            for process in [process for process in running if process.poll() is not None]:
                cell, slot, started = running.pop(process)
                slots.append(slot)
                error = last_error(cell.folder / "log.txt") if process.returncode else ""
                end(cell, error, time.monotonic() - started)
    return ended


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Notes SIGINT and SIGTERM in a list in place of raising at once, which may be between a start and its record."""
    asked: list[int] = []
    taken = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in taken}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(cell: Cell, device: str, threads: int) -> subprocess.Popen:
    """Starts a cell in a session of its own: a terminal's Ctrl-C reaches only us, and we end it in order."""
    with clear_storage_errors(cell.folder):
        cell.folder.mkdir(parents=True, exist_ok=True)
    line = command(cell, device)
    with open(cell.folder / "log.txt", "a", encoding="utf-8") as log:
        print(f"$ {spell_command(line)}", file=log, flush=True)
        return subprocess.Popen(
            line,
            env=environment(threads),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _stop(processes: Sequence[subprocess.Popen], asked: Sequence[int]) -> None:
    """Asks every run to end and waits; kills those still running then, or once ``asked`` again, with their children."""
    deadline = time.monotonic() + GRACE
    for process in processes:
        process.terminate()
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline and not asked:
        time.sleep(POLL)
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# --- on a cluster -------------------------------------------------------------------------------------------


def waves(cells: Sequence[Cell]) -> list[list[Cell]]:
    """``cells`` in waves; what a cell needs and is not among them counts as finished."""
    by_folder = {cell.folder: cell for cell in cells}
    depths: dict[Path, int] = {}

    def depth(cell: Cell) -> int:
        if cell.folder not in depths:
            needed = [by_folder[folder] for folder in cell.needs if folder in by_folder]
            depths[cell.folder] = max((depth(other) + 1 for other in needed), default=0)
        return depths[cell.folder]

    found = [depth(cell) for cell in cells]
    return [[cell for cell, d in zip(cells, found, strict=True) if d == wave] for wave in range(max(found) + 1)]


def array_indices(cells: Sequence[Cell]) -> str:
    """The cells' indices as sbatch's --array takes them: '0-3,7'."""
    spans: list[list[int]] = []
    for index in sorted(cell.index for cell in cells):
        if spans and spans[-1][1] == index - 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)


def submit(
    cells: Sequence[Cell],
    arguments: Sequence[str],
    send: Callable[[list[str]], str],
    *,
    script: Path,
    exports: Mapping[str, str],
    options: Sequence[str] = (),
    at_a_time: int | None = None,
) -> dict[str, list[Cell]]:
    """Submits job arrays, one for the cells of a wave that need the same; they start when what they need succeeded.

    Args:
        cells: unfinished ones.
        arguments: of tools/ablate.py, the same for every task.
        send: runs an sbatch command line and returns what ``--parsable`` prints.
        script: the array script.
        exports: environment variables that the script reads.
        options: further sbatch options, such as ``--partition=gpu``.
        at_a_time: tasks of an array that run together; None for as many as the cluster has room for.

    Returns:
        The cells of each job, by its id.
    """
    jobs: dict[str, list[Cell]] = {}
    tasks: dict[Path, str] = {}
    limit = f"%{at_a_time}" if at_a_time else ""
    exported = ",".join(["ALL", *(f"{key}={value}" for key, value in exports.items())])
    for wave in waves(cells):
        alike: dict[tuple[str, ...], list[Cell]] = {}
        for cell in wave:
            alike.setdefault(tuple(sorted(tasks[folder] for folder in cell.needs if folder in tasks)), []).append(cell)
        for needed, group in alike.items():
            depends = [f"--dependency=afterok:{':'.join(needed)}", "--kill-on-invalid-dep=yes"] if needed else []
            line = ["sbatch", "--parsable", f"--array={array_indices(group)}{limit}", *depends, f"--export={exported}"]
            job = send([*line, *options, str(script), *arguments]).strip().partition(";")[0]  # "id" or "id;cluster"
            jobs[job] = group
            tasks |= {cell.folder: f"{job}_{cell.index}" for cell in group}
    return jobs
