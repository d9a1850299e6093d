"""The section of a report that says whether the run's density ratio can be trusted: verdict, checks, charts.

Notation: l = log p/q is the estimator's, D = sigmoid(l); q is the student, p the teacher or the data. *Records* are the
objects of metrics.jsonl, *tables* the ``ratio`` of diagnostics.json.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ratiograph.reports.axes import Guide
from ratiograph.reports.charts import bin_chart, calibration_chart
from ratiograph.reports.curves import label_of, series_chart
from ratiograph.reports.evaluation_file import finite
from ratiograph.reports.page import table, table_row
from ratiograph.reports.ratio_checks import GUIDES, IDENTITY_NAMES, Check, checks, outcomes, verdict

__all__ = ["trust"]


def trust(records: Sequence[Mapping[str, Any]], diagnostics: Mapping[str, Any]) -> tuple[str, set[str]]:
    """The section's body, and the metrics that it shows.

    Args:
        records: of metrics.jsonl.
        diagnostics: what diagnostics.json holds; {} if there is none.

    Returns:
        (HTML, names); ("", set()) for a run without a ratio.

    Raises:
        KeyError, TypeError, ValueError: diagnostics.json lacks a field, or its lists differ in length.
    """
    tables = diagnostics.get("ratio") or {}
    names = {name for record in records for name, value in record.items() if finite(value)}
    if not any(name.startswith("ratio/") for name in names) and not (tables and _known(tables["by_time"]["accuracy"])):
        return "", set()
    groups = {
        group: {name: label_of(name) for name in sorted(names) if name.startswith(f"{group}/")}
        for group in ("divergence", "field", "cosine")
    }
    charts = _training_charts(records, names, groups) | (_table_charts(tables) if tables else {})
    body = "".join(f"<div>{charts[key]}<p>{text}</p></div>" for key, text in _READ.items() if key in charts)
    shown = {*IDENTITY_NAMES, "ratio/accuracy", *itertools.chain(*groups.values())} & names
    steps = max([diagnostics.get("step", 0), *(record["step"] for record in records[-1:])])
    return f'{_verdict(checks(records, tables), steps)}<div class="charts read">{body}</div>', shown


def _verdict(found: Sequence[Check], steps: int) -> str:
    kind, line = verdict(found, steps)
    rows = []
    for check in found:
        mark, word = outcomes(steps)[check.holds]
        cells = [word, escape(check.found), escape(check.rule)]
        rows.append(table_row(escape(check.name), cells, cell_kinds=[mark, "", ""]))
    heads = ["check", "holds", "found", "rule"]
    checked = table("The checks of the ratio", heads, rows, kind="checks", seen=False)
    return f'<p class="verdict {kind}">{escape(line)}</p>{checked}'


def _training_charts(
    records: Sequence[Mapping[str, Any]], names: set[str], groups: Mapping[str, Mapping[str, str]]
) -> dict[str, str]:
    """Charts over training, by their key in `_READ`."""
    identities = IDENTITY_NAMES if IDENTITY_NAMES.keys() <= names else {}
    accuracy = {"ratio/accuracy": "accuracy"} if "ratio/accuracy" in names else {}
    charts = {
        "identities": ("", "identities", "", identities, GUIDES["ratio/mean_exp_real"]),
        "accuracy": ("", "accuracy", "fraction", accuracy, GUIDES["ratio/accuracy"]),
        "divergences": ("", "divergences", "nats for KL", groups["divergence"], Guide(0.0)),
        "fields": ("field", "norms", "rms at the image", groups["field"], None),
        "cosines": ("field", "cosines", "", groups["cosine"], GUIDES["cosine"]),
    }
    drawn = {}
    for key, (group, title, unit, labels, guide) in charts.items():
        if len(labels) == 1 and title not in labels.values():  # one series has no legend to name it
            title = f"{title}: {next(iter(labels.values()))}"
        if labels:
            drawn[key] = series_chart(records, group, title, unit, labels, guide=guide)
    return drawn


def _table_charts(tables: Mapping[str, Any]) -> dict[str, str]:
    """Charts by noise level and of the calibration, by their key in `_READ`."""
    by_time = tables["by_time"]
    accuracy = {"accuracy": by_time["accuracy"]}
    identities = {label: by_time[name.partition("/")[2]] for name, label in IDENTITY_NAMES.items()}
    charts = {
        "identities by noise level": ("identities", "", identities, GUIDES["ratio/mean_exp_real"]),
        "accuracy by noise level": ("accuracy", "fraction", accuracy, GUIDES["ratio/accuracy"]),
        "divergence by noise level": ("KL(q||p)", "nats", {"KL(q||p)": by_time["kl"]}, Guide(0.0)),
    }
    drawn = {
        key: bin_chart(f"{title} by noise level", unit, series, guide=guide)
        for key, (title, unit, series, guide) in charts.items()
        if any(map(_known, series.values()))
    }
    calibration = tables["calibration"]
    if calibration and _known(calibration["predicted"]):
        columns = [calibration[key] for key in ("predicted", "observed", "share")]
        drawn["calibration"] = calibration_chart("calibration", *columns)
    return drawn


_READ = {
    "identities": (
        "Both are 1 for the exact ratio. Below the shade, one side has samples where the other has none: for E_q, "
        "real kinds that the student leaves out. Above it, the estimator is too sure: give it <code>R1Penalized</code> "
        "or more <code>ratio_updates</code>."
    ),
    "identities by noise level": (
        "The same two means at each noise level, where an average can hide a fault. If only the least noise is off, "
        "raise the lower end of the objective's times; if all levels are off by different factors, wrap the weighting "
        "in <code>RatioNormalized</code>."
    ),
    "calibration": (
        "Of samples that are given D, a share D should be real: dots on the diagonal, judged where the bars are. A "
        "curve flatter than the diagonal is too sure, a steeper one too timid; cure the first by "
        "<code>R1Penalized</code>, the second by more <code>ratio_updates</code>."
    ),
    "accuracy": (
        "0.5 is chance, 1 complete separation. Falling towards 0.5 while the samples improve is success. If it stays "
        "at 0.5 from the start, the estimator does not learn; if it climbs to 1, it outruns the student."
    ),
    "accuracy by noise level": (
        "High at little noise, near 0.5 at much, as noise hides every difference. A level at 1 only knows that the "
        "ratio is large, not how large: put more noise into <code>ratio_times</code> and the objective's times, or "
        "penalise the estimator."
    ),
    "divergences": (
        "How far the student is from its target, as far as the ratio knows: falling, then level. Compare a line with "
        "itself only, as each has its own scale. A lasting rise with worse samples means that the student runs away: "
        "lower its learning rate."
    ),
    "divergence by noise level": (
        "No divergence is negative, and none grows with noise: a value below 0 or a rise to the right is an error of "
        "the estimator at that level, and shows how large its errors are."
    ),
    "fields": (
        "How hard each term pulls at the image. A term a hundred times below another one decides nothing, whatever its "
        "name; set its <code>coefficient</code> by this chart."
    ),
    "cosines": (
        "1: two terms pull the same way; 0: unrelated; −1: they cancel. If a pair with one aim stays well below 0, the "
        "ratio and the scores disagree, and the one with the fewer updates is usually behind."
    ),
}


def _known(values: Sequence[float | None]) -> bool:
    return any(value is not None for value in values)
