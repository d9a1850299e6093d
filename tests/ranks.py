"""Processes of a distributed test, forked from one that has imported what they need, which takes seconds each time."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOADED = ["torch.distributed.fsdp", "torch.distributed.tensor", "ratiograph.training.trainer", "pytest"]


def together(function: Callable, ranks: int, *arguments: object) -> None:
    """Runs ``function(rank, *arguments)`` in so many processes that can exchange tensors over gloo.

    Args:
        function: at the top of a test's module.
        ranks: number of processes, each of one thread.
        arguments: as they can be pickled.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)  # of no effect once the server is up
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_joined, (ranks, folder, function, *arguments), nprocs=ranks, start_method="forkserver")


def _joined(rank: int, ranks: int, folder: str, function: Callable, *arguments: object) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    try:
        function(rank, *arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()
