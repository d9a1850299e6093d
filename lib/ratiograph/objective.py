"""Terms and their sum: the field that moves the student's samples.

Notation: v = omega(r) d - omega(r*) grad log r* is one term's vector field at x_t; its gradient with respect to x0 is
coefficient * w(t) * alpha * v, and the parameters' gradient is E[(dx0/dtheta)^T of that], so ``x0.backward(field)``
is exact without a pseudo-loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ratiograph.directions import Direction
from ratiograph.noising import NoisingProcess
from ratiograph.targets import MatchTeacher, Target
from ratiograph.times import TimeSampler, TimeWeight, UnitTimeWeight
from ratiograph.types import Evaluation, Needs, expand
from ratiograph.weightings import Weighting

__all__ = ["AbsorbedTerm", "Objective", "Term"]


class Term(nn.Module):
    """direction x weighting x target x w(t), times a coefficient.

    The GAN loss of DMD2, f-distill and Di-Bregman is the term (RatioGradient, SoftenedReverseKL).

    Args:
        direction: d, an estimate of s_q - s_p.
        weighting: omega.
        target: r*; the teacher itself by default.
        time_weight: w(t); 1 by default.
        coefficient: multiplies the term.
    """

    def __init__(
        self,
        *,
        direction: Direction,
        weighting: Weighting,
        target: Target | None = None,
        time_weight: TimeWeight | None = None,
        coefficient: float = 1.0,
    ):
        super().__init__()
        self.direction, self.weighting = direction, weighting
        self.target = MatchTeacher() if target is None else target
        self.time_weight = UnitTimeWeight() if time_weight is None else time_weight
        self.coefficient = coefficient

    @property
    def needs(self) -> Needs:
        return self.direction.needs | self.target.needs

    @property
    def requires(self) -> set[str]:
        """Nodes of the graph this term asks."""
        weighs = ("ratio",) if self.weighting.needs_ratio else ()
        return {*self.direction.requires, *self.target.requires, *self.time_weight.requires, *weighs}

    def connect(self, noising: NoisingProcess, times: TimeSampler) -> None:
        """Called once by the root with the process and p(t) of the objective."""
        self.weighting.connect(noising, times)

    def velocity(self, evaluation: Evaluation) -> Tensor:
        """v [B, ...] = omega(r) d - omega(r*) grad log r*."""
        t = evaluation.noisy.t
        d = self.direction(evaluation)
        log_ratio = evaluation.log_ratio if self.weighting.needs_ratio else torch.zeros_like(t)
        tilt = self.target.log_target(evaluation)
        if tilt is None:
            return expand(self.weighting(log_ratio, t), d) * d
        log_target, gradient = tilt
        # Weightings are functions of l = -log r, so omega(r*) is taken at -log r*.
        weight, target_weight = self.weighting.pair(log_ratio, -log_target, t)
        return expand(weight, d) * d - expand(target_weight, gradient) * gradient

    def field(self, evaluation: Evaluation) -> Tensor:
        """coefficient w(t) alpha v [B, ...]: the gradient with respect to each x0, before the mean over the batch."""
        v = self.velocity(evaluation)
        scale = self.coefficient * self.time_weight(evaluation) * evaluation.noisy.alpha
        return expand(scale, v) * v


class AbsorbedTerm(Term):
    """The tilt absorbed into the reference, v = omega(r/r*) (d - grad log r*), instead of subtracted as in ``Term``.

    As r/r* = q/p*, this is an untilted term whose teacher is p* = R p / Z. It descends D_h(q_t || p*_t) =
    E_p*[h(q/p*)] = E_p[r* h(r/r*)], where ``Term`` descends E_p[h(r) - h(r*) - h'(r*) (r - r*)]; the two are the same
    for KL only, and both are at rest at q = p* and nowhere else. Z matters here too, except to KL; ``RatioNormalized``
    removes an error of it, because E_q[p*/q] = 1 at every t.

    Args:
        direction: d, an estimate of s_q - s_p.
        weighting: omega, taken at l + log r* = log p*/q.
        target: r*; the teacher itself by default, with which this is ``Term``.
        time_weight: w(t); 1 by default.
        coefficient: multiplies the term.
    """

    def velocity(self, evaluation: Evaluation) -> Tensor:
        """v [B, ...] = omega(r/r*) (d - grad log r*)."""
        tilt = self.target.log_target(evaluation)
        if tilt is None:
            return super().velocity(evaluation)
        log_target, gradient = tilt
        t, difference = evaluation.noisy.t, self.direction(evaluation) - gradient
        log_ratio = evaluation.log_ratio + log_target if self.weighting.needs_ratio else torch.zeros_like(t)
        return expand(self.weighting(log_ratio, t), difference) * difference


class Objective(nn.Module):
    """Named sum of terms: the loss combiner.

    Args:
        terms: terms by name, at least one; the names appear in logs and errors.
    """

    def __init__(self, *, terms: Mapping[str, Term]):
        super().__init__()
        if not terms:
            raise ValueError("Objective.terms is empty: give at least one, e.g. {'distribution': @Term()}")
        self.terms = nn.ModuleDict(terms)

    @property
    def needs(self) -> Needs:
        needs = Needs()
        for term in self.terms.values():
            needs = needs | term.needs
        return needs

    @property
    def requires(self) -> dict[str, list[str]]:
        """For each node of the graph that some term needs, the names of those terms."""
        asked: dict[str, list[str]] = {}
        for name, term in self.terms.items():
            for node in term.requires:
                asked.setdefault(node, []).append(name)
        return asked

    def connect(self, noising: NoisingProcess, times: TimeSampler) -> None:
        """Called once by the root with the process and p(t) of the objective."""
        for term in self.terms.values():
            term.connect(noising, times)

    def fields(self, evaluation: Evaluation) -> dict[str, Tensor]:
        """Each term's field [B, ...] by name."""
        return {name: term.field(evaluation) for name, term in self.terms.items()}
