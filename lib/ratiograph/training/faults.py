"""What goes wrong inside a step: gradients that are not finite, and steps that never end.

An update whose gradient has a norm that is not finite is left out: weights and moments stay as they were, and so do the
running statistics (buffers) of the whole step, which the same samples have touched. Whether that happened is known on
the device only, so nothing synchronises; the counts are read where metrics are logged.
"""

from __future__ import annotations

import faulthandler
import functools
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TextIO

import torch
from torch import Tensor, nn

from ratiograph.training.experiment import Task

__all__ = ["Faults", "Means", "StepGuard", "Watchdog"]

_EXPONENTIALS = ("ratio/", "divergence/")
"""Groups whose values are exponentials of l: they overflow where an estimator is very sure, and no weight learns from
them."""


class Means:
    """Means of metrics over the steps since they were last read, over the finite values of each.

    Args:
        device: where the sums are kept.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._sums: dict[tuple[str, ...], tuple[Tensor, Tensor, int]] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Takes in one step's 0-d tensors, in one operation whatever their number."""
        if not metrics:
            return
        values = torch.stack([value.to(self.device) for value in metrics.values()])
        finite = values.isfinite()
        kept = torch.where(finite, values, 0)
        names = tuple(metrics)
        total, count, steps = self._sums.get(names, (0, 0, 0))
        self._sums[names] = total + kept, count + finite, steps + 1

    def read(self) -> tuple[dict[str, float], dict[str, int]]:
        """(means by name, NaN where no value was finite; number of values that were not finite, where there were)."""
        totals: dict[str, float] = {}
        counts: dict[str, int] = {}
        bad: dict[str, int] = {}
        for names, (total, count, steps) in self._sums.items():
            for name, value, finite in zip(names, total.tolist(), count.tolist(), strict=True):
                totals[name] = totals.get(name, 0.0) + value
                counts[name] = counts.get(name, 0) + finite
                if finite < steps and not name.startswith(_EXPONENTIALS):
                    bad[name] = bad.get(name, 0) + steps - finite
        self._sums = {}
        return {name: totals[name] / counts[name] if counts[name] else float("nan") for name in totals}, bad


@dataclass(frozen=True)
class Faults:
    """Steps with an update left out: all of them, those since the last look, and the most in a row."""

    skipped: int
    new: int
    longest: int


class StepGuard:
    """A context manager round each step that leaves out updates from gradients that are not finite.

    Args:
        task: prepared, so that its optimisers and networks are there.
        device: of the task.
    """

    def __init__(self, task: Task, device: torch.device):
        zero = torch.zeros((), device=device)
        self.task = task
        self._bad, self._in_a_row, self._longest, self._skipped = (zero.clone() for _ in range(4))
        self._read = 0
        self._by_network = {name: zero.clone() for name in task.optimizers}
        self._buffers = list({id(b): b for network in task.trained().values() for b in network.buffers()}.values())
        self._looks = {name: functools.partial(self._look, name) for name in task.optimizers}
        for name, look in self._looks.items():
            task.optimizers[name].watchers.append(look)

    @torch.no_grad()
    def _look(self, name: str, bad: Tensor) -> None:
        """Before an update of a network, which is left out where ``bad`` [] is 1."""
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
        """Takes the guard off the optimisers."""
        for name, look in self._looks.items():
            self.task.optimizers[name].watchers.remove(look)

    def read(self) -> Faults:
        """What was left out so far. Synchronises."""
        skipped, longest = (int(count) for count in torch.stack([self._skipped, self._longest]).tolist())
        new, self._read = skipped - self._read, skipped
        return Faults(skipped, new, longest)

    def report(self, bad: Mapping[str, int]) -> str:
        """Which terms and which networks, for people; ``bad`` counts what `Means.read` found."""
        counts = {name: int(count) for name, count in self._by_network.items()}
        terms = [f"the term {name.removeprefix('field/')!r}" for name in bad if name.startswith("field/")]
        rewards = [f"the reward {name.removeprefix('reward/')}" for name in bad if name.startswith("reward/")]
        losses = [f"the {name}" for name in bad if name.startswith("loss/")]
        updates = [f"{count} updates of {name}" for name, count in counts.items() if count]
        broken = [f"the weights of {name}" for name, network in self.task.named_children() if not _finite(network)]
        told = ", ".join([*rewards, *terms, *losses, *broken]) or "the gradient"
        return f"not finite: {told}; left out: {', '.join(updates)}"


def _finite(network: nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in network.parameters())


class Watchdog:
    """A thread that prints where every other thread stands once ``minutes`` have passed without a step.

    A context manager. It ends nothing: the step may be slow, and where it hangs is known then.

    Args:
        minutes: > 0.
        file: has a file descriptor; standard error when None.
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
        """Says that ``step`` is done."""
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
