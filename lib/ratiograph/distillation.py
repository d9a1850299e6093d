"""The root of a distillation graph: owns every node, takes one training step.

One step, for z ~ N(0, I):

    x0 = student(z)                                    the only graph that is kept
    x_t = alpha_t x0 + sigma_t noise, t ~ p(t)         detached
    field = sum over terms of coefficient w(t) alpha_t v(x_t)
    x0.backward(field / batch size)                    exact gradient of the objective, no pseudo-loss
    student score: denoising loss on x0 at its own times;  ratio: logistic loss of real against x0 at its own times

By the line of the backward no graph but the student's exists, so the peak memory is one network's activations.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ratiograph.denoiser_training import denoising_loss
from ratiograph.denoisers import EDM, Denoiser, set_precision
from ratiograph.experiment import Sampler, Task
from ratiograph.noising import NoisingProcess
from ratiograph.objective import Objective
from ratiograph.optim import EMA, Adam
from ratiograph.ratios import RatioEstimator
from ratiograph.samplers import HeunSampler
from ratiograph.students import OneStep
from ratiograph.times import TimeSampler
from ratiograph.types import Batch, Condition, Evaluation, Nodes

__all__ = ["Distillation"]


class Distillation(Task):
    """Trains a one-step student under an objective, with its critics online.

    Args:
        student: the one-step generator.
        objective: the sum of terms that moves its samples.
        noising: forward process.
        times: p(t) of the objective.
        student_optimizer: recipe of the student's optimiser.
        ema: recipe of the student's average, which is the result.
        teacher: denoiser of p, frozen; None for score-free objectives.
        student_score: denoiser of q, trained online; None for score-free objectives.
        student_score_times: p(t) of its denoising loss.
        student_score_optimizer: recipe of its optimiser.
        student_score_updates: its updates a step; the first shares the step's samples, the others draw fresh ones.
        ratio: estimator of log p/q, trained online; None where every weighting is KL's and no direction needs it.
        ratio_times: p(t) of its logistic loss.
        ratio_optimizer: recipe of its optimiser.
        ratio_updates: its updates a step.
        critic_steps: first steps in which only the critics learn and the student stands still.

    Raises:
        ValueError: if a term asks for a node the graph does not have, or a node lacks its times or optimiser.
    """

    def __init__(
        self,
        *,
        student: OneStep,
        objective: Objective,
        noising: NoisingProcess,
        times: TimeSampler,
        student_optimizer: Adam,
        ema: EMA,
        teacher: Denoiser | None = None,
        student_score: EDM | None = None,
        student_score_times: TimeSampler | None = None,
        student_score_optimizer: Adam | None = None,
        student_score_updates: int = 1,
        ratio: RatioEstimator | None = None,
        ratio_times: TimeSampler | None = None,
        ratio_optimizer: Adam | None = None,
        ratio_updates: int = 1,
        critic_steps: int = 0,
    ):
        super().__init__()
        self.student, self.objective, self.noising, self.times = student, objective, noising, times
        self.teacher, self.student_score, self.ratio = teacher, student_score, ratio
        self.student_score_times, self.ratio_times = student_score_times, ratio_times
        self.student_optimizer, self.ema = student_optimizer, ema
        self.student_score_optimizer, self.ratio_optimizer = student_score_optimizer, ratio_optimizer
        self.student_score_updates, self.ratio_updates = student_score_updates, ratio_updates
        self.critic_steps = critic_steps
        self._check()
        if teacher is not None:
            teacher.requires_grad_(False)
        if ratio is not None:
            ratio.connect(teacher)

    def _check(self) -> None:
        for node, terms in self.objective.requires.items():
            if getattr(self, node) is None:
                raise ValueError(f"the term {terms[0]!r} needs a {node}: bind Distillation.{node}, or change the term")
        for node, recipe in (("student_score", self.student_score_optimizer), ("ratio", self.ratio_optimizer)):
            if getattr(self, node) is None:
                continue
            if not any(True for _ in getattr(self, node).parameters()) and node == "ratio":
                continue
            if recipe is None or getattr(self, f"{node}_times") is None:
                raise ValueError(f"{node} is trained online: bind Distillation.{node}_times and {node}_optimizer")

    @property
    def needs_data(self) -> bool:
        """Real samples are the ratio's positives, unless the teacher can be sampled exactly."""
        return self.ratio is not None and not getattr(self.teacher, "can_sample", False)

    @property
    def nodes(self) -> Nodes:
        return Nodes(self.teacher, self.student_score, self.ratio)

    def prepare(self, device: torch.device, autocast_dtype: torch.dtype | None) -> None:
        for node in (self.student.denoiser, self.teacher, self.student_score):
            if node is not None:
                node.load()
        for term in self.objective.terms.values():
            term.target.load()
        set_precision(self.to(device), autocast_dtype)
        self.average = self.ema.copy_of(self.student)
        self.optimizers = {"student": self.student_optimizer.build(self.student.parameters())}
        if self.student_score is not None:
            self.optimizers["student_score"] = self.student_score_optimizer.build(self.student_score.parameters())
        if self.ratio is not None and self.ratio_optimizer is not None:
            self.optimizers["ratio"] = self.ratio_optimizer.build(self.ratio.parameters())
        self.steps_done = 0

    def trained(self) -> dict[str, nn.Module]:
        networks = {
            "student": self.student,
            "student_average": self.average,
            "student_score": self.student_score,
            "ratio": self.ratio,
            "objective": self.objective,
        }
        return {name: network for name, network in networks.items() if network is not None}

    def training_state(self) -> dict:
        return {**super().training_state(), "steps_done": self.steps_done}

    def load_training_state(self, state: dict) -> None:
        super().load_training_state(state)
        self.steps_done = state["steps_done"]

    def weights(self) -> dict[str, nn.Module]:
        return {"student": self.average}

    def fit(self, batches: Iterator[Batch] | None, generator: torch.Generator) -> dict[str, float]:
        """Estimates log Z of each tilted target from real or teacher samples.

        Raises:
            ValueError: for a tilted target without real samples, if the teacher cannot be sampled either.
        """
        fitted = {}
        for name, term in self.objective.terms.items():
            if hasattr(term.target, "log_normalizer"):
                term.target.fit(self._positives(batches, 500, generator))
                fitted[f"log Z of {name}"] = float(term.target.log_normalizer)
        return fitted

    def _positives(self, batches: Iterator[Batch] | None, size: int, generator: torch.Generator) -> Iterator[Batch]:
        if batches is not None:
            return batches
        if not getattr(self.teacher, "can_sample", False):
            raise ValueError("Z is estimated from real samples: bind Experiment.data = @ShardStream() (or give --data)")
        return (Batch(self.teacher.sample(size, generator), Condition()) for _ in itertools.count())

    def step(self, batch: Batch | None, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        condition = self.student.condition(batch_size, generator)
        z = self.student.noise(batch_size, generator)
        if self.steps_done >= self.critic_steps:
            x0 = self.student(z, condition)
            metrics = self._update_student(x0, condition, generator)
            x0 = x0.detach()
        else:
            metrics, x0 = {}, self._samples(z, condition)
        for update in range(max(self.student_score_updates, self.ratio_updates)):
            if update:
                condition = self.student.condition(batch_size, generator)
                x0 = self._samples(self.student.noise(batch_size, generator), condition)
            if "student_score" in self.optimizers and update < self.student_score_updates:
                metrics |= self._update_student_score(x0, condition, generator)
            if "ratio" in self.optimizers and update < self.ratio_updates:
                metrics |= self._update_ratio(x0, condition, batch, generator)
        self.steps_done += 1
        return metrics

    @torch.no_grad()
    def _samples(self, z: Tensor, condition: Condition) -> Tensor:
        return self.student(z, condition)

    def evaluate(self, x0: Tensor, condition: Condition, generator: torch.Generator) -> Evaluation:
        """Noises ``x0`` [B, ...] at times of the objective, for its terms to look at."""
        t = self.times(self.noising, x0.shape[0], generator)
        noise = torch.empty_like(x0).normal_(generator=generator)
        noisy = self.noising.add_noise(x0.detach(), t, noise)
        return Evaluation(noisy, x0, condition, self.nodes, self.objective.needs)

    def _update_student(self, x0: Tensor, condition: Condition, generator: torch.Generator) -> dict[str, Tensor]:
        fields = self.objective.fields(self.evaluate(x0, condition, generator))
        total = torch.stack(list(fields.values())).sum(0)
        x0.backward(total / x0.shape[0])
        updater = self.optimizers["student"]
        norm = updater.step()
        self.ema.update(self.average, self.student, x0.shape[0], updater.updates * x0.shape[0])
        metrics = {f"field/{name}": field.float().square().mean().sqrt() for name, field in fields.items()}
        return {**metrics, "gradient/student": norm}

    def _update_student_score(self, x0: Tensor, condition: Condition, generator: torch.Generator) -> dict[str, Tensor]:
        t = self.student_score_times(self.noising, x0.shape[0], generator)
        noisy = self.noising.add_noise(x0, t, torch.empty_like(x0).normal_(generator=generator))
        loss = denoising_loss(self.student_score, x0, noisy, condition)
        loss.backward()
        self.optimizers["student_score"].step()
        return {"loss/student_score": loss.detach()}

    def _update_ratio(
        self, x0: Tensor, condition: Condition, batch: Batch | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        if batch is None:
            batch = next(self._positives(None, x0.shape[0], generator))
        # Real and student samples in one batch, each pair at one time: the classes are balanced at every noise level.
        both = torch.cat([batch.images.to(x0.dtype), x0])
        t = self.ratio_times(self.noising, x0.shape[0], generator).repeat(2)
        noisy = self.noising.add_noise(both, t, torch.empty_like(both).normal_(generator=generator))
        real = torch.arange(len(both), device=both.device) < len(batch)
        evaluation = Evaluation(noisy, both, condition.repeat(2), self.nodes)
        with torch.enable_grad():
            loss, metrics = self.ratio.loss(evaluation, real)
        loss.backward()
        self.optimizers["ratio"].step()
        return {"loss/ratio": loss.detach(), **metrics}

    @torch.no_grad()
    def preview(self, samples: int, generator: torch.Generator) -> Tensor:
        return self.student_sampler(samples, generator)

    @torch.no_grad()
    def student_sampler(self, samples: int, generator: torch.Generator) -> Tensor:
        """x0 [samples, ...] of the averaged student."""
        condition = self.average.condition(samples, generator)
        return self.average(self.average.noise(samples, generator), condition)

    def teacher_sampler(self, evaluations: int) -> Sampler:
        """Many-step samples of the teacher, at ``evaluations`` passes each."""
        heun = HeunSampler.for_evaluations(evaluations)

        def sample(samples: int, generator: torch.Generator) -> Tensor:
            condition = self.student.condition(samples, generator)
            return heun.sample(self.teacher, self.student.noise(samples, generator), condition)

        return sample
