"""Sources of the ratio estimator's positives: samples of p.

Notation: a *positive* is a clean sample x0 of class 1 with its condition; the student's samples are the negatives.
"""

from __future__ import annotations

import torch

from ratiograph.core.contracts import Denoiser
from ratiograph.core.draws import GeneratorDraws
from ratiograph.core.types import Batch, Condition
from ratiograph.networks.samplers import ManyStepSampler
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
    """The data itself: p is the data, as in f-distill, DiffRatio and Di-Bregman's Algorithm 1."""

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
    """Many-step samples of the teacher: needs no real images, but the sampler's teacher passes in every step.

    For a captioned student they have the captions of the step's batch, as the student's own samples do
    (`BatchConditions`); otherwise they have uniform labels, or none.

    Args:
        sampler: of the teacher.
    """

    def __init__(self, *, sampler: ManyStepSampler):
        self.sampler = sampler

    def check(self, teacher):
        if teacher is None:
            raise ValueError("TeacherSamples needs a teacher: bind Distillation.teacher, or use RealSamples")

    @torch.no_grad()
    def draw(self, batch, samples, teacher, student, generator):
        if student.captioned:
            assert batch is not None, "BatchConditions needs data"
            assert len(batch) == samples, (len(batch), samples)
            condition = batch.condition
        else:
            condition = student.condition(samples, generator)
        noise = student.noise(samples, generator)
        images = self.sampler.sample(teacher, noise, condition, GeneratorDraws(samples, generator))
        return Batch(images, condition)
