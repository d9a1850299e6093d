"""Runs a grid of configurations, and makes one table and one figure of what came out.

  python tools/ablate.py --gin_file=gin/mnist_sba.gin --vary='SBA.lam = -1.0, 0.5, 3.0' --folder=runs/lam
  python tools/ablate.py --gin_file=gin/mnist_sba.gin --vary='WEIGHTING = @KL(), @LS()' --vary='Clamped.limit = 2, 3'
  python tools/ablate.py --grid=gin/ablations/digits.toml --out=README.md      a file's rows; the table into README.md
  python tools/ablate.py --grid=gin/ablations/digits.toml --dry_run            checks every row and prints its command
  python tools/ablate.py --grid=gin/ablations/digits.toml --only=KL --seeds=0,1,2 --steps=100
  python tools/ablate.py --grid=gin/ablations/digits.toml --slurm --sbatch=--partition=gpu --processes=4

Several --vary make their product. A value is gin text: 0.5, 'mnist', @KL(), (1.0, 2.0). Every row is checked before the
first one runs. Each run is a launch/main.py process with FOLDER/<row>/log.txt; the same command resumes what was
interrupted and skips what is done, and --table_only makes the table from what there is. A failed run ends only those
that need it.

FOLDER (runs/<name of the grid>) gets table.md, table.json, table.csv, figure.png and figure.svg; --out puts the table
between the lines <!-- ablation NAME --> and <!-- /ablation NAME --> of a text file, NAME being the grid file's or, with
--vary, the folder's.

--slurm submits the unfinished runs as job arrays, in waves where rows need others; make the table afterwards with
--table_only. --task=K runs the K-th cell of --dry_run's list, as the tasks of an array do; inside one,
SLURM_ARRAY_TASK_ID is the default.

Exit codes: 0 done, 1 a run failed or the command is wrong, 130 interrupted.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_string("grid", None, "A grid as a TOML file, e.g. gin/ablations/digits.toml.")
flags.DEFINE_multi_string("gin_file", [], "Gin files of a grid that --vary makes; repeatable.")
flags.DEFINE_multi_string("vary", [], "'BINDING = value, value, ...', an axis of the grid; repeatable.")
flags.DEFINE_multi_string("gin_param", [], "A line of gin for every run; repeatable.")
flags.DEFINE_string("folder", None, "Folder of the runs. Default: runs/<name of the grid>, or runs/ablation.")
flags.DEFINE_list("columns", None, "Columns of the table, in place of the grid's.")
flags.DEFINE_string("curve", None, "Metric of metrics.jsonl that the figure draws, in place of the grid's.")
flags.DEFINE_string("only", "", "Runs whose name holds this, and those they need; the table has every row.")
flags.DEFINE_list("seeds", [], "Repeat every row at these seeds; the table shows mean and standard deviation.")
flags.DEFINE_integer("steps", None, "Steps of each run, in place of the grid's.", lower_bound=1)
flags.DEFINE_integer("batch_size", None, "Samples a step, for every run.", lower_bound=1)
flags.DEFINE_string("precision", None, "Arithmetic of the networks, for every run.")
flags.DEFINE_string("data", None, "Macro DATA of every run.")
flags.DEFINE_string("teacher", None, "Macro TEACHER of every run.")
flags.DEFINE_list("device", ["auto"], "Devices, given to the runs in turn: auto, cpu, or cuda:0,cuda:1.")
flags.DEFINE_integer(
    "processes", None, "Runs at a time: 2 here; on a cluster as many as it has room for.", lower_bound=1
)
flags.DEFINE_integer("threads", 1, "Threads of each run here.", lower_bound=1)
flags.DEFINE_string("out", None, "Text file with the markers, e.g. README.md.")
flags.DEFINE_bool("dry_run", False, "Check every row, print the runs and their commands, run nothing.")
flags.DEFINE_bool("table_only", False, "Make the table from the runs there are.")
flags.DEFINE_bool("slurm", False, "Submit the runs as job arrays.")
flags.DEFINE_bool("slurm_dry_run", False, "Print the sbatch commands of --slurm.")
flags.DEFINE_multi_string("sbatch", [], "An option of sbatch, e.g. --partition=gpu; repeatable.")
flags.DEFINE_integer("task", None, "Run this cell only.", lower_bound=0)

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "launch" / "slurm" / "array_ablation.sbatch"
BINDINGS = {
    "batch_size": "Experiment.batch_size",
    "precision": "Experiment.precision",
    "data": "DATA",
    "teacher": "TEACHER",
}
REPEATED = ("gin_file", "vary", "gin_param", "sbatch")


def grid_of():
    """The grid of --grid, or of --gin_file and --vary."""
    import dataclasses

    from ablations import grids

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
        name = Path(FLAGS.folder or "ablation").name
        grid = grids.Grid(name=name, rows=(row,), axes=axes_of(FLAGS.vary))
    given = {"columns": FLAGS.columns and tuple(FLAGS.columns), "curve": FLAGS.curve}
    return dataclasses.replace(grid, **{key: value for key, value in given.items() if value is not None})


def axes_of(texts):
    """The axes of --vary, each given once."""
    from ablations import grids

    axes = [grids.parse_axis(text) for text in texts]
    for key, _ in axes:
        if [other for other, _ in axes].count(key) > 1:
            raise ValueError(f"--vary gives {key} twice: write all its values in one")
    return dict(axes)


def cells_of(grid, folder):
    """The grid's cells with the lines that flags add."""
    from ablations import grids

    lines = [f"{key} = {FLAGS[flag].value!r}" for flag, key in BINDINGS.items() if FLAGS[flag].value is not None]
    if not all(seed.isdecimal() for seed in FLAGS.seeds) or len(set(FLAGS.seeds)) < len(FLAGS.seeds):
        raise ValueError(f"--seeds={','.join(FLAGS.seeds)}: write different whole numbers, such as --seeds=0,1,2")
    seeds = [int(seed) for seed in FLAGS.seeds]
    return grids.cells_of(grid, folder, seeds=seeds, bindings=[*FLAGS.gin_param, *lines], steps=FLAGS.steps)


def arguments(*dropped):
    """The flags given on this command line, without the ``dropped`` ones."""
    found = []
    for name in FLAGS:
        flag = FLAGS[name]
        if not flag.present or name in dropped:
            continue
        values = flag.value if name in REPEATED else [flag.value]
        for value in values:
            text = ",".join(map(str, value)) if isinstance(value, list) else value
            found.append(f"--{name}" if value is True else f"--{name}={text}")
    return found


def shown(*dropped):
    """The command line that this one is, without the ``dropped`` flags."""
    from ablations.execution import spell_command

    return spell_command(["python", "tools/ablate.py", *arguments(*dropped)])


# --- running ------------------------------------------------------------------------------------------------


def plan(cells):
    """The folders of finished runs, once every cell of the grid is known to be right."""
    from ablations import grids

    return {cell.folder for cell in cells if grids.is_finished(cell, grids.check(cell))}


def wanted(cells, done):
    """The unfinished cells that --only asks for and those they need."""
    from ablations import grids

    return [cell for cell in grids.with_needs(asked(cells), cells) if cell.folder not in done]


def asked(cells):
    """The cells that --only asks for.

    Raises:
        ValueError: no cell's name holds it.
    """
    found = [cell for cell in cells if FLAGS.only in cell.name]
    if not found:
        raise ValueError(f"--only={FLAGS.only} is in no run's name: {'; '.join(cell.name for cell in cells)}")
    return found


def run_here(todo, done):
    """Runs ``todo`` with a line for each that ends; the failed ones."""
    from rich.console import Console
    from rich.text import Text

    from ablations.execution import run_cells
    from ratiograph.training.logs import duration

    console, started, seconds = Console(highlight=False, soft_wrap=True), time.monotonic(), []
    processes = FLAGS.processes or 2

    def report(ended):
        seconds.append(ended.seconds)
        elapsed, left = time.monotonic() - started, len(todo) - len(seconds)
        estimate = left * elapsed / max(sum(map(bool, seconds)), 1)  # of those that ran
        state = Text("failed", "bold red") if ended.error else Text("done", "green")
        line = Text.assemble((f"[{len(seconds)}/{len(todo)}] ", "dim"), (ended.cell.name, "bold"), ": ", state)
        line.append(f" in {duration(ended.seconds)}")
        line.append(
            f"   {duration(elapsed)} elapsed, {duration(estimate)} left" if left else f"   {duration(elapsed)} in all",
            "dim",
        )
        console.print(line)

    names = "1 run" if len(todo) == 1 else f"{len(todo)} runs"
    console.print(f"{names} to do, {len(done)} done, {processes} at a time")
    ended = run_cells(todo, done, processes=processes, threads=FLAGS.threads, devices=FLAGS.device, report=report)
    return [end for end in ended if end.error]


def run_task(cells, index):
    """Becomes the run of one cell, so that a cluster's signals reach it."""
    from ablations import grids
    from ablations.execution import command, spell_command

    if index >= len(cells):
        raise ValueError(f"--task={index}: the grid has the cells 0 to {len(cells) - 1}")
    cell = cells[index]
    missing = [c for c in cells if c.folder in cell.needs and not grids.is_finished(c, grids.check(c))]
    if missing:
        raise ValueError(f"'{cell.name}' needs '{missing[0].name}', which has not finished: run it first")
    if grids.is_finished(cell, grids.check(cell)):
        print(f"{cell.name}: done already, {cell.folder}")
        return
    log = cell.folder / "log.txt"
    print(f"{cell.name}: its output is in {log}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    line = command(cell, FLAGS.device[0])
    with open(log, "a") as file:
        print(f"$ {spell_command(line)}", file=file, flush=True)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.execv(line[0], line)


def submit(todo, folder):
    """Submits ``todo``, or prints the commands that would.

    Raises:
        ValueError: sbatch refuses.
    """
    from ablations.execution import spell_command, submit

    printed = []

    def send(line):
        print(spell_command(line), flush=True)
        if FLAGS.slurm_dry_run:
            printed.append(line)
            return f"JOB{len(printed)}"
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"sbatch refused: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    passed = arguments("slurm", "slurm_dry_run", "sbatch", "processes", "threads", "only", "out", "task")
    exports = {"PYTHON": sys.executable, "ABLATE": Path(__file__).resolve()}
    folder.mkdir(parents=True, exist_ok=True)  # for the tasks' output
    options = [f"--output={folder}/slurm_%A_%a.out", *FLAGS.sbatch]
    jobs = submit(todo, passed, send, script=SCRIPT, exports=exports, options=options, at_a_time=FLAGS.processes)
    if not FLAGS.slurm_dry_run:
        for job, cells in jobs.items():
            print(f"job {job}: {'; '.join(cell.name for cell in cells)}")
        rest = ("slurm", "sbatch", "processes", "only")
        print(f"when they have ended: {shown(*rest)} --table_only")


def list_cells(cells, done):
    """The runs that --only asks for and those they need: number in the grid, state and command."""
    from ablations import grids
    from ablations.execution import command, spell_command

    for cell in grids.with_needs(asked(cells), cells):
        begun = "begun" if list(cell.folder.glob("checkpoints/*.pt")) else "to do"
        state = "done" if cell.folder in done else begun
        print(f"{cell.index:3d}  {state:5}  {cell.name}\n     {spell_command(command(cell, FLAGS.device[0]))}")


def write(grid, cells, folder):
    """Table and figure into the folder, and the table into --out."""
    from ablations import plots, tables
    from ratiograph.core.files import write_atomically

    made = shown("processes", "threads", "device", "table_only", "only")
    table = tables.tabulate(grid, cells)
    text = table.markdown(made)
    if FLAGS.out:
        write_atomically(Path(FLAGS.out), tables.insert(Path(FLAGS.out), grid.name, text).encode())
    document = json.dumps(table.document(made), indent=1, ensure_ascii=False)
    for name, content in {"table.md": text + "\n", "table.json": document + "\n", "table.csv": table.csv()}.items():
        write_atomically(folder / name, content.encode())
    figure = plots.draw(table)
    if figure:
        plots.save(figure, folder)
    print(f"\n{text}\n\n{folder}: table.md, table.json, table.csv{', figure.png, figure.svg' if figure else ''}")


def work():
    """The exit code."""
    from ablations import tables

    grid = grid_of()
    if FLAGS.slurm and not FLAGS.slurm_dry_run and not shutil.which("sbatch"):
        raise ValueError("--slurm: there is no sbatch on PATH; run it on a login node, or see --slurm_dry_run")
    folder = Path(FLAGS.folder or f"runs/{grid.name}")
    cells = cells_of(grid, folder)
    task = os.environ.get("SLURM_ARRAY_TASK_ID") if FLAGS.task is None else FLAGS.task
    if FLAGS.table_only:
        write(grid, cells, folder)
        return 0
    if task is not None and not (FLAGS.dry_run or FLAGS.slurm or FLAGS.slurm_dry_run):
        run_task(cells, int(task))
        return 0
    if FLAGS.out:
        tables.insert(Path(FLAGS.out), grid.name, "")  # a missing marker is said before hours of training
    done = plan(cells)
    todo = wanted(cells, done)
    if FLAGS.dry_run:
        list_cells(cells, done)
    elif not todo and (FLAGS.slurm or FLAGS.slurm_dry_run):
        print("every run is done: make the table with --table_only")
    elif FLAGS.slurm or FLAGS.slurm_dry_run:
        submit(todo, folder)
    else:
        failed = run_here(todo, done)
        write(grid, cells, folder)
        for end in failed:
            log = end.cell.folder / "log.txt"
            print(f"failed: {end.cell.name}: {end.error}{f' ({log})' if log.exists() else ''}", file=sys.stderr)
        return int(bool(failed))
    return 0


def main(argv):
    try:
        if argv[1:]:
            raise ValueError(f"'{argv[1]}' is no flag. Did you mean --grid={argv[1]}?")
        code = work()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    app.run(main)
