"""The page that a run leaves: ``report.html``, one file that opens anywhere, without a network.

It is written from the files in the run's folder alone, and any of them may be missing: ``metrics.jsonl`` -> curves,
``diagnostics.json`` -> whether the ratio can be trusted, ``samples/step_*.png`` -> grids over training,
``evaluation.json`` -> table, histograms, figures and notes, ``graph.svg`` -> the graph, ``config.gin`` -> the
configuration. An *evaluation row* is one sampler's measurements. The fields of evaluation.json, each optional::

    {"title": str,
     "rows": [{"name": str, "evaluations": int, "samples": int, "highlight": bool, "collapsed": bool,
               "<metric>": float | bool | [float]}],
     "metrics": {"<metric>": {"label": str, "better": "lower" | "higher" | null}},
     "histograms": {"labels": [str], "series": [{"name": str, "values": [float]}]},
     "figures": [{"file": path inside the run's folder, "caption": str}],
     "notes": [str]}

``histograms`` may also be a list of such objects, each with a ``title``. A highlighted row that has collapsed is warned
of at the page's head. Every text is escaped: nothing in those files becomes markup.
"""

from __future__ import annotations

import base64
import json
import math
import os
import platform
import re
import time
from collections.abc import Collection, Mapping, Sequence
from html import escape
from importlib import metadata, resources
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import ratiograph
from ratiograph.files import write_atomically
from ratiograph.logs import duration, read_metrics, significant
from ratiograph.report_charts import line_chart
from ratiograph.report_diagnostics import collapse_banner, quality_charts, trust
from ratiograph.report_results import class_charts, results_table

__all__ = ["write_report"]

_GRIDS = 6  # sample grids shown, the first and the last among them
_TOGETHER = {"field": "norms", "cosine": "cosines"}  # groups read against each other in one chart, and its title
_UNITS = (  # the first pattern found in a metric's name gives its unit
    (r"^field/", "rms at the image"),
    (r"per_second$", "per second"),
    (r"fraction$|accuracy", "fraction"),
    (r"seconds$", "s"),
    (r"^gradient/|gradient_norm", "norm"),
    (r"^memory/", "GB"),
)
_PICTURES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
_PICTURES[".svg"] = "image/svg+xml"


def write_report(workdir: Path) -> Path:
    """Writes ``workdir/report.html`` whole, replacing an earlier one.

    Args:
        workdir: a run's folder; the run may still be training.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: evaluation.json does not have the form above or diagnostics.json not its own, or the page cannot be
            written.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise FileNotFoundError(f"no run at {workdir}: give the --workdir of a run")
    evaluation, metrics = _object(workdir / "evaluation.json"), read_metrics(workdir / "metrics.jsonl")
    diagnostics = _object(workdir / "diagnostics.json")
    title = evaluation.get("title") or workdir.resolve().name
    try:
        results = [_results(evaluation), _classes(evaluation), _figures(workdir, evaluation), _notes(evaluation)]
        banner, quality = collapse_banner(metrics, evaluation), quality_charts(metrics, evaluation.get("metrics") or {})
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{workdir / 'evaluation.json'} lacks or misuses a field ({type(error).__name__}: {error}). The form is "
            "in the documentation of ratiograph.report; evaluate again, or remove the file"
        ) from error
    try:
        trusted, shown = trust(metrics, diagnostics)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{workdir / 'diagnostics.json'} lacks or misuses a field ({type(error).__name__}: {error}). Resume "
            "the run, which writes it again, or remove the file"
        ) from error
    table, histograms, figures, notes = results
    sections = [
        *(banner, table, _samples(workdir / "samples"), _quality(quality), histograms, _trust(trusted)),
        *(figures, notes, _graph(workdir / "graph.svg"), _curves(metrics, shown)),
        _configuration(workdir / "config.gin"),
    ]
    if not any(sections):
        sections = ['<p class="lead">Nothing has been measured here yet.</p>']
    write_atomically(workdir / "report.html", _page(title, _facts(metrics), sections).encode())
    return workdir / "report.html"


def _object(path: Path) -> dict[str, Any]:
    """What a JSON file of the run holds; {} if there is no file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). Make it again, or remove the file") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not an object. Make it again, or remove it")
    return found


def _page(title: str, facts: str, sections: Sequence[str]) -> str:
    assets = resources.files("ratiograph") / "assets"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{(assets / 'report.css').read_text(encoding='utf-8')}</style></head>"
        f'<body><main><header><p class="eyebrow">ratiograph run</p><h1>{escape(title)}</h1>{facts}</header>\n'
        + "\n".join(section for section in sections if section)
        + f"\n<footer>{escape(_environment())}</footer></main>"
        f"<script>{(assets / 'report.js').read_text(encoding='utf-8')}</script></body></html>\n"
    )


def _section(title: str, body: str, hint: str = "") -> str:
    hint = f'<p class="hint">{hint}</p>' if hint else ""
    return f"<section><h2>{escape(title)}</h2>{hint}{body}</section>"


def _environment() -> str:
    versions = []
    for name in ("torch", "numpy"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return f"Report written {when} by ratiograph {ratiograph.__version__} with {', '.join(versions)} on {system}."


def _facts(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The run in four numbers."""
    if not metrics:
        return ""
    last = metrics[-1]
    facts = {"steps": f"{last['step']:,}"}
    if last.get("images") is not None:
        facts["training images"] = f"{last['images']:,}"
    if last.get("seconds"):
        facts["training time"] = f"{duration(last['seconds'])} {'h' if last['seconds'] >= 3600 else 'min'}"
        facts["steps per second"] = significant(last["step"] / last["seconds"], 3)
    items = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{items}</dl>'


# -- evaluation --------------------------------------------------------------------------------------------------------


def _results(evaluation: Mapping[str, Any]) -> str:
    table, sentence = results_table(evaluation)
    return _section("Results", table, sentence) if table else ""


def _classes(evaluation: Mapping[str, Any]) -> str:
    charts = class_charts(evaluation)
    return _section("Classes", charts, "Fraction of samples in each class.") if charts else ""


def _figures(workdir: Path, evaluation: Mapping[str, Any]) -> str:
    parts = []
    for figure in evaluation.get("figures") or []:
        caption = escape(str(figure.get("caption") or ""))
        path = (workdir / str(figure["file"])).resolve()
        if not path.is_relative_to(workdir.resolve()) or path.suffix.lower() not in _PICTURES or not path.is_file():
            parts.append(f'<p class="gaps">No picture at {escape(str(figure["file"]))} in the run\'s folder.</p>')
        else:
            parts.append(_picture(path, f"{caption}", str(figure.get("caption") or path.stem)))
    return _section("Figures", f'<div class="figures">{"".join(parts)}</div>') if parts else ""


def _notes(evaluation: Mapping[str, Any]) -> str:
    notes = evaluation.get("notes") or []
    return _section("Notes", "".join(f"<p>{escape(str(note))}</p>" for note in notes)) if notes else ""


# -- pictures ----------------------------------------------------------------------------------------------------------


def _data(path: Path) -> str:
    """The file as a data address, so that the page needs no other file."""
    return f"data:{_PICTURES[path.suffix.lower()]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _picture(path: Path, caption: str, alternative: str) -> str:
    image = f'<img src="{_data(path)}" alt="{escape(alternative)}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _samples(folder: Path) -> str:
    """A few grids from the first to the last, at the same noise, so that progress can be seen."""
    grids = {
        int(match[1]): path for path in folder.glob("step_*.png") if (match := re.search(r"_(\d+)\.png$", path.name))
    }
    if not grids:
        return ""
    steps = sorted(grids)
    count = min(len(steps), _GRIDS)
    shown = [round(index * (len(steps) - 1) / max(count - 1, 1)) for index in range(count)]
    pictures = "".join(
        _picture(grids[steps[index]], f"step <b>{steps[index]:,}</b>", f"samples at step {steps[index]}")
        for index in shown
    )
    hint = "Every grid starts from the same noise."
    return _section("Samples over training", f'<div class="strip">{pictures}</div>', hint)


def _graph(path: Path) -> str:
    """The drawing as an image: its styles and ids stay its own, and a script in it could not run."""
    if not path.exists():
        return ""
    try:
        ElementTree.parse(path)
    except ElementTree.ParseError as error:
        return _section("Graph", f'<p class="gaps">graph.svg is not a drawing: {escape(str(error))}</p>')
    return _section("Graph", f'<div class="graph"><img src="{_data(path)}" alt="component graph of the run"></div>')


# -- curves ------------------------------------------------------------------------------------------------------------


def _quality(charts: str) -> str:
    hint = "On fewer samples than in the table of results: compare the points with each other, not with it."
    return _section("Quality over training images", f'<div class="charts">{charts}</div>', hint) if charts else ""


def _trust(body: str) -> str:
    hint = (
        "The log-ratio l = log p/q sets the weight of every sample, and D = sigmoid(l) is its belief that a sample is "
        "real. p is the teacher or the data, q the student. Below each chart: how to read it, and what to do."
    )
    return _section("Can the ratio be trusted?", body, hint) if body else ""


def _curves(metrics: Sequence[Mapping[str, Any]], elsewhere: Collection[str]) -> str:
    """One chart a metric, or one a group where its metrics are read against each other."""
    names = dict.fromkeys(key for record in metrics for key in record if key not in ("step", "seconds", "images"))
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=_rank):
        if name in elsewhere or name.startswith("evaluation/"):
            continue
        if any(_finite(record.get(name)) for record in metrics):
            groups.setdefault(name.partition("/")[0], []).append(name)
    charts = "".join(
        _chart(group, chart, metrics) for group, members in groups.items() for chart in _charts(group, members, metrics)
    )
    hint = "Over training steps. Faint: logged values; strong: their running average. Point at a chart to read values."
    return _section("Curves", f'<div class="charts">{charts}</div>', hint) if charts else ""


def _rank(name: str) -> int:
    order = ("loss", "field", "ratio")
    group = name.partition("/")[0]
    return order.index(group) if group in order else len(order) + (group in ("rate", "data"))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _unit(name: str) -> str:
    return next((unit for pattern, unit in _UNITS if re.search(pattern, name)), "")


def _charts(group: str, names: Sequence[str], metrics: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Which metrics share a chart: in some groups those with one unit that were logged at the same steps."""
    if group not in _TOGETHER:
        return [[name] for name in names]
    charts: dict[tuple, list[str]] = {}
    for name in names:
        logged = tuple(index for index, record in enumerate(metrics) if name in record)
        charts.setdefault((_unit(name), logged), []).append(name)
    return list(charts.values())


def _chart(group: str, names: Sequence[str], metrics: Sequence[Mapping[str, Any]]) -> str:
    records = [record for record in metrics if names[0] in record]
    series = {
        name.partition("/")[2].replace("_", " ") or name: [
            record[name] if _finite(record.get(name)) else math.nan for record in records
        ]
        for name in names
    }
    title = next(iter(series)) if len(names) == 1 else _TOGETHER[group]
    unit = _unit(names[0])
    unit = "" if unit in title else unit
    return line_chart(group.replace("_", " "), title, unit, [record["step"] for record in records], series)


def _configuration(path: Path) -> str:
    if not path.exists():
        return ""
    text = escape(path.read_text(encoding="utf-8", errors="replace"))
    return _section("Configuration", f"<details><summary>config.gin</summary><pre>{text}</pre></details>")
