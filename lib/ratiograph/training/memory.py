"""Memory of the machine that this process runs on: the most it has held, and what is left.

Bytes are gigabytes of 1e9 where a function says GB.
"""

from __future__ import annotations

import platform
import resource
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["available_memory", "peak_memory", "require_memory"]


def peak_memory(device: torch.device) -> float:
    """The most that this process has held so far in GB: resident on a CPU, by torch's allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with suppress(OSError, StopIteration):  # what getrusage tells on Linux begins with the parent process's own
        return 1024 * _kilobytes("/proc/self/status", "VmHWM") / 1e9
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def available_memory(device: torch.device) -> float:
    """GB that can be had without swapping; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    left = [float("inf")]
    with suppress(OSError, StopIteration):
        left.append(1024 * _kilobytes("/proc/meminfo", "MemAvailable") / 1e9)
    with suppress(OSError, ValueError):  # a container's own limit, where it has one
        most, held = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        left.append((most - held) / 1e9)
    return min(left)


def _kilobytes(file: str, name: str) -> int:
    return int(next(line for line in Path(file).read_text().splitlines() if line.startswith(name)).split()[1])


def require_memory(gigabytes: float, device: torch.device, remedy: str) -> None:
    """Refuses work that would not fit, before it starts to swap or is killed.

    Args:
        gigabytes: what the work takes at its peak.
        device: where.
        remedy: how to ask for less, the end of the message.

    Raises:
        ValueError: less than a tenth more than that is left.
    """
    left = available_memory(device)
    if 1.1 * gigabytes > left:
        raise ValueError(f"this takes about {gigabytes:.1f} GB and {left:.1f} GB are left: {remedy}")
