"""What trains a ratio estimator.

Notation: l = ``log_ratio`` [B] at noisy real samples (class 1) and at noisy student samples (class 0). Minimising the
logistic loss E_real[softplus(-l)] + E_student[softplus(l)], 2 log 2 at chance, makes l = log p_t/q_t.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ratiograph.core.domains import NonNegative, Positive, PositiveInt

__all__ = ["LogisticLoss", "R1Penalized", "RatioLoss", "Scaled"]


class RatioLoss:
    """Base class."""

    needs_gradient = False
    """Whether ``x_t`` must require a gradient before the estimator runs."""

    def at(self, update: int) -> RatioLoss:
        """The loss of the estimator's update number ``update`` = 0, 1, ...: this one, unless it changes from one to
        the next."""
        return self

    def __call__(self, real: Tensor, student: Tensor, x_t: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss [].

        Args:
            real: l at real samples [B], with its graph.
            student: l at student samples [B], with its graph.
            x_t: the noisy samples [N, ...] that ``real`` was computed from, and perhaps others.
            weight: how much each real sample counts [B], r* of a reward without a gradient; 1 by default.
        """
        raise NotImplementedError


class LogisticLoss(RatioLoss):
    """E_real[softplus(-l)] + E_student[softplus(l)]: the loss of Di-Bregman Eq. 5, f-distill and DiffRatio."""

    def __call__(self, real, student, x_t, weight=None):
        positive = F.softplus(-real)
        return (positive if weight is None else weight * positive).mean() + F.softplus(student).mean()


class R1Penalized(RatioLoss):
    """A loss plus weight/2 E_real |grad_x l|^2 (R1, Mescheder et al. 2018), taken at the noisy sample.

    Its gradient takes three passes through the features where the loss takes one. With ``every`` = n the penalty is
    n times as heavy at each n-th update and absent from the others, the same on average (lazy regularisation,
    StyleGAN2, Karras et al. 2020, Appendix B).

    Args:
        loss: the loss held.
        weight: of the penalty, >= 0; f-distill takes 1 on CIFAR-10 and COYO.
        every: n >= 1, counted in updates of the estimator; 1 is the penalty as f-distill has it.
    """

    needs_gradient = True

    def __init__(self, *, loss: RatioLoss, weight: NonNegative = 1.0, every: PositiveInt = 1):
        self.loss, self.weight, self.every = loss, weight, every

    def at(self, update):
        loss = self.loss.at(update)
        return loss if update % self.every else R1Penalized(loss=loss, weight=self.every * self.weight)

    def __call__(self, real, student, x_t, weight=None):
        (gradient,) = torch.autograd.grad(real.sum(), x_t, create_graph=True)
        penalty = gradient.float().square().sum() / len(real)
        return self.loss(real, student, x_t, weight) + self.weight / 2 * penalty


class Scaled(RatioLoss):
    """weight times the loss held, for a ratio whose encoder learns to denoise too: DMD2 takes 0.01.

    A ratio with weights of its own alone does not need it, as Adam's steps do not depend on the scale of a loss.

    Args:
        loss: the loss held.
        weight: its factor beside the denoising loss, > 0.
    """

    def __init__(self, *, loss: RatioLoss, weight: Positive):
        self.loss, self.weight, self.needs_gradient = loss, weight, loss.needs_gradient

    def at(self, update):
        return Scaled(loss=self.loss.at(update), weight=self.weight)

    def __call__(self, real, student, x_t, weight=None):
        return self.weight * self.loss(real, student, x_t, weight)
