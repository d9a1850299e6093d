"""What of a task is judged: the average of its student, the student's last weights, or the teacher by many steps.

Notation: a *maker* turns the draws of samples into x0 [n, ...], images or latents, under the task's own conditions or
under given ones. The same draws give all makers the same noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from ratiograph.samplers import ManyStepSampler
from ratiograph.sampling import SampleDraws
from ratiograph.types import Condition

from .rows import component_identity, weights_identity

if TYPE_CHECKING:
    from ratiograph.distillation import Distillation

__all__ = ["AveragedStudent", "LastStudent", "Maker", "Teacher"]


class Maker(Protocol):
    """Makes samples of a task."""

    name: str
    evaluations: int
    """Network evaluations of a sample."""

    def samples(self, task: Distillation, draws: SampleDraws) -> Tensor:
        """x0 of the samples of ``draws`` under the task's own conditions."""

    def told(self, task: Distillation, condition: Condition, draws: SampleDraws) -> Tensor:
        """x0 of the samples of ``draws`` under ``condition``."""

    def identity(self, task: Distillation) -> dict[str, object]:
        """What the samples depend on beside the draws and the condition, as JSON values."""


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """The module without its dropout."""
    training = module.training
    try:
        yield module.eval()
    finally:
        module.train(training)


class AveragedStudent:
    """The average of the student's weights, which is what a run leaves."""

    name, evaluations = "student, one evaluation", 1

    def network(self, task: Distillation) -> nn.Module:
        return task.average

    def samples(self, task: Distillation, draws: SampleDraws) -> Tensor:
        with _evaluating(self.network(task)) as student:
            return task.student_samples(draws, student=student)

    def told(self, task: Distillation, condition: Condition, draws: SampleDraws) -> Tensor:
        with _evaluating(self.network(task)) as student:
            return student(student.noise_of(draws), condition)

    def identity(self, task: Distillation) -> dict[str, object]:
        return _identity(self.network(task))


class LastStudent(AveragedStudent):
    """The student's weights of the last step."""

    name = "student, last weights"

    def network(self, task):
        return task.student


class Teacher:
    """The teacher by a many-step sampler.

    Args:
        sampler: and its number of steps.
    """

    def __init__(self, sampler: ManyStepSampler):
        self.sampler, self.evaluations = sampler, sampler.evaluations
        self.name = f"teacher, {sampler.evaluations} evaluation{'s' if sampler.evaluations > 1 else ''}"

    def samples(self, task: Distillation, draws: SampleDraws) -> Tensor:
        return task.teacher_samples(draws, self.sampler)

    def told(self, task: Distillation, condition: Condition, draws: SampleDraws) -> Tensor:
        return self.sampler.sample(task.teacher, task.average.noise_of(draws), condition, draws)

    def identity(self, task: Distillation) -> dict[str, object]:
        return {**_identity(task.teacher), "sampler": component_identity(self.sampler)}


def _identity(network: nn.Module) -> dict[str, object]:
    denoiser = getattr(network, "denoiser", network)
    return {
        "weights": weights_identity(network.state_dict()),
        "network": component_identity(network),
        "autocast": str(getattr(denoiser, "autocast_dtype", None)),
    }
