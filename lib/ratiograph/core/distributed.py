"""What the ranks of a distributed run do together; on a single process everything here is the identity.

Statistics of a batch are statistics of the GLOBAL batch, so that one process with 8 samples and two with 4 each
compute the same numbers. Per-sample scalars are few, so they are gathered whole: no reduction order to worry about.
Gradients are averaged once an update, after all backward passes, in buckets.

Every exchange waits for the slowest rank, so there are few: what is gathered at one place is sent together, and an
exchange whose result is not needed at once (`Gathering`, `Averaging`) runs beside the networks. All ranks must begin
the same exchanges in the same order.
"""

from __future__ import annotations

import datetime
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "Averaging",
    "Gathering",
    "any_rank",
    "average_gradients",
    "average_metrics",
    "from_main",
    "gather",
    "gather_together",
    "is_main",
    "local_rank",
    "own_part",
    "rank",
    "ranks",
    "ranks_here",
    "start",
    "stop",
    "wait_for_all",
]

Value = TypeVar("Value")

BUCKET = 32 * 2**20
"""Elements of a bucket of gradients: the latency of an exchange does not show, and the copy is small."""


_hosts: dist.ProcessGroup | None = None
"""The group for messages between hosts: gloo where GPUs use nccl; None, the default group, elsewhere."""


def ranks() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 .. ranks() - 1."""
    return dist.get_rank() if ranks() > 1 else 0


def is_main() -> bool:
    """Whether this process writes the run's files and speaks for it."""
    return rank() == 0


def _environment() -> tuple[int, int, int]:
    """(rank, ranks, rank on this machine) as ``torchrun`` or ``srun`` tell them; (0, 1, 0) without either."""
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
        if all(name in os.environ for name in names):
            number, count, local = (int(os.environ[name]) for name in names)
            return number, count, local
    return 0, 1, 0


def local_rank() -> int:
    """This process's number on its machine, which picks its GPU."""
    return _environment()[2]


def ranks_here() -> int:
    """Number of processes on this machine; all processes where the machines differ or the launcher gives no count."""
    counts = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    same = re.fullmatch(r"(\d+)(\(x\d+\))?", counts)  # srun's '8(x2)' is 8 on each of 2 machines
    return int(same[1]) if same else ranks()


def start(device: torch.device, minutes: float = 30.0) -> None:
    """Joins the other processes of a ``torchrun`` or ``srun`` launch, over nccl for GPUs and gloo for CPUs.

    Args:
        device: where tensors lie that will be exchanged.
        minutes: how long a rank waits for the others before the run ends with their names.

    Raises:
        ValueError: more than one process was started without an address where they can meet.
    """
    number, count, _ = _environment()
    if count == 1 or dist.is_initialized():
        return
    os.environ.setdefault("MASTER_ADDR", _first_host(os.environ.get("SLURM_JOB_NODELIST", "")))
    os.environ.setdefault("MASTER_PORT", str(20_000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20_000))
    if not os.environ["MASTER_ADDR"]:
        raise ValueError(f"rank {number} of {count} does not know where the others are: start with torchrun or srun")
    global _hosts
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=number,
        world_size=count,
        timeout=datetime.timedelta(minutes=minutes),
    )
    if device.type == "cuda":
        _hosts = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=minutes))


def _first_host(nodes: str) -> str:
    """The first of SLURM's hosts: 'gpu[03-05,9],cpu1' => 'gpu03'; '' where there are none."""
    found = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\])?", nodes)
    return found[1] + (found[2] or "")


def stop() -> None:
    """Leaves the other processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` holds on some rank. The answer is exchanged between hosts, so that no GPU is synchronised."""
    if ranks() == 1:
        return flag
    raised = torch.tensor(int(flag))
    dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=_hosts)
    return bool(raised)


def from_main(values: Value) -> Value:
    """The main rank's ``values`` on every rank: anything that can be pickled, sent from host to host."""
    if ranks() == 1:
        return values
    held = [values]
    dist.broadcast_object_list(held, src=0, group=_hosts)
    return held[0]


def wait_for_all() -> None:
    """Returns when every rank is here."""
    if ranks() > 1:
        dist.barrier(group=_hosts)


class Gathering:
    """Gathers tensors of every rank in one exchange in the background, from construction to ``finish``.

    They are sent as bytes, so their types may differ.

    Args:
        values: [B] (or [B, ...]) each; every rank has as many samples. On one process they may have any shape.
    """

    def __init__(self, *values: Tensor):
        self._values = [value.detach() for value in values]
        self._work = None
        if ranks() > 1:
            self._own = torch.cat([value.contiguous().flatten().view(torch.uint8) for value in self._values])
            self._all = self._own.new_empty(ranks() * len(self._own))
            self._work = dist.all_gather_into_tensor(self._all, self._own, async_op=True)

    def finish(self) -> list[Tensor]:
        """Each of the tensors of every rank, one rank after another [ranks * B, ...], without a graph."""
        if self._work is None:
            return self._values
        self._work.wait()
        sizes = [value.numel() * value.element_size() for value in self._values]
        parts = self._all.view(ranks(), -1).split(sizes, 1)
        return [
            part.flatten().view(value.dtype).view(-1, *value.shape[1:])
            for part, value in zip(parts, self._values, strict=True)
        ]


def gather_together(*values: Tensor) -> list[Tensor]:
    """``gather`` of each of ``values``, in one exchange."""
    return Gathering(*values).finish()


def gather(values: Tensor) -> Tensor:
    """``values`` [B] (or [B, ...]) of every rank, one rank after another [ranks * B], without a graph.

    Every rank must hold the same number of samples.
    """
    return gather_together(values)[0]


def own_part(values: Tensor) -> Tensor:
    """This rank's [B] of what ``gather`` put together, or of something computed from it sample by sample."""
    if ranks() == 1:
        return values
    return values.tensor_split(ranks())[rank()]


def is_sharded(value: object) -> bool:
    """Whether this is a tensor of which each process holds a part (a DTensor)."""
    # Without that module there is no DTensor, and importing it takes as long as importing all of ours.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


class Averaging:
    """Averages gradients over the ranks in the background, all buckets at once, from construction to ``finish``.

    In between a gradient is a part of its bucket and holds a partial sum: nothing may read or add to ``p.grad``. Which
    parameters have a gradient must be the same on every rank, as it is for one graph. Gradients of sharded weights
    (`parallel.Sharded`) are means already.

    Args:
        parameters: whose gradients are averaged.
    """

    @torch.no_grad()
    def __init__(self, parameters: Iterable[nn.Parameter]):
        self._work = []
        if ranks() == 1:
            return
        for bucket in _buckets([p for p in parameters if p.grad is not None and not is_sharded(p.grad)]):
            total = _joined(bucket).div_(ranks())
            self._work.append(dist.all_reduce(total, async_op=True))

    def __bool__(self) -> bool:
        """Whether there is anything to wait for."""
        return bool(self._work)

    def finish(self) -> None:
        """Waits until the gradients are means; on a GPU, later work on the same stream waits for them instead."""
        for work in self._work:
            work.wait()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces each gradient by its mean over the ranks, see `Averaging`."""
    Averaging(parameters).finish()


def _joined(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The gradients one after another [n]; afterwards they are views of it, strides and all: no copy back is due."""
    gradients = [parameter.grad for parameter in parameters]
    total = gradients[0].new_empty(sum(gradient.numel() for gradient in gradients))
    parts = total.split([gradient.numel() for gradient in gradients])
    # As empty_like, which keeps the strides of a gradient without holes, and makes those of any other contiguous.
    strides = [torch.empty_like(gradient, device="meta").stride() for gradient in gradients]
    views = [part.as_strided(g.shape, stride) for part, g, stride in zip(parts, gradients, strides, strict=True)]
    torch._foreach_copy_(views, gradients)
    for parameter, view in zip(parameters, views, strict=True):
        parameter.grad = view
    return total


def _buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Neighbours with gradients of one type together, up to ``BUCKET`` elements."""
    buckets: list[list[nn.Parameter]] = []
    held = 0
    for parameter in parameters:
        if not buckets or held + parameter.numel() > BUCKET or buckets[-1][0].grad.dtype != parameter.grad.dtype:
            buckets.append([])
            held = 0
        buckets[-1].append(parameter)
        held += parameter.numel()
    return buckets


def average_metrics(metrics: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Means over the ranks of numbers that every rank has under the same names."""
    if ranks() == 1 or not metrics:
        return dict(metrics)
    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=device) / ranks()
    dist.all_reduce(values)
    return dict(zip(metrics, values.tolist(), strict=True))
