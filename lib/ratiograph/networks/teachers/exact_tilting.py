"""Rewards that tilt a Gaussian mixture exactly: p*(x0) = R(x0) p(x0) / Z is a Gaussian mixture again.

Hence r* = R_t / Z = p*_t / p_t is exact at every noise level. Notation as in `mixture`: p has the weights w_k, means
m_k and covariances C_k.
"""

from __future__ import annotations

import copy
import math
from functools import singledispatch

import torch
from torch import Tensor, nn

from ratiograph.algebra.rewards import (
    BlackBoxReward,
    ClassReward,
    LinearReward,
    QuadraticReward,
    Reward,
    ScaledReward,
    SumReward,
)
from ratiograph.algebra.targets import Target
from ratiograph.core.contracts import Evaluation
from ratiograph.core.types import Condition, Noisy
from ratiograph.networks.teachers.mixture import GaussianMixture

__all__ = ["ExactTilted", "MixtureClassifier"]


class MixtureClassifier(nn.Module):
    """The exact classifier of a mixture's clean samples: logits log p(y, x0) [B, C].

    ``ClassReward`` with it is the smooth reward R(x0) = sum_y P(y | x0) e^(b_y), whose tilt is exact.

    Args:
        mixture: the teacher, or an equal one.
    """

    def __init__(self, *, mixture: GaussianMixture):
        super().__init__()
        self.mixture = mixture

    def load(self) -> None:
        """Nothing to load: a mixture has no weights."""

    def forward(self, x0: Tensor) -> Tensor:
        zero = x0.new_zeros(len(x0))
        log_joint = self.mixture.log_joint(Noisy(x0, zero, zero + 1, zero), Condition())
        labels = torch.arange(int(self.mixture.classes.max()) + 1, device=x0.device)
        return torch.where(self.mixture.classes == labels[:, None], log_joint[:, None], -math.inf).logsumexp(2)


@singledispatch
def tilt(reward: Reward, mixture: GaussianMixture) -> tuple[GaussianMixture, Tensor]:
    """(p* = R p / Z as a mixture, log Z [] float64).

    Raises:
        ValueError: for a reward under which p* is not a mixture.
    """
    raise ValueError(
        f"a mixture tilted by {type(reward).__name__} has no closed form: use LinearReward or QuadraticReward, also "
        "scaled or summed, or ClassReward with a MixtureClassifier, or the target RewardTilted instead of ExactTilted"
    )


def _with(
    mixture: GaussianMixture, log_weights: Tensor, means: Tensor, covariances: Tensor | None = None
) -> tuple[GaussianMixture, Tensor]:
    """(``mixture`` with other unnormalised log weights, means and perhaps covariances; log of the weights' sum)."""
    other = copy.deepcopy(mixture)
    other.log_weights, other.means = log_weights.log_softmax(0), means
    if covariances is not None:
        other.variances, other.basis = torch.linalg.eigh(covariances)
    return other, log_weights.logsumexp(0)


@tilt.register
def _tilt_linear(reward: LinearReward, mixture: GaussianMixture) -> tuple[GaussianMixture, Tensor]:
    """w_k e^(<b, m_k> + <b, C_k b> / 2), means m_k + C_k b: completing the square in each component."""
    slope = mixture.means.new_tensor(reward.slope)
    shift = torch.einsum("kde,ke,kfe,f->kd", mixture.basis, mixture.variances, mixture.basis, slope)
    return _with(mixture, mixture.log_weights + mixture.means @ slope + shift @ slope / 2, mixture.means + shift)


@tilt.register(QuadraticReward)
@tilt.register(ScaledReward)
@tilt.register(SumReward)
def _tilt_quadratic(reward: Reward, mixture: GaussianMixture) -> tuple[GaussianMixture, Tensor]:
    """Component k becomes N(m_k + C' a, C'), C' = (C_k^-1 - A)^-1 and a = A m_k + b the slope of log R at m_k.

    Its weight is w_k R(m_k) e^(a^T C' a / 2) / sqrt(det(I - C_k A)): completing the square round m_k.
    """
    curvature, slope = quadratic_form(reward, mixture)
    precision = (mixture.basis / mixture.variances[:, None]) @ mixture.basis.mT - curvature
    factor, failed = torch.linalg.cholesky_ex(precision)
    if failed.any():
        raise ValueError(
            f"R p is not integrable: the curvature of this {type(reward).__name__} exceeds the inverse covariance of "
            f"component {int(failed.ne(0).int().argmax())}; lower it (eigenvalues below 1 / the largest variance do)"
        )
    steepness = mixture.means @ curvature + slope
    shift = torch.cholesky_solve(steepness[..., None], factor)[..., 0]
    growth = factor.diagonal(dim1=1, dim2=2).log().sum(1) + mixture.variances.log().sum(1) / 2
    at_means = ((steepness + slope) * mixture.means).sum(1) / 2
    log_weights = mixture.log_weights + at_means + (steepness * shift).sum(1) / 2 - growth
    return _with(mixture, log_weights, mixture.means + shift, torch.cholesky_inverse(factor))


@singledispatch
def quadratic_form(reward: Reward, mixture: GaussianMixture) -> tuple[Tensor, Tensor]:
    """A [D, D] and b [D], float64, of log R(x0) = x0^T A x0 / 2 + <b, x0>, where D is that of ``mixture``.

    Raises:
        ValueError: for a reward that is not of this form.
    """
    raise ValueError(
        f"a mixture tilted by a scaled or summed {type(reward).__name__} has no closed form: scale and sum only "
        "LinearReward and QuadraticReward, or use the target RewardTilted instead of ExactTilted"
    )


@quadratic_form.register
def _(reward: LinearReward, mixture: GaussianMixture) -> tuple[Tensor, Tensor]:
    slope = reward.slope_vector.to(mixture.means)
    return slope.new_zeros(2 * mixture.shape), slope


@quadratic_form.register
def _(reward: QuadraticReward, mixture: GaussianMixture) -> tuple[Tensor, Tensor]:
    curvature, slope = reward.curvature_matrix.to(mixture.means), reward.slope_vector.to(mixture.means)
    if curvature.ndim == 0:
        curvature = curvature * torch.eye(*mixture.shape).to(mixture.means)
    return curvature, slope.expand(mixture.shape)


@quadratic_form.register
def _(reward: ScaledReward, mixture: GaussianMixture) -> tuple[Tensor, Tensor]:
    curvature, slope = quadratic_form(reward.reward, mixture)
    return curvature / reward.beta, slope / reward.beta


@quadratic_form.register
def _(reward: SumReward, mixture: GaussianMixture) -> tuple[Tensor, Tensor]:
    forms = [quadratic_form(part, mixture) for part in reward.rewards]
    curvature, slope = (sum(w * form[k] for w, form in zip(reward.weights, forms, strict=True)) for k in (0, 1))
    return curvature, slope


@tilt.register
def _tilt_black_box(reward: BlackBoxReward, mixture: GaussianMixture) -> tuple[GaussianMixture, Tensor]:
    """As the wrapped reward does: exact tilting needs no gradient."""
    return tilt(reward.reward, mixture)


@tilt.register
def _tilt_classes(reward: ClassReward, mixture: GaussianMixture) -> tuple[GaussianMixture, Tensor]:
    """w_k e^(b_y(k)): R(x0) p(x0) = sum_y e^(b_y) p(y, x0)."""
    if not isinstance(reward.classifier, MixtureClassifier):
        raise ValueError("ExactTilted with a ClassReward needs its classifier to be the exact one, MixtureClassifier")
    rewards = mixture.means.new_tensor(reward.log_rewards)
    return _with(mixture, mixture.log_weights + rewards[mixture.classes], mixture.means)


class ExactTilted(Target):
    """r* = R_t / Z = p*_t / p_t in closed form, for a ``GaussianMixture`` teacher: what ``RewardTilted`` approximates.

    Under labels p*, p and Z are those of the class.

    Args:
        reward: ``LinearReward`` and ``QuadraticReward``, also scaled and summed, or ``ClassReward`` with a
            ``MixtureClassifier`` of the teacher.
    """

    requires = ("teacher",)

    def __init__(self, *, reward: Reward):
        super().__init__()
        self.reward = reward

    def log_expected_reward(self, evaluation: Evaluation) -> Tensor:
        """log R_t(x_t) = log E_p[R(x0) | x_t] [B], under the class where there is one."""
        teacher, condition = evaluation.nodes.teacher, evaluation.condition
        tilted, log_normalizer = tilt(self.reward, teacher)
        # r* is of the conditional densities: the Z of a class is Z p*(y) / p(y).
        class_shift = tilted.log_class_mass(condition) - teacher.log_class_mass(condition)
        return self.log_target(evaluation)[0] + log_normalizer + class_shift

    @torch.no_grad()
    def log_target(self, evaluation):
        teacher, noisy, condition = evaluation.nodes.teacher, evaluation.noisy, evaluation.condition
        tilted, _ = tilt(self.reward, teacher)
        log_target = tilted.log_density(noisy, condition) - teacher.log_density(noisy, condition)
        return log_target, tilted.score(noisy, condition) - teacher.score(noisy, condition)
