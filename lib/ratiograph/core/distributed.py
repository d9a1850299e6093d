"""What the ranks of a distributed run do together; on a single process everything here is the identity.

Statistics of a batch are statistics of the GLOBAL batch, so that one process with 8 samples and two with 4 each
compute the same numbers. Per-sample scalars are few, so they are gathered whole: no reduction order to worry about.
Gradients are averaged once an update, after all backward passes, in buckets.

Every exchange waits for the slowest rank, so there are few: what is gathered at one place is sent together, and an
exchange whose result is not needed at once (`Gathering`, `averaging.Averaging`) runs beside the networks. All ranks
must begin the same exchanges in the same order.
"""

from __future__ import annotations

import datetime
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ratiograph.core.foreign import shown

__all__ = [
    "Gathering",
    "agreed",
    "any_rank",
    "average_metrics",
    "check_same",
    "from_main",
    "gather",
    "gather_together",
    "is_main",
    "joined",
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


_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")


def _environment() -> tuple[int, int, int]:
    """(rank, ranks, rank on this machine) as ``torchrun`` or ``srun`` tell them; (0, 1, 0) without either."""
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), *([_SLURM] if _by_srun() else [])):
        if all(name in os.environ for name in names):
            number, count, local = map(_number, names)
            if number >= count:
                raise ValueError(f"{names[0]}={number} must be below {names[1]}={count}: start with torchrun or srun")
            return number, count, local
    return 0, 1, 0


def _number(name: str) -> int:
    """The environment variable ``name``, a whole number >= 0."""
    text = os.environ[name]
    if not text.isdecimal():
        raise ValueError(
            f"the environment variable {name}='{shown(text)}' is no number: torchrun or srun sets it; unset it, or "
            "start with one of them"
        )
    return int(text)


def _by_srun() -> bool:
    """Whether SLURM numbers this process as one of several that srun started: not in the script of a job itself.

    In a shell of salloc the step's number is one of SLURM's own, beyond 2^31.
    """
    return "SLURM_STEP_ID" in os.environ and _number("SLURM_STEP_ID") < 2**31


def local_rank() -> int:
    """This process's number on its machine, which picks its GPU."""
    return _environment()[2]


def ranks_here() -> int:
    """Number of processes on this machine; all processes where the machines differ or the launcher gives no count."""
    counts = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    same = re.fullmatch(r"(\d+)(\(x\d+\))?", counts)  # srun's '8(x2)' is 8 on each of 2 machines
    return int(same[1]) if same else ranks()


def start(device: torch.device, minutes: float = 30.0, patience: float = 10.0) -> None:
    """Joins the other processes of a ``torchrun`` or ``srun`` launch, over nccl for GPUs and gloo for CPUs.

    Args:
        device: where tensors lie that will be exchanged.
        minutes: how long a rank waits for the others in an exchange before the run ends.
        patience: minutes that it waits for them to start; after 5 seconds a line says so.

    Raises:
        ValueError: more than one process was started without an address where they can meet, or they did not come;
            a variable that says which process this is is no number.
    """
    number, count, _ = _environment()
    if count == 1 and not _by_srun() and "WORLD_SIZE" not in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1":
        tasks = _number("SLURM_NTASKS")
        print(f"this process runs alone: the job has {tasks} tasks, and srun starts them (srun python ...)", flush=True)
    if count == 1 or dist.is_initialized():
        return
    place = _meeting_place(number, count)
    said = threading.Timer(5.0, print, (f"rank {number} of {count} waits at {place} for the others",), {"flush": True})
    said.daemon = True
    said.start()
    global _hosts
    limit = datetime.timedelta(minutes=minutes)
    try:
        store, _, _ = next(dist.rendezvous("env://", number, count, timeout=datetime.timedelta(minutes=patience)))
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=limit)
        if device.type == "cuda":
            _hosts = dist.new_group(backend="gloo", timeout=limit)
    except (dist.DistError, RuntimeError) as error:
        raise ValueError(
            f"rank {number} of {count} did not meet the others at {place} ({shown(error).partition('. ')[0]}). Start "
            "every rank, by torchrun or by srun (use srun in a job's script), with an address that all can reach"
        ) from error
    finally:
        said.cancel()


def _meeting_place(number: int, count: int) -> str:
    """Sets MASTER_ADDR and MASTER_PORT where the launcher has not; returns 'address:port'."""
    address = os.environ.get("MASTER_ADDR") or _first_host(os.environ.get("SLURM_JOB_NODELIST", ""))
    if not address:
        raise ValueError(f"rank {number} of {count} does not know where the others are: start with torchrun or srun")
    os.environ["MASTER_ADDR"] = address
    job = _number("SLURM_JOB_ID") if "SLURM_JOB_ID" in os.environ else 0
    os.environ.setdefault("MASTER_PORT", str(20_000 + job % 20_000))
    if not 0 < _number("MASTER_PORT") < 2**16:
        raise ValueError(
            f"the environment variable MASTER_PORT={os.environ['MASTER_PORT']} is no port: give 1 to 65535"
        )
    return f"{shown(address)}:{os.environ['MASTER_PORT']}"


def _first_host(nodes: str) -> str:
    """The first of SLURM's hosts: 'gpu[03-05,9],cpu1' => 'gpu03'; '' where there are none."""
    found = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\])?", nodes)
    return found[1] + (found[2] or "")


def stop() -> None:
    """Leaves the other processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """A context manager of `start` and `stop`: a rank whose exchange fails because another has ended says so.

    Raises:
        ValueError: as `start`; another rank has ended.
    """
    start(device)
    try:
        yield
    except RuntimeError as error:
        if ranks() == 1 or not (isinstance(error, dist.DistError) or _LOST.search(str(error))):
            raise
        raise ValueError(
            f"rank {rank()} ends because another rank has ended, whose error says why. The same command goes on from "
            "the last checkpoint"
        ) from error
    finally:
        stop()


_LOST = re.compile(
    r"Connection (closed|reset|refused|timed out)|Broken pipe|Timed out waiting|communicator was aborted"
)
"""What gloo and nccl say when a peer is gone."""


@contextmanager
def agreed() -> Iterator[None]:
    """An error of the body on some ranks ends it on all: the others raise a ValueError that repeats the first.

    The body must not exchange anything.
    """
    mistake: Exception | None = None
    try:
        yield
    except Exception as error:
        mistake = error
    found = _all_objects(None if mistake is None else str(mistake) or repr(mistake))
    if mistake is not None:
        raise mistake
    for number, theirs in enumerate(found):
        if theirs is not None:
            raise ValueError(f"rank {number}: {theirs}")


def check_same(facts: Mapping[str, object]) -> None:
    """Raises a ValueError on every rank, which names the first difference, unless all have the same ``facts``."""
    held = _all_objects(dict(facts))
    for number, theirs in enumerate(held):
        for name in {**held[0], **theirs}:
            here, there = (each.get(name, "absent") for each in (held[0], theirs))
            if here != there:
                raise ValueError(
                    f"rank {number} runs something else: {name} is {shown(there)} there and {shown(here)} on rank 0. "
                    "Start every rank with the same command, files and versions"
                )


def _all_objects(value: object) -> list:
    """The ``value`` of every rank, in their order."""
    held = [value] * ranks()
    if ranks() > 1:
        dist.all_gather_object(held, value, group=_hosts)
    return held


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


def average_metrics(metrics: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Means over the ranks of numbers that every rank has under the same names."""
    if ranks() == 1 or not metrics:
        return dict(metrics)
    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=device) / ranks()
    dist.all_reduce(values)
    return dict(zip(metrics, values.tolist(), strict=True))
