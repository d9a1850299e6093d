"""Formats of a run's log: numbers, durations, grids of pictures, and the lines of metrics.jsonl.

A *metric* is a number under a name ``<group>/<name>``: ``loss/ratio``, ``field/distribution`` (rms norm of a
term's field at the image), ``ratio/accuracy``. ``metrics.jsonl`` holds one JSON object for each logged step::

    {"step": 400, "seconds": 31.2, "images": 51200, "loss/ratio": 0.61, ...}

``seconds`` is time spent training since step 0, added up over resumes; ``images`` the training samples seen.
JSON has no NaN or infinity: such a value is written as null. Importing this module is quick, and imports no torch.
"""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ratiograph.core.files import Missing
from ratiograph.core.foreign import lines_of, parse_json, read_bytes, read_text, shown

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["HISTORY", "duration", "make_grid", "read_history", "read_metrics", "significant"]

HISTORY = "history.jsonl"


def significant(value: float | None, digits: int = 4) -> str:
    """``value`` rounded to ``digits`` significant digits: 0.6931, 1.2e-05, 51,200; "nan" for None or NaN."""
    if value is None or not math.isfinite(value):
        return "nan" if value is None or math.isnan(value) else ("inf" if value > 0 else "-inf")
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 10 ** (digits + 3) or size < 1e-4:
        return f"{value:.{max(digits - 2, 1)}e}"
    decimals = max(digits - 1 - math.floor(math.log10(size)), 0)
    return f"{value:,.{decimals}f}"


def duration(seconds: float | None) -> str:
    """``seconds`` as ``m:ss`` or ``h:mm:ss``; ``-:--`` where it is not known."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def make_grid(images: Tensor, columns: int = 8, *, min_side: int = 56) -> np.ndarray:
    """Lays images out in rows, each pixel enlarged so that small ones are readable.

    Args:
        images: [N, C, H, W] in [-1, 1], N >= 1, C = 1 (grey) or 3 (colour); values outside are clamped, NaN
            is grey.
        columns: images a row; the last row may be shorter.
        min_side: pixels are repeated a whole number of times until an image's longer side reaches this.

    Returns:
        uint8 [rows, width, 3], images on a white ground with gaps of 2 pixels.

    Raises:
        ValueError: the shape is not that of grey or colour images.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.shape[0]:
        raise ValueError(f"a grid shows images [N, 1 or 3, H, W]; got shape {list(images.shape)}")
    values = np.nan_to_num(images.detach().float().cpu().numpy(), nan=0.0)
    tiles = np.rint((values.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    repeat = max(1, math.ceil(min_side / max(tiles.shape[1:3])))
    tiles = tiles.repeat(repeat, axis=1).repeat(repeat, axis=2)
    count, height, width, _ = tiles.shape
    columns, gap = min(columns, count), 2
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = gap + index // columns * (height + gap), gap + index % columns * (width + gap)
        grid[top : top + height, left : left + width] = tile  # a grey tile's one channel spreads over three
    return grid


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects in a metrics.jsonl, in file order; [] if there is no file.

    A last line that an interrupted write left torn is skipped in silence; broken lines before it, with a warning that
    names the first.

    Raises:
        ValueError: the file cannot be read.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = read_bytes(path).removesuffix(b"\n").split(b"\n")
    found = [_record(line) for line in lines]
    broken = [number for number, record in enumerate(found, 1) if record is None and number < len(lines)]
    if broken:
        more = f", as are {len(broken) - 1:,} more lines" if len(broken) > 1 else ""
        warnings.warn(
            f"{shown(path)}:{broken[0]} is not an object with a step and numbers: skipped{more}", stacklevel=2
        )
    return [record for record in found if record is not None]


def _record(line: bytes) -> dict[str, Any] | None:
    """The object of a line: a step and numbers of 64 bits or null; None for anything else."""
    try:
        record = parse_json(line, "the line")
    except ValueError:
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or record["step"] < 0:
        return None
    known = (value is None or isinstance(value, float) or _is_whole(value) for value in record.values())
    return record if all(known) else None


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and -(2**63) <= value < 2**63


def read_history(workdir: Path) -> list[dict[str, Any]]:
    """The objects of history.jsonl; [] without a file. Torn lines are left out."""
    found = []
    with suppress(Missing, ValueError):
        for line in lines_of(read_text(workdir / HISTORY)):
            with suppress(ValueError):
                entry = parse_json(line, HISTORY)
                if isinstance(entry, dict) and "ratiograph" in entry and _are_changes(entry.get("changes")):
                    found.append(entry)
    return found


def _are_changes(value: object) -> bool:
    """Whether it is a dict of lists of texts."""
    lists = [*value.values()] if isinstance(value, dict) else [None]
    return all(isinstance(each, list) and all(isinstance(text, str) for text in each) for each in lists)
