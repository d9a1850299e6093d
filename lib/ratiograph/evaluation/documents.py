"""The document of ``evaluation.json``: parts that evaluators share, reading one, and adding rows to it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ratiograph.core.foreign import read_json

__all__ = ["cached_notes", "merged", "read_document", "shares_series", "without"]

EMPTY = {"title": "One-step samples", "rows": [], "metrics": {}, "figures": [], "notes": []}


def without(rows: Sequence[Mapping[str, object]], hidden: Collection[str]) -> list[dict]:
    """The rows without the keys ``hidden``."""
    return [{key: value for key, value in row.items() if key not in hidden} for row in rows]


def shares_series(
    rows: Sequence[Mapping[str, object]], key: str, expected: Mapping[str, Sequence[float]]
) -> list[dict]:
    """Series of a histogram: the shares ``key`` of every row, then the ``expected`` ones by name."""
    series = [(row["name"], row[key]) for row in rows] + list(expected.items())
    return [{"name": name, "values": list(shares)} for name, shares in series]


def cached_notes(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """A note that names the rows from the cache, if there are any."""
    cached = ", ".join(str(row["name"]) for row in rows if row.get("cached"))
    return [f"Measured in an earlier run with the same weights and protocol: {cached}."] if cached else []


def read_document(path: Path) -> dict:
    """The document, or an empty one where there is none.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.is_file():
        return dict(EMPTY)
    try:
        document = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; or delete it, or give --out") from error
    if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
        raise ValueError(f"{path} is no evaluation.json: give --out")
    return {**EMPTY, **document}


def merged(old: Mapping, new: Mapping, suffix: str) -> dict:
    """``old`` with the numbers of ``new``: added to a row of the same name and samples, or in a new row.

    Where ``old`` has a number of the same name with another label, as of other features, the new one is called
    ``<name>_<suffix>``. If ``new`` marks a row as ``best``, the marks of ``old`` are dropped.
    """
    clash = {
        key: f"{key}_{suffix}"
        for key, about in new["metrics"].items()
        if key in old["metrics"] and old["metrics"][key].get("label") != about["label"]
    }
    labels = {clash.get(key, key): dict(about) for key, about in new["metrics"].items()}
    for about in labels.values():
        if about.get("of") in clash:
            about["of"] = clash[about["of"]]
    rows = without(old["rows"], ["best"] if any("best" in row for row in new["rows"]) else [])
    for row in new["rows"]:
        renamed = {clash.get(key, key): value for key, value in row.items()}
        same = [r for r in rows if (r.get("name"), r.get("samples")) == (row["name"], row["samples"])]
        if same:
            same[0].update(renamed)
        else:
            rows.append(renamed)
    notes = list(dict.fromkeys([*old["notes"], *new["notes"]]))
    return {**old, "rows": rows, "metrics": {**old["metrics"], **labels}, "notes": notes}
