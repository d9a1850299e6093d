"""Tabulates finished digit runs as Markdown: distances of teacher and students, and class shares of tilted ones.

  python tools/digits_table.py --run=runs/mnist_sba --run=runs/mnist_reward_tilt                    prints the tables
  python tools/digits_table.py --run=runs/mnist_sba --run=runs/mnist_reward_tilt --out=RESULTS.md   writes them there

The numbers come from each run's evaluation.json. The markers are <!-- digits_table --> and <!-- /digits_table -->.
"""

from pathlib import Path

from absl import flags

from marked_text import insert
from ratiograph import command_line
from ratiograph.core.foreign import shown
from ratiograph.reports.evaluation_file import fields_of, finite, read_evaluation
from ratiograph.reports.markdown import code, plain, table
from ratiograph.training.logs import read_metrics

FLAGS = flags.FLAGS
flags.DEFINE_multi_string("run", None, "Folder of a finished run; repeatable.", required=True)
flags.DEFINE_string("out", None, "Text file with the markers, e.g. RESULTS.md.")


def read(folder):
    """A run's evaluation.json.

    Raises:
        ValueError: the run has none, or it cannot be read.
    """
    path = folder / "evaluation.json"
    if not path.is_file():
        raise ValueError(f"{shown(path)} is missing: finish the run first, with the command that began it")
    return read_evaluation(path)


def seconds(folder):
    """Training time of a run in whole seconds, from its last logged step; "" where that is not known."""
    last = next(reversed(read_metrics(folder / "metrics.jsonl")), {}).get("seconds")
    return f"{last:.0f}" if finite(last) else ""


def distances(runs):
    """One row for each sampler; real digits and the teacher once."""
    lines = []
    for position, (folder, document) in enumerate(runs.items()):
        rows = document.get("rows") or []
        for row in rows if not position else [row for row in rows if row.get("highlight")]:
            trained = bool(row.get("highlight"))
            name = f"**{plain(row['name'])}**, {code(folder.name)}" if trained else plain(row["name"])
            shares = f"{row['smallest_class_share']:.3f} to {row['largest_class_share']:.3f}"
            time = seconds(folder) if trained else ""
            lines.append([name, row["evaluations"] or "–", f"{row['frechet_distance']:.2f}", shares, time])
    heads = ("samples", "evaluations", "Fréchet distance", "class shares, smallest to largest", "training, s")
    return table(heads, lines)


def tilted(folder, document):
    """Class shares of teacher, tilted target and student; '' for a run without a tilt."""
    series = {entry["name"]: entry["values"] for entry in document["histograms"]["series"]}
    exact = [name for name in series if name.startswith("p")]
    if not exact:
        return ""
    student = next(row["name"] for row in document["rows"] if row.get("highlight"))
    target = next(name for name in exact if name.startswith("p*"))
    largest = max(abs(a - b) for a, b in zip(series[student], series[target], strict=True))
    rows = [[plain(name), *(f"{share:.3f}" for share in series[name])] for name in (*exact, student)]
    heads = ["", *map(plain, document["histograms"]["labels"])]
    return (
        f"\n\nClass shares, {code(folder.name)}:\n\n{table(heads, rows)}\n\n"
        f"Largest difference between the student's share and p*(y): {largest:.3f}."
    )


def main(arguments):
    command_line.no_arguments(arguments, "run")
    runs, shares = {Path(folder): read(Path(folder)) for folder in FLAGS.run}, []
    for folder, document in runs.items():
        with fields_of(folder / "evaluation.json", "Give runs that DigitsEvaluator has evaluated"):
            distances({folder: document})
            shares.append(tilted(folder, document))
    text = distances(runs) + "".join(shares)
    print(text)
    if FLAGS.out:
        insert(Path(FLAGS.out), "digits_table", text)


if __name__ == "__main__":
    command_line.run(main)
