"""Devices by the names that users give, and the arithmetic that they are good at."""

from __future__ import annotations

import re

import torch

from ratiograph.core import distributed
from ratiograph.core.foreign import shown

__all__ = ["autocast_dtype", "choose_device", "named_device"]


def named_device(device: str) -> torch.device:
    """The torch device of ``--device``, which need not exist here; "auto" is a GPU if there is one.

    Raises:
        ValueError: it is none of them.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise ValueError(f"--device={shown(device)} is no device: give auto, cpu, cuda or cuda:N")
    return torch.device(device)


def choose_device(device: str) -> torch.device:
    """As ``named_device``, but a ValueError unless it exists; "cuda" is another GPU for each process of a machine."""
    chosen = named_device(device)
    if chosen.type == "cpu":
        return chosen
    chosen = torch.device("cuda", distributed.local_rank() if chosen.index is None else chosen.index)
    if chosen.index >= torch.cuda.device_count():
        seen = f"{torch.cuda.device_count() or 'no'} GPU here"
        raise ValueError(f"--device={device}, but torch sees {seen}: use --device=cpu or --device=auto")
    return chosen


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The networks' autocast type; None is float32. "auto" is bf16 where the hardware computes in it."""
    if precision == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
        capabilities = torch.cpu.get_capabilities()
        return torch.bfloat16 if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else None
    return {"fp32": None, "fp64": None, "bf16": torch.bfloat16}[precision]
