"""The work of tools/ablate.py: the grid that its flags ask for, its runs, and the files made of them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.text import Text

from ablations import execution, grids, plots, tables
from ablations.execution import Ended, command, run_cells, spell_command, submit
from ablations.grids import Cell, Grid
from marked_text import insert, replaced
from ratiograph.command_line import overrides
from ratiograph.core.files import clear_storage_errors, write_atomically
from ratiograph.training.logs import duration

__all__ = ["ablate"]

FLAGS = flags.FLAGS
TOOL = Path(__file__).resolve().parents[1] / "ablate.py"
SCRIPT = TOOL.parents[1] / "launch" / "slurm" / "array_ablation.sbatch"
REPEATED = ("gin_file", "vary", "gin_param", "sbatch")


def grid_of() -> Grid:
    """The grid of --grid, or of --gin_file and --vary."""
    if bool(FLAGS.grid) == bool(FLAGS.vary):
        raise ValueError("give either --grid=FILE.toml, or --gin_file=FILE.gin with --vary='BINDING = value, value'")
    if FLAGS.grid and FLAGS.gin_file:
        raise ValueError("--gin_file goes with --vary; a grid file names its own")
    if FLAGS.grid:
        grid = grids.read_grid(FLAGS.grid)
    else:
        if not FLAGS.gin_file:
            raise ValueError("--vary needs a configuration to vary: give --gin_file=FILE.gin")
        row = grids.Row(name="", gin_files=tuple(FLAGS.gin_file))
        grid = Grid(name=Path(FLAGS.folder or "ablation").name, rows=(row,), axes=axes_of(FLAGS.vary))
    given = {"columns": FLAGS.columns and tuple(FLAGS.columns), "curve": FLAGS.curve}
    return dataclasses.replace(grid, **{key: value for key, value in given.items() if value is not None})


def axes_of(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The axes of --vary, each given once."""
    axes = {}
    for key, values in map(grids.parse_axis, texts):
        if key in axes:
            raise ValueError(f"--vary gives {key} twice: write all its values in one")
        axes[key] = values
    return axes


def cells_of(grid: Grid, folder: Path) -> list[Cell]:
    """The grid's cells with the lines that flags add."""
    if not all(seed.isdecimal() for seed in FLAGS.seeds) or len(set(FLAGS.seeds)) < len(FLAGS.seeds):
        raise ValueError(f"--seeds={','.join(FLAGS.seeds)}: write different whole numbers, such as --seeds=0,1,2")
    given = overrides("batch_size", "precision", "data", "teacher")
    lines = [*FLAGS.gin_param, *(f"{key} = {value!r}" for key, value in given.items())]
    return grids.cells_of(grid, folder, seeds=[int(seed) for seed in FLAGS.seeds], bindings=lines, steps=FLAGS.steps)


def arguments(*dropped: str) -> list[str]:
    """The flags given on this command line, without the ``dropped`` ones."""
    found = []
    for name in FLAGS:
        flag = FLAGS[name]
        if not flag.present or name in dropped:
            continue
        for value in flag.value if name in REPEATED else [flag.value]:
            text = ",".join(map(str, value)) if isinstance(value, list) else value
            found.append(f"--{name}" if value is True else f"--{name}={text}")
    return found


def this_command(*dropped: str) -> str:
    """This command line without the ``dropped`` flags."""
    return spell_command(["python", "tools/ablate.py", *arguments(*dropped)])


# --- running ------------------------------------------------------------------------------------------------


def is_finished(cell: Cell) -> bool:
    """Whether the cell, once it is known to be right, has been run to its end."""
    return execution.is_finished(cell, execution.check(cell))


def selected(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that --only selects and those they need.

    Raises:
        ValueError: no cell's name holds it.
    """
    found = [cell for cell in cells if FLAGS.only in cell.name]
    if not found:
        raise ValueError(f"--only={FLAGS.only} is in no run's name: {'; '.join(cell.name for cell in cells)}")
    return grids.with_needs(found, cells)


def run_here(todo: Sequence[Cell], done: Collection[Path]) -> list[Ended]:
    """Runs ``todo`` with a line for each that ends; the failed ones."""
    console, started, seconds = Console(highlight=False, soft_wrap=True), time.monotonic(), []
    processes = FLAGS.processes or 2

    def report(ended: Ended) -> None:
        seconds.append(ended.seconds)
        elapsed, left = time.monotonic() - started, len(todo) - len(seconds)
        estimate = left * elapsed / max(sum(map(bool, seconds)), 1)  # of those that ran
        state = Text("failed", "bold red") if ended.error else Text("done", "green")
        line = Text.assemble((f"[{len(seconds)}/{len(todo)}] ", "dim"), (ended.cell.name, "bold"), ": ", state)
        line.append(f" in {duration(ended.seconds)}")
        rest = f"elapsed, {duration(estimate)} left" if left else "in all"
        line.append(f"   {duration(elapsed)} {rest}", "dim")
        console.print(line)

    names = "1 run" if len(todo) == 1 else f"{len(todo)} runs"
    console.print(f"{names} to do, {len(done)} done, {processes} at a time")
    ended = run_cells(todo, done, processes=processes, threads=FLAGS.threads, devices=FLAGS.device, report=report)
    return [end for end in ended if end.error]


def run_task(cells: Sequence[Cell], index: int) -> None:
    """Turns this process into the run of one cell, so that a cluster's signals reach it."""
    if index >= len(cells):
        raise ValueError(f"--task={index}: the grid has the cells 0 to {len(cells) - 1}")
    cell = cells[index]
    missing = [other for other in cells if other.folder in cell.needs and not is_finished(other)]
    if missing:
        raise ValueError(f"'{cell.name}' needs '{missing[0].name}', which has not finished: run it first")
    if is_finished(cell):
        print(f"{cell.name}: done already, {cell.folder}")
        return
    log = cell.folder / "log.txt"
    print(f"{cell.name}: its output is in {log}", flush=True)
    with clear_storage_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
    line = command(cell, FLAGS.device[0])
    with open(log, "a") as file:
        print(f"$ {spell_command(line)}", file=file, flush=True)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.execv(line[0], line)


def submit_runs(todo: Sequence[Cell], folder: Path) -> None:
    """Submits ``todo``, or prints the commands that would.

    Raises:
        ValueError: sbatch refuses.
    """
    printed = []

    def send(line: list[str]) -> str:
        print(spell_command(line), flush=True)
        if FLAGS.slurm_dry_run:
            printed.append(line)
            return f"JOB{len(printed)}"
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"sbatch refused: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    passed = arguments("slurm", "slurm_dry_run", "sbatch", "processes", "threads", "only", "out", "task")
    exports = {"PYTHON": sys.executable, "ABLATE": TOOL}
    with clear_storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)  # for the tasks' output
    options = [f"--output={folder}/slurm_%A_%a.out", *FLAGS.sbatch]
    jobs = submit(todo, passed, send, script=SCRIPT, exports=exports, options=options, at_a_time=FLAGS.processes)
    if not FLAGS.slurm_dry_run:
        for job, cells in jobs.items():
            print(f"job {job}: {'; '.join(cell.name for cell in cells)}")
        rest = this_command("slurm", "sbatch", "processes", "only")
        print(f"when they have ended: {rest} --table_only")


def list_cells(cells: Sequence[Cell], done: Collection[Path]) -> None:
    """Prints number in the grid, state and command of each of ``cells``."""
    for cell in cells:
        begun = "begun" if list(cell.folder.glob("checkpoints/*.pt")) else "to do"
        state = "done" if cell.folder in done else begun
        print(f"{cell.index:3d}  {state:5}  {cell.name}\n     {spell_command(command(cell, FLAGS.device[0]))}")


def write(grid: Grid, cells: Sequence[Cell], folder: Path) -> None:
    """Table and figure into the folder, and the table into --out."""
    made_by = this_command("processes", "threads", "device", "table_only", "only")
    table = tables.tabulate(grid, cells)
    text = table.markdown(made_by)
    if FLAGS.out:
        insert(Path(FLAGS.out), f"ablation {grid.name}", text)
    document = json.dumps(table.document(made_by), indent=1, ensure_ascii=False)
    for name, content in {"table.md": text + "\n", "table.json": document + "\n", "table.csv": table.csv()}.items():
        write_atomically(folder / name, content.encode())
    figure = plots.draw(table)
    if figure:
        plots.save(figure, folder)
    print(f"\n{text}\n\n{folder}: table.md, table.json, table.csv{', figure.png, figure.svg' if figure else ''}")


def ablate() -> int:
    """Does what the flags ask for; the exit code.

    Raises:
        ValueError: flags, the grid or a row of it are wrong.
        KeyboardInterrupt: the runs were stopped.
    """
    grid, on_cluster = grid_of(), FLAGS.slurm or FLAGS.slurm_dry_run
    if FLAGS.slurm and not FLAGS.slurm_dry_run and not shutil.which("sbatch"):
        raise ValueError("--slurm: there is no sbatch on PATH; run it on a login node, or see --slurm_dry_run")
    folder = Path(FLAGS.folder or f"runs/{grid.name}")
    cells = cells_of(grid, folder)
    task = os.environ.get("SLURM_ARRAY_TASK_ID") if FLAGS.task is None else FLAGS.task
    if FLAGS.table_only:
        write(grid, cells, folder)
        return 0
    if task is not None and not (FLAGS.dry_run or on_cluster):
        run_task(cells, int(task))
        return 0
    if FLAGS.out:
        replaced(Path(FLAGS.out), f"ablation {grid.name}", "")  # fails before hours of training if a marker is missing
    done = {cell.folder for cell in cells if is_finished(cell)}
    chosen = selected(cells)
    todo, failed = [cell for cell in chosen if cell.folder not in done], []
    if FLAGS.dry_run:
        list_cells(chosen, done)
    elif on_cluster and not todo:
        print("every run is done: make the table with --table_only")
    elif on_cluster:
        submit_runs(todo, folder)
    else:
        failed = run_here(todo, done)
        write(grid, cells, folder)
    for end in failed:
        log = end.cell.folder / "log.txt"
        print(f"failed: {end.cell.name}: {end.error}{f' ({log})' if log.exists() else ''}", file=sys.stderr)
    return int(bool(failed))
