"""The root of a distillation graph: owns every node, takes one training step.

One step, for z ~ N(0, I):

    x0 = student(z)                                    the only graph that is kept
    x_t = alpha_t x0 + sigma_t noise, t ~ p(t)         detached
    field = sum over terms of coefficient w(t) alpha_t v(x_t)
    x0.backward(field / batch size)                    exact gradient of the objective, no pseudo-loss
    student score: denoising loss on x0 at its own times;  ratio: loss of real against x0 at its own times

By the line of the backward no graph but the student's exists, so the peak memory is one network's activations.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

from ratiograph.augmentation import Augmentation, NoAugmentation
from ratiograph.conditions import Conditions, UniformLabels
from ratiograph.data.latents import picture
from ratiograph.denoisers import EDM, Denoiser, freeze, place
from ratiograph.denoising_weights import DenoisingWeight, EDMWeight, weighted_denoising_loss
from ratiograph.diagnostics import RatioDiagnostics, bregman_divergence, field_metrics, ratio_metrics
from ratiograph.distributed import gather
from ratiograph.experiment import Sampler, Task
from ratiograph.noising import NoisingProcess
from ratiograph.objective import Objective
from ratiograph.optim import EMA, Adam
from ratiograph.positives import ExactSamples, Positives, RealSamples
from ratiograph.randomness import normal
from ratiograph.ratio_losses import LogisticLoss, RatioLoss
from ratiograph.ratios import RatioEstimator
from ratiograph.samplers import HeunSampler, ManyStepSampler
from ratiograph.sampling import SampleDraws
from ratiograph.students import OneStep
from ratiograph.times import TimeSampler
from ratiograph.types import Batch, Condition, Evaluation, Needs, Nodes, Noisy, NoisySamples
from ratiograph.warm_start import WarmStart

__all__ = ["Distillation"]

TRAINING = Needs(training=True)


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
        student_score_weight: lambda(s) of its loss; EDM's for its ``sigma_data`` by default.
        ratio: estimator of log p/q, trained online; None where every weighting is KL's and no direction needs it.
        ratio_times: p(t) of its loss; None, for an estimator on the student score, shares that network's noisy samples,
            so that one pass over them gives both losses.
        ratio_optimizer: recipe of its optimiser.
        ratio_updates: its updates a step.
        ratio_loss: what trains it; the logistic loss by default.
        positives: its samples of p; by default exact ones if the teacher has them, and real ones otherwise.
        warm_start: an earlier run whose networks to begin with.
        critic_steps: first steps in which only the critics learn and the student stands still.
        conditions: what the student's samples are conditioned on; uniform labels by default.
        augmentation: of the critics' images, the student's and the real ones alike; none by default. The terms ask
            about samples as they are.

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
        student_score_weight: DenoisingWeight | None = None,
        ratio: RatioEstimator | None = None,
        ratio_times: TimeSampler | None = None,
        ratio_optimizer: Adam | None = None,
        ratio_updates: int = 1,
        ratio_loss: RatioLoss | None = None,
        positives: Positives | None = None,
        warm_start: WarmStart | None = None,
        critic_steps: int = 0,
        conditions: Conditions | None = None,
        augmentation: Augmentation | None = None,
    ):
        super().__init__()
        self.student, self.objective, self.noising, self.times = student, objective, noising, times
        self.teacher, self.student_score, self.ratio = teacher, student_score, ratio
        self.student_score_times, self.ratio_times = student_score_times, ratio_times
        self.student_optimizer, self.ema = student_optimizer, ema
        self.student_score_optimizer, self.ratio_optimizer = student_score_optimizer, ratio_optimizer
        self.student_score_updates, self.ratio_updates = student_score_updates, ratio_updates
        self.ratio_loss = LogisticLoss() if ratio_loss is None else ratio_loss
        exact = getattr(teacher, "can_sample", False)
        self.positives = positives or (ExactSamples() if exact else RealSamples())
        self.warm_start, self.critic_steps = warm_start, critic_steps
        self.conditions = UniformLabels() if conditions is None else conditions
        self.student_score_weight = student_score_weight
        self.augmentation = NoAugmentation() if augmentation is None else augmentation
        self._check()
        if teacher is not None:
            teacher.requires_grad_(False).eval()
        objective.connect(noising, times)
        if ratio is not None:
            ratio.connect(teacher, student_score)
            self.diagnostics = RatioDiagnostics()

    def _check(self) -> None:
        self.conditions.check(self.student)
        for node, terms in self.objective.requires.items():
            if getattr(self, node) is None:
                raise ValueError(f"the term {terms[0]!r} needs a {node}: bind Distillation.{node}, or change the term")
        if self.student_score is not None and None in (self.student_score_times, self.student_score_optimizer):
            raise ValueError(
                "student_score is trained online: bind Distillation.student_score_times and student_score_optimizer"
            )
        if self.ratio is not None:
            self._check_ratio(self.ratio)
        learning = (self.student_score, self.ratio)
        self.augmentation.check(*(node.network for node in learning if hasattr(node, "network")))

    def _check_ratio(self, ratio: RatioEstimator) -> None:
        self.positives.check(self.teacher)
        if not ratio.learns:
            return
        timeless = self.ratio_times is None and not ratio.on_student_score
        if timeless or (ratio.has_weights and self.ratio_optimizer is None):
            raise ValueError("ratio is trained online: bind Distillation.ratio_times and ratio_optimizer")
        if self.ratio_times is None and self.ratio_updates > self.student_score_updates:
            raise ValueError(
                "a ratio without times of its own shares the student score's samples: bind Distillation.ratio_times, "
                "or give no more ratio_updates than student_score_updates"
            )

    @property
    def needs_data(self) -> bool:
        """Whether the ratio's positives are real samples, or the student's conditions theirs."""
        return self.conditions.needs_data or (self.ratio is not None and self.positives.needs_data)

    @property
    def nodes(self) -> Nodes:
        return Nodes(self.teacher, self.student_score, self.ratio)

    def prepare(self, device: torch.device, autocast_dtype: torch.dtype | None) -> None:
        for node in (self.student.denoiser, self.teacher, self.student_score, self.ratio):
            if node is not None:
                node.load()
        for term in self.objective.terms.values():
            term.target.load()
        if self.teacher is not None:
            freeze(self.teacher, autocast_dtype)
        place(self, device, autocast_dtype)
        self.average = self.ema.copy_of(self.student)
        self.optimizers = {"student": self.student_optimizer.build(self.student.parameters())}
        if self.student_score is not None:
            self.optimizers["student_score"] = self.student_score_optimizer.build(self.student_score.parameters())
        if self.ratio is not None and self.ratio.has_weights:
            self.optimizers["ratio"] = self.ratio_optimizer.build(self.ratio.parameters())
        self.steps_done = 0
        if self.warm_start is not None:
            networks = self.trained()
            self.warm_start.load(
                {name: networks[name] for name in networks if name not in ("objective", "diagnostics")}
            )

    def trained(self) -> dict[str, nn.Module]:
        networks = {
            "student": self.student,
            "student_average": self.average,
            "student_score": self.student_score,
            "ratio": self.ratio,
            "objective": self.objective,
            "diagnostics": self.diagnostics if self.ratio is not None else None,
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
        return {"student": self.average, **ratio}

    def summary(self) -> dict:
        return {} if self.ratio is None else {"ratio": self.diagnostics.summary()}

    def fit(self, batches: Iterator[Batch] | None, generator: torch.Generator) -> dict[str, float]:
        """Estimates log Z of each tilted target from real or teacher samples, and keeps conditions for previews.

        Raises:
            ValueError: for a tilted target without real samples, if the teacher cannot be sampled either.
        """
        self.conditions.remember(batches)
        fitted = {}
        for name, term in self.objective.terms.items():
            if term.target.needs_samples:
                term.target.fit(self._samples_of_p(batches, 500, generator))
                fitted[f"log Z of {name}"] = float(term.target.log_normalizer)
        return fitted

    def _samples_of_p(self, batches: Iterator[Batch] | None, size: int, generator: torch.Generator) -> Iterator[Batch]:
        if batches is not None:
            return batches
        if not getattr(self.teacher, "can_sample", False):
            raise ValueError("Z is estimated from real samples: bind Experiment.data = @ShardStream() (or give --data)")
        return (Batch(self.teacher.sample(size, generator), Condition()) for _ in itertools.count())

    def step(self, batch: Batch | None, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        condition = self.conditions.draw(batch, batch_size, self.student, generator)
        z = self.student.noise(batch_size, generator)
        if self.steps_done >= self.critic_steps:
            x0 = self.student(z, condition)
            metrics = self._update_student(x0, condition, generator)
            x0 = x0.detach()
        else:
            metrics, x0 = {}, self._samples(z, condition)
        for update in range(max(self.student_score_updates, self.ratio_updates)):
            if update:
                condition = self.conditions.draw(batch, batch_size, self.student, generator)
                x0 = self._samples(self.student.noise(batch_size, generator), condition)
            metrics |= self._update_critics(update, x0, condition, batch, generator)
        self.steps_done += 1
        return metrics

    @torch.no_grad()
    def _samples(self, z: Tensor, condition: Condition) -> Tensor:
        return self.student(z, condition)

    def evaluate(self, x0: Tensor, condition: Condition, generator: torch.Generator) -> Evaluation:
        """Noises ``x0`` [B, ...] at times of the objective, for its terms to look at."""
        t = self.times(self.noising, x0.shape[0], generator)
        noisy = self.noising.add_noise(x0.detach(), t, normal(x0.shape, generator, x0.dtype))
        return Evaluation(noisy, x0, condition, self.nodes, self.objective.needs)

    def _update_student(self, x0: Tensor, condition: Condition, generator: torch.Generator) -> dict[str, Tensor]:
        critics = [node for node in (self.student_score, self.ratio) if node is not None]
        for node in critics:  # without their dropout where they are only asked
            node.eval()
        fields = self.objective.fields(self.evaluate(x0, condition, generator))
        for node in critics:
            node.train()
        total = torch.stack(list(fields.values())).sum(0)
        x0.backward(total / x0.shape[0])
        updater = self.optimizers["student"]
        norm = updater.step()
        self.ema.update(self.average, self.student, x0.shape[0], updater.updates * x0.shape[0])
        return {**field_metrics(fields), **self.objective.metrics(), "gradient/student": norm}

    def _update_critics(
        self, update: int, x0: Tensor, condition: Condition, batch: Batch | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """One update of the critics that are due at this number of the step's updates."""
        metrics, due, student = {}, set(), None
        if self.student_score is not None and update < self.student_score_updates:
            student = self._noised(x0, self.student_score_times, condition, generator)
            metrics |= self._learn_student_score(student)
            due.add("student_score")
        if self.ratio is not None and self.ratio.learns and update < self.ratio_updates:
            metrics |= self._learn_ratio(x0, condition, batch, student, generator)
            due |= {"ratio", "student_score"} if self.ratio.on_student_score else {"ratio"}
        for name in self.optimizers:  # in the same order on every rank
            if name in due:
                self.optimizers[name].step()
        return metrics

    def _noised(
        self, x0: Tensor, times: TimeSampler, condition: Condition, generator: torch.Generator, needs=TRAINING
    ) -> Evaluation:
        """``x0`` augmented and noised at ``times``, for a critic to learn from."""
        x0, condition = self.augmentation.apply(x0, condition, generator)
        t = times(self.noising, x0.shape[0], generator)
        noisy = self.noising.add_noise(x0, t, normal(x0.shape, generator, x0.dtype))
        return Evaluation(noisy, x0, condition, self.nodes, needs)

    def _learn_student_score(self, student: Evaluation) -> dict[str, Tensor]:
        denoised = student.student_score_output
        weight = self.student_score_weight or EDMWeight(sigma_data=self.student_score.sigma_data)
        loss = weighted_denoising_loss(denoised, student.x0, student.noisy, weight)
        # A ratio that shares this pass goes back through its encoder once more.
        loss.backward(retain_graph=self._shares_pass)
        return {"loss/student_score": loss.detach()}

    @property
    def _shares_pass(self) -> bool:
        return self.ratio is not None and self.ratio.on_student_score and self.ratio_times is None

    def _learn_ratio(
        self,
        x0: Tensor,
        condition: Condition,
        batch: Batch | None,
        shared: Evaluation | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        positives = self.positives.draw(batch, x0.shape[0], self.teacher, self.student, generator)
        real, student, noisy, fake = self._logits(x0, condition, positives, shared, generator)
        loss = self.ratio_loss(real, student, noisy.x_t, self.objective.positive_weights(positives))
        # Not to x_t as well, by which R1 differentiates: the second derivative there would be work for nothing.
        loss.backward(inputs=self.learn_from_ratio)
        times = self.ratio_times or self.student_score_times
        quantiles = (times.quantile(self.noising, of.t) for of in (noisy, fake))
        self.diagnostics.update(*map(gather, (real, student, *quantiles)))
        return {"loss/ratio": loss.detach(), **ratio_metrics(real, student), **self._divergences(real)}

    @cached_property
    def learn_from_ratio(self) -> list[nn.Parameter]:
        """What the ratio's loss trains."""
        nodes = (self.ratio, self.student_score) if self.ratio.on_student_score else (self.ratio,)
        return [parameter for node in nodes for parameter in node.parameters() if parameter.requires_grad]

    def _logits(self, x0, condition, positives, shared, generator) -> tuple[Tensor, Tensor, Noisy, Noisy]:
        """(l of real samples, l of the student's, the noisy real ones, the student's noisy ones)."""
        if self._shares_pass:  # the student samples' features are those of the student score's own update
            images = positives.images.to(x0.dtype)
            real = self._noised(images, self.student_score_times, positives.condition, generator, self._ratio_needs)
            return real.log_ratio_output, shared.log_ratio_output, real.noisy, shared.noisy
        real, student = self._pair(x0, condition, positives, generator)
        if self.ratio_loss.needs_gradient:  # by real samples alone, so that those of the student need no such graph
            real, student = self._evaluation(real, self._ratio_needs), self._evaluation(student, TRAINING)
            return real.log_ratio_output, student.log_ratio_output, real.noisy, student.noisy
        both = self._evaluation(real.join(student), TRAINING)
        return *both.log_ratio_output.tensor_split([len(positives)]), real.noisy, student.noisy

    def _pair(self, x0, condition, positives, generator) -> list[NoisySamples]:
        """Real and student samples, noised at the same times: the classes are balanced at every noise level."""
        pairs = (positives.images.to(x0.dtype), positives.condition), (x0, condition)
        pairs = [self.augmentation.apply(*pair, generator) for pair in pairs]
        t = self.ratio_times(self.noising, x0.shape[0], generator)
        return [
            NoisySamples(self.noising.add_noise(x, t, normal(x.shape, generator, x.dtype)), x, told)
            for x, told in pairs
        ]

    def _evaluation(self, samples: NoisySamples, needs: Needs) -> Evaluation:
        return Evaluation(samples.noisy, samples.x0, samples.condition, self.nodes, needs)

    @property
    def _ratio_needs(self) -> Needs:
        again = self.ratio_loss.needs_gradient
        return TRAINING | Needs(ratio_gradient=again, curvature=again)

    def _divergences(self, real: Tensor) -> dict[str, Tensor]:
        """The estimate of each term's own D_h(q_t||p_t), where h has a closed form."""
        terms = self.objective.terms.items()
        rows = {name: term.weighting.row for name, term in terms if term.weighting is not None}
        return {f"divergence/{name}": bregman_divergence(row, real) for name, row in rows.items() if row.has_h}

    @torch.no_grad()
    def preview(self, samples: int, generator: torch.Generator) -> Tensor:
        return picture(self.student_sampler(samples, generator))

    @torch.no_grad()
    def student_sampler(self, samples: int, generator: torch.Generator) -> Tensor:
        """x0 [samples, ...] of the averaged student."""
        condition = self.conditions.preview(samples, self.average, generator)
        return self.average(self.average.noise(samples, generator), condition)

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
        """Many-step samples of the teacher, at ``evaluations`` passes each."""
        heun = HeunSampler.for_evaluations(evaluations)

        def sample(samples: int, generator: torch.Generator) -> Tensor:
            condition = self.conditions.preview(samples, self.student, generator)
            return heun.sample(self.teacher, self.student.noise(samples, generator), condition)

        return sample
