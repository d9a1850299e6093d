"""Timing that can be compared: variants in turn in one process, medians of many, and what machine it was.

Notation: a *variant* is a function of no arguments that does the whole work once; a *round* runs every variant once, in
an order that turns from round to round, so that a slow minute of the machine falls on all of them.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from ratiograph.files import write_atomically

__all__ = ["append_record", "count_flops", "hardware", "in_turn", "medians", "peak_memory"]


def in_turn(variants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each variant in each of ``rounds`` rounds, after one round that is not counted."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            _synchronise(device)
            begun = time.perf_counter()
            variants[name]()
            _synchronise(device)
            if number:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each variant's rounds, in seconds."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def count_flops(work: Callable[[], object]) -> int:
    """Floating-point operations of matrix products and convolutions in one call of ``work``."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def peak_memory(device: torch.device) -> float:
    """Most memory held so far in GB: the process's on a CPU, the allocator's on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # Unix only

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if platform.system() == "Darwin" else 1024) / 1e9


def hardware(device: torch.device) -> dict[str, object]:
    """What the numbers were measured on."""
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


def append_record(path: Path, record: Mapping[str, object], device: torch.device) -> dict[str, object]:
    """Adds one JSON line with today's date and the hardware to ``path``; returns what was written."""
    path = Path(path)
    whole = {"date": datetime.date.today().isoformat(), "hardware": hardware(device), **record}
    before = path.read_bytes() if path.is_file() else b""
    write_atomically(path, before + (json.dumps(whole) + "\n").encode())
    return whole
