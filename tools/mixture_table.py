"""Trains the ring of eight modes with every weighting and both directions, and tabulates the results.

  python tools/mixture_table.py --out=RESULTS.md    the whole grid; writes the table between its markers in RESULTS.md
  python tools/mixture_table.py                     prints the table only
  python tools/mixture_table.py --only=LS           runs whose name holds LS

Runs go to --folder, one thread each and --processes at a time; finished ones are not repeated, so the command resumes.
The numbers stay in FOLDER/mixture_table.json. The markers are <!-- mixture_table --> and <!-- /mixture_table -->.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from absl import flags

from marked_text import insert
from ratiograph import command_line
from ratiograph.core.files import clear_storage_errors, write_atomically
from ratiograph.reports.evaluation_file import fields_of, read_evaluation
from ratiograph.reports.markdown import table

FLAGS = flags.FLAGS
flags.DEFINE_string("folder", "runs/mixture_table", "Folder of the runs.")
flags.DEFINE_string("out", None, "Text file with the markers, e.g. RESULTS.md.")
flags.DEFINE_string("only", "", "Runs whose name holds this.")
flags.DEFINE_integer("processes", 2, "Runs at a time.", lower_bound=1)
flags.DEFINE_integer("steps", None, "Steps of each run; the gin file's number by default.", lower_bound=1)

ROOT = Path(__file__).resolve().parents[1]

WEIGHTINGS = {
    "KL": ["WEIGHTING=@KL()"],
    "LR": ["WEIGHTING=@LR()"],
    "SoftenedReverseKL": ["WEIGHTING=@SoftenedReverseKL()"],
    "BE": ["WEIGHTING=@BE()"],
    "Jeffreys": ["WEIGHTING=@Jeffreys()"],
    "SquaredHellinger": ["WEIGHTING=@SquaredHellinger()"],
    "LS": ["WEIGHTING=@LS()"],
    "SBA, λ = 0.5": ["WEIGHTING=@SBA()", "SBA.lam=0.5"],
    "SBA, λ = 3": ["WEIGHTING=@SBA()", "SBA.lam=3.0"],
    "CustomWeighting": [
        "WEIGHTING=@CustomWeighting()",
        "CustomWeighting.log_ratios=(-2.0, 0.0, 2.0)",
        "CustomWeighting.weights=(0.5, 1.0, 2.0)",
    ],
}
"""Every row of the table of weightings; ReverseKL, JensenShannon and ForwardKL are KL, LR and BE by other names."""
DIRECTIONS = {"scores": "gin/mixture2d_scores.gin", "ratio": "gin/mixture2d_ratio.gin"}
TARGETS = {"exact": "gin/mixture2d_tilted.gin", "first order": "gin/mixture2d_first_order.gin"}
TILTED = ["KL", "LR", "LS", "SBA, λ = 0.5"]


def jobs():
    """(gin file, gin lines) by the name of the run."""
    grid = [
        (weighting, f"{weighting} by {name}", file) for weighting in WEIGHTINGS for name, file in DIRECTIONS.items()
    ]
    grid += [(weighting, f"{weighting} tilted, {name}", file) for weighting in TILTED for name, file in TARGETS.items()]
    return {name: (file, WEIGHTINGS[weighting]) for weighting, name, file in grid if FLAGS.only in name}


def run(name, file, lines):
    """Trains one job unless it is done; the numbers of its student, or None if it failed."""
    folder = "".join(c if c.isalnum() else "_" for c in name.replace("λ", "lam"))
    workdir = Path(FLAGS.folder) / folder
    document = workdir / "evaluation.json"
    if not document.exists():
        command = [sys.executable, ROOT / "launch/main.py", f"--gin_file={ROOT / file}", f"--workdir={workdir}"]
        command += [f"--gin_param={line}" for line in lines] + ([f"--steps={FLAGS.steps}"] if FLAGS.steps else [])
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(f"{name}: failed\n{done.stderr}", file=sys.stderr, flush=True)
            return None
    result = read_evaluation(document)
    with fields_of(document, "Delete it, so that the run is made again"):
        row, fresh = result["rows"][-1], result["rows"][0]["energy_distance"]
        print(f"{name}: {row['relative_energy_distance']:.2f} times the distance of fresh samples", flush=True)
        found = {**row, "target_class_shares": result["class_shares"]["exact"], "fresh": fresh}
        matched_cells(found), masses(found)  # so that a field that a table lacks is found here
        return found


def matched_table(rows):
    """The grid of weightings and directions as Markdown."""
    found = {weighting: [rows.get(f"{weighting} by {name}") for name in DIRECTIONS] for weighting in WEIGHTINGS}
    lines = [[name, *(c for row in pair for c in matched_cells(row))] for name, pair in found.items() if any(pair)]
    heads = ("energy distance, scores", "smallest mode", "energy distance, ratio", "smallest mode")
    return table(["weighting ω", *heads], lines)


def matched_cells(row):
    """Energy distance and smallest mode of one run, which may be missing."""
    keys = ("relative_energy_distance", "smallest_relative_mode")
    return [f"{row[key]:.2f}" if row else "–" for key in keys]


def masses(row):
    """Class masses of the student of one run, and the exact ones."""
    return [", ".join(f"{m:.3f}" for m in row[key]) for key in ("class_shares", "target_class_shares")]


def tilted_table(rows):
    """Class masses of the tilted runs as Markdown."""
    lines = []
    for weighting in TILTED:
        for target in TARGETS:
            row = rows.get(f"{weighting} tilted, {target}")
            if row:
                lines.append([weighting, target, *masses(row)])
    return table(["weighting ω", "target r*", "masses of the student", "exact masses"], lines)


def text_of(rows):
    """Both tables, and what their numbers mean."""
    fresh = next(iter(rows.values()))["fresh"]
    return (
        "Energy distance of the one-step student to the exact ring, as a multiple of that between two fresh sets of "
        f"1,000 teacher samples ({fresh:.2g}); 1 is perfect. Smallest mode: share of the rarest of the eight modes "
        f"over its exact share. Made by `python tools/mixture_table.py --out=RESULTS.md`.\n\n{matched_table(rows)}\n\n"
        f"Tilted by a reward of e on even modes and 1 on odd ones:\n\n{tilted_table(rows)}"
    )


def main(arguments):
    command_line.no_arguments(arguments, "only")
    with clear_storage_errors(Path(FLAGS.folder)):
        Path(FLAGS.folder).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(FLAGS.processes) as pool:
        futures = {name: pool.submit(run, name, *job) for name, job in jobs().items()}
        found = {name: future.result() for name, future in futures.items()}
    rows = {name: row for name, row in found.items() if row}
    if not rows:
        raise ValueError("no run finished" if found else f"--only={FLAGS.only} is in no run's name")
    write_atomically(Path(FLAGS.folder) / "mixture_table.json", (json.dumps(rows, indent=1) + "\n").encode())
    text = text_of(rows)
    print(text)
    if FLAGS.out:
        insert(Path(FLAGS.out), "mixture_table", text)
    return int(len(found) > len(rows))


if __name__ == "__main__":
    command_line.run(main)
