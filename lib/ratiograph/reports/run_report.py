"""The page that a run leaves: ``report.html``, one file that opens anywhere, without a network.

It is written from the files in the run's folder alone, and any of them may be missing: ``metrics.jsonl`` -> curves,
``diagnostics.json`` -> whether the ratio can be trusted, ``samples/step_*.png`` -> grids over training, and with
``samples/teacher.png`` the teacher above the student, ``evaluation.json`` -> table, histograms, figures and notes, with
published results where they compare, ``graph.svg`` -> the graph, ``history.jsonl`` -> changes on the way,
``config.gin`` -> the configuration. An *evaluation row* is one sampler's measurements. The fields of evaluation.json,
each optional::

    {"title": str,
     "rows": [{"name": str, "evaluations": int, "samples": int, "highlight": bool, "collapsed": bool,
               "<metric>": float | bool | [float]}],
     "metrics": {"<metric>": {"label": str, "better": "lower" | "higher" | null, "of": "<metric>"}},
     "histograms": {"labels": [str], "series": [{"name": str, "values": [float]}]},
     "figures": [{"file": path inside the run's folder, "caption": str}],
     "notes": [str]}

A metric with ``of`` is the standard error of another one. ``histograms`` may also be a list of such objects, each with
a ``title``. The head of the page warns of a highlighted row that has collapsed. Every text is escaped: nothing in those
files becomes markup.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from ratiograph.core.files import write_atomically
from ratiograph.core.foreign import read_text, shown
from ratiograph.reports.curves import run_curves
from ratiograph.reports.evaluation_file import fields_of
from ratiograph.reports.page import facts_list, page, picture, section
from ratiograph.reports.published import Measured, published_table
from ratiograph.reports.quality import collapse_banner, quality_charts
from ratiograph.reports.results import class_charts, results_table
from ratiograph.reports.run_files import RESUME, TEACHER, RunFiles, grids, read_run
from ratiograph.reports.trust import trust
from ratiograph.training.logs import read_history

__all__ = ["write_report"]

GRIDS = 6  # sample grids shown, the first and the last among them


def write_report(workdir: Path, out: Path | None = None) -> Path:
    """Writes the page whole, replacing an earlier one.

    Args:
        workdir: a run's folder; the run may still be training.
        out: the file; ``workdir/report.html`` by default.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: evaluation.json does not have the form above or diagnostics.json not its own, or the page cannot be
            written.
    """
    run = read_run(workdir)
    out = run.workdir / "report.html" if out is None else Path(out)
    evaluation = run.evaluation
    title = evaluation.get("title") or run.name
    quality = quality_charts(run.records, evaluation.get("metrics") or {})
    with fields_of(run.workdir / "diagnostics.json", RESUME):
        trusted, charted = trust(run.records, run.diagnostics)
    sections = [
        *(collapse_banner(run.records, evaluation), _results(run), _samples(run), quality, _classes(evaluation)),
        *(_trust(trusted), _figures(run.workdir, evaluation), _notes(run), _graph(run.workdir)),
        run_curves(run.records, charted),
        _changes(run.workdir),
        _configuration(run.workdir / "config.gin"),
    ]
    state = run.state() or ("" if any(sections) else "Nothing has been measured here yet.")
    lead = f'<p class="lead">{escape(state)}</p>' if state else ""
    eyebrow = "ratiograph run" if title == run.name else f"ratiograph run {run.name}"
    html = page(str(title), eyebrow, facts_list(run.facts()), [lead, *sections], tab=run.name)
    write_atomically(out, html)
    return out


# -- evaluation --------------------------------------------------------------------------------------------------------


def _results(run: RunFiles) -> str:
    table, sentence = results_table(run.evaluation)
    published = published_table([Measured(run.name, run.bindings or {}, run.evaluation)])
    return section("Results", table + published, escape(sentence)) if table else ""


def _classes(evaluation: Mapping[str, Any]) -> str:
    charts = class_charts(evaluation)
    return section("Classes", charts, "Fraction of samples in each class.") if charts else ""


def _figures(workdir: Path, evaluation: Mapping[str, Any]) -> str:
    parts = []
    for figure in evaluation.get("figures") or []:
        caption = figure.get("caption") or ""
        parts.append(picture(workdir, figure["file"], escape(caption), caption or Path(figure["file"]).stem))
    return section("Figures", f'<div class="figures">{"".join(parts)}</div>') if parts else ""


def _notes(run: RunFiles) -> str:
    notes = "".join(f"<p>{escape(str(note))}</p>" for note in run.evaluation.get("notes") or [])
    notes += "".join(f'<p class="gaps">{escape(note)}</p>' for note in run.notes)
    return section("Notes", notes) if notes else ""


# -- pictures ----------------------------------------------------------------------------------------------------------


def _samples(run: RunFiles) -> str:
    """A few grids from the first to the last, at the same noise; beside them the teacher above the last."""
    found = grids(run.workdir)
    if not found:
        return ""
    steps = list(found)
    count = min(len(steps), GRIDS)
    some = [steps[round(index * (len(steps) - 1) / max(count - 1, 1))] for index in range(count)]
    strip = "".join(picture(run.workdir, found[s], f"step <b>{s:,}</b>", f"samples at step {s}") for s in some)
    strip = f'<div class="strip">{strip}</div>'
    hint = "Every grid starts from the same noise: a place shows one sample as the student learns."
    if run.teacher_grid:
        teacher = picture(run.workdir, TEACHER, escape(run.teacher_name()), "samples of the teacher")
        student = picture(
            *(run.workdir, found[steps[-1]], f"student, step <b>{steps[-1]:,}</b>", "samples of the last step")
        )
        strip = f'<div class="beside"><div class="pair">{teacher}{student}</div>{strip}</div>'
        hint += " The teacher's grid too."
    return section("Samples over training", strip, hint)


def _graph(workdir: Path) -> str:
    """The drawing as an image: its styles and ids stay its own, and a script in it could not run."""
    if not (workdir / "graph.svg").exists():
        return ""
    drawing = picture(workdir, "graph.svg", "", "component graph of the run")
    return section("Graph", f'<div class="graph" tabindex="0">{drawing}</div>')


# -- the rest ----------------------------------------------------------------------------------------------------------


def _trust(body: str) -> str:
    hint = (
        "The log-ratio l = log p/q sets the weight of every sample, and D = sigmoid(l) is its belief that a sample is "
        "real. p is the teacher or the data, q the student. Below each chart: how to read it, and what to do."
    )
    return section("Can the ratio be trusted?", body, hint) if body else ""


def _changes(workdir: Path) -> str:
    """The bindings that were changed on the way, with the step from which they hold."""
    changes = [
        f"from step {entry.get('step')}: {name} {' → '.join(values)}"
        for entry in read_history(workdir)
        for name, values in entry["changes"].items()
    ]
    lines = [f"<p>{escape(shown(change))}</p>" for change in changes]
    hint = "Values of the configuration that were changed with --allow_change: before and after."
    return section("Changes on the way", "".join(lines), hint) if lines else ""


def _configuration(path: Path) -> str:
    if not path.exists():
        return ""
    try:
        text = f"<pre>{escape(read_text(path))}</pre>"
    except ValueError as error:
        text = f'<p class="gaps">{escape(shown(error))}</p>'
    return section("Configuration", f"<details><summary>config.gin</summary>{text}</details>")
