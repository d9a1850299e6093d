"""Captions as tensors, for ``Condition.caption``.

A caption is its UTF-8 bytes, zero-padded to ``LENGTH``; text encoders read 77 tokens, so longer ones are cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["LENGTH", "pack", "unpack"]

LENGTH = 1024


def pack(captions: Sequence[str]) -> Tensor:
    """``captions`` as bytes [B, LENGTH] uint8; one of more bytes is cut at a whole character, zeros are left out."""
    packed = torch.zeros(len(captions), LENGTH, dtype=torch.uint8)
    for row, caption in zip(packed, captions, strict=True):
        cut = caption.replace("\0", "").encode()[:LENGTH].decode(errors="ignore").encode()
        row[: len(cut)] = torch.frombuffer(bytearray(cut), dtype=torch.uint8) if cut else 0
    return packed


def unpack(packed: Tensor) -> list[str]:
    """Inverse of ``pack``."""
    return [row.tobytes().rstrip(b"\0").decode() for row in packed.numpy()]
