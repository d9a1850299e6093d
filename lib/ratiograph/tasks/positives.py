"""Where the ratio estimator's positives come from: samples that stand for p.

Notation: a *positive* is a clean sample x0 of class 1 with its condition; the student's samples are the negatives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ratiograph.core.contracts import Denoiser
from ratiograph.core.draws import GeneratorDraws
from ratiograph.core.types import Batch, Condition
from ratiograph.networks.samplers import ManyStepSampler

if TYPE_CHECKING:
    from ratiograph.networks.students import OneStep

__all__ = ["ExactSamples", "Positives", "RealSamples", "TeacherSamples"]


class Positives:
    """Base class."""

    needs_data = False
    """Whether ``draw`` wants a batch of real samples."""

    def check(self, teacher: Denoiser | None) -> None:
        """Raises a ValueError where the graph cannot give these positives."""

    def draw(
        self,
        batch: Batch | None,
        samples: int,
        teacher: Denoiser | None,
        student: OneStep,
        generator: torch.Generator,
    ) -> Batch:
        """``samples`` positives; ``batch`` holds the step's real samples where there are any."""
        raise NotImplementedError


class RealSamples(Positives):
    """The data itself: p is the data, as in f-distill, [S] and Di-Bregman's Algorithm 1."""

    needs_data = True

    def draw(self, batch, samples, teacher, student, generator):
        return batch


class ExactSamples(Positives):
    """Exact samples of a teacher that can be sampled in closed form, such as a Gaussian mixture."""

    def check(self, teacher):
        if not getattr(teacher, "can_sample", False):
            raise ValueError("ExactSamples needs a teacher with exact samples: use RealSamples or TeacherSamples")

    @torch.no_grad()
    def draw(self, batch, samples, teacher, student, generator):
        return Batch(teacher.sample(samples, generator), Condition())


class TeacherSamples(Positives):
    """Many-step samples of the teacher: no images at all, at the sampler's price in teacher passes a step.

    A captioned student's positives have the captions of the step's batch, as the student's own samples do
    (`conditions.BatchConditions`); those of any other have uniform labels, or none.

    Args:
        sampler: makes them.
    """

    def __init__(self, *, sampler: ManyStepSampler):
        self.sampler = sampler

    def check(self, teacher):
        if teacher is None:
            raise ValueError("TeacherSamples needs a teacher: bind Distillation.teacher, or use RealSamples")

    @torch.no_grad()
    def draw(self, batch, samples, teacher, student, generator):
        condition = self._condition(batch, samples, student, generator)
        noise = student.noise(samples, generator)
        images = self.sampler.sample(teacher, noise, condition, GeneratorDraws(samples, generator))
        return Batch(images, condition)

    def _condition(self, batch: Batch | None, samples: int, student: OneStep, generator: torch.Generator) -> Condition:
        if not student.captioned:
            return student.condition(samples, generator)
        assert batch is not None, "BatchConditions asks for data"
        assert len(batch) == samples, (len(batch), samples)
        return batch.condition
