"""``evaluation.json``: reading one that is there, and adding rows to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

__all__ = ["merged", "read_document"]

EMPTY = {"title": "One-step samples", "rows": [], "metrics": {}, "figures": [], "notes": []}


def read_document(path: Path) -> dict:
    """The document, or an empty one where there is none.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.is_file():
        return dict(EMPTY)
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): delete it, or give --out") from error
    if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
        raise ValueError(f"{path} is no evaluation.json: give --out")
    return {**EMPTY, **document}


def merged(old: Mapping, new: Mapping, suffix: str) -> dict:
    """``old`` with the numbers of ``new``: a row of the same name and samples takes them up, other rows follow.

    A number that ``old`` has under the same name with another label, as of other features, keeps it; the new one is
    called ``<name>_<suffix>``. Which row is ``best`` is for ``new`` to say where it does.
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
    judged = any("best" in row for row in new["rows"])
    rows = [{key: value for key, value in row.items() if not (judged and key == "best")} for row in old["rows"]]
    for row in new["rows"]:
        renamed = {clash.get(key, key): value for key, value in row.items()}
        same = [r for r in rows if (r.get("name"), r.get("samples")) == (row["name"], row["samples"])]
        if same:
            same[0].update(renamed)
        else:
            rows.append(renamed)
    notes = list(dict.fromkeys([*old["notes"], *new["notes"]]))
    return {**old, "rows": rows, "metrics": {**old["metrics"], **labels}, "notes": notes}
