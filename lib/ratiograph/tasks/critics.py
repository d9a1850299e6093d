"""What a distillation's critics learn: the student score to denoise the student's samples, the ratio to tell them.

Notation: x0 [B, ...] the student's samples, detached; *positives* clean samples of p; everything noised at each
critic's own times. Noise, times and positives are drawn for the whole batch, then cut into micro-batches of equal
length: the losses of the pieces have the whole batch's mean, so their gradients add up to its gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ratiograph.algebra.denoising_weights import DenoisingWeight, EDMWeight, weighted_denoising_loss
from ratiograph.algebra.diagnostics import RatioDiagnostics, bregman_divergence, ratio_metrics
from ratiograph.algebra.noising import NoisingProcess
from ratiograph.algebra.objective import Objective
from ratiograph.algebra.ratio_losses import RatioLoss
from ratiograph.algebra.times import TimeSampler
from ratiograph.core.contracts import Evaluation, Needs, Nodes
from ratiograph.core.randomness import normal
from ratiograph.core.types import Batch, Condition, NoisySamples
from ratiograph.networks.augmentation import Augmentation
from ratiograph.networks.students import OneStep
from ratiograph.tasks.positives import Positives

__all__ = ["Critics"]

TRAINING = Needs(training=True)


@dataclass(frozen=True)
class _Drawn:
    """The noisy samples of one update; None is what no critic that learns asks for."""

    score: NoisySamples | None = None  # the student's, at the student score's times
    positives: Batch | None = None
    real: NoisySamples | None = None  # the positives, noised
    student: NoisySamples | None = None  # the student's that the ratio tells from them, where it does not share a pass

    def split(self, pieces: int) -> list[_Drawn]:
        named = (self.score, self.positives, self.real, self.student)
        cut = ([None] * pieces if each is None else each.split(pieces) for each in named)
        return [_Drawn(*each) for each in zip(*cut, strict=True)]


@dataclass(frozen=True)
class _Learnt:
    """Detached results of one piece: losses [], already parts of the batch's; l [B] of both classes."""

    score_loss: Tensor | None = None
    ratio_loss: Tensor | None = None
    real: Tensor | None = None
    student: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Critics:
    """The losses of ``nodes.student_score`` and ``nodes.ratio``; arguments as of `Distillation`."""

    nodes: Nodes
    student: OneStep
    noising: NoisingProcess
    augmentation: Augmentation
    student_score_times: TimeSampler | None
    student_score_weight: DenoisingWeight | None
    ratio_times: TimeSampler | None
    ratio_loss: RatioLoss
    positives: Positives
    objective: Objective
    diagnostics: RatioDiagnostics | None

    def learn(
        self,
        names: Collection[str],
        x0: Tensor,
        condition: Condition,
        batch: Batch | None,
        generator: torch.Generator,
        pieces: int = 1,
    ) -> dict[str, Tensor]:
        """Adds to the weights' gradients what the critics ``names`` ("student_score", "ratio") learn from ``x0``.

        What ``diagnostics`` take in of it is under way afterwards, until their ``finish``.

        Args:
            names: which critics learn.
            x0: the student's samples [B, ...], detached.
            condition: theirs.
            batch: the step's real samples, if there are any.
            generator: draws noise, times and positives.
            pieces: micro-batches; B is a multiple of it.

        Returns:
            What to log, 0-d tensors by name.
        """
        drawn = self._draw(names, x0, condition, batch, generator)
        learnt = [self._learn_piece(names, piece, pieces) for piece in drawn.split(pieces)]
        metrics = {}
        if "student_score" in names:
            metrics["loss/student_score"] = torch.stack([each.score_loss for each in learnt]).sum()
        if "ratio" in names:
            metrics["loss/ratio"] = torch.stack([each.ratio_loss for each in learnt]).sum()
            real, student = (torch.cat([getattr(each, name) for each in learnt]) for name in ("real", "student"))
            self._diagnose(real, student, drawn)
            metrics |= {**ratio_metrics(real, student), **self._divergences(real)}
        return metrics

    def together(self, names: Sequence[str]) -> list[Sequence[str]]:
        """``names`` in groups, each of one update: gradients of several need not exist at the same time."""
        return [names] if self._on_student_score else [[name] for name in names]

    def learning(self, names: Collection[str]) -> set[str]:
        """The networks that the losses of ``names`` train, and whose weights they ask for."""
        return {*names, "student_score"} if "ratio" in names and self._on_student_score else set(names)

    @property
    def _on_student_score(self) -> bool:
        return self.nodes.ratio is not None and self.nodes.ratio.on_student_score

    @property
    def learn_from_ratio(self) -> list[nn.Parameter]:
        """What the ratio's loss trains."""
        ratio = self.nodes.ratio
        nodes = (ratio, self.nodes.student_score) if ratio.on_student_score else (ratio,)
        return [parameter for node in nodes for parameter in node.parameters() if parameter.requires_grad]

    @property
    def shares_pass(self) -> bool:
        """Whether the ratio reads the very pass in which the student score learns."""
        return self._on_student_score and self.ratio_times is None

    def _draw(self, names, x0, condition, batch, generator) -> _Drawn:
        score = positives = real = student = None
        if "student_score" in names or ("ratio" in names and self.shares_pass):
            score = self._noised(x0, condition, self.student_score_times, generator)
        if "ratio" in names:
            positives = self.positives.draw(batch, len(x0), self.nodes.teacher, self.student, generator)
            pair = (positives.images.to(x0.dtype), positives.condition), (x0, condition)
            if self.shares_pass:
                real = self._noised(*pair[0], self.student_score_times, generator)
            else:
                real, student = self._pair(*pair, generator)
        return _Drawn(score, positives, real, student)

    def _noised(self, x0: Tensor, condition: Condition, times: TimeSampler, generator) -> NoisySamples:
        """``x0`` augmented and noised at ``times``."""
        x0, condition = self.augmentation.apply(x0, condition, generator)
        t = times(self.noising, x0.shape[0], generator)
        return NoisySamples(self.noising.add_noise(x0, t, normal(x0.shape, generator, x0.dtype)), x0, condition)

    def _pair(self, real, student, generator) -> list[NoisySamples]:
        """Real and student samples, noised at the same times: the classes are balanced at every noise level."""
        pairs = [self.augmentation.apply(*pair, generator) for pair in (real, student)]
        t = self.ratio_times(self.noising, len(pairs[0][0]), generator)
        return [
            NoisySamples(self.noising.add_noise(x, t, normal(x.shape, generator, x.dtype)), x, told)
            for x, told in pairs
        ]

    def _learn_piece(self, names: Collection[str], drawn: _Drawn, pieces: int) -> _Learnt:
        """Both losses of one micro-batch, backward; no activations are left."""
        shared = None if drawn.score is None else self._evaluation(drawn.score, TRAINING)
        score_loss = None
        if "student_score" in names:
            # A ratio that shares this pass goes back through its encoder once more.
            score_loss = self._learn_student_score(shared, pieces, keep="ratio" in names and self.shares_pass)
        if "ratio" not in names:
            return _Learnt(score_loss)
        weight = self.objective.positive_weights(drawn.positives)
        real, student, x_t = self._logits(drawn, shared)
        loss = self.ratio_loss(real, student, x_t, weight) / pieces
        # Not to x_t as well, by which R1 differentiates: the second derivative there would be work for nothing.
        loss.backward(inputs=self.learn_from_ratio if self.ratio_loss.needs_gradient else None)
        return _Learnt(score_loss, loss.detach(), real.detach(), student.detach())

    def _learn_student_score(self, student: Evaluation, pieces: int, keep: bool) -> Tensor:
        denoised = student.student_score_output
        weight = self.student_score_weight or EDMWeight(sigma_data=self.nodes.student_score.sigma_data)
        loss = weighted_denoising_loss(denoised, student.x0, student.noisy, weight) / pieces
        loss.backward(retain_graph=keep)
        return loss.detach()

    def _logits(self, drawn: _Drawn, shared: Evaluation | None) -> tuple[Tensor, Tensor, Tensor]:
        """(l of real samples, l of the student's, the noisy real samples)."""
        if self.shares_pass:  # the student samples' features are those of the student score's own update
            real = self._evaluation(drawn.real, self._ratio_needs)
            return real.log_ratio_output, shared.log_ratio_output, real.noisy.x_t
        if self.ratio_loss.needs_gradient:  # by real samples alone, so that those of the student need no such graph
            real, student = (
                self._evaluation(drawn.real, self._ratio_needs),
                self._evaluation(drawn.student, TRAINING),
            )
            return real.log_ratio_output, student.log_ratio_output, real.noisy.x_t
        both = self._evaluation(drawn.real.join(drawn.student), TRAINING)
        return *both.log_ratio_output.tensor_split([len(drawn.positives)]), drawn.real.noisy.x_t

    def _evaluation(self, samples: NoisySamples, needs: Needs) -> Evaluation:
        return Evaluation(*samples, self.nodes, needs)

    @property
    def _ratio_needs(self) -> Needs:
        again = self.ratio_loss.needs_gradient
        return TRAINING | Needs(ratio_gradient=again, curvature=again)

    def _diagnose(self, real: Tensor, student: Tensor, drawn: _Drawn) -> None:
        times = self.ratio_times or self.student_score_times
        told = drawn.score if self.shares_pass else drawn.student
        self.diagnostics.begin(real, student, *(times.quantile(self.noising, of.noisy.t) for of in (drawn.real, told)))

    def _divergences(self, real: Tensor) -> dict[str, Tensor]:
        """The estimate of each term's own D_h(q_t||p_t), where h has a closed form."""
        terms = self.objective.terms.items()
        rows = {name: term.weighting.row for name, term in terms if term.weighting is not None}
        return {f"divergence/{name}": bregman_divergence(row, real) for name, row in rows.items() if row.has_h}
