"""What the ranks of a distributed run see together; on a single process everything here is the identity.

Statistics of a batch are statistics of the GLOBAL batch, so that one process with 8 samples and two with 4 each
compute the same numbers. Per-sample scalars are few, so they are gathered whole: no reduction order to worry about.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather", "own_part"]


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(values: Tensor) -> Tensor:
    """``values`` [B] (or [B, ...]) of every rank, one rank after another [ranks * B], without a graph.

    Every rank must hold the same number of samples.
    """
    values = values.detach()
    if _ranks() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(_ranks())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def own_part(values: Tensor) -> Tensor:
    """This rank's [B] of what ``gather`` put together, or of something computed from it sample by sample."""
    if _ranks() == 1:
        return values
    return values.tensor_split(_ranks())[dist.get_rank()]
