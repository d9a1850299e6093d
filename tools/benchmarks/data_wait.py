"""Whether training waits for its data: the share of a step's time before its batch arrives.

Notation: *wait* is the time that the training thread spends in ``next(batches)``; *delivery* is the time per batch when
nothing else computes: steps longer than that need not wait.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch

from benchmarks.inputs import made_up_latents, randomised
from benchmarks.step import kind_of
from benchmarks.timing import request
from ratiograph import config
from ratiograph.core.types import Batch
from ratiograph.tasks.distillation import Distillation
from ratiograph.training import devices
from ratiograph.training.experiment import Experiment

__all__ = ["bench_data", "delivery_seconds", "waits"]

FIRST = 2
"""Steps that are not counted: processes and caches start."""


def waits(batches: Iterator[Batch], work: Callable[[Batch], object], steps: int) -> tuple[list[float], list[float]]:
    """(seconds waited, seconds worked) in each of ``steps`` steps, after two that are not counted.

    Args:
        batches: endless.
        work: what a step does with its batch, to the end.
        steps: steps counted.
    """
    waited, worked = [], []
    for _ in range(FIRST + steps):
        begun = time.perf_counter()
        batch = next(batches)
        arrived = time.perf_counter()
        work(batch)
        waited.append(arrived - begun)
        worked.append(time.perf_counter() - arrived)
    return waited[FIRST:], worked[FIRST:]


def delivery_seconds(batches: Iterator[Batch], count: int) -> float:
    """Seconds a batch, of ``count`` after the two first and what was read ahead."""
    for _ in range(FIRST):
        next(batches)
    begun = time.perf_counter()
    for _ in range(count):
        next(batches)
    return (time.perf_counter() - begun) / count


def bench_data(
    gin_file: Sequence[str],
    gin_param: Sequence[str],
    *,
    precision: str,
    batch_size: int,
    steps: int,
    made_up: int,
    device: torch.device,
) -> dict[str, object]:
    """The record of a run's data: wait in real steps, and delivery.

    Args:
        gin_file: the run, with its data.
        gin_param: further lines, such as a network of another size.
        precision: "auto", "fp32" or "bf16".
        batch_size: samples a step.
        steps: steps timed.
        made_up: for a run of latents, the number of random ones of its own shapes to write and read; 0 for its own.
        device: of the networks.

    Raises:
        ValueError: it is not a distillation with data, or its data cannot be read.
    """
    torch.manual_seed(0)
    experiment = config.build(config.parse(gin_file, gin_param, {}))
    if not isinstance(experiment.task, Distillation) or experiment.data is None:
        raise ValueError("say whose data to time: the gin file of a distillation with Experiment.data")
    with tempfile.TemporaryDirectory() as folder:
        if made_up:
            made_up_latents(experiment, Path(folder), made_up)
        found = _measured(experiment, precision, batch_size, steps, device)
    run = request(gin_file, gin_param, batch_size=batch_size, rounds=steps)
    return {"bench": "data", **run, "precision": kind_of(precision, device), "made_up": made_up, **found}


def _measured(
    experiment: Experiment, precision: str, batch_size: int, steps: int, device: torch.device
) -> dict[str, object]:
    task, stream = experiment.task, experiment.data
    with closing(stream.batches(batch_size, 0)) as batches:
        delivery = delivery_seconds(batches, max(steps, 8 * _ahead(stream)))
    randomised(task).prepare(device, devices.autocast_dtype(precision, device))
    generator = torch.Generator(device).manual_seed(0)

    def step(batch: Batch) -> None:
        task.step(batch.to(device), batch_size, generator)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with closing(stream.batches(batch_size, 0)) as batches:
        waited, worked = waits(batches, step, steps)
    return {
        "delivery_seconds": delivery,
        "wait_seconds": statistics.median(waited),
        "step_seconds": statistics.median(worked),
        "wait_share": sum(waited) / (sum(waited) + sum(worked)),
        "samples_per_second": batch_size / delivery,
    }


def _ahead(stream: object) -> int:
    """Batches that a stream holds ready."""
    return getattr(stream, "prefetch", 1) * max(getattr(stream, "workers", 0), 1)
