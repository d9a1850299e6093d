"""Reads evaluation.json and other JSON files of a run; what is in them is checked here and nowhere else.

The form of evaluation.json is in `reports.run_report`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ratiograph.core.foreign import read_json, shown

__all__ = ["fields_of", "finite", "read_evaluation", "read_object"]

WRONG = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, StopIteration, RecursionError)
"""What a missing or wrong field raises where it is used."""
FORM = "The form is in the documentation of ratiograph.reports.run_report; evaluate again"


def finite(value: Any) -> bool:
    """Whether a value of a record is a finite number; a bool is one."""
    return isinstance(value, int | float) and math.isfinite(value)


@contextmanager
def fields_of(path: Path, remedy: str) -> Iterator[None]:
    """Turns the errors of a block that reads the fields of a JSON file into one that names the file and the remedy.

    Raises:
        ValueError: the block raised an error that a missing or wrong field causes.
    """
    try:
        yield
    except WRONG as error:
        raise ValueError(
            f"{shown(path)} lacks or misuses a field ({type(error).__name__}: {shown(error)}). {remedy}, or remove the "
            "file"
        ) from error


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run; {} if there is no file.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    if not path.exists():
        return {}
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{shown(path)} holds a {type(found).__name__}, not an object. Make it again, or remove it")
    return found


def read_evaluation(path: Path) -> dict[str, Any]:
    """An evaluation.json, its fields of the types that its form says; {} if there is no file.

    Raises:
        ValueError: the file cannot be read, or has another form.
    """
    document = read_object(path)
    with fields_of(path, FORM):
        _expect(document.get("title"), str | None, "title")
        for row in _each(document, "rows", dict):
            _check_row(row)
        for name, about in _part(document, "metrics").items():
            _expect(about, dict, f"metrics.{name}")
            for key in ("label", "better", "of"):
                _expect(about.get(key), str | None, f"metrics.{name}.{key}")
        found = document.get("histograms") or []
        for histogram in [found] if isinstance(found, dict) else _each(document, "histograms", dict):
            _check_histogram(histogram)
        for figure in _each(document, "figures", dict):
            _expect(figure["file"], str, "file of a figure")
            _expect(figure.get("caption"), str | None, "caption of a figure")
        for _ in _each(document, "notes", str):
            pass
    return document


def _check_row(row: Mapping[str, Any]) -> None:
    _expect(row["name"], str, "name of a row")
    for key, value in row.items():
        counts = key in ("evaluations", "samples")
        for number in value if isinstance(value, list) and not counts else [value]:
            _expect(number, int | None if counts else int | float | str | None, f"{key} of a row")
            if isinstance(number, int) and abs(number) >= 2**63:
                raise OverflowError(f"{key} of a row is too large")
        if isinstance(value, list) and not all(isinstance(number, int | float) for number in value):
            raise TypeError(f"{key} of a row is no list of numbers")


def _check_histogram(histogram: Mapping[str, Any]) -> None:
    labels = histogram["labels"]
    _expect(labels, list, "labels of a histogram")
    _expect(histogram.get("title"), str | None, "title of a histogram")
    for one in _each(histogram, "series", dict):
        values = one["values"]
        _expect(one["name"], str, "name of a series")
        _expect(values, list, "values of a series")
        if not all(map(finite, values)):
            raise TypeError(f"histogram {one['name']} has a value that is no finite number")
        if len(values) != len(labels):
            raise TypeError(f"histogram {one['name']} has {len(values)} values for {len(labels)} labels")


def _part(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    _expect(document.get(name), dict | None, name)
    return document.get(name) or {}


def _each(document: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    _expect(document.get(name), list | None, name)
    for one in document.get(name) or []:
        _expect(one, kind, f"one of {name}")
    return document.get(name) or []


def _expect(value: object, kind: Any, name: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} is a {type(value).__name__}")
