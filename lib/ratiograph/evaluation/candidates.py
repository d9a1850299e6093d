"""The candidates that an evaluation judges: averages of the student, its last weights, the teacher by many steps.

Notation: a *candidate* turns the draws of samples into x0 [n, ...], images or latents, under the task's own conditions
or under given ones. The same draws give all candidates the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from ratiograph.core.draws import SampleDraws
from ratiograph.core.types import Condition
from ratiograph.evaluation.result_cache import component_identity, weights_identity
from ratiograph.networks.samplers import ManyStepSampler
from ratiograph.tasks.distillation import Distillation

__all__ = ["AveragedStudent", "Candidate", "LastStudent", "Teacher", "marked_best", "students_of"]


class Candidate(Protocol):
    """A network of a task with a way to sample it."""

    name: str
    evaluations: int
    """Network evaluations a sample."""

    def samples(self, task: Distillation, draws: SampleDraws) -> Tensor:
        """x0 of the samples of ``draws`` under the task's own conditions."""

    def samples_under(self, task: Distillation, condition: Condition, draws: SampleDraws) -> Tensor:
        """x0 of the samples of ``draws`` under ``condition``."""

    def identity(self, task: Distillation) -> dict[str, object]:
        """What the samples depend on besides the draws and the condition, as JSON values."""


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """The module in evaluation mode, without dropout."""
    training = module.training
    try:
        yield module.eval()
    finally:
        module.train(training)


class AveragedStudent:
    """An average of the student's weights; the main one is the run's result.

    Args:
        average: one of ``Distillation.averages``; None is the main one.
    """

    evaluations = 1

    def __init__(self, average: str | None = None):
        self.average = average
        self.name = "student, one evaluation" if average is None else f"student, average '{average}'"
        self.prefix = "" if average is None else f"{average}/"

    def network(self, task: Distillation) -> nn.Module:
        return task.average if self.average is None else task.averaged[self.average]

    def sampler(self, task: Distillation) -> Callable[[int, torch.Generator], Tensor]:
        """``sampler(n, generator)`` -> x0 [n, ...] under the task's own conditions."""
        if not self.prefix:
            return task.student_sampler

        def sample(samples: int, generator: torch.Generator) -> Tensor:
            with _evaluating(self.network(task)) as student:
                return task.student_sampler(samples, generator, student)

        return sample

    def samples(self, task: Distillation, draws: SampleDraws) -> Tensor:
        with _evaluating(self.network(task)) as student:
            return task.student_samples(draws, student=student)

    def samples_under(self, task: Distillation, condition: Condition, draws: SampleDraws) -> Tensor:
        with _evaluating(self.network(task)) as student:
            return student(student.noise_of(draws), condition)

    def identity(self, task: Distillation) -> dict[str, object]:
        return _identity(self.network(task))


class LastStudent(AveragedStudent):
    """The student's weights of the last step."""

    def __init__(self):
        super().__init__()
        self.name, self.prefix = "student, last weights", "raw/"

    def network(self, task):
        return task.student


class Teacher:
    """The teacher by a many-step ``sampler``."""

    def __init__(self, sampler: ManyStepSampler):
        self.sampler, self.evaluations = sampler, sampler.evaluations
        self.name = f"teacher, {sampler.evaluations} evaluation{'s' if sampler.evaluations > 1 else ''}"

    def samples(self, task: Distillation, draws: SampleDraws) -> Tensor:
        return task.teacher_samples(draws, self.sampler)

    def samples_under(self, task: Distillation, condition: Condition, draws: SampleDraws) -> Tensor:
        return self.sampler.sample(task.teacher, task.average.noise_of(draws), condition, draws)

    def identity(self, task: Distillation) -> dict[str, object]:
        return {**_identity(task.teacher), "sampler": component_identity(self.sampler)}


def students_of(task: Distillation, *, raw: bool = False) -> list[AveragedStudent]:
    """The student's main average, each further average and, if there are any or with ``raw``, its last weights."""
    further = [AveragedStudent(name) for name in getattr(task, "averaged", ())]
    return [AveragedStudent(), *further, *([LastStudent()] if raw or further else [])]


def marked_best(rows: Sequence[Mapping[str, object]], metrics: Mapping[str, Mapping[str, object]]) -> list[dict]:
    """The rows of one student's several weights, the first marked ``highlight`` and the best one ``best``.

    Args:
        rows: the main average's first.
        metrics: ``{"label", "better"}`` by name, as in ``evaluation.json``. The best row is best by the first metric
            that all rows have and that has a better direction.
    """
    marked = [{**row, **({} if number else {"highlight": True})} for number, row in enumerate(rows)]
    for name, metric in metrics.items():
        values = [row.get(name) for row in rows]
        if len(rows) > 1 and metric.get("better") in ("lower", "higher") and None not in values:
            best = (min if metric["better"] == "lower" else max)(values)
            marked[values.index(best)]["best"] = True
            break
    return marked


def _identity(network: nn.Module) -> dict[str, object]:
    denoiser = getattr(network, "denoiser", network)
    return {
        "weights": weights_identity(network.state_dict()),
        "network": component_identity(network),
        "autocast": str(getattr(denoiser, "autocast_dtype", None)),
    }
