"""Can the ratio of a run be trusted? The section of the report that says so, the curves of quality, and collapse.

Notation: l = log p/q is the estimator's, D = sigmoid(l); q is the student, p the teacher or the data. *Records* are the
objects of metrics.jsonl, *tables* the ``ratio`` of diagnostics.json (``diagnostics.RatioDiagnostics.summary``). A
*check* compares one of the quantities that are known for the exact l with a threshold, which the page states:

    identities        E_q[e^l] and E_p[e^-l] are 1, averaged over the last tenth of the records
    accuracy          strictly between chance and complete separation
    calibration error sum over levels of D of share |predicted - observed|, 0 for the exact l

Checks can expose a wrong ratio and cannot prove a right one: l = 0 passes all but that of the accuracy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ratiograph.reports.charts import Guide, bin_chart, calibration_chart, line_chart
from ratiograph.reports.page import captioned, scrolled
from ratiograph.training.logs import significant

__all__ = ["Check", "checks", "collapse_banner", "outcomes", "quality_charts", "trust", "verdict"]

IDENTITY = 0.2  # |mean - 1| that is let pass
IDENTITY_FACTOR = 2.0  # the same at a single noise level, where samples are fewer
SEPARATED = 0.99  # accuracy of an estimator that only says "large"
CHANCE = 0.55  # accuracy of one that says nothing
CALIBRATION = 0.05
EARLY = 100  # steps before which nothing is judged: about twice what the tables remember

_STUDENT, _REAL = "ratio/mean_exp_student", "ratio/mean_exp_real"
_NAMES = {_STUDENT: "E_q[e^l], student samples", _REAL: "E_p[e^−l], real samples"}

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Check:
    """One line of the verdict: what was found, the rule it is held to, and whether it holds (None: undecided)."""

    name: str
    found: str
    rule: str
    holds: bool | None


def checks(records: Records, tables: Mapping[str, Any]) -> list[Check]:
    """The four checks.

    Args:
        records: of metrics.jsonl.
        tables: the ``ratio`` of diagnostics.json; {} if there is none.

    Raises:
        KeyError, TypeError: the tables lack a field.
    """
    by_time = tables["by_time"] if tables else {}
    calibration = tables["calibration"] if tables else {}
    return [_identities(records), _identities_by_time(by_time), _accuracy(by_time), _calibration(calibration)]


def _identities(records: Records) -> Check:
    means = {name: _late_mean(records, name) for name in (_STUDENT, _REAL)}
    found = "; ".join(
        f"{_NAMES[name].partition(',')[0]} = {significant(mean, 3)}" for name, mean in means.items() if mean is not None
    )
    rule = f"both within {100 * IDENTITY:g} % of 1, over the last tenth of training"
    known = [mean for mean in means.values() if mean is not None]
    holds = all(abs(mean - 1) <= IDENTITY for mean in known) if len(known) == 2 else None
    return Check("Identities", found or "not measured", rule, holds)


def _late_mean(records: Records, name: str) -> float | None:
    values = [record[name] for record in records if _finite(record.get(name))]
    late = values[-max(len(values) // 10, 5) :]
    return math.fsum(late) / len(late) if late else None


def _identities_by_time(by_time: Mapping[str, Sequence[float | None]]) -> Check:
    values = [
        value for key in ("mean_exp_student", "mean_exp_real") for value in by_time.get(key, ()) if value is not None
    ]
    rule = f"between {1 / IDENTITY_FACTOR:g} and {IDENTITY_FACTOR:g} at every noise level"
    if not values:
        return Check("Identities by noise level", "not measured", rule, None)
    holds = all(1 / IDENTITY_FACTOR <= value <= IDENTITY_FACTOR for value in values)
    return Check(
        "Identities by noise level", f"{significant(min(values), 3)} to {significant(max(values), 3)}", rule, holds
    )


def _accuracy(by_time: Mapping[str, Sequence[float | None]]) -> Check:
    values = [value for value in by_time.get("accuracy", ()) if value is not None]
    rule = f"below {SEPARATED} at every noise level, above {CHANCE} at one or more"
    if not values:
        return Check("Accuracy", "not measured", rule, None)
    separated = sum(value >= SEPARATED for value in values)
    found = f"{min(values):.2f} to {max(values):.2f}"
    if separated:
        return Check("Accuracy", f"{found}; complete separation at {separated} of {len(values)} levels", rule, False)
    return Check("Accuracy", found, rule, True if max(values) > CHANCE else None)


def _calibration(calibration: Mapping[str, Sequence[float | None]]) -> Check:
    rule = f"mean distance from the diagonal at most {CALIBRATION}"
    rows = zip(*(calibration.get(key, ()) for key in ("predicted", "observed", "share")), strict=True)
    known = [row for row in rows if None not in row]
    if not known:
        return Check("Calibration error", "not measured", rule, None)
    error = math.fsum(share * abs(predicted - observed) for predicted, observed, share in known)
    return Check("Calibration error", f"{error:.3f}", rule, error <= CALIBRATION)


def verdict(found: Sequence[Check], steps: int) -> tuple[str, str]:
    """(class of report.css, one line of text) for the checks of a run after ``steps`` steps."""
    failed = [check.name.lower() for check in found if check.holds is False]
    missing = [check.name.lower() for check in found if check.found == "not measured"]
    if len(missing) == len(found):
        return "open", "Not measured: the run left none of the numbers that the checks need."
    if steps < EARLY:
        return "open", f"Too early to say: {steps} steps, and the checks are read from {EARLY} on."
    if failed:
        verb = "fails" if len(failed) == 1 else "fail"
        return "bad", f"Doubtful: {_listed(failed)} {verb}; weights that depend on l may be wrong."
    if missing:
        return "open", f"Incomplete: {_listed(missing)} not measured; nothing that was speaks against the ratio."
    if any(check.holds is None for check in found):
        return "open", (
            "Undecided: at no noise level does the estimator tell student from real samples. Either the student "
            "matches them, or the estimator has learnt nothing; the quality of the samples decides which."
        )
    return "good", "No objection: all checks pass. They can expose a wrong ratio; they cannot prove a right one."


def outcomes(steps: int) -> dict[bool | None, tuple[str, str]]:
    """{whether a check holds: (class of report.css, word)} after ``steps`` steps: none is read before EARLY."""
    if steps < EARLY:
        return dict.fromkeys((True, False, None), ("open", "not yet"))
    return {True: ("good", "passes"), False: ("bad", "fails"), None: ("open", "undecided")}


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def trust(records: Records, diagnostics: Mapping[str, Any]) -> tuple[str, set[str]]:
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
    names = {name for record in records for name, value in record.items() if _finite(value)}
    if not any(name.startswith("ratio/") for name in names) and not (tables and _known(tables["by_time"]["accuracy"])):
        return "", set()
    groups = {
        group: sorted(name for name in names if name.startswith(f"{group}/"))
        for group in ("divergence", "field", "cosine")
    }
    cards = [*_identity_cards(records, names, tables), *_accuracy_cards(records, names, tables)]
    cards += [*_divergence_cards(records, groups["divergence"], tables), *_field_cards(records, groups)]
    shown = {_STUDENT, _REAL, "ratio/accuracy", *itertools.chain(*groups.values())} & names
    steps = max([diagnostics.get("step", 0), *(record["step"] for record in records[-1:])])
    body = "".join(f"<div>{chart}<p>{text}</p></div>" for chart, text in cards)
    return f'{_verdict(checks(records, tables), steps)}<div class="charts read">{body}</div>', shown


def _verdict(found: Sequence[Check], steps: int) -> str:
    kind, line = verdict(found, steps)
    words = outcomes(steps)
    rows = "".join(
        f'<tr><th scope="row">{escape(check.name)}</th><td class="{words[check.holds][0]}">{words[check.holds][1]}</td>'
        f"<td>{escape(check.found)}</td><td>{escape(check.rule)}</td></tr>"
        for check in found
    )
    head = "".join(f'<th scope="col">{word}</th>' for word in ("check", "holds", "found", "rule"))
    caption = captioned("The checks of the ratio", seen=False)
    table = f'<table class="checks">{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<p class="verdict {kind}">{escape(line)}</p>{scrolled(table, "The checks of the ratio")}'


Card = tuple[str, str]  # a chart, and how to read it


def _identity_cards(records: Records, names: set[str], tables: Mapping[str, Any]) -> list[Card]:
    guide = Guide(1.0, shade=(1 - IDENTITY, 1 + IDENTITY), log=True)
    cards = []
    if {_STUDENT, _REAL} <= names:
        cards.append((_over_training(records, "", "identities", "", _NAMES, guide), _READ["identities"]))
    series = (
        {_NAMES[f"ratio/{key}"]: tables["by_time"][key] for key in ("mean_exp_student", "mean_exp_real")}
        if tables
        else {}
    )
    if any(_known(values) for values in series.values()):
        cards.append(
            (bin_chart("identities by noise level", "", series, guide=guide), _READ["identities by noise level"])
        )
    calibration = tables["calibration"] if tables else {}
    if calibration and _known(calibration["predicted"]):
        columns = [calibration[key] for key in ("predicted", "observed", "share")]
        cards.append((calibration_chart("calibration", *columns), _READ["calibration"]))
    return cards


def _accuracy_cards(records: Records, names: set[str], tables: Mapping[str, Any]) -> list[Card]:
    guide, cards = Guide(0.5, ends=(0.0, 1.0)), []
    if "ratio/accuracy" in names:
        chart = _over_training(records, "", "accuracy", "fraction", {"ratio/accuracy": "accuracy"}, guide)
        cards.append((chart, _READ["accuracy"]))
    if tables and _known(tables["by_time"]["accuracy"]):
        series = {"accuracy": tables["by_time"]["accuracy"]}
        cards.append(
            (bin_chart("accuracy by noise level", "fraction", series, guide=guide), _READ["accuracy by noise level"])
        )
    return cards


def _divergence_cards(records: Records, names: Sequence[str], tables: Mapping[str, Any]) -> list[Card]:
    guide, cards = Guide(0.0), []
    if names:
        chart = _over_training(records, "", "divergences", "nats for KL", _short(names), guide)
        cards.append((chart, _READ["divergences"]))
    if tables and _known(tables["by_time"]["kl"]):
        series = {"KL(q||p)": tables["by_time"]["kl"]}
        cards.append(
            (bin_chart("KL(q||p) by noise level", "nats", series, guide=guide), _READ["divergence by noise level"])
        )
    return cards


def _field_cards(records: Records, groups: Mapping[str, Sequence[str]]) -> list[Card]:
    cards = []
    if groups["field"]:
        chart = _over_training(records, "field", "norms", "rms at the image", _short(groups["field"]), None)
        cards.append((chart, _READ["fields"]))
    if groups["cosine"]:
        guide = Guide(0.0, ends=(-1.0, 1.0))
        chart = _over_training(records, "field", "cosines", "", _short(groups["cosine"]), guide)
        cards.append((chart, _READ["cosines"]))
    return cards


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


def _short(names: Sequence[str]) -> dict[str, str]:
    return {name: name.partition("/")[2].replace("_", " ") for name in names}


def _over_training(
    records: Records, group: str, title: str, unit: str, names: Mapping[str, str], guide: Guide | None
) -> str:
    """A chart of the metrics ``names`` (name -> label), over the records that have any of them."""
    if list(names.values()) != [title] and len(names) == 1:  # one series has no legend to name it
        title = f"{title}: {next(iter(names.values()))}"
    known = [record for record in records if any(_finite(record.get(name)) for name in names)]
    series = {
        label: [record[name] if _finite(record.get(name)) else math.nan for record in known]
        for name, label in names.items()
    }
    return line_chart(group, title, unit, [record["step"] for record in known], series, guide=guide)


def quality_charts(records: Records, described: Mapping[str, Any]) -> str:
    """Charts of evaluation/* against the training images.

    Args:
        records: of metrics.jsonl.
        described: the ``metrics`` of evaluation.json, for labels and directions; may be {}.

    Returns:
        HTML; "" if nothing was measured while training.
    """
    names = dict.fromkeys(name for record in records for name in record if name.startswith("evaluation/"))
    charts = []
    for name in names:
        key = name.partition("/")[2]
        known = [record for record in records if _finite(record.get(name)) and "images" in record]
        if key == "collapsed" or not known:
            continue
        about = described.get(key) or {}
        unit = {"lower": "lower is better", "higher": "higher is better"}.get(about.get("better") or "", "")
        title = str(about.get("label") or key.replace("_", " "))
        images = [record["images"] for record in known]
        charts.append(line_chart("", title, unit, images, {title: [r[name] for r in known]}, where="# images"))
    return "".join(charts)


def collapse_banner(records: Records, evaluation: Mapping[str, Any]) -> str:
    """A warning if the student has collapsed, or had while training; "" otherwise.

    A student that was collapsed at the first measurements only, before it had learnt, is not warned of.
    """
    seen = [
        (record["step"], record["evaluation/collapsed"] >= 0.5)
        for record in records
        if "evaluation/collapsed" in record
    ]
    turned = next((step for (_, before), (step, now) in itertools.pairwise(seen) if now and not before), None)
    rows = [row for row in evaluation.get("rows") or [] if row.get("highlight") and row.get("collapsed") is not None]
    ended = seen[-1][1] if seen else False
    collapsed = any(row["collapsed"] for row in rows) if rows else ended
    when = f" It was first seen at step {turned:,}." if turned is not None else ""
    if collapsed:
        head, text = (
            "The student has collapsed.",
            f"It makes few kinds of samples, or nearly the same one.{when} {_CURE}",
        )
    elif turned is not None or ended:
        last = "still so at the last measurement while training" if ended else "no longer so at the last one"
        final = ", but not in the final evaluation" if rows else ""
        head, text = "The student collapsed while training.", f"{when.strip()} This was {last}{final}. {_CURE}"
    else:
        return ""
    return f'<div class="banner" role="alert"><b>{head}</b> {escape(text)}</div>'


_CURE = (
    "Look at the grids and the class shares, then run again with a lower learning rate of the student, more updates of "
    "the critics a step, or a smaller coefficient of the GAN term."
)


def _known(values: Sequence[float | None]) -> bool:
    return any(value is not None for value in values)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
