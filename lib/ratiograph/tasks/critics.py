"""How a distillation's critics learn: the student score denoises the student's samples, the ratio tells them from p's.

Notation: x0 [B, ...] the student's samples, detached; *positives* clean samples of p; each critic noises at times of
its own. Noise, times and positives are drawn for the whole batch, then cut into micro-batches of equal length: each
piece's loss is its part of the whole batch's mean, so the pieces' gradients add up to the whole batch's gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ratiograph.algebra.denoising_weights import EDMWeight, weighted_denoising_loss
from ratiograph.algebra.diagnostics import bregman_divergence, ratio_metrics
from ratiograph.algebra.ratio_losses import RatioLoss
from ratiograph.algebra.times import TimeSampler
from ratiograph.core.contracts import Evaluation, Needs
from ratiograph.core.randomness import normal
from ratiograph.core.types import Batch, Condition, NoisySamples
from ratiograph.training.experiment import Task

__all__ = ["Critics"]

TRAINING = Needs(training=True)


@dataclass(frozen=True)
class _Samples:
    """The noisy samples of one update; None where no critic of the update needs them."""

    score: NoisySamples | None = None  # the student's, at the student score's times
    positives: Batch | None = None
    real: NoisySamples | None = None  # the positives, noised
    student: NoisySamples | None = None  # the student's, for the ratio; ``score`` itself where they share a pass

    def split(self, pieces: int) -> list[_Samples]:
        parts = (self.score, self.positives, self.real, self.student)
        cut = ([None] * pieces if part is None else part.split(pieces) for part in parts)
        return [_Samples(*each) for each in zip(*cut, strict=True)]


class Critics:
    """Trains the student score and the ratio of a distillation.

    Args:
        task: the `Distillation`, whose module imports this one.
    """

    def __init__(self, task: Task):
        self.task = task

    def learn(
        self,
        names: Collection[str],
        x0: Tensor,
        condition: Condition,
        batch: Batch | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Adds the gradients of the losses of ``names`` to the weights.

        The task's ``diagnostics`` begin to gather the ratio's outputs over all ranks; call their ``finish`` afterwards.

        Args:
            names: the critics to train, of "student_score" and "ratio".
            x0: the student's samples [B, ...], detached.
            condition: of these samples.
            batch: the step's real samples, if there are any.
            generator: draws noise, times and positives.

        Returns:
            Metrics to log, 0-d tensors by name.
        """
        samples = self._draw(names, x0, condition, batch, generator)
        results = [self._learn_piece(names, piece) for piece in samples.split(self.task.accumulation)]
        losses = [name for name in ("student_score", "ratio") if name in names]
        metrics = {f"loss/{name}": torch.stack([each[name] for each in results]).sum() for name in losses}
        if "ratio" in names:
            real, student = (torch.cat([each[name] for each in results]) for name in ("l_real", "l_student"))
            times = self.task.ratio_times or self.task.student_score_times
            quantiles = (times.quantile(self.task.noising, each.noisy.t) for each in (samples.real, samples.student))
            self.task.diagnostics.begin(real, student, *quantiles)
            metrics |= {**ratio_metrics(real, student), **self._divergences(real)}
        return metrics

    def updates_of(self, names: Sequence[str]) -> list[Sequence[str]]:
        """``names`` in groups, one for each update: only critics that share an encoder are updated together."""
        return [names] if self._on_student_score else [[name] for name in names]

    def networks_of(self, names: Collection[str]) -> set[str]:
        """The networks that the losses of ``names`` train."""
        return {*names, "student_score"} if "ratio" in names and self._on_student_score else set(names)

    @property
    def ratio_parameters(self) -> list[nn.Parameter]:
        """What the ratio's loss trains."""
        nodes = (self.task.ratio, self.task.student_score) if self._on_student_score else (self.task.ratio,)
        return [parameter for node in nodes for parameter in node.parameters() if parameter.requires_grad]

    @property
    def _on_student_score(self) -> bool:
        return self.task.ratio is not None and self.task.ratio.on_student_score

    @property
    def _share_pass(self) -> bool:
        """Whether the ratio reads the same pass of the student score that the student score learns from."""
        return self._on_student_score and self.task.ratio_times is None

    def _draw(
        self,
        names: Collection[str],
        x0: Tensor,
        condition: Condition,
        batch: Batch | None,
        generator: torch.Generator,
    ) -> _Samples:
        score = positives = real = student = None
        if "student_score" in names or ("ratio" in names and self._share_pass):
            (score,) = self._noised([(x0, condition)], self.task.student_score_times, generator)
        if "ratio" in names:
            positives = self.task.positives.draw(batch, len(x0), self.task.teacher, self.task.student, generator)
            clean = positives.images.to(x0.dtype), positives.condition
            if self._share_pass:
                (real,), student = self._noised([clean], self.task.student_score_times, generator), score
            else:
                real, student = self._noised([clean, (x0, condition)], self.task.ratio_times, generator)
        return _Samples(score, positives, real, student)

    def _noised(
        self, sets: Sequence[tuple[Tensor, Condition]], times: TimeSampler, generator: torch.Generator
    ) -> list[NoisySamples]:
        """Sets of samples, augmented and noised at the same times: several are balanced at every noise level."""
        augmented = [self.task.augmentation.apply(*each, generator) for each in sets]
        t = times(self.task.noising, len(augmented[0][0]), generator)
        return [
            NoisySamples(self.task.noising.add_noise(x0, t, normal(x0.shape, generator, x0.dtype)), x0, condition)
            for x0, condition in augmented
        ]

    def _learn_piece(self, names: Collection[str], samples: _Samples) -> dict[str, Tensor]:
        """The backward passes of one micro-batch.

        Returns:
            Detached: the losses "student_score" and "ratio" [], divided by the number of micro-batches; the ratio's
            outputs "l_real" and "l_student" [B].
        """
        score = None if samples.score is None else self._evaluation(samples.score, TRAINING)
        results = {}
        if "student_score" in names:
            # The ratio's loss goes back through the same encoder once more where they share the pass.
            keep = "ratio" in names and self._share_pass
            results["student_score"] = self._learn_student_score(score, keep)
        if "ratio" in names:
            weight = self.task.objective.positive_weights(samples.positives)
            ratio_loss = self._ratio_loss()
            real, student, x_t = self._log_ratios(samples, score, ratio_loss.needs_gradient)
            loss = ratio_loss(real, student, x_t, weight) / self.task.accumulation
            # Not to x_t as well, by which R1 differentiates: its second derivative there would be wasted work.
            loss.backward(inputs=self.ratio_parameters if ratio_loss.needs_gradient else None)
            results |= {"ratio": loss.detach(), "l_real": real.detach(), "l_student": student.detach()}
        return results

    def _learn_student_score(self, student: Evaluation, keep: bool) -> Tensor:
        denoised = student.student_score_output
        weight = self.task.student_score_weight or EDMWeight(sigma_data=self.task.student_score.sigma_data)
        loss = weighted_denoising_loss(denoised, student.x0, student.noisy, weight) / self.task.accumulation
        loss.backward(retain_graph=keep)
        return loss.detach()

    def _ratio_loss(self) -> RatioLoss:
        """The loss of the ratio's next update."""
        updater = self.task.optimizers.get("ratio", self.task.optimizers.get("student_score"))
        return self.task.ratio_loss.at(0 if updater is None else updater.updates)

    def _log_ratios(
        self, samples: _Samples, score: Evaluation | None, penalized: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(l of real samples, l of the student's, the noisy real samples)."""
        if self._share_pass or penalized:  # two passes: only that of the real samples needs the penalty's graph
            real = self._evaluation(samples.real, TRAINING | Needs(ratio_gradient=penalized, curvature=penalized))
            student = score if self._share_pass else self._evaluation(samples.student, TRAINING)
            return real.log_ratio_output, student.log_ratio_output, real.noisy.x_t
        both = self._evaluation(samples.real.join(samples.student), TRAINING)
        return *both.log_ratio_output.tensor_split([len(samples.positives)]), samples.real.noisy.x_t

    def _evaluation(self, samples: NoisySamples, needs: Needs) -> Evaluation:
        return Evaluation(*samples, self.task.nodes, needs)

    def _divergences(self, real: Tensor) -> dict[str, Tensor]:
        """The estimate of each term's own D_h(q_t||p_t), where h has a closed form."""
        terms = self.task.objective.terms.items()
        rows = {name: term.weighting.row for name, term in terms if term.weighting is not None}
        return {f"divergence/{name}": bregman_divergence(row, real) for name, row in rows.items() if row.has_h}
