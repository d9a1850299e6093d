"""Faults inside a step: gradients that are not finite, and steps that never end.

An update is skipped where the norm of its gradient is not finite: weights and moments stay as they were. The buffers of
all networks (running statistics) then go back to their values before the step, as the same samples went into them. The
flags and counts stay on the device, so that nothing synchronises, and are read where metrics are logged.
"""

from __future__ import annotations

import faulthandler
import functools
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TextIO

import torch
from torch import Tensor, nn

from ratiograph.core.distributed import any_rank, is_sharded
from ratiograph.training.experiment import Task

__all__ = ["REMEDY", "Faults", "Means", "StepGuard", "Watchdog", "check_weights"]

REMEDY = (
    "Lower Adam.lr (--gin_param='Adam.lr=...' --allow_change=Adam.lr), clamp the weighting "
    "(--gin_param='Clamped.limit=...' --allow_change=Clamped.limit), or compute in fp32 (--precision=fp32 "
    "--allow_change=Experiment.precision): the same command with one of these goes on from there"
)
"""What to do about gradients or weights that are not finite."""

_EXPONENTIALS = ("ratio/", "divergence/")
"""Metrics of these groups are exponentials of the log-ratio l: they may overflow, and no weight learns from them."""


def check_weights(task: Task, step: int, remedy: Callable[[], str]) -> None:
    """Raises a ValueError with ``remedy()``, on all ranks, if a weight that ``task`` trains is not finite."""
    broken = _not_finite(task.trained().items())
    if any_rank(bool(broken)):
        raise ValueError(f"the weights of {', '.join(broken) or 'a network'} at step {step} are not finite; {remedy()}")


def _not_finite(networks: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """The names of the networks with a weight that is not finite; of sharded weights this process looks at its own."""
    found = []
    for name, network in networks:
        held = (p.detach() for p in network.parameters())
        finite = [(p.to_local() if is_sharded(p) else p).isfinite().all() for p in held]
        if finite and not torch.stack(finite).all():
            found.append(name)
    return found


class Means:
    """Means of metrics over the steps since the last ``read``; values that are not finite are left out.

    Args:
        device: device of the sums.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._sums: dict[tuple[str, ...], tuple[Tensor, Tensor, int]] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Adds one step's metrics, 0-d tensors, all in one operation."""
        if not metrics:
            return
        values = torch.stack([value.to(self.device) for value in metrics.values()])
        finite = values.isfinite()
        kept = torch.where(finite, values, 0)
        names = tuple(metrics)
        total, count, steps = self._sums.get(names, (0, 0, 0))
        self._sums[names] = total + kept, count + finite, steps + 1

    def read(self) -> tuple[dict[str, float], dict[str, int]]:
        """(means by name, NaN where no value was finite; the number of values not finite, for names that had any)."""
        totals, counts, bad = Counter(), Counter(), Counter()
        for names, (total, count, steps) in self._sums.items():
            for name, value, finite in zip(names, total.tolist(), count.tolist(), strict=True):
                totals[name] += value
                counts[name] += finite
                if finite < steps and not name.startswith(_EXPONENTIALS):
                    bad[name] += steps - finite
        self._sums = {}
        return {name: totals[name] / counts[name] if counts[name] else float("nan") for name in totals}, bad


@dataclass(frozen=True)
class Faults:
    """Counts of steps with a skipped update: of all, of those since the last ``read``, and the most in a row."""

    skipped: int
    new: int
    longest: int


class StepGuard:
    """A context manager for one step at a time, which undoes what a step with a gradient that is not finite did.

    Args:
        task: a task after ``prepare``, so that its optimisers exist.
        device: the task's device.
    """

    def __init__(self, task: Task, device: torch.device):
        zero = torch.zeros((), device=device)
        self.task = task
        self._bad, self._in_a_row, self._longest, self._skipped = (zero.clone() for _ in range(4))
        self._read = 0
        self._by_network = {name: zero.clone() for name in task.optimizers}
        self._buffers = list({id(b): b for network in task.trained().values() for b in network.buffers()}.values())
        self._watchers = {name: functools.partial(self._count, name) for name in task.optimizers}
        for name, watcher in self._watchers.items():
            task.optimizers[name].watchers.append(watcher)

    @torch.no_grad()
    def _count(self, name: str, bad: Tensor) -> None:
        """Called before each update of the network ``name``; ``bad`` [] is 1 where the update is skipped, else 0."""
        self._by_network[name] += bad
        self._bad = torch.maximum(self._bad, bad)

    def __enter__(self) -> None:
        self._bad = torch.zeros_like(self._bad)
        self._kept = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def __exit__(self, *_exception: object) -> None:
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            buffer.copy_(torch.where(self._bad > 0, kept, buffer))
        self._in_a_row = (self._in_a_row + self._bad) * self._bad
        self._longest = torch.maximum(self._longest, self._in_a_row)
        self._skipped += self._bad

    def remove(self) -> None:
        """Detaches the guard from the optimisers."""
        for name, watcher in self._watchers.items():
            self.task.optimizers[name].watchers.remove(watcher)

    def streak(self) -> int:
        """The number of bad steps in a row, up to the last one. Synchronises the device."""
        return int(self._in_a_row)

    def read(self) -> Faults:
        """The counts so far. Synchronises the device."""
        skipped, longest = (int(count) for count in torch.stack([self._skipped, self._longest]).tolist())
        new, self._read = skipped - self._read, skipped
        return Faults(skipped, new, longest)

    def report(self, bad: Mapping[str, int]) -> str:
        """A sentence on the terms and networks that were not finite; ``bad`` is the second result of `Means.read`."""
        counts = {name: int(count) for name, count in self._by_network.items()}
        terms = [f"the term {name.removeprefix('field/')!r}" for name in bad if name.startswith("field/")]
        rewards = [f"the reward {name.removeprefix('reward/')}" for name in bad if name.startswith("reward/")]
        losses = [f"the {name}" for name in bad if name.startswith("loss/")]
        updates = [f"{count} updates of {name}" for name, count in counts.items() if count]
        broken = [f"the weights of {name}" for name in _not_finite(self.task.named_children())]
        causes = ", ".join([*rewards, *terms, *losses, *broken]) or "the gradient"
        return f"not finite: {causes}; left out: {', '.join(updates)}"


class Watchdog:
    """A thread that prints the stack of every thread, once, when no step has ended for ``minutes``.

    A context manager. The run goes on, as the step may only be slow.

    Args:
        minutes: time without a step, > 0.
        file: where to print, with a file descriptor; None: standard error.
    """

    def __init__(self, minutes: float, file: TextIO | None = None):
        self.seconds, self.file = 60 * minutes, file
        self._step, self._beaten, self._reported = 0, time.monotonic(), False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._beaten = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def beat(self, step: int) -> None:
        """Notes that ``step`` has ended."""
        self._step, self._beaten, self._reported = step, time.monotonic(), False

    def _watch(self) -> None:
        while not self._ended.wait(min(self.seconds / 4, 5.0)):
            if time.monotonic() - self._beaten > self.seconds and not self._reported:
                self._reported = True
                self._dump()

    def _dump(self) -> None:
        file = self.file or sys.__stderr__
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        where = f"rank {rank}, process {os.getpid()} on {socket.gethostname()}"
        print(f"no step for {self.seconds / 60:g} minutes after step {self._step} ({where}):", file=file, flush=True)
        faulthandler.dump_traceback(file, all_threads=True)
