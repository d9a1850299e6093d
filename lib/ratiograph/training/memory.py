"""The memory that this process has used at most, and the memory that is left. One GB is 1e9 bytes."""

from __future__ import annotations

import platform
import resource
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["available_memory", "peak_memory", "require_memory"]


def peak_memory(device: torch.device) -> float:
    """The peak memory of this process in GB: resident memory on a CPU, torch's allocations on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with suppress(OSError, StopIteration):  # on Linux getrusage includes the parent process's peak
        return 1024 * _kilobytes("/proc/self/status", "VmHWM") / 1e9
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def available_memory(device: torch.device) -> float:
    """GB that can be allocated without swapping; infinite where the system does not say."""
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
    """Raises a ValueError if less than 1.1 ``gigabytes`` are left, before the work starts to swap or is killed.

    Args:
        gigabytes: peak memory of the work.
        device: the device that it runs on.
        remedy: how to make the work smaller; the end of the message.
    """
    left = available_memory(device)
    if 1.1 * gigabytes > left:
        raise ValueError(f"this takes about {gigabytes:.1f} GB and {left:.1f} GB are left: {remedy}")
