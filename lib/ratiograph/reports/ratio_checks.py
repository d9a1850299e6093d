"""Checks of a run's density-ratio estimator, and the verdict on it.

Notation: l = log p/q is the estimator's, D = sigmoid(l); q is the student, p the teacher or the data. *Records* are the
objects of metrics.jsonl, *tables* the ``ratio`` of diagnostics.json (`algebra.diagnostics.RatioDiagnostics.summary`). A
*check* compares one of the quantities that are known for the exact l with a threshold, which the page states:

    identities        E_q[e^l] and E_p[e^-l] are 1, averaged over the last tenth of the records
    accuracy          strictly between chance and complete separation
    calibration error sum over levels of D of share |predicted - observed|, 0 for the exact l

Checks can expose a wrong ratio and cannot prove a right one: l = 0 passes all but that of the accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ratiograph.reports.axes import Guide
from ratiograph.reports.evaluation_file import finite
from ratiograph.training.logs import significant

__all__ = ["GUIDES", "IDENTITY_NAMES", "NOT_MEASURED", "Check", "checks", "outcomes", "verdict"]

IDENTITY = 0.2  # |mean - 1| that passes
IDENTITY_FACTOR = 2.0  # the same at a single noise level, where samples are fewer
SEPARATED = 0.99  # accuracy of complete separation: such an estimator knows only that the ratio is large
CHANCE = 0.55  # accuracy that differs from chance
CALIBRATION = 0.05
EARLY = 100  # steps before which nothing is judged: about twice what the tables remember
NOT_MEASURED = "not measured"

IDENTITY_NAMES = {
    "ratio/mean_exp_student": "E_q[e^l], student samples",
    "ratio/mean_exp_real": "E_p[e^−l], real samples",
}
GUIDES = {  # what the metrics of a name or a group are read against
    **dict.fromkeys(IDENTITY_NAMES, Guide(1.0, shade=(1 - IDENTITY, 1 + IDENTITY), log=True)),
    "ratio/accuracy": Guide(0.5, ends=(0.0, 1.0)),
    "cosine": Guide(0.0, ends=(-1.0, 1.0)),
}


@dataclass(frozen=True)
class Check:
    """One check: what was found, the rule, and whether it holds (None: undecided)."""

    name: str
    found: str
    rule: str
    holds: bool | None


def checks(records: Sequence[Mapping[str, Any]], tables: Mapping[str, Any]) -> list[Check]:
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


def _identities(records: Sequence[Mapping[str, Any]]) -> Check:
    known = {}
    for name, label in IDENTITY_NAMES.items():
        values = [record[name] for record in records if finite(record.get(name))]
        if values:
            late = values[-max(len(values) // 10, 5) :]
            known[label.partition(",")[0]] = math.fsum(late) / len(late)
    found = "; ".join(f"{label} = {significant(mean, 3)}" for label, mean in known.items())
    rule = f"both within {100 * IDENTITY:g} % of 1, over the last tenth of training"
    holds = all(abs(mean - 1) <= IDENTITY for mean in known.values()) if len(known) == 2 else None
    return Check("Identities", found or NOT_MEASURED, rule, holds)


def _identities_by_time(by_time: Mapping[str, Sequence[float | None]]) -> Check:
    name = "Identities by noise level"
    rule = f"between {1 / IDENTITY_FACTOR:g} and {IDENTITY_FACTOR:g} at every noise level"
    keys = ("mean_exp_student", "mean_exp_real")
    values = [value for key in keys for value in by_time.get(key, ()) if value is not None]
    if not values:
        return Check(name, NOT_MEASURED, rule, None)
    holds = all(1 / IDENTITY_FACTOR <= value <= IDENTITY_FACTOR for value in values)
    return Check(name, f"{significant(min(values), 3)} to {significant(max(values), 3)}", rule, holds)


def _accuracy(by_time: Mapping[str, Sequence[float | None]]) -> Check:
    values = [value for value in by_time.get("accuracy", ()) if value is not None]
    rule = f"below {SEPARATED} at every noise level, above {CHANCE} at one or more"
    if not values:
        return Check("Accuracy", NOT_MEASURED, rule, None)
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
        return Check("Calibration error", NOT_MEASURED, rule, None)
    error = math.fsum(share * abs(predicted - observed) for predicted, observed, share in known)
    return Check("Calibration error", f"{error:.3f}", rule, error <= CALIBRATION)


def verdict(found: Sequence[Check], steps: int) -> tuple[str, str]:
    """(class of report.css, one line of text) for the checks of a run after ``steps`` steps."""
    failed = [check.name.lower() for check in found if check.holds is False]
    missing = [check.name.lower() for check in found if check.found == NOT_MEASURED]
    if len(missing) == len(found):
        return "open", "Not measured: the run left none of the numbers that the checks need."
    if steps < EARLY:
        return "open", f"Too early to say: {steps} steps, and the checks are read from {EARLY} on."
    if failed:
        verb = "fails" if len(failed) == 1 else "fail"
        return "bad", f"Doubtful: {_listed(failed)} {verb}; weights that depend on l may be wrong."
    if missing:
        return "open", f"Incomplete: {_listed(missing)} not measured; nothing measured speaks against the ratio."
    if any(check.holds is None for check in found):
        return "open", (
            "Undecided: at no noise level does the estimator tell student from real samples. Either the student "
            "matches them, or the estimator has learnt nothing; the quality of the samples decides which."
        )
    return "good", "No objection: all checks pass. They can expose a wrong ratio; they cannot prove a right one."


def outcomes(steps: int) -> dict[bool | None, tuple[str, str]]:
    """{whether a check holds: (class of report.css, word)} after ``steps`` steps; before `EARLY` none is read."""
    if steps < EARLY:
        return dict.fromkeys((True, False, None), ("open", "not yet"))
    return {True: ("good", "passes"), False: ("bad", "fails"), None: ("open", "undecided")}


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
