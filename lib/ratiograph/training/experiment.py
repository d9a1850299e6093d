"""What a run is: a task, the data it reads, who judges it, and the run-level values.

A ``Task`` owns every node of the graph and knows how to take one optimisation step; the trainer owns the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ratiograph.core.contracts import DataStream, Denoiser
from ratiograph.core.types import Batch
from ratiograph.training.checkpoints import load_strict
from ratiograph.training.loggers import Logger
from ratiograph.training.optim import Updater
from ratiograph.training.parallel import Parallel, Replicated, full, spread_like

__all__ = ["Experiment"]

Sampler = Callable[[int, torch.Generator], Tensor]
"""(n, generator) -> samples [n, ...]; the generator is the only source of randomness."""


class Task(nn.Module):
    """Base class of what a run trains. Submodules are the networks; ``trained`` names those that change."""

    needs_data = True
    accumulation = 1
    """Micro-batches of equal length that a step's samples are taken in, one after another."""
    accumulates = False
    """Whether ``step`` does so; a task that does not has steps in one piece."""
    parallel: Parallel = Replicated()
    """How several processes hold the networks; set before ``prepare``."""
    shardable = False
    """Whether ``prepare`` gives its networks to ``parallel``."""
    optimizers: dict[str, Updater]
    """Exists after ``prepare``."""

    def trained(self) -> dict[str, nn.Module]:
        """The networks a checkpoint must hold, averages included, by name."""
        raise NotImplementedError

    def prepare(self, device: torch.device, autocast_dtype: torch.dtype | None) -> None:
        """Loads or initialises weights, moves to ``device``, makes the optimisers. Never called in a dry run."""
        raise NotImplementedError

    def fit(self, batches: Iterator[Batch] | None, generator: torch.Generator) -> dict[str, float]:
        """Estimates constants that need data before step 1 (such as Z); returns what to log. Not called on resume."""
        return {}

    def check_samples(self, batch: Batch) -> None:
        """Raises a ValueError unless the data's samples, if any, have the shape that the denoisers are for."""
        found = tuple(batch.images.shape[1:])
        denoisers = {name: module for name, module in self.named_modules() if isinstance(module, Denoiser)}
        for name, module in denoisers.items() if batch.images.numel() else ():
            made = tuple(getattr(module, "shape", found))
            if made != found:
                network = type(getattr(module, "network", module)).__name__
                theirs, ours = ("x".join(map(str, shape)) for shape in (made, found))
                raise ValueError(
                    f"the data's samples are {ours}, and {name} ({network}) is for {theirs}: configure the network for "
                    "them (resolution and channels), or give other --data"
                )

    def step(self, batch: Batch | None, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """One optimisation step; returns detached 0-d tensors by name, without synchronising the device."""
        raise NotImplementedError

    def preview(self, samples: int, generator: torch.Generator) -> Tensor | None:
        """Samples [samples, ...] of the averaged model, or None if the task makes none."""
        return None

    def summary(self) -> dict:
        """Tables that explain the run so far, as JSON values; written to ``diagnostics.json``."""
        return {}

    def weights(self) -> dict[str, nn.Module]:
        """The networks whose final weights are written as safetensors, by file name without suffix."""
        return {}

    def training_state(self) -> dict:
        """All that a resume needs, as plain containers of tensors; all processes must call, the main one has it."""
        return {
            "networks": {name: full(module.state_dict()) for name, module in self.trained().items()},
            "optimizers": {name: full(updater.state_dict()) for name, updater in self.optimizers.items()},
        }

    def load_training_state(self, state: dict) -> None:
        """Inverse of ``training_state``.

        Raises:
            ValueError: naming the first differing node, if the checkpoint is of another graph.
        """
        modules, saved = self.trained(), state["networks"]
        load_strict(modules, {n: spread_like(modules[n], held) if n in modules else held for n, held in saved.items()})
        for name, updater in self.optimizers.items():
            updater.load_state_dict(state["optimizers"][name])


@runtime_checkable
class Evaluator(Protocol):
    """Judges a task's samples and writes ``evaluation.json`` into the workdir."""

    def before(self, task: Task, device: torch.device, seed: int) -> list[dict]:
        """Rows about the task before its first step."""

    def during(self, task: Task, device: torch.device, seed: int) -> dict[str, float]:
        """A few numbers cheap enough to take while training; the run's own random numbers are not touched."""

    def after(self, task: Task, device: torch.device, seed: int, before: list[dict], workdir: str) -> dict:
        """The document of ``evaluation.json``, from the finished task and the rows of ``before``."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The root of a configuration.

    Args:
        task: what is trained; owns the graph.
        data: stream of real samples; needed if the task needs data.
        evaluator: judges the result, or None for no evaluation.
        loggers: where metrics and pictures go beside the run's folder; TensorBoard by default, [] for nowhere.
        steps: optimisation steps of the whole run.
        batch_size: samples a step, of all processes together.
        accumulation: micro-batches, one after another, that a process takes its samples of a step in: the same step in
            less memory, for one more pass of the student.
        seed: everything random in the run follows from it.
        precision: "auto" takes bf16 autocast where the processor has it in hardware, fp32 elsewhere; "fp64" is for
            comparing runs.
        log_every: steps between logged lines.
        preview_every: steps between sample grids.
        checkpoint_every: steps between checkpoints.
        keep_last: how many of the last checkpoints are kept.
        keep_every: checkpoints of these steps are kept for good, a multiple of ``checkpoint_every``; 0 for none.
        best_metric: a quick measurement, 'evaluation/<name>', whose smallest value has its checkpoint kept.
        evaluate_every: steps between the evaluator's quick measurements, 0 for none but the last.
        preview_samples: samples of a grid.
        teacher_evaluations: evaluations a sample of the teacher's grid, drawn once at the end from the same noise, to
            stand above the student's in the report; 0 for none.
        max_bad_steps: steps in a row without a finite gradient that end the run; fewer are left out and counted.
        hang_minutes: time without a step after which the log says where the run hangs.

    Raises:
        ValueError: for a task without the data it needs, or values out of range.
    """

    task: Task
    data: DataStream | None = None
    evaluator: Evaluator | None = None
    loggers: Sequence[Logger] | None = None
    steps: int
    batch_size: int
    accumulation: int = 1
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    log_every: int = 10
    preview_every: int = 50
    checkpoint_every: int = 100
    keep_last: int = 2
    keep_every: int = 0
    best_metric: str | None = None
    evaluate_every: int = 0
    preview_samples: int = 64
    teacher_evaluations: int = 0
    max_bad_steps: int = 10
    hang_minutes: float = 15.0

    def __post_init__(self):
        at_least_one = ("steps", "batch_size", "accumulation", "log_every", "preview_every", "checkpoint_every")
        for name in (*at_least_one, "keep_last", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"Experiment.{name}={getattr(self, name)} must be at least 1")
        if self.accumulation > 1 and not self.task.accumulates:
            raise ValueError(
                f"Experiment.accumulation={self.accumulation}: {type(self.task).__name__} takes a step in one piece; "
                "leave it at 1"
            )
        if self.teacher_evaluations < 0:
            raise ValueError(f"Experiment.teacher_evaluations={self.teacher_evaluations} must be >= 0; 0 draws none")
        if self.evaluate_every < 0:
            raise ValueError(f"Experiment.evaluate_every={self.evaluate_every} must be at least 0, which is never")
        if self.keep_every < 0 or self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"Experiment.keep_every={self.keep_every} must be 0 or a multiple of checkpoint_every="
                f"{self.checkpoint_every}: other steps have no checkpoint"
            )
        if self.hang_minutes <= 0:
            raise ValueError(f"Experiment.hang_minutes={self.hang_minutes} must be positive")
        if self.best_metric is not None and not (self.evaluator and self.evaluate_every):
            raise ValueError(
                f"Experiment.best_metric={self.best_metric!r} needs measurements: bind Experiment.evaluator and set "
                "Experiment.evaluate_every"
            )
        if self.task.needs_data and self.data is None:
            raise ValueError(
                f"{type(self.task).__name__} needs real samples: bind Experiment.data = @ShardStream() and give "
                "ShardStream.urls (or --data)"
            )
