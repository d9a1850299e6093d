"""Timing that can be compared: variants in turn in one process, medians over rounds, and the machine.

Notation: a *variant* is a function of no arguments that does the whole work once; a *round* runs every variant once, in
an order that rotates from round to round, so that a slow minute of the machine affects all of them. A *record* is the
result of one measurement, a line of JSON.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ratiograph.core.files import Missing, write_atomically
from ratiograph.core.foreign import lines_of, parse_json, read_text, shown

__all__ = [
    *("append_record", "count_flops", "hardware", "in_turn", "load"),
    *("medians", "read_records", "request", "standard_error"),
]


def in_turn(variants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each variant in each of ``rounds`` rounds, after one round that is not counted."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            taken = _seconds(variants[name], device)
            if number:
                seconds[name].append(taken)
    return seconds


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, by the device's own clock where it has one."""
    if device.type != "cuda":
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        begun.record()
        work()
        ended.record()
        ended.synchronize()
    return begun.elapsed_time(ended) / 1e3


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each variant's rounds, in seconds."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def standard_error(values: list[float]) -> float | None:
    """Of the median of ``values``, relative to it, as of a normal distribution; None for fewer than three values.

    sqrt(pi / 2) s / sqrt(n) with s = 1.4826 times the median distance from the median, which single slow rounds leave
    alone.
    """
    if len(values) < 3:
        return None
    middle = statistics.median(values)
    spread = 1.4826 * statistics.median(abs(value - middle) for value in values)
    return 1.2533 * spread / len(values) ** 0.5 / middle


def count_flops(work: Callable[[], object]) -> int:
    """Floating-point operations of matrix products and convolutions in one call of ``work``."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which a peak of memory would show

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def request(gin_file: Sequence[str], gin_param: Sequence[str], **numbers: int) -> dict[str, object]:
    """The part of a record that says which run was measured."""
    return {"gin_file": list(gin_file), "gin_param": list(gin_param), **numbers}


def load() -> float:
    """Average number of processes running on this machine in the last minute; 0 if it was idle."""
    return os.getloadavg()[0]


def hardware(device: torch.device) -> dict[str, object]:
    """The machine that the numbers are measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    kinds = [kind for kind in ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx2") if capabilities.get(kind)]
    return {
        "device": name,
        "instructions": kinds[:1],
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def revision() -> str | None:
    """The commit of the checkout that holds this package, with a + where files differ from it; None outside one."""
    describe = ["describe", "--always", "--dirty=+", "--abbrev=8", "--exclude=*"]
    command = ["git", "-C", str(Path(__file__).parent), *describe]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def append_record(path: Path, record: Mapping[str, object], device: torch.device) -> dict[str, object]:
    """Adds one JSON line with date, revision and hardware to ``path``; returns what was written."""
    path = Path(path)
    today = datetime.date.today().isoformat()
    whole = {"date": today, "revision": revision(), "hardware": hardware(device), **record}
    before = path.read_bytes() if path.is_file() else b""
    write_atomically(path, before + (json.dumps(whole) + "\n").encode())
    return whole


def read_records(path: Path, start: str = "") -> list[dict[str, object]]:
    """The records of a file in order, of dates or revisions that start with ``start``.

    Raises:
        ValueError: there is no such file, a line is no JSON object, or no record is left.
    """
    try:
        lines = lines_of(read_text(path))
    except Missing as error:
        raise ValueError(f"no records at {shown(path)}; tools/bench.py --out={shown(path)} step makes some") from error
    records = []
    for number, line in enumerate(lines, 1):
        record = parse_json(line, f"{path}, line {number},")
        if not isinstance(record, dict):
            raise ValueError(f"{shown(path)}, line {number} holds a {type(record).__name__}, not an object")
        records.append(record)
    kept = [record for record in records if any(str(record.get(k)).startswith(start) for k in ("date", "revision"))]
    if not kept:
        raise ValueError(f"{shown(path)} holds no record of a date or revision that starts with {start!r}")
    return kept
