"""A training step against its floor: the bare passes of networks that its graph cannot do without.

Notation: B samples a step; F one pass forward; the *floor* is the sum of the seconds of every pass below, each timed
alone. A pass is written with the network's own ``encode`` and ``decode`` on random numbers, without the framework:
no noising, no weights, no loss, no optimiser, no metrics.

- student: F and backward to its weights; for each further update of a critic, one F without a graph;
- teacher: F without a graph; its encoder with a graph to x_t where a ratio on its features is differentiated;
- student score: F without a graph; for each of its updates, F and backward to its weights, and through its encoder once
  more where a ratio shares that pass;
- ratio: F with a graph to x_t where it is differentiated; for each of its updates, F and backward on 2 B samples, or on
  the B real ones where it shares the student score's pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ratiograph.denoisers import Denoiser
from ratiograph.distillation import Distillation
from ratiograph.randomness import normal
from ratiograph.types import Batch, Evaluation, Needs, Noisy

__all__ = ["StepBench", "randomised"]

Pass = Callable[[], None]


def randomised(task: Distillation, seed: int = 0) -> Distillation:
    """The task without any file: random weights everywhere, none of them zero, and nothing to load."""
    generator = torch.Generator().manual_seed(seed)
    for module in task.modules():
        for name in ("weights", "encoder_weights"):
            if getattr(module, name, None) is not None:
                setattr(module, name, None)
    with torch.no_grad():
        for parameter in task.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02, generator=generator)
    task.warm_start = None
    return task


class StepBench:
    """One step of a task, and each of the passes that make up its floor.

    Args:
        task: a prepared distillation.
        batch_size: B.
        device: where it lies.
    """

    def __init__(self, task: Distillation, batch_size: int, device: torch.device):
        self.task, self.batch_size = task, batch_size
        self.generator = torch.Generator(device).manual_seed(0)
        shape = (batch_size, *task.student.denoiser.shape)
        self.condition = task.student.condition(batch_size, self.generator)
        self.batch = Batch(normal(shape, self.generator).clamp(-1, 1), self.condition)
        self.field = normal(shape, self.generator)

    def step(self) -> None:
        """One training step."""
        self.task.step(self.batch, self.batch_size, self.generator)

    def unit(self) -> None:
        """Forward and backward of the student's network in plain eager float32."""
        network = self.task.student.denoiser.network
        output = network.decode(network.encode(self.field, self.field.flatten(1)[:, 0], self.condition))
        output.square().mean().backward()
        self._clear(network)

    def floor(self) -> dict[str, tuple[int, Pass]]:
        """How often each bare pass is needed in a step, and the pass, by name."""
        return dict(self._passes())

    def _passes(self) -> Iterator[tuple[str, tuple[int, Pass]]]:
        task, needs = self.task, self.task.objective.needs
        updates = max(task.student_score_updates * (task.student_score is not None), self._ratio_updates, 1)
        yield "student, forward and backward", (1, self._student)
        if updates > 1:
            yield "student, forward", (updates - 1, torch.no_grad()(lambda: task.student(self.field, self.condition)))
        asked = task.objective.requires
        if "teacher" in asked:
            graph = needs.ratio_gradient and task.ratio.on_teacher
            yield "teacher, forward", (1, self._asked(task.teacher, graph or needs.teacher_gradient))
        if "student_score" in asked:
            graph = needs.ratio_gradient and task.ratio is not None and task.ratio.on_student_score
            yield "student score, forward", (1, self._asked(task.student_score, graph))
        if task.student_score is not None:
            yield "student score, forward and backward", (task.student_score_updates, self._score_update)
        if self._ratio_updates:
            own = not (task.ratio.on_teacher or task.ratio.on_student_score)
            if own and "ratio" in asked:
                yield "ratio, forward and backward to x_t", (1, self._ratio_asked)
            yield "ratio, forward and backward", (self._ratio_updates, self._ratio_update)

    @property
    def _ratio_updates(self) -> int:
        ratio = self.task.ratio
        return self.task.ratio_updates if ratio is not None and ratio.learns else 0

    def _noisy(self, samples: Tensor, gradient: bool) -> Noisy:
        sigma = torch.ones(len(samples), device=samples.device)
        return Noisy(samples.detach().clone().requires_grad_(gradient), sigma, torch.ones_like(sigma), sigma)

    def _clear(self, module: nn.Module) -> None:
        for parameter in module.parameters():
            parameter.grad = None

    def _student(self) -> None:
        self.task.student(self.field, self.condition).backward(self.field)
        self._clear(self.task.student)

    def _asked(self, network: Denoiser, graph: bool) -> Pass:
        """Features and output; with a graph from the features to x_t where a term differentiates them."""

        def run() -> None:
            network.eval()
            noisy = self._noisy(self.field, graph)
            with torch.set_grad_enabled(graph):
                encoding = network.encode(noisy, self.condition)
            with torch.no_grad():
                network.decode(encoding.detach())
            if graph:
                total = sum(feature.float().sum() for feature in self._read(encoding.features))
                torch.autograd.grad(total, noisy.x_t)

        return run

    def _read(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        """The feature maps that the ratio reads."""
        return [features[k] for k in getattr(self.task.ratio, "feature_maps", (-1,))]  # SiDA's mean: the last

    def _score_update(self) -> None:
        network = self.task.student_score.train()
        encoding = network.encode(self._noisy(self.field, False), self.condition)
        network.decode(encoding).backward(self.field, retain_graph=self._shared)
        if self._shared:
            sum(feature.float().sum() for feature in self._read(encoding.features)).backward()
        self._clear(network)

    @property
    def _shared(self) -> bool:
        """Whether the ratio reads the student score's own update, and so goes back through its encoder once more."""
        ratio = self.task.ratio
        return ratio is not None and ratio.on_student_score and self.task.ratio_times is None

    def _evaluation(self, samples: Tensor, needs: Needs) -> Evaluation:
        condition = self.condition if len(samples) == self.batch_size else self.condition.join(self.condition)
        return Evaluation(self._noisy(samples, False), samples, condition, self.task.nodes, needs)

    def _ratio_asked(self) -> None:
        self.task.ratio.eval()
        evaluation = self._evaluation(self.field, Needs(ratio_gradient=True))
        torch.autograd.grad(evaluation.log_ratio_output.sum(), evaluation.noisy.x_t)

    def _ratio_update(self) -> None:
        task = self.task
        task.ratio.train()
        again = task.ratio_loss.needs_gradient
        if again:
            real = self._evaluation(self.field, Needs(training=True, ratio_gradient=True, curvature=True))
            student = self._evaluation(self.field, Needs(training=True)).log_ratio_output
            loss = task.ratio_loss(real.log_ratio_output, student, real.noisy.x_t)
        else:
            samples = self.field if self._shared else torch.cat([self.field, self.field])
            loss = self._evaluation(samples, Needs(training=True)).log_ratio_output.sum()
        loss.backward(inputs=task.learn_from_ratio)
        for parameter in task.learn_from_ratio:
            parameter.grad = None
