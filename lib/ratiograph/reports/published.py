"""Published results beside measured ones, each marked as what it is.

Notation: a *published row* is one line of a paper's table, from ``assets/published.toml``; the *recipe* of a row is
what a run's configuration must be to repeat it. Numbers stand beside each other only where data set and metric are the
same: a run's data set is recognised by its configuration, and its Fréchet distance, Inception Score, recall and CLIP
score count where they are of Inception's features or of CLIP. Distances on other features, as those of the digits, are
compared with nothing.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from html import escape
from importlib import resources
from typing import Any

from ratiograph.config.values import Reference, literal
from ratiograph.reports.evaluation_file import finite
from ratiograph.reports.page import breakable, table, table_row
from ratiograph.reports.results import spread

__all__ = ["Measured", "facts_of", "own_rows", "published_table", "read_published"]

METRICS = {  # key of the published rows: what the label of a measured number begins with, its name here, decimals
    "frechet": ("Fréchet distance (Inception-v3", "FID", 2),
    "inception_score": ("Inception Score (Inception-v3", "Inception Score", 2),
    "recall": ("recall (Inception-v3", "recall", 2),
    "clip_score": ("CLIP score", "CLIP score", 1),
}
LOWER = ("frechet",)


@dataclass(frozen=True)
class Measured:
    """What a run gives to the comparison: a name, bindings (`config.differences.read_bindings`), its evaluation."""

    name: str
    bindings: Mapping[str, object]
    evaluation: Mapping[str, Any]


@cache
def read_published() -> dict[str, Any]:
    """The file: ``datasets`` and ``papers`` by name, ``rows`` as a list."""
    text = (resources.files("ratiograph") / "assets" / "published.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def facts_of(bindings: Mapping[str, object]) -> dict[str, str]:
    """What tells recipes apart, in the words of published.toml."""
    weighting, chain = bindings.get("Term.weighting"), 0
    while isinstance(weighting, Reference) and (inner := bindings.get(f"{_at(weighting)}.weighting")) is not None:
        weighting, chain = inner, chain + 1
    terms = bindings.get("Objective.terms")
    lam = bindings.get(f"{_at(weighting)}.lam") if isinstance(weighting, Reference) else None
    guidance = next((value for name, value in bindings.items() if name.endswith("Guided.guidance_scale")), None)
    return {
        "weighting": _class(weighting),
        "normalised": "yes" if chain else "no",
        "lam": _number(lam),
        "terms": ", ".join(sorted(terms)) if isinstance(terms, Mapping) else "",
        "ratio": _class(bindings.get("Distillation.ratio")),
        "teacher": _class(bindings.get("Distillation.teacher")),
        "continued": "no" if bindings.get("Distillation.warm_start") is None else "yes",
        "guidance": _number(guidance),
        "low": _number(bindings.get("KarrasIndex.low")),
        "high": _number(bindings.get("KarrasIndex.high")),
        "start": _start(bindings.get("student/EDM.weights")),
    }


def _at(reference: Reference) -> str:
    return f"{reference.scope}/{reference.name}" if reference.scope else reference.name


def _class(value: object) -> str:
    return value.name if isinstance(value, Reference) else "none"


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else ""


def _start(weights: object) -> str:
    """Where the student's weights come from, by the file's name: an EDM model, a stage of training, or nowhere."""
    if not isinstance(weights, str):
        return "nothing"
    classes = re.search(r"(\d+)_classes", weights)
    return f"{classes[1]} classes" if classes else "single level" if "single_level" in weights else "edm"


def own_rows(bindings: Mapping[str, object], dataset: str) -> list[dict[str, Any]]:
    """The published rows of ``dataset`` whose recipe the configuration is."""
    facts = facts_of(bindings)
    rows = (row for row in read_published()["rows"] if row["dataset"] == dataset and "recipe" in row)
    return [row for row in rows if all(facts[name] == value for name, value in row["recipe"].items())]


def _datasets(run: Measured) -> list[str]:
    """Names of the data sets that the configuration speaks of."""
    text = "\n".join(map(literal, run.bindings.values()))
    return [name for name, one in read_published()["datasets"].items() if re.search(one["found"], text, re.IGNORECASE)]


def _comparable(run: Measured) -> dict[str, tuple[str, str | None]]:
    """Key of the published rows => keys in the run's rows of the same metric and of its standard error."""
    described = run.evaluation.get("metrics") or {}
    errors = {about.get("of"): name for name, about in described.items() if about.get("of")}
    found = {}
    for name, about in described.items():
        for key, (label, _, _) in METRICS.items():
            if not about.get("of") and str(about.get("label") or "").startswith(label):
                found.setdefault(key, (name, errors.get(name)))
    return found


@dataclass(frozen=True)
class _Line:
    """A measured row: its name, number of evaluations and samples, and of each metric (value, standard error).

    ``own`` says that it is the row that the run is about.
    """

    name: str
    own: bool
    evaluations: int
    samples: int
    numbers: Mapping[str, tuple[float, float | None]]
    labels: Sequence[str]


def _lines(run: Measured, about: Mapping[str, Any]) -> list[_Line]:
    """The run's rows that can stand in the table: those of trained samplers, measured on enough samples."""
    keys = _comparable(run)
    lines = []
    for row in run.evaluation.get("rows") or []:
        known = {key: (row[name], row.get(error)) for key, (name, error) in keys.items() if finite(row.get(name))}
        samples, name = row.get("samples") or 0, str(row["name"])
        wrong = about.get("only_samples") and samples != about["samples"]
        if known and row.get("evaluations") and not wrong and "before training" not in name:
            labels = [run.evaluation["metrics"][keys[key][0]]["label"] for key in known]
            lines.append(_Line(name, bool(row.get("highlight")), row["evaluations"], samples, known, labels))
    return lines


def published_table(runs: Sequence[Measured]) -> str:
    """Measured rows of the runs above the published ones of the same data set, one table a data set.

    Args:
        runs: one, or those of a comparison.

    Returns:
        HTML, "" where nothing is comparable.
    """
    tables = []
    for dataset, about in read_published()["datasets"].items():
        found = [(run, _lines(run, about)) for run in runs if dataset in _datasets(run)]
        found = [(run, lines) for run, lines in found if lines]
        if found:
            tables.append(_table(dataset, about, found, named=len(runs) > 1))
    return "".join(tables)


def _table(dataset: str, about: Mapping[str, Any], found: Sequence[tuple[Measured, list]], *, named: bool) -> str:
    published = [row for row in read_published()["rows"] if row["dataset"] == dataset]
    own = [row for run, _ in found for row in own_rows(run.bindings, dataset)]
    measured = _named(found) if named else [line for _, lines in found for line in lines]
    keys = [key for key in METRICS if any(key in line.numbers for line in measured)]
    published = sorted((row for row in published if any(key in row for key in keys)), key=lambda row: row["frechet"])
    heads = [
        f'{METRICS[key][1]} <span class="better">{"lower" if key in LOWER else "higher"} is better</span>'
        for key in keys
    ]
    rows = [_measured_row(line, keys) for line in measured]
    rows += [_published_row(row, keys, own=row in own) for row in published]
    caption = f"{about['name']}: measured here, and published ({about['protocol']})"
    heads = ["sampler", *heads, "network evaluations"]
    notes = "".join(f"<p>{escape(note)}</p>" for note in _differences(about, measured, published))
    return f'{table(caption, heads, rows, kind="numbers published")}<div class="differences">{notes}</div>'


def _named(found: Sequence[tuple[Measured, list[_Line]]]) -> list[_Line]:
    """The runs' own rows under the runs' names, below their teachers', those that are alike once."""
    own = [replace(line, name=run.name) for run, lines in found for line in lines if line.own]
    teachers: dict[str, _Line] = {}
    for run, lines in found:
        for line in lines:
            if line.name.startswith("teacher") and teachers.setdefault(line.name, line) != line:
                teachers[f"{line.name}, {run.name}"] = replace(line, name=f"{line.name}, {run.name}")
    return [*teachers.values(), *own]


def _measured_row(line: _Line, keys: Iterable[str]) -> str:
    cells = []
    for key in keys:
        value, error = line.numbers.get(key, (None, None))
        text = "–" if value is None else f"{value:.{METRICS[key][2]}f}"
        cells.append(text if error is None else f"{text} ± {spread(error)}")
    mark = f'<span class="setting"><span class="badge here">measured here</span> {line.samples:,} samples</span>'
    kind = "highlight" if line.own else ""
    return table_row(f"{breakable(line.name)} {mark}", [*cells, f"{line.evaluations:,}"], kind=kind)


def _published_row(row: Mapping[str, Any], keys: Iterable[str], *, own: bool) -> str:
    paper = read_published()["papers"][row["paper"]]
    cells = [f"{row[key]:.{METRICS[key][2]}f}" if key in row else "–" for key in keys]
    setting = f", {escape(row['setting'])}" if row.get("setting") else ""
    mark = ' <b class="own">this recipe</b>' if own else ""
    source = f"{paper['name']} ({paper['source']}), {row['place']}"
    head = (
        f'{escape(row["name"])}{setting}{mark} <span class="setting">'
        f'<span class="badge">published</span> {escape(source)}</span>'
    )
    return table_row(head, [*cells, f"{row['evaluations']:,}"], kind="theirs")


def _differences(about: Mapping[str, Any], measured: Sequence[_Line], published: Sequence[Mapping]) -> list[str]:
    """How the protocols differ, in sentences."""
    wanted, counts = about["samples"], sorted({line.samples for line in measured})
    notes = [f"Measured as: {'; '.join(dict.fromkeys(label for line in measured for label in line.labels))}."]
    if counts != [wanted]:
        notes.append(
            f"Measured on {' and '.join(f'{count:,}' for count in counts)} samples, published on {wanted:,}: a Fréchet "
            "distance falls and a recall rises with the number of samples, so the two compare only at the same number."
        )
    papers = dict.fromkeys(row["paper"] for row in published)
    return [*notes, *(read_published()["papers"][paper]["protocol"] for paper in papers)]
