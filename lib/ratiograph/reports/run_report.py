"""The page that a run leaves: ``report.html``, one file that opens anywhere, without a network.

It is written from the files in the run's folder alone, and any of them may be missing: ``metrics.jsonl`` -> curves,
``diagnostics.json`` -> whether the ratio can be trusted, ``samples/step_*.png`` -> grids over training, and with
``samples/teacher.png`` the teacher above the student, ``evaluation.json`` -> table, histograms, figures and notes, with
published results where they compare, ``graph.svg`` -> the graph, ``config.gin`` -> the configuration. An *evaluation
row* is one sampler's measurements. The fields of evaluation.json, each optional::

    {"title": str,
     "rows": [{"name": str, "evaluations": int, "samples": int, "highlight": bool, "collapsed": bool,
               "<metric>": float | bool | [float]}],
     "metrics": {"<metric>": {"label": str, "better": "lower" | "higher" | null, "of": "<metric>"}},
     "histograms": {"labels": [str], "series": [{"name": str, "values": [float]}]},
     "figures": [{"file": path inside the run's folder, "caption": str}],
     "notes": [str]}

A metric with ``of`` is the standard error of another one. ``histograms`` may also be a list of such objects, each with
a ``title``. A highlighted row that has collapsed is warned of at the page's head. Every text is escaped: nothing in
those files becomes markup.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ratiograph.core.files import write_atomically
from ratiograph.reports.charts import line_chart
from ratiograph.reports.page import PICTURES, facts_list, page, picture, section
from ratiograph.reports.published import Measured, published_table
from ratiograph.reports.results import class_charts, results_table
from ratiograph.reports.run_files import RunFiles, finite, grids, read_run
from ratiograph.reports.trust import collapse_banner, quality_charts, trust

__all__ = ["curve_groups", "unit_of", "write_report"]

GRIDS = 6  # sample grids shown, the first and the last among them
_TOGETHER = {"field": "norms", "cosine": "cosines"}  # groups read against each other in one chart, and its title
_UNITS = (  # the first pattern found in a metric's name gives its unit
    (r"^field/", "rms at the image"),
    (r"steps_per_second$", "steps per second"),
    (r"images_per_second$", "images per second"),
    (r"per_second$", "per second"),
    (r"fraction$|accuracy", "fraction"),
    (r"seconds$", "s"),
    (r"^gradient/|gradient_norm", "norm"),
    (r"^memory/", "GB"),
    (r"^reward/", "log R"),
)


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
    try:
        results = [
            _results(run),
            _classes(evaluation),
            _figures(run.workdir, evaluation),
            _notes(evaluation, run.notes),
        ]
        banner = collapse_banner(run.records, evaluation)
        quality = quality_charts(run.records, evaluation.get("metrics") or {})
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{run.workdir / 'evaluation.json'} lacks or misuses a field ({type(error).__name__}: {error}). The form "
            "is in the documentation of ratiograph.reports.run_report; evaluate again, or remove the file"
        ) from error
    try:
        trusted, shown = trust(run.records, run.diagnostics)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{run.workdir / 'diagnostics.json'} lacks or misuses a field ({type(error).__name__}: {error}). Resume "
            "the run, which writes it again, or remove the file"
        ) from error
    table, histograms, figures, notes = results
    sections = [
        *(banner, table, _samples(run), _quality(quality), histograms, _trust(trusted)),
        *(figures, notes, _graph(run.workdir / "graph.svg"), _curves(run.records, shown)),
        _configuration(run.workdir / "config.gin"),
    ]
    state = run.state() or ("" if any(sections) else "Nothing has been measured here yet.")
    lead = f'<p class="lead">{escape(state)}</p>' if state else ""
    named = "ratiograph run" if title == run.name else f"ratiograph run {run.name}"
    html = page(str(title), named, facts_list(run.facts()), [lead, *sections], tab=run.name)
    write_atomically(out, html.encode())
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
        caption = escape(str(figure.get("caption") or ""))
        path = (workdir / str(figure["file"])).resolve()
        if not path.is_relative_to(workdir.resolve()) or path.suffix.lower() not in PICTURES or not path.is_file():
            parts.append(f'<p class="gaps">No picture at {escape(str(figure["file"]))} in the run\'s folder.</p>')
        else:
            parts.append(picture(path, caption, str(figure.get("caption") or path.stem)))
    return section("Figures", f'<div class="figures">{"".join(parts)}</div>') if parts else ""


def _notes(evaluation: Mapping[str, Any], found: Sequence[str]) -> str:
    notes = "".join(f"<p>{escape(str(note))}</p>" for note in evaluation.get("notes") or [])
    notes += "".join(f'<p class="gaps">{escape(note)}</p>' for note in found)
    return section("Notes", notes) if notes else ""


# -- pictures ----------------------------------------------------------------------------------------------------------


def _samples(run: RunFiles) -> str:
    """A few grids from the first to the last, at the same noise; beside them the teacher above the last."""
    found = grids(run.workdir / "samples")
    if not found:
        return ""
    steps = list(found)
    count = min(len(steps), GRIDS)
    shown = [steps[round(index * (len(steps) - 1) / max(count - 1, 1))] for index in range(count)]
    strip = "".join(picture(found[s], f"step <b>{s:,}</b>", f"samples at step {s}") for s in shown)
    strip = f'<div class="strip">{strip}</div>'
    hint = "Every grid starts from the same noise: a place shows one sample as the student learns."
    if run.teacher_grid:
        teacher = picture(run.teacher_grid, escape(run.teacher_name()), "samples of the teacher")
        student = picture(found[steps[-1]], f"student, step <b>{steps[-1]:,}</b>", "samples of the last step")
        strip = f'<div class="beside"><div class="pair">{teacher}{student}</div>{strip}</div>'
        hint += " The teacher's too."
    return section("Samples over training", strip, hint)


def _graph(path: Path) -> str:
    """The drawing as an image: its styles and ids stay its own, and a script in it could not run."""
    if not path.exists():
        return ""
    try:
        ElementTree.parse(path)
    except ElementTree.ParseError as error:
        return section("Graph", f'<p class="gaps">graph.svg is not a drawing: {escape(str(error))}</p>')
    return section("Graph", f'<div class="graph" tabindex="0">{picture(path, "", "component graph of the run")}</div>')


# -- curves ------------------------------------------------------------------------------------------------------------


def _quality(charts: str) -> str:
    hint = "On fewer samples than in the table of results: compare the points with each other, not with it."
    return section("Quality over training images", f'<div class="charts">{charts}</div>', hint) if charts else ""


def _trust(body: str) -> str:
    hint = (
        "The log-ratio l = log p/q sets the weight of every sample, and D = sigmoid(l) is its belief that a sample is "
        "real. p is the teacher or the data, q the student. Below each chart: how to read it, and what to do."
    )
    return section("Can the ratio be trusted?", body, hint) if body else ""


def _curves(metrics: Sequence[Mapping[str, Any]], elsewhere: Collection[str]) -> str:
    """One chart a metric, or one a group where its metrics are read against each other."""
    charts = "".join(
        _chart(group, chart, metrics)
        for group, members in curve_groups(metrics, elsewhere).items()
        for chart in _charts(group, members, metrics)
    )
    hint = "Over training steps. Faint: logged values; strong: their running average. Point at a chart to read values."
    return section("Curves", f'<div class="charts">{charts}</div>', hint) if charts else ""


def curve_groups(metrics: Sequence[Mapping[str, Any]], elsewhere: Collection[str] = ()) -> dict[str, list[str]]:
    """Names of the metrics that have a finite value, by group, in the order people look in.

    Args:
        metrics: of metrics.jsonl.
        elsewhere: names that are shown in another place, as those of evaluations are.
    """
    names = dict.fromkeys(key for record in metrics for key in record if key not in ("step", "seconds", "images"))
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=_rank):
        if name in elsewhere or name.startswith("evaluation/"):
            continue
        if any(finite(record.get(name)) for record in metrics):
            groups.setdefault(name.partition("/")[0], []).append(name)
    return groups


def _rank(name: str) -> int:
    order = ("loss", "field", "ratio")
    group = name.partition("/")[0]
    return order.index(group) if group in order else len(order) + (group in ("rate", "data", "memory", "faults"))


def unit_of(name: str) -> str:
    """The unit of a metric's values, "" for a pure number."""
    return next((unit for pattern, unit in _UNITS if re.search(pattern, name)), "")


def _charts(group: str, names: Sequence[str], metrics: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Which metrics share a chart: in some groups those with one unit that were logged at the same steps."""
    if group not in _TOGETHER:
        return [[name] for name in names]
    charts: dict[tuple, list[str]] = {}
    for name in names:
        logged = tuple(index for index, record in enumerate(metrics) if name in record)
        charts.setdefault((unit_of(name), logged), []).append(name)
    return list(charts.values())


def _chart(group: str, names: Sequence[str], metrics: Sequence[Mapping[str, Any]]) -> str:
    records = [record for record in metrics if names[0] in record]
    series = {
        name.partition("/")[2].replace("_", " ") or name: [
            record[name] if finite(record.get(name)) else math.nan for record in records
        ]
        for name in names
    }
    title = next(iter(series)) if len(names) == 1 else _TOGETHER[group]
    unit = unit_of(names[0])
    unit = "" if unit in title else unit
    return line_chart(group.replace("_", " "), title, unit, [record["step"] for record in records], series)


def _configuration(path: Path) -> str:
    if not path.exists():
        return ""
    text = escape(path.read_text(encoding="utf-8", errors="replace"))
    return section("Configuration", f"<details><summary>config.gin</summary><pre>{text}</pre></details>")
