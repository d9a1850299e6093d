"""What the student's samples are conditioned on: p(c).

Notation: c is a ``Condition`` of B samples. Training draws one for every batch of z; previews and evaluations ask for
the same ones again and again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ratiograph.types import Batch, Condition

if TYPE_CHECKING:
    from ratiograph.students import OneStep

__all__ = ["BatchConditions", "Conditions", "UniformLabels"]


class Conditions:
    """Base class."""

    needs_data = False
    """Whether ``draw`` wants a batch of real samples."""

    def check(self, student: OneStep) -> None:
        """Raises a ValueError where these are not the conditions that ``student`` needs."""

    def draw(self, batch: Batch | None, samples: int, student: OneStep, generator: torch.Generator) -> Condition:
        """Conditions of ``samples`` samples to train on; ``batch`` holds the step's real samples, if there are any."""
        raise NotImplementedError

    def remember(self, batches: Iterator[Batch] | None) -> None:
        """Called once before step 1: takes what ``preview`` will need from the data."""

    def preview(self, samples: int, student: OneStep, generator: torch.Generator) -> Condition:
        """Conditions of ``samples`` samples to show or to judge."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """What is remembered, for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of ``state_dict``."""


class UniformLabels(Conditions):
    """Classes drawn uniformly for a class-conditional student, and nothing for an unconditional one."""

    def check(self, student):
        if getattr(student, "captioned", False):
            raise ValueError(
                "the student's network is conditioned on captions: bind Distillation.conditions = @BatchConditions()"
            )

    def draw(self, batch, samples, student, generator):
        return student.condition(samples, generator)

    def preview(self, samples, student, generator):
        return student.condition(samples, generator)


class BatchConditions(Conditions):
    """The conditions of the step's own real batch, such as captions: the student's sample k goes with real sample k.

    All updates of a step see the same conditions with fresh noise. Previews and evaluations take the first conditions
    of the data in turn, over and over, and a checkpoint holds them, so that a resumed run shows the same ones.

    Args:
        kept: number of conditions kept for previews, at least 1; a batch gives no more than it has.
    """

    needs_data = True

    def __init__(self, *, kept: int = 64):
        if kept < 1:
            raise ValueError(f"BatchConditions.kept={kept} must be at least 1")
        self.kept, self.remembered = kept, Condition()

    def draw(self, batch, samples, student, generator):
        assert batch is not None, "the task needs data"
        assert len(batch) == samples, (len(batch), samples)
        if not batch.condition.parts():
            raise ValueError("BatchConditions: the data has neither labels nor captions, nothing to condition on")
        return batch.condition

    def remember(self, batches):
        assert batches is not None, "the task needs data"
        self.remembered = next(batches).condition.map(lambda part: part[: self.kept].clone())

    def preview(self, samples, student, generator):
        if not self.remembered.parts():
            raise ValueError("BatchConditions has no conditions to preview: call Distillation.fit with the data first")

        def take(part: Tensor) -> Tensor:
            part = part.to(generator.device)
            return part[torch.arange(samples, device=part.device) % len(part)]

        return self.remembered.map(take)

    def state_dict(self):
        return self.remembered.parts()

    def load_state_dict(self, state):
        self.remembered = Condition(**state)
