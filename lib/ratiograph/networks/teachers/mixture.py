"""The exact world: a Gaussian-mixture teacher whose every quantity is a closed form under any noising process.

Notation: p(x0) = sum_k w_k N(x0; m_k, C_k) with C_k = V_k diag(e_k) V_k^T. At (alpha, sigma) component k becomes
N(alpha m_k, V_k diag(v_k) V_k^T), v_k = alpha^2 e_k + sigma^2; with rotated residuals u_k = V_k^T (x_t - alpha m_k)

    log p_t = logsumexp_k j_k,   j_k = log w_k - (u_k^2 / v_k + log 2 pi v_k).sum / 2,   P(k | x_t) = softmax_k j_k
    s_p = -sum_k P(k | x_t) V_k (u_k / v_k),   mu_p = sum_k P(k | x_t) (m_k + V_k (alpha e_k u_k / v_k)).

Samples are [B, D] (or [B, ...] of D numbers), j is [B, K]. Tilting by the rewards here gives another mixture,
p*(x0) = R(x0) p(x0) / Z, and therefore r* = R_t / Z = p*_t / p_t exactly, at every noise level.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
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
from ratiograph.core.contracts import Denoiser, Evaluation, RatioEstimator
from ratiograph.core.randomness import normal, own_rows
from ratiograph.core.types import Condition, Encoding, Noisy, expand

__all__ = ["ExactRatio", "ExactTilted", "GaussianMixture", "MixtureClassifier", "RingMixture"]


class GaussianMixture(Denoiser):
    """p(x0) = sum_k w_k N(m_k, C_k), exact at every noise level, computed in the dtype of x_t.

    Its features are the component log densities j [B, K]. ``condition.labels`` restricts each sample to the components
    of its class; without labels, or where a label is negative, it is the whole mixture.

    Args:
        means: m_k, K lists of D numbers.
        std: standard deviation of isotropic components, one for all or one each, > 0. Give this or ``covariances``.
        covariances: C_k, K symmetric positive definite D x D matrices as lists of rows.
        weights: w_k > 0, one for each component; normalised here. Equal by default.
        classes: class of each component, using every one of 0 .. C - 1. Each component its own class by default.

    Raises:
        ValueError: for lists that do not fit together, or covariances that are not positive definite.
    """

    can_sample = True

    def __init__(
        self,
        *,
        means: Sequence[Sequence[float]],
        std: float | Sequence[float] | None = None,
        covariances: Sequence[Sequence[Sequence[float]]] | None = None,
        weights: Sequence[float] | None = None,
        classes: Sequence[int] | None = None,
    ):
        super().__init__()
        count = len(means)
        if (std is None) == (covariances is None):
            raise ValueError("GaussianMixture takes exactly one of std and covariances")
        for name, values in (("std", std), ("covariances", covariances), ("weights", weights), ("classes", classes)):
            if isinstance(values, Sequence) and len(values) != count:
                raise ValueError(f"GaussianMixture.{name} has {len(values)} entries for {count} means")
        if weights is not None and min(weights) <= 0:
            raise ValueError(f"GaussianMixture.weights must be positive: {list(weights)}")
        classes = range(count) if classes is None else classes
        if set(classes) != set(range(max(classes) + 1)):
            raise ValueError(f"GaussianMixture.classes must use every class from 0 to the largest: {list(classes)}")
        # Constants, not weights: float64 on the CPU even when the graph is built on the meta device.
        centre = torch.tensor(means, dtype=torch.float64, device="cpu")
        log_weights = torch.tensor(weights or [1.0] * count, dtype=torch.float64, device="cpu").log().log_softmax(0)
        basis, variances = _eigen(centre, std, covariances)
        self.register_buffer("means", centre)
        self.register_buffer("log_weights", log_weights)
        self.register_buffer("basis", basis)
        self.register_buffer("variances", variances)
        self.register_buffer("classes", torch.tensor(list(classes), device="cpu"))

    @property
    def dimension(self) -> int:
        """D."""
        return self.means.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(D,)."""
        return (self.dimension,)

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """(K,): the only feature is j [B, K]."""
        return (self.means.shape[0],)

    def class_masses(self) -> Tensor:
        """p(y) [C] float64."""
        masses = self.log_weights.new_zeros(int(self.classes.max()) + 1)
        return masses.index_add(0, self.classes, self.log_weights.exp())

    def _log_masses(self, condition: Condition) -> Tensor:
        """log w [K], or [B, K] with -inf outside the class asked for; all of them where the label is negative."""
        if condition.labels is None:
            return self.log_weights
        labels = condition.labels[:, None]
        return torch.where((self.classes == labels) | (labels < 0), self.log_weights, -math.inf)

    def _log_weights(self, condition: Condition) -> Tensor:
        """The same, normalised: of the class alone."""
        return self._log_masses(condition).log_softmax(-1)

    def log_class_mass(self, condition: Condition) -> Tensor:
        """log p(y) of the class asked for [B], or [] without labels; 0 where none is asked for."""
        return self._log_masses(condition).logsumexp(-1)

    def _residuals(self, noisy: Noisy) -> tuple[Tensor, Tensor]:
        """(u, v), [B, K, D] each."""
        x, dtype = noisy.x_t.flatten(1), noisy.x_t.dtype
        alpha, sigma = noisy.alpha[:, None, None], noisy.sigma[:, None, None]
        u = torch.einsum("bkd,kde->bke", x[:, None] - alpha * self.means.to(dtype), self.basis.to(dtype))
        return u, alpha.square() * self.variances.to(dtype) + sigma.square()

    def _log_joint(self, u: Tensor, v: Tensor, condition: Condition) -> Tensor:
        log_normal = -(u.square() / v + (2 * math.pi * v).log()).sum(2) / 2
        return log_normal + self._log_weights(condition).to(u.dtype)

    def log_joint(self, noisy: Noisy, condition: Condition) -> Tensor:
        """j [B, K] = log p_t(k, x_t)."""
        return self._log_joint(*self._residuals(noisy), condition)

    def log_density(self, noisy: Noisy, condition: Condition) -> Tensor:
        """log p_t(x_t) [B]."""
        return self.log_joint(noisy, condition).logsumexp(1)

    def responsibilities(self, noisy: Noisy, condition: Condition) -> Tensor:
        """P(k | x_t) [B, K]."""
        return self.log_joint(noisy, condition).softmax(1)

    def score(self, noisy: Noisy, condition: Condition) -> Tensor:
        """s_p(x_t) = grad log p_t, shaped like x_t."""
        u, v = self._residuals(noisy)
        share = self._log_joint(u, v, condition).softmax(1)
        score = -torch.einsum("bk,bke,kde->bd", share, u / v, self.basis.to(u.dtype))
        return score.view_as(noisy.x_t)

    def encode(self, noisy: Noisy, condition: Condition) -> Encoding:
        u, v = self._residuals(noisy)
        variances, basis, means = (b.to(u.dtype) for b in (self.variances, self.basis, self.means))

        def restore(share: Tensor) -> Tensor:  # P(k | x_t) [B, K] => mu [B, ...]
            gain = expand(noisy.alpha, u) * variances / v
            moved = torch.einsum("bk,bke,kde->bd", share, gain * u, basis)
            return (share @ means + moved).view_as(noisy.x_t)

        return Encoding(features=(self._log_joint(u, v, condition),), restore=restore)

    def decode(self, encoding: Encoding) -> Tensor:
        return encoding.restore(encoding.features[0].softmax(1))

    def sample(
        self,
        samples: int,
        generator: torch.Generator,
        condition: Condition | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Clean samples x0 [samples, D]; with ``condition.labels`` [samples], each from its own class."""
        weights = self._log_weights(condition or Condition()).exp().expand(samples, -1)

        def waiting(n: int) -> Tensor:
            return weights.new_empty(n, weights.shape[1]).exponential_(generator=generator)

        # The component whose exponential waiting time, at the rate of its weight, is over first.
        component = (weights / own_rows(waiting, samples, generator)).argmax(1)
        noise = normal((samples, self.dimension), generator, torch.float64)
        scaled = self.variances[component].sqrt() * noise
        return (self.means[component] + torch.einsum("be,bde->bd", scaled, self.basis[component])).to(dtype)

    def _changed(
        self, log_weights: Tensor, means: Tensor, covariances: Tensor | None = None
    ) -> tuple[GaussianMixture, Tensor]:
        """(this mixture with other unnormalised log weights, means and perhaps covariances; the weights' log sum)."""
        other = copy.deepcopy(self)
        other.log_weights, other.means = log_weights.log_softmax(0), means
        if covariances is not None:
            other.variances, other.basis = torch.linalg.eigh(covariances)
        return other, log_weights.logsumexp(0)


def _eigen(means: Tensor, std: float | Sequence[float] | None, covariances: Sequence | None) -> tuple[Tensor, Tensor]:
    """(V [K, D, D], e [K, D])."""
    count, dimension = means.shape
    if covariances is None:
        spread = torch.as_tensor(std, dtype=torch.float64, device="cpu").expand(count)
        basis = torch.eye(dimension, dtype=torch.float64, device="cpu").expand(count, -1, -1)
        variances = spread.square()[:, None].expand(-1, dimension)
    else:
        matrices = torch.tensor(covariances, dtype=torch.float64, device="cpu")
        if matrices.shape != (count, dimension, dimension) or not torch.equal(matrices, matrices.mT):
            raise ValueError(
                f"GaussianMixture.covariances: {count} symmetric {dimension} x {dimension} matrices, please"
            )
        variances, basis = torch.linalg.eigh(matrices)
    if (variances <= 0).any() or (covariances is None and (spread <= 0).any()):
        raise ValueError("GaussianMixture.std must be positive, and covariances positive definite")
    return basis.contiguous(), variances.contiguous()


class RingMixture(GaussianMixture):
    """Equidistant isotropic modes on a circle in the plane; mode k sits at the angle 2 pi k / modes.

    Args:
        modes: number of modes.
        radius: of the circle.
        std: standard deviation of each mode.
        weights: weight of each mode; equal by default.
        classes: class of each mode; each its own by default.
    """

    def __init__(
        self,
        *,
        modes: int = 8,
        radius: float = 1.0,
        std: float = 0.1,
        weights: Sequence[float] | None = None,
        classes: Sequence[int] | None = None,
    ):
        angles = [2 * math.pi * k / modes for k in range(modes)]
        means = [(radius * math.cos(a), radius * math.sin(a)) for a in angles]
        super().__init__(means=means, std=std, weights=weights, classes=classes)


class MixtureClassifier(nn.Module):
    """The exact classifier of a mixture's clean samples: logits log p(y, x0) [B, C].

    ``ClassReward`` with it is the smooth reward R(x0) = sum_y P(y | x0) e^(b_y), whose tilt is exact.

    Args:
        mixture: equal to the teacher.
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
        inside = self.mixture.classes == labels[:, None]
        return torch.where(inside, log_joint[:, None], -math.inf).logsumexp(2)


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


@tilt.register
def _tilt_linear(reward: LinearReward, mixture: GaussianMixture) -> tuple[GaussianMixture, Tensor]:
    """w_k e^(<b, m_k> + <b, C_k b> / 2), means m_k + C_k b: completing the square in each component."""
    slope = mixture.means.new_tensor(reward.slope)
    shift = torch.einsum("kde,ke,kfe,f->kd", mixture.basis, mixture.variances, mixture.basis, slope)
    return mixture._changed(mixture.log_weights + mixture.means @ slope + shift @ slope / 2, mixture.means + shift)


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
    return mixture._changed(log_weights, mixture.means + shift, torch.cholesky_inverse(factor))


@singledispatch
def quadratic_form(reward: Reward, mixture: GaussianMixture) -> tuple[Tensor, Tensor]:
    """(A [D, D], b [D]) float64 of log R(x0) = x0^T A x0 / 2 + <b, x0>, in the dimension of ``mixture``.

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
    return slope.new_zeros(mixture.dimension, mixture.dimension), slope


@quadratic_form.register
def _(reward: QuadraticReward, mixture: GaussianMixture) -> tuple[Tensor, Tensor]:
    curvature, slope = reward.curvature_matrix.to(mixture.means), reward.slope_vector.to(mixture.means)
    if curvature.ndim == 0:
        curvature = curvature * torch.eye(mixture.dimension).to(mixture.means)
    return curvature, slope.expand(mixture.dimension)


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
    """As by the reward held: exact tilting asks for no gradient."""
    return tilt(reward.reward, mixture)


@tilt.register
def _tilt_classes(reward: ClassReward, mixture: GaussianMixture) -> tuple[GaussianMixture, Tensor]:
    """w_k e^(b_y(k)): R(x0) p(x0) = sum_y e^(b_y) p(y, x0)."""
    if not isinstance(reward.classifier, MixtureClassifier):
        raise ValueError("ExactTilted with a ClassReward needs its classifier to be the exact one, MixtureClassifier")
    rewards = mixture.means.new_tensor(reward.log_rewards)
    return mixture._changed(mixture.log_weights + rewards[mixture.classes], mixture.means)


class ExactTilted(Target):
    """r* = R_t / Z = p*_t / p_t in closed form, for a ``GaussianMixture`` teacher: what ``RewardTilted`` approximates.

    Under labels p* and p are those of the class, and so is the Z in it.

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
        log_ratio = tilted.log_class_mass(condition) - teacher.log_class_mass(condition)
        return self.log_target(evaluation)[0] + log_normalizer + log_ratio

    @torch.no_grad()
    def log_target(self, evaluation):
        teacher, noisy, condition = evaluation.nodes.teacher, evaluation.noisy, evaluation.condition
        tilted, _ = tilt(self.reward, teacher)
        log_target = tilted.log_density(noisy, condition) - teacher.log_density(noisy, condition)
        return log_target, tilted.score(noisy, condition) - teacher.score(noisy, condition)


class ExactRatio(RatioEstimator):
    """l = log p_t(x_t) / q_t(x_t) of two mixtures; log p_t comes from the teacher's own features.

    Args:
        student: q, the exact distribution of the student.
    """

    on_teacher = True
    learns = False

    def __init__(self, *, student: GaussianMixture):
        super().__init__()
        self.student = student

    def log_ratio(self, evaluation: Evaluation) -> Tensor:
        (log_joint,) = evaluation.teacher_encoding.features
        return log_joint.logsumexp(1) - self.student.log_density(evaluation.noisy, evaluation.condition)
