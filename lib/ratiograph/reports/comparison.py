"""Several runs in one page: results, differing parameters, samples, curves, and whether their ratios can be trusted.

Notation: a run's *label* is the shortest end of its folder's path that no other run has. Its *own* rows of
evaluation.json are the highlighted ones, or the last; every other row is a *reference* where all runs that have it
agree. Like the page of one run it needs no other file; each folder must be a run's, and may lack any single file.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ratiograph.config.differences import ABSENT, differences, full_bindings
from ratiograph.core.files import write_atomically
from ratiograph.core.foreign import shown
from ratiograph.reports.charts import colour_class
from ratiograph.reports.curves import curves_section
from ratiograph.reports.evaluation_file import fields_of, finite
from ratiograph.reports.page import breakable, page, picture, section, table, table_row
from ratiograph.reports.published import Measured, published_table
from ratiograph.reports.quality import quality_section
from ratiograph.reports.ratio_checks import NOT_MEASURED, checks, outcomes, verdict
from ratiograph.reports.results import results_table
from ratiograph.reports.run_files import RESUME, TEACHER, RunFiles, check_run, grids, read_run
from ratiograph.training.logs import significant

__all__ = ["labels_of", "merged_evaluation", "write_comparison"]

FOLDED = 30  # differing parameters from which the table is folded up

Runs = Mapping[str, RunFiles]


def write_comparison(workdirs: Sequence[Path], out: Path) -> Path:
    """Writes the page whole, replacing an earlier one.

    Args:
        workdirs: folders of two runs or more, finished or not.
        out: the file.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a folder is given twice or is no run's, a file of a run cannot be read or has another form, or the
            page cannot be written.
    """
    for workdir in workdirs:
        check_run(workdir)
    runs = dict(zip(labels_of(workdirs), map(read_run, workdirs), strict=True))
    records = {label: run.records for label, run in runs.items()}
    described = {key: about for run in runs.values() for key, about in (run.evaluation.get("metrics") or {}).items()}
    configurations, unlike = _configurations(runs)
    sections = [
        *(_overview(runs), _results(runs, unlike), configurations, _samples(runs)),
        *(quality_section(records, described), _verdicts(runs), curves_section(records), _notes(runs)),
    ]
    write_atomically(Path(out), page(f"{len(runs)} runs compared", "ratiograph runs", "", sections))
    return Path(out)


def labels_of(workdirs: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart.

    Raises:
        ValueError: a folder is given twice.
    """
    parts = [Path(workdir).resolve().parts for workdir in workdirs]
    for index, own in enumerate(parts):
        if own in parts[:index]:
            raise ValueError(f"{shown(workdirs[index])} is given twice: give each run once")
    labels = []
    for own in parts:
        others = [other for other in parts if other != own]
        size = next(n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others))
        labels.append("/".join(own[-size:]))
    return labels


def _key(index: int, label: str) -> str:
    """A run's name with its colour."""
    return f'<span class="named"><span class="key {colour_class(index)}"></span><span>{breakable(label)}</span></span>'


# -- speed and state ---------------------------------------------------------------------------------------------------


def _overview(runs: Runs) -> str:
    """One line a run: how far it is, its pace and its memory."""
    heads = ("steps", "training images", "training time", "seconds a step", "images a second", "peak memory", "waiting")
    rows = [table_row(_key(index, label), _pace(run)) for index, (label, run) in enumerate(runs.items())]
    lengths = table("Length, speed and memory of the runs", ["run", *heads], rows, seen=False)
    states = "".join(
        f"<p><b>{breakable(label)}</b>: {escape(text)}</p>" for label, run in runs.items() if (text := run.state())
    )
    hint = (
        "Seconds a step and images a second are medians over the logged lines, memory is the most of the main process, "
        "waiting the mean share of time that a step waited for data. Speeds compare between runs of one machine only."
    )
    return section("Runs", f'{lengths}<div class="states">{states}</div>', hint)


def _pace(run: RunFiles) -> list[str]:
    facts = run.facts()
    rate, images = (_values(run, f"rate/{name}_per_second") for name in ("steps", "images"))
    memory, waiting = _values(run, "memory/peak_gb"), _values(run, "data/wait_fraction")
    return [
        escape(facts.get("steps", "0")),
        escape(facts.get("training images", ABSENT)),
        escape(facts.get("training time", ABSENT)),
        f"{significant(1 / statistics.median(rate), 3)} s" if rate and statistics.median(rate) > 0 else ABSENT,
        significant(statistics.median(images), 3) if images else ABSENT,
        f"{max(memory):.2f} GB" if memory else ABSENT,
        f"{100 * statistics.fmean(waiting):.1f} %" if waiting else ABSENT,
    ]


def _values(run: RunFiles, name: str) -> list[float]:
    return [record[name] for record in run.records if finite(record.get(name))]


# -- results -----------------------------------------------------------------------------------------------------------


def _results(runs: Runs, unlike: Sequence[str]) -> str:
    unmeasured = [label for label, run in runs.items() if not run.evaluation.get("rows")]
    missing = f'<p class="hint">Not evaluated: {escape(", ".join(unmeasured))}.</p>' if unmeasured else ""
    if len(unmeasured) == len(runs):
        return section("Results", '<p class="lead">None of the runs has been evaluated.</p>')
    main, rest = merged_evaluation({label: run.evaluation for label, run in runs.items()})
    results, hint = results_table(main, caption="The runs' students, the best of them bold, and what they share")
    more, _ = results_table(rest, caption="Further rows of the runs' evaluations")
    published = published_table([Measured(label, run.bindings or {}, run.evaluation) for label, run in runs.items()])
    if unlike:
        missing += (
            f'<p class="gaps">The runs were not evaluated alike: {escape(", ".join(unlike))} '
            f"{'differs' if len(unlike) == 1 else 'differ'}. Numbers of different protocols do not compare.</p>"
        )
    folded = f"<details><summary>Further rows: students before training, other weights</summary>{more}</details>"
    counts = {row.get("samples") for row in main["rows"] if row.get("compared")}
    if len(counts) > 1:
        hint = (
            "The runs were measured on different numbers of samples. Distances fall and recall rises with them, so no "
            "best is marked among numbers of different ones."
        )
    return section("Results", missing + results + (folded if more else "") + published, escape(hint))


def merged_evaluation(runs: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The evaluations of several runs as two: own rows with references, and the rows that differ from run to run.

    A metric that goes by one name and different labels, as of different features, becomes several.

    Args:
        runs: what evaluation.json holds, by the run's label; {} for one without.
    """
    described: dict[str, dict[str, Any]] = {}
    own: list[dict[str, Any]] = []
    others: dict[str, dict[str, dict[str, Any]]] = {}
    for label, evaluation in runs.items():
        rows = evaluation.get("rows") or []
        renamed = _renamed(evaluation.get("metrics") or {}, described)
        chosen = [row for row in rows if row.get("highlight")] or rows[-1:]
        for row in rows:
            numbers = {renamed.get(key, key): value for key, value in row.items() if key != "highlight"}
            if row in chosen:
                name = label if len(chosen) == 1 else f"{label}: {row['name']}"
                own.append({**numbers, "name": name, "compared": True, "highlight": False})
            else:
                others.setdefault(row["name"], {})[label] = numbers
    shared, varying = [], []
    for name, by_run in others.items():
        rows = list(by_run.values())
        if all(_alike(row, rows[0]) for row in rows):
            shared.append({key: value for row in rows for key, value in row.items()} | {"compared": False})
        else:
            varying += [{**row, "name": f"{label}: {name}"} for label, row in by_run.items()]
    return {"rows": [*own, *shared], "metrics": described}, {"rows": varying, "metrics": described}


def _renamed(metrics: Mapping[str, Mapping[str, Any]], described: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Adds the metrics to ``described``; key here => key there, where it is another because its label is."""
    names: dict[str, str] = {}
    for key in sorted(metrics, key=lambda key: bool(metrics[key].get("of"))):  # standard errors after their numbers
        about = dict(metrics[key])
        if about.get("of"):
            about["of"] = names.get(about["of"], about["of"])
        name, number = key, 2
        while name in described and any(described[name].get(field) != about.get(field) for field in ("label", "of")):
            name, number = f"{key} {number}", number + 1
        names[key] = name
        described.setdefault(name, about)
    return {key: name for key, name in names.items() if key != name}


def _alike(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether rows are equal to six digits, as processors sum in their own order, in what both have."""
    pairs = [(value, other[key]) for key, value in row.items() if key in other]
    return all(a == b or (finite(a) and finite(b) and math.isclose(a, b, rel_tol=1e-6)) for a, b in pairs)


# -- configuration -----------------------------------------------------------------------------------------------------


def _configurations(runs: Runs) -> tuple[str, list[str]]:
    """The section, and the names of parameters of evaluators that differ."""
    known = {
        label: full_bindings(run.workdir / "config.gin") for label, run in runs.items() if run.bindings is not None
    }
    unknown = [label for label in runs if label not in known]
    body = "".join(
        f'<p class="hint">{escape(label)} has no config.gin that can be read: it is left out here.</p>'
        for label in unknown
    )
    found = differences(known)
    title, hint = "Configuration", f"Only parameters that differ; {ABSENT}: the run has no such component."
    if len(known) < 2:
        return section(title, body + '<p class="lead">Nothing to compare.</p>'), []
    if not found:
        return section(title, f'{body}<p class="lead">The configurations mean the same.</p>'), []
    places = {label: index for index, label in enumerate(runs)}
    heads = ["parameter", *(_key(places[label], label) for label in known)]
    rows = [table_row(f"<code>{breakable(one.name)}</code>", [*map(_value, one.values)]) for one in found]
    caption = f"{len(found)} parameter{'s' if len(found) > 1 else ''} that differ{'' if len(found) > 1 else 's'}"
    differing = table(caption, heads, rows, kind="words")
    if len(found) > FOLDED:
        differing = f"<details><summary>{caption}</summary>{differing}</details>"
    of_evaluators = re.compile(r"Experiment\.evaluator|.*Evaluator\.\w+")
    unlike = [one.name for one in found if of_evaluators.fullmatch(one.name) and ABSENT not in one.values]
    return section(title, body + differing, hint), unlike


def _value(text: str) -> str:
    return escape(text) if text == ABSENT else f"<code>{escape(text)}</code>"


# -- samples -----------------------------------------------------------------------------------------------------------


def _samples(runs: Runs) -> str:
    """The last grid of each run side by side, the teacher's above it where there is one."""
    columns, drawn = [], []
    for index, (label, run) in enumerate(runs.items()):
        found = grids(run.workdir)
        if not found:
            continue
        step, last = list(found.items())[-1]
        alternative = f"samples of the teacher of {label}"
        above = picture(run.workdir, TEACHER, escape(run.teacher_name()), alternative) if run.teacher_grid else ""
        below = picture(run.workdir, last, f"student, step <b>{step:,}</b>", f"samples of {label} at step {step}")
        drawn.append(run)
        columns.append(f"<div><h3>{_key(index, label)}</h3>{above}{below}</div>")
    if not columns:
        return ""
    return section("Samples", f'<div class="sides">{"".join(columns)}</div>', _noise(drawn))


def _noise(runs: Sequence[RunFiles]) -> str:
    """Whether the grids may be compared place by place: whether seed, number and shape of the noise are the same."""
    shape = re.compile(r"Experiment\.(seed|preview_samples|task)|student/.*\.(network|resolution|image_channels)")
    drawn = [{key: value for key, value in (run.bindings or {}).items() if shape.fullmatch(key)} for run in runs]
    if drawn[0] and all(one == drawn[0] for one in drawn):
        return "All grids start from the same noise: a place shows one sample in every run."
    return (
        "Seeds, numbers or shapes of the samples differ: grids start from different noise, and places do not compare."
    )


# -- diagnostics -------------------------------------------------------------------------------------------------------


def _verdicts(runs: Runs) -> str:
    """One line a run: the verdict on its ratio, and what each check found."""
    rows, names = [], []
    for index, (label, run) in enumerate(runs.items()):
        tables = run.diagnostics.get("ratio") or {}
        with fields_of(run.workdir / "diagnostics.json", RESUME):
            found, steps = checks(run.records, tables), max(run.step, run.diagnostics.get("step", 0))
        names = [check.name for check in found]
        key, measured = _key(index, label), [check.found != NOT_MEASURED for check in found]
        if not any(measured):
            words = "no ratio that learns, or not measured"
            rows.append(f'<tr><th scope="row">{key}</th><td class="open" colspan="{len(found) + 1}">{words}</td></tr>')
            continue
        kind, line = verdict(found, steps)
        marks = [_mark(*outcomes(steps)[c.holds]) if known else "" for c, known in zip(found, measured, strict=True)]
        cells = [f"{mark} {escape(check.found)}".strip() for mark, check in zip(marks, found, strict=True)]
        rows.append(table_row(key, [_mark(kind, line.partition(":")[0]), *cells]))
    if not any("mark" in row for row in rows):
        return ""
    heads = ["run", "verdict", *map(escape, names)]
    verdicts = table("Verdicts on the runs' ratios", heads, rows, kind="words", seen=False)
    hint = "Each run's own report has the rules, the charts by noise level and how to read them."
    return section("Can the ratios be trusted?", verdicts, hint)


def _mark(kind: str, word: str) -> str:
    return f'<span class="{kind} mark">{escape(word)}</span>'


def _notes(runs: Runs) -> str:
    """What could not be read, and the protocols' notes, those of several runs once."""
    notes: dict[str, list[str]] = {}
    for label, run in runs.items():
        for note in run.evaluation.get("notes") or []:
            notes.setdefault(str(note), []).append(label)
    parts = []
    for note, labels in notes.items():
        whose = "" if len(labels) == len(runs) else f"<b>{escape(', '.join(labels))}</b>: "
        parts.append(f"<p>{whose}{escape(note)}</p>")
    for label, run in runs.items():
        parts += [f'<p class="gaps"><b>{escape(label)}</b>: {escape(note)}</p>' for note in run.notes]
    return section("Notes", "".join(parts)) if parts else ""
