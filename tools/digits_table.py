"""Tabulates finished digit runs as Markdown: distances of teacher and students, and class shares of tilted ones.

  python tools/digits_table.py --run=runs/mnist_sba --run=runs/mnist_reward_tilt                    prints the tables
  python tools/digits_table.py --run=runs/mnist_sba --run=runs/mnist_reward_tilt --out=RESULTS.md   writes them there

The numbers come from each run's evaluation.json. The markers are <!-- digits_table --> and <!-- /digits_table -->.
"""

import json
from pathlib import Path

from absl import flags

from marked_text import insert, table
from ratiograph import command_line

FLAGS = flags.FLAGS
flags.DEFINE_multi_string("run", None, "Folder of a finished run; repeatable.", required=True)
flags.DEFINE_string("out", None, "Text file with the markers, e.g. RESULTS.md.")


def read(folder):
    """A run's evaluation.json.

    Raises:
        ValueError: the run has none.
    """
    path = folder / "evaluation.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: finish the run first, with the launch/main.py command that began it")
    return json.loads(path.read_text())


def seconds(folder):
    """Training time of a run, from its last logged step."""
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]


def distances(runs):
    """One row for each sampler; real digits and the teacher once."""
    lines = []
    for position, (folder, document) in enumerate(runs.items()):
        for row in document["rows"]:
            trained = bool(row.get("highlight"))
            if position and not trained:
                continue
            name = f"**{row['name']}**, `{folder.name}`" if trained else row["name"]
            shares = f"{row['smallest_class_share']:.3f} to {row['largest_class_share']:.3f}"
            time = f"{seconds(folder):.0f}" if trained else ""
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
    rows = [[name, *(f"{share:.3f}" for share in series[name])] for name in (*exact, student)]
    return (
        f"\n\nClass shares, `{folder.name}`:\n\n{table(['', *document['histograms']['labels']], rows)}\n\n"
        f"Largest difference between the student's share and p*(y): {largest:.3f}."
    )


def main(arguments):
    command_line.no_arguments(arguments, "run")
    runs = {Path(folder): read(Path(folder)) for folder in FLAGS.run}
    text = distances(runs) + "".join(tilted(*run) for run in runs.items())
    print(text)
    if FLAGS.out:
        insert(Path(FLAGS.out), "digits_table", text)


if __name__ == "__main__":
    command_line.run(main)
