"""The root of a distillation graph: owns every node, takes one training step.

One step, for z ~ N(0, I):

    x0 = student(z)                                    the only graph that is kept
    x_t = alpha_t x0 + sigma_t noise, t ~ p(t)         detached
    field = sum over terms of coefficient w(t) alpha_t v(x_t)
    x0.backward(field / batch size)                    exact gradient of the objective, no pseudo-loss
    student score: denoising loss on x0 at its own times;  ratio: loss of real against x0 at its own times

When the backward runs, only the student's graph exists. Micro-batches (``Experiment.accumulation``) change no step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ratiograph.algebra.denoising_weights import DenoisingWeight
from ratiograph.algebra.diagnostics import RatioDiagnostics, field_metrics
from ratiograph.algebra.noising import NoisingProcess
from ratiograph.algebra.objective import Objective
from ratiograph.algebra.ratio_losses import LogisticLoss, RatioLoss
from ratiograph.algebra.times import TimeSampler
from ratiograph.core.contracts import Denoiser, Evaluation, Nodes, RatioEstimator
from ratiograph.core.domains import Depth, NonNegativeInt
from ratiograph.core.draws import SampleDraws
from ratiograph.core.randomness import normal
from ratiograph.core.types import Batch, Condition, NoisySamples
from ratiograph.data.latents import picture
from ratiograph.networks.augmentation import Augmentation, NoAugmentation
from ratiograph.networks.conditions import Conditions, UniformLabels
from ratiograph.networks.cuda_graphs import record_passes
from ratiograph.networks.denoisers import EDM, freeze
from ratiograph.networks.lora import share_bases
from ratiograph.networks.samplers import HeunSampler, ManyStepSampler
from ratiograph.networks.students import OneStep
from ratiograph.tasks.critics import Critics
from ratiograph.tasks.distillation_check import check_nodes, check_parallel
from ratiograph.tasks.positives import ExactSamples, Positives, RealSamples
from ratiograph.tasks.student_passes import KeptPass, ReplayedPass
from ratiograph.training.experiment import Sampler, Task
from ratiograph.training.optim import EMA, Adam, named_averages
from ratiograph.training.updates import Updates
from ratiograph.training.warm_start import WarmStart

__all__ = ["Distillation"]


class Distillation(Task):
    """Trains a one-step student under an objective, with its critics online.

    Args:
        student: the one-step generator.
        objective: the sum of terms that moves its samples.
        noising: forward process.
        times: p(t) of the objective.
        student_optimizer, ema: recipes of the student's optimiser, and of its average, which is the result.
        averages: recipes of further averages by name, such as 'short' and 'long', which are evaluated and saved too.
        teacher: denoiser of p, frozen; None for score-free objectives.
        student_score: denoiser of q, trained online; None for score-free objectives.
        student_score_times: p(t) of its denoising loss.
        student_score_optimizer: recipe of its optimiser.
        student_score_updates: its updates a step; the first uses the samples that the student learned from.
        student_score_weight: lambda(s) of its loss; EDM's for its ``sigma_data`` by default.
        ratio: estimator of log p/q, trained online; None where no weighting or direction needs it.
        ratio_times: p(t) of its loss; None, for an estimator on the student score, shares that network's noisy samples.
        ratio_optimizer: recipe of its optimiser.
        ratio_updates: its updates a step.
        fresh_samples: whether each further update of the critics has new samples of the student, or only new noise.
        ratio_loss: what trains it; the logistic loss by default.
        positives: its samples of p; by default exact ones if the teacher has them, and real ones otherwise.
        warm_start: an earlier run whose networks this one starts from.
        critic_steps: first steps in which only the critics learn and the student does not change.
        conditions: what the student's samples are conditioned on; uniform labels by default.
        augmentation: of the critics' images, student's and real ones; none by default.
        recompute: whether samples are made without a graph and again for their gradient, as under accumulation, so that
            two networks never hold activations at once.
        cuda_graphs: whether passes without gradients are recorded on a GPU and replayed, see `cuda_graphs`.

    Raises:
        ValueError: a term needs a node that the graph does not have, or a node lacks its times or optimiser.
    """

    accumulates = shardable = True

    def __init__(
        self,
        *,
        student: OneStep,
        objective: Objective,
        noising: NoisingProcess,
        times: TimeSampler,
        student_optimizer: Adam,
        ema: EMA,
        averages: Mapping[str, EMA] | None = None,
        teacher: Denoiser | None = None,
        student_score: EDM | None = None,
        student_score_times: TimeSampler | None = None,
        student_score_optimizer: Adam | None = None,
        student_score_updates: Depth = 1,
        student_score_weight: DenoisingWeight | None = None,
        ratio: RatioEstimator | None = None,
        ratio_times: TimeSampler | None = None,
        ratio_optimizer: Adam | None = None,
        ratio_updates: Depth = 1,
        fresh_samples: bool = True,
        ratio_loss: RatioLoss | None = None,
        positives: Positives | None = None,
        warm_start: WarmStart | None = None,
        critic_steps: NonNegativeInt = 0,
        conditions: Conditions | None = None,
        augmentation: Augmentation | None = None,
        recompute: bool = False,
        cuda_graphs: bool = False,
    ):
        super().__init__()
        self.student, self.objective, self.noising, self.times = student, objective, noising, times
        self.teacher, self.student_score, self.ratio = teacher, student_score, ratio
        self.student_score_times, self.ratio_times = student_score_times, ratio_times
        self.student_optimizer, self.ema, self.averages = student_optimizer, ema, named_averages(averages)
        self.student_score_optimizer, self.ratio_optimizer = student_score_optimizer, ratio_optimizer
        self.student_score_updates, self.ratio_updates = student_score_updates, ratio_updates
        self.student_score_weight, self.ratio_loss = student_score_weight, ratio_loss or LogisticLoss()
        self.positives = positives or (ExactSamples() if getattr(teacher, "can_sample", False) else RealSamples())
        self.fresh_samples, self.warm_start, self.critic_steps = fresh_samples, warm_start, critic_steps
        self.conditions, self.augmentation = conditions or UniformLabels(), augmentation or NoAugmentation()
        self.recompute, self.cuda_graphs = recompute, cuda_graphs
        check_nodes(self)
        if teacher is not None:
            teacher.requires_grad_(False).eval()
        share_bases(teacher, student, student_score)
        objective.connect(noising, times)
        self.diagnostics = None if ratio is None else RatioDiagnostics()
        if ratio is not None:
            ratio.connect(teacher, student_score)
        self.critics = Critics(self)

    @property
    def needs_data(self) -> bool:
        return self.conditions.needs_data or (self.ratio is not None and self.positives.needs_data)

    @property
    def nodes(self) -> Nodes:
        return Nodes(self.teacher, self.student_score, self.ratio)

    def load(self) -> None:
        for node in (self.student.denoiser, self.teacher, self.student_score, self.ratio):
            if node is not None:
                node.load()
        for term in self.objective.terms.values():
            term.target.load()

    def prepare(self, device: torch.device, autocast_dtype: torch.dtype | None) -> None:
        self.load()
        if self.teacher is not None:
            freeze(self.teacher, autocast_dtype)
        self.average = self.parallel.copy(self.student)
        self.averaged = nn.ModuleDict({name: self.parallel.copy(self.student) for name in self.averages})
        check_parallel(self)
        averages = (average.denoiser for average in (self.average, *self.averaged.values()))
        nodes = (self.student.denoiser, *averages, self.teacher, self.student_score, self.ratio)
        self.parallel.place(self, [node for node in nodes if node is not None], device, autocast_dtype)
        if self.cuda_graphs:
            record_passes(self)
        self._start_warm()
        self.optimizers = {"student": self.student_optimizer.build(self.student.parameters())}
        if self.student_score is not None:
            self.optimizers["student_score"] = self.student_score_optimizer.build(self.student_score.parameters())
        if self.ratio is not None and self.ratio.has_weights:
            self.optimizers["ratio"] = self.ratio_optimizer.build(self.ratio.parameters())
        self.updates, self.steps_done = Updates(self.optimizers), 0

    def _start_warm(self) -> None:
        if self.warm_start is None:
            return
        own = {name: node for name, node in self.trained().items() if name not in ("objective", "diagnostics")}
        loaded = self.warm_start.load(own)
        for name, average in self.averaged.items():
            if f"student_average_{name}" not in loaded:
                average.load_state_dict(self.average.state_dict())

    def trained(self) -> dict[str, nn.Module]:
        networks = {
            "student": self.student,
            "student_average": self.average,
            **{f"student_average_{name}": average for name, average in self.averaged.items()},
            "student_score": self.student_score,
            "ratio": self.ratio,
            "objective": self.objective,
            "diagnostics": self.diagnostics,
        }
        return {name: network for name, network in networks.items() if network is not None}

    def training_state(self) -> dict:
        state = super().training_state()
        return {**state, "steps_done": self.steps_done, "conditions": self.conditions.state_dict()}

    def load_training_state(self, state: dict) -> None:
        super().load_training_state(state)
        self.steps_done = state["steps_done"]
        self.conditions.load_state_dict(state.get("conditions", {}))

    def weights(self) -> dict[str, nn.Module]:
        ratio = {"ratio": self.ratio} if "ratio" in self.optimizers else {}
        return {"student": self.average, **{f"student_{name}": a for name, a in self.averaged.items()}, **ratio}

    def summary(self) -> dict:
        return {} if self.ratio is None else {"ratio": self.diagnostics.summary()}

    def fit(self, batches: Iterator[Batch] | None, generator: torch.Generator) -> dict[str, float]:
        """Estimates log Z of each tilted target from real or teacher samples, and stores conditions for previews.

        Raises:
            ValueError: a tilted target has neither real samples nor a teacher that can be sampled.
        """
        self.conditions.remember(batches)
        fitted = {}
        for name, term in self.objective.terms.items():
            if term.target.needs_samples:
                term.target.fit(self._teacher_batches(generator) if batches is None else batches)
                fitted[f"log Z of {name}"] = float(term.target.log_normalizer)
        return fitted

    def _teacher_batches(self, generator: torch.Generator) -> Iterator[Batch]:
        if not getattr(self.teacher, "can_sample", False):
            raise ValueError("Z is estimated from real samples: bind Experiment.data = @ShardStream() (or give --data)")
        while True:
            yield Batch(self.teacher.sample(500, generator), Condition())

    def step(self, batch: Batch | None, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        z, condition = self._inputs(batch, batch_size, generator)
        student_learns = self.steps_done >= self.critic_steps
        if student_learns:
            x0, metrics = self._update_student(z, condition, generator)
        else:
            x0, metrics = self._samples(z, condition), {}
        for update in range(max(self.student_score_updates, self.ratio_updates)):
            if update > 0 and self.fresh_samples:
                self.updates.finish(["student"])  # the student of the new samples is the updated one
                z, condition = self._inputs(batch, batch_size, generator)
                x0 = self._samples(z, condition)
            metrics |= self._update_critics(update, x0, condition, batch, generator)
        self.updates.finish()
        if self.ratio is not None:
            self.diagnostics.finish()
        if student_learns:
            metrics["gradient/student"] = self.updates.norms["student"]
        self.steps_done += 1
        return metrics

    def _inputs(self, batch: Batch | None, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Condition]:
        condition = self.conditions.draw(batch, batch_size, self.student, generator)
        return self.student.noise(batch_size, generator), condition

    @torch.no_grad()
    def _samples(self, z: Tensor, condition: Condition) -> Tensor:
        return self.student(z, condition)

    def _update_student(
        self, z: Tensor, condition: Condition, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Begins an update of the student; returns its samples x0 [B, ...], detached, and the metrics to log."""
        if self.recompute or self.accumulation > 1:
            student_pass = ReplayedPass(self.student, z, condition, self.accumulation)
        else:
            student_pass = KeptPass(self.student, z, condition)
        fields = self._fields(student_pass.x0, condition, generator)
        student_pass.backward(torch.stack(list(fields.values())).sum(0) / len(z))
        self.updates.begin("student", lambda: self._move_averages(len(z)))
        return student_pass.x0, {**field_metrics(fields), **self.objective.metrics()}

    def _fields(self, x0: Tensor, condition: Condition, generator: torch.Generator) -> dict[str, Tensor]:
        """Each term's field [B, ...] at ``x0``, from one micro-batch after another."""
        critics = [node for node in (self.student_score, self.ratio) if node is not None]
        for node in critics:  # no dropout where they do not learn
            node.eval()
        pieces = self._noised(x0, condition, generator).split(self.accumulation)
        fields = self.objective.fields(Evaluation(*each, self.nodes, self.objective.needs) for each in pieces)
        for node in critics:
            node.train()
        return fields

    def _noised(self, x0: Tensor, condition: Condition, generator: torch.Generator) -> NoisySamples:
        x0, t = x0.detach(), self.times(self.noising, x0.shape[0], generator)
        noisy = self.noising.add_noise(x0, t, normal(x0.shape, generator, x0.dtype))
        return NoisySamples(noisy, x0, condition)

    def evaluate(self, x0: Tensor, condition: Condition, generator: torch.Generator) -> Evaluation:
        """The networks' outputs that the objective's terms need, at ``x0`` [B, ...] noised at times of p(t)."""
        return Evaluation(*self._noised(x0, condition, generator), self.nodes, self.objective.needs)

    def _move_averages(self, samples: int) -> None:
        """Called after an update of the student from ``samples`` samples of this process."""
        recipes, averages = (self.ema, *self.averages.values()), (self.average, *self.averaged.values())
        for ema, average in zip(recipes, averages, strict=True):
            ema.update(average, self.student, samples, self.optimizers["student"].updates * samples)

    def _update_critics(
        self, update: int, x0: Tensor, condition: Condition, batch: Batch | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Update number ``update`` of the step, of each critic that has so many updates a step."""
        planned = {
            "student_score": self.student_score_updates * (self.student_score is not None),
            "ratio": self.ratio_updates * (self.ratio is not None and self.ratio.learns),
        }
        metrics = {}
        for names in self.critics.updates_of([name for name, updates in planned.items() if update < updates]):
            networks = [name for name in self.optimizers if name in self.critics.networks_of(names)]
            self.updates.finish(networks)
            metrics |= self.critics.learn(names, x0, condition, batch, generator)
            for name in networks:
                self.updates.begin(name)
        return metrics

    def preview(self, samples: int, generator: torch.Generator) -> Tensor:
        return picture(self.student_sampler(samples, generator))

    @torch.no_grad()
    def student_sampler(self, samples: int, generator: torch.Generator, student: OneStep | None = None) -> Tensor:
        """x0 [samples, ...] of ``student``, the averaged one by default."""
        student = self.average if student is None else student
        condition = self.conditions.preview(samples, student, generator)
        return student(student.noise(samples, generator), condition)

    @torch.no_grad()
    def student_samples(self, draws: SampleDraws, student: OneStep | None = None) -> Tensor:
        """x0 [n, ...] of the samples of ``draws`` by ``student``, the averaged one by default."""
        student = self.average if student is None else student
        condition = self.conditions.sampled(draws, student)
        return student(student.noise_of(draws), condition)

    def teacher_samples(self, draws: SampleDraws, sampler: ManyStepSampler) -> Tensor:
        """x0 [n, ...] of the same noise and conditions by the teacher and a many-step ``sampler``."""
        if self.teacher is None:
            raise ValueError("this graph has no teacher to sample: it is trained from a ratio alone")
        condition = self.conditions.sampled(draws, self.average)
        return sampler.sample(self.teacher, self.average.noise_of(draws), condition, draws)

    def teacher_sampler(self, evaluations: int) -> Sampler:
        """Samples of the teacher by Heun's method, at ``evaluations`` evaluations each."""
        heun = HeunSampler.for_evaluations(evaluations)

        def sample(samples: int, generator: torch.Generator) -> Tensor:
            condition = self.conditions.preview(samples, self.student, generator)
            return heun.sample(self.teacher, self.student.noise(samples, generator), condition)

        return sample
