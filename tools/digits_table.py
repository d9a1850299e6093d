"""Tabulates finished digit runs as Markdown: distances of teacher and students, and class shares of tilted ones.

  python tools/digits_table.py --run=runs/mnist_sba --run=runs/mnist_reward_tilt                   prints the tables
  python tools/digits_table.py --run=runs/mnist_sba --run=runs/mnist_reward_tilt --out=README.md   writes them there

The numbers come from each run's evaluation.json. The markers are <!-- digits_table --> and <!-- /digits_table -->.
"""

import json
import sys
from pathlib import Path

from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_multi_string("run", None, "Folder of a finished run; repeatable.", required=True)
flags.DEFINE_string("out", None, "Text file with the markers, e.g. README.md.")

START, END = "<!-- digits_table -->", "<!-- /digits_table -->"


def read(folder):
    """A run's evaluation.json.

    Raises:
        ValueError: the run has none.
    """
    path = Path(folder) / "evaluation.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: finish the run first, with the launch/main.py command that began it")
    return json.loads(path.read_text())


def seconds(folder):
    """Training time of a run, from its last logged step."""
    last = (Path(folder) / "metrics.jsonl").read_text().splitlines()[-1]
    return json.loads(last)["seconds"]


def distances(runs):
    """One row for each sampler; real digits and the teacher once."""
    lines = [
        "| samples | evaluations | Fréchet distance | class shares, smallest to largest | training, s |",
        "|---|---|---|---|---|",
    ]
    for position, (folder, document) in enumerate(runs.items()):
        for row in document["rows"]:
            trained = bool(row.get("highlight"))
            if position and not trained:
                continue
            name = f"**{row['name']}**, `{Path(folder).name}`" if trained else row["name"]
            shares = f"{row['smallest_class_share']:.3f} to {row['largest_class_share']:.3f}"
            spent = f"{seconds(folder):.0f}" if trained else ""
            cells = [name, row["evaluations"] or "–", f"{row['frechet_distance']:.2f}", shares, spent]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def tilted(folder, document):
    """Class shares of teacher, tilted target and student; nothing for a run without a tilt."""
    series = {entry["name"]: entry["values"] for entry in document["histograms"]["series"]}
    wanted = [name for name in series if name.startswith("p")]
    if not wanted:
        return []
    student = next(row["name"] for row in document["rows"] if row.get("highlight"))
    lines = ["", f"Class shares, `{Path(folder).name}`:", ""]
    lines += ["| | " + " | ".join(document["histograms"]["labels"]) + " |", "|---" * 11 + "|"]
    for name in (*wanted, student):
        lines.append(f"| {name} | " + " | ".join(f"{share:.3f}" for share in series[name]) + " |")
    target = next(name for name in wanted if name.startswith("p*"))
    largest = max(abs(a - b) for a, b in zip(series[student], series[target], strict=True))
    return [*lines, "", f"Largest difference between the student's share and p*(y): {largest:.3f}."]


def main(argv):
    try:
        runs = {folder: read(folder) for folder in FLAGS.run}
        text = "\n".join([*distances(runs), *(line for run in runs.items() for line in tilted(*run))])
        print(text)
        if FLAGS.out:
            old = Path(FLAGS.out).read_text()
            if START not in old or END not in old:
                raise ValueError(f"{FLAGS.out} has no place for the tables: write the lines {START} and {END} there")
            before, after = old.split(START, 1)[0], old.split(END, 1)[1]
            Path(FLAGS.out).write_text(f"{before}{START}\n{text}\n{END}{after}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
