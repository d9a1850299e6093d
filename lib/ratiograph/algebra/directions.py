"""Directions d of the one field: two estimates of s_q - s_p = grad_x log r.

Notation: mu_p and mu_q are the denoisers of teacher and student, s = (alpha mu - x_t) / sigma^2 their scores,
l = log p_t/q_t. All of x_t's shape [B, ...].
"""

from __future__ import annotations

from torch import Tensor

from ratiograph.core.contracts import Evaluation, Needs
from ratiograph.core.types import expand

__all__ = ["Direction", "RatioGradient", "ScoreDifference"]


class Direction:
    """Base class."""

    needs = Needs()
    """Gradients the evaluation must be prepared to give."""
    requires: tuple[str, ...] = ()
    """Nodes of the graph that must exist."""

    def __call__(self, evaluation: Evaluation) -> Tensor:
        """d [B, ...] at ``evaluation.noisy.x_t``, without a graph."""
        raise NotImplementedError


class ScoreDifference(Direction):
    """d = s_q - s_p = alpha (mu_q - mu_p) / sigma^2 from two denoisers (VSD, DMD, f-distill, Di-Bregman)."""

    requires = ("teacher", "student_score")

    def __call__(self, evaluation):
        noisy = evaluation.noisy
        scale = noisy.alpha / noisy.sigma.square()
        difference = evaluation.student_score_denoised - evaluation.teacher_denoised
        return expand(scale, difference) * difference


class RatioGradient(Direction):
    """d = -grad_x l from the ratio estimator alone (Di-Bregman Eq. 37; DiffRatio; GANs)."""

    needs = Needs(ratio_gradient=True)
    requires = ("ratio",)

    def __call__(self, evaluation):
        return -evaluation.log_ratio_gradient
