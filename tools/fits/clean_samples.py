"""Clean samples x0 ~ p of a run: of its data, or exact ones of its teacher."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from ratiograph.core.types import Batch, Condition
from ratiograph.training.experiment import Experiment

__all__ = ["clean_batches"]


def clean_batches(experiment: Experiment, size: int, seed: int, generator: torch.Generator) -> Iterator[Batch]:
    """Endless batches of ``size`` samples on the generator's device.

    Args:
        experiment: the run.
        size: samples a batch.
        seed: of the order of the data.
        generator: of the teacher's samples, on the teacher's device.

    Raises:
        ValueError: the run has neither data nor a teacher that can be sampled.
    """
    if experiment.data is not None:
        return (batch.to(generator.device) for batch in experiment.data.batches(size, seed))
    teacher = experiment.task.teacher
    if not getattr(teacher, "can_sample", False):
        raise ValueError("samples of p are needed: bind Experiment.data = @ShardStream() (or CaptionedStream)")
    return (Batch(teacher.sample(size, generator), Condition()) for _ in itertools.count())
