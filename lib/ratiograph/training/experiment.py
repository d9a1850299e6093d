"""The root of a configuration: a task, its data, an evaluator, and the values of the run.

A ``Task`` owns every node of the graph and takes one optimisation step; the `trainer` has the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, Literal, Protocol, runtime_checkable

import torch
from annotated_types import Interval
from torch import Tensor, nn

from ratiograph.core.contracts import DataStream, Denoiser, RatioEstimator
from ratiograph.core.domains import NonNegativeInt, Positive, PositiveInt
from ratiograph.core.types import Batch
from ratiograph.training.checkpoints import load_strict
from ratiograph.training.loggers import Logger
from ratiograph.training.optim import Updater
from ratiograph.training.parallel import Parallel, Replicated, full, spread_like

__all__ = ["Experiment"]

Sampler = Callable[[int, torch.Generator], Tensor]
"""(n, generator) -> samples [n, ...]; the generator is the only source of randomness."""


class Task(nn.Module):
    """Base class of what a run trains. Its submodules are the networks; ``trained`` returns those that change."""

    needs_data = True
    accumulation = 1
    """Number of micro-batches of equal size that a step is split into."""
    accumulates = False
    """Whether ``step`` supports more than one micro-batch."""
    parallel: Parallel = Replicated()
    """How several processes hold the networks; set before ``prepare``."""
    shardable = False
    """Whether ``prepare`` calls ``parallel.place``, so that weights can be sharded."""
    optimizers: dict[str, Updater]
    """Exists after ``prepare``."""

    def trained(self) -> dict[str, nn.Module]:
        """The networks a checkpoint must hold, averages included, by name."""
        raise NotImplementedError

    def load(self) -> None:
        """Reads the files of trained weights into the networks, for ``prepare``. Never called in a dry run."""

    def prepare(self, device: torch.device, autocast_dtype: torch.dtype | None) -> None:
        """Loads or initialises weights, moves to ``device``, builds the optimisers. Never called in a dry run."""
        raise NotImplementedError

    def fit(self, batches: Iterator[Batch] | None, generator: torch.Generator) -> dict[str, float]:
        """Estimates constants that need data before step 1 (such as Z); returns what to log. Not called on resume."""
        return {}

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample; () where no network says it."""
        return next((tuple(each.shape) for _, each in _networks(self) if each.shape is not None), ())

    def check_shapes(self) -> None:
        """Raises a ValueError if two networks are for samples of different shapes."""
        shaped = [(name, each) for name, each in _networks(self) if each.shape is not None]
        for name, each in shaped[1:]:
            if tuple(each.shape) != tuple(shaped[0][1].shape):
                (a, b), first = (_by(each.shape) for each in (shaped[0][1], each)), shaped[0][0]
                raise ValueError(
                    f"{first} is for samples of {a}, and {name} for {b}: configure both for the same (dimension, or "
                    "resolution and channels)"
                )

    def check_samples(self, batch: Batch) -> None:
        """Raises a ValueError if the data's samples are not of the denoisers' shape, or of classes they don't know."""
        self.check_labels(batch)
        found = tuple(batch.images.shape[1:])
        for name, each in _networks(self) if batch.images.numel() else ():
            if tuple(each.shape or found) != found:
                raise ValueError(
                    f"the data's samples are {_by(found)}, and {name} is for {_by(each.shape)}: configure the network "
                    "for them (resolution and channels), or give other --data"
                )

    @cached_property
    def known_classes(self) -> int | None:
        """The number of classes that every network with class labels knows; None without such a network."""
        return min((each.class_count for _, each in _networks(self) if each.class_count), default=None)

    def check_labels(self, batch: Batch) -> None:
        """Raises a ValueError if a network does not know a sample's class; ``batch`` is not on a device yet."""
        labels = batch.condition.labels
        known = self.known_classes
        if known is None or labels is None or not len(labels) or labels.max() < known:
            return
        row = int(labels.argmax())
        place = batch.places[row] if batch.places else f"sample {row} of a batch"
        raise ValueError(
            f"{place} has the class label {int(labels[row])}, and the networks know classes 0 to {known - 1}: "
            "count classes from 0, configure the networks' classes, or give other --data"
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
        """The state that a resume needs, in plain containers, on the main process; all processes must call."""
        return {
            "networks": {name: full(module.state_dict()) for name, module in self.trained().items()},
            "optimizers": {name: full(updater.state_dict()) for name, updater in self.optimizers.items()},
        }

    def load_training_state(self, state: dict) -> None:
        """Inverse of ``training_state``.

        Raises:
            ValueError: the checkpoint is of another graph; names the first difference.
        """
        modules, saved = self.trained(), state["networks"]
        load_strict(modules, {n: spread_like(modules[n], held) if n in modules else held for n, held in saved.items()})
        for name, updater in self.optimizers.items():
            updater.load_state_dict(state["optimizers"][name])


def _networks(task: Task) -> list[tuple[str, Denoiser | RatioEstimator]]:
    """The networks of the graph, each as ``student.denoiser (UNet)``."""
    found = [(n, each) for n, each in task.named_modules() if isinstance(each, Denoiser | RatioEstimator)]
    return [(f"{name} ({type(getattr(each, 'network', each)).__name__})", each) for name, each in found]


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


@runtime_checkable
class Evaluator(Protocol):
    """Evaluates a task's samples before, during and after training."""

    def before(self, task: Task, device: torch.device, seed: int) -> list[dict]:
        """Rows of results from before the first step, which ``after`` gets back."""

    def during(self, task: Task, device: torch.device, seed: int) -> dict[str, float]:
        """A few cheap measurements during training. It must not change the run's random numbers."""

    def after(self, task: Task, device: torch.device, seed: int, before: list[dict], workdir: str) -> dict:
        """The content of ``evaluation.json``, from the trained task and the rows of ``before``."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The root of a configuration.

    Args:
        task: what is trained; owns the graph.
        data: stream of real samples; required if the task needs data.
        evaluator: evaluates the samples; None for no evaluation.
        loggers: further loggers of metrics and pictures, beside the run's folder; TensorBoard by default, [] for none.
        steps: optimisation steps of the whole run.
        batch_size: samples of a step, of all processes together.
        accumulation: number of micro-batches that each process splits a step into: the same step in less memory, for
            one more pass of the student.
        seed: seed of all random numbers of the run.
        precision: "auto" is bf16 autocast where the hardware computes in it, else fp32; "fp64" is for comparing
            runs.
        log_every: steps between logged lines.
        preview_every: steps between sample grids.
        checkpoint_every: steps between checkpoints.
        keep_last: how many of the last checkpoints are kept.
        keep_every: checkpoints at multiples of this step are never removed; 0 or a multiple of ``checkpoint_every``.
        best_metric: a quick measurement, 'evaluation/<name>'; the checkpoint with its smallest value is never removed.
        evaluate_every: steps between the evaluator's quick measurements, 0 for none but the last.
        preview_samples: number of samples in a grid.
        teacher_evaluations: network evaluations for each sample of the teacher's grid, which is drawn once at the end
            from the same noise and shown above the student's in the report; 0 for none.
        max_bad_steps: number of steps in a row without a finite gradient that ends the run; before that they are
            skipped and counted.
        hang_minutes: minutes without a step after which the stack of every thread is printed.

    Raises:
        ValueError: for a task without the data it needs, or values out of range.
    """

    harmless: ClassVar[frozenset[str]] = frozenset(
        {"steps", "accumulation", "log_every", "preview_every", "preview_samples", "teacher_evaluations", "loggers"}
        | {"checkpoint_every", "keep_last", "keep_every", "best_metric", "evaluate_every"}
        | {"max_bad_steps", "hang_minutes"}
    )
    """The parameters that a run may go on with changed: no step depends on them."""

    task: Task
    data: DataStream | None = None
    evaluator: Evaluator | None = None
    loggers: Sequence[Logger] | None = None
    steps: PositiveInt
    batch_size: PositiveInt
    accumulation: PositiveInt = 1
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    log_every: PositiveInt = 10
    preview_every: PositiveInt = 50
    checkpoint_every: PositiveInt = 100
    keep_last: PositiveInt = 2
    keep_every: NonNegativeInt = 0
    best_metric: str | None = None
    evaluate_every: NonNegativeInt = 0
    preview_samples: Annotated[int, Interval(ge=1, le=10_000)] = 64
    teacher_evaluations: NonNegativeInt = 0
    max_bad_steps: PositiveInt = 10
    hang_minutes: Positive = 15.0

    def __post_init__(self):
        if self.accumulation > 1 and not self.task.accumulates:
            raise ValueError(
                f"Experiment.accumulation={self.accumulation}: {type(self.task).__name__} takes a step in one piece; "
                "leave it at 1"
            )
        if self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"Experiment.keep_every={self.keep_every} must be 0 or a multiple of checkpoint_every="
                f"{self.checkpoint_every}: other steps have no checkpoint"
            )
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

    def samples_each(self, processes: int) -> int:
        """Samples of a step that each of ``processes`` takes.

        Raises:
            ValueError: they are no whole number, or not divisible by ``accumulation``.
        """
        if self.batch_size % processes:
            raise ValueError(
                f"Experiment.batch_size={self.batch_size} is of all {processes} processes together and must be a "
                f"multiple of {processes}"
            )
        samples = self.batch_size // processes
        if samples % self.accumulation:
            raise ValueError(
                f"Experiment.accumulation={self.accumulation} must divide the {samples} samples that a process has of "
                "a step"
            )
        return samples
