"""A Gaussian-mixture teacher, all of whose densities, scores and denoised samples are closed forms at any noise level.

Notation: p(x0) = sum_k w_k N(x0; m_k, C_k) with C_k = V_k diag(e_k) V_k^T. At (alpha, sigma) component k becomes
N(alpha m_k, V_k diag(v_k) V_k^T), v_k = alpha^2 e_k + sigma^2; with rotated residuals u_k = V_k^T (x_t - alpha m_k)

    log p_t = logsumexp_k j_k,   j_k = log w_k - (u_k^2 / v_k + log 2 pi v_k).sum / 2,   P(k | x_t) = softmax_k j_k
    s_p = -sum_k P(k | x_t) V_k (u_k / v_k),   mu_p = sum_k P(k | x_t) (m_k + V_k (alpha e_k u_k / v_k)).

Samples are [B, D] (or [B, ...] of D numbers), j is [B, K]. Rewards that tilt a mixture exactly: `exact_tilting`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Interval, MinLen
from torch import Tensor

from ratiograph.core.contracts import Denoiser, Evaluation, RatioEstimator
from ratiograph.core.domains import NonNegative, NonNegativeInt, Positive, Scale
from ratiograph.core.randomness import normal, own_rows
from ratiograph.core.types import Condition, Encoding, Noisy, expand

__all__ = ["ExactRatio", "GaussianMixture", "RingMixture"]


class GaussianMixture(Denoiser):
    """p(x0) = sum_k w_k N(m_k, C_k), exact at every noise level, computed in the dtype of x_t.

    Its one feature map is j [B, K]. ``condition.labels`` restricts each sample to the components of its class; without
    labels, or where a label is negative, p is the whole mixture.

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
        means: Annotated[Sequence[Annotated[Sequence[float], MinLen(1)]], MinLen(1)],
        std: Scale | Sequence[Scale] | None = None,
        covariances: Sequence[Sequence[Sequence[float]]] | None = None,
        weights: Sequence[Positive] | None = None,
        classes: Sequence[NonNegativeInt] | None = None,
    ):
        super().__init__()
        count = len(means)
        if (std is None) == (covariances is None):
            raise ValueError("GaussianMixture takes exactly one of std and covariances")
        for name, values in (("std", std), ("covariances", covariances), ("weights", weights), ("classes", classes)):
            if isinstance(values, Sequence) and len(values) != count:
                raise ValueError(f"GaussianMixture.{name} has {len(values)} entries for {count} means")
        classes = range(count) if classes is None else classes
        if set(classes) != set(range(len(set(classes)))):
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
    def shape(self) -> tuple[int, ...]:
        """(D,)."""
        return tuple(self.means.shape[1:])

    @property
    def class_count(self) -> int:
        """C."""
        return int(self.classes.max()) + 1

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """(K,): the only feature is j [B, K]."""
        return tuple(self.means.shape[:1])

    def class_masses(self) -> Tensor:
        """p(y) [C] float64."""
        masses = self.log_weights.new_zeros(self.class_count)
        return masses.index_add(0, self.classes, self.log_weights.exp())

    def _log_masses(self, condition: Condition) -> Tensor:
        """log w [K]; with labels [B, K], -inf outside the sample's class, and the whole log w where it is negative."""
        if condition.labels is None:
            return self.log_weights
        labels = condition.labels[:, None]
        return torch.where((self.classes == labels) | (labels < 0), self.log_weights, -math.inf)

    def _log_weights(self, condition: Condition) -> Tensor:
        """``_log_masses`` normalised: the log weights within the class."""
        return self._log_masses(condition).log_softmax(-1)

    def log_class_mass(self, condition: Condition) -> Tensor:
        """log p(y) of each sample's class [B], 0 where the label is negative; without labels 0, shaped []."""
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

        def exponential(n: int) -> Tensor:
            return weights.new_empty(n, weights.shape[1]).exponential_(generator=generator)

        # An exponential race: E_k / w_k with E_k ~ Exp(1) is smallest for component k with probability w_k.
        component = (weights / own_rows(exponential, samples, generator)).argmax(1)
        noise = normal((samples, *self.shape), generator, torch.float64)
        scaled = self.variances[component].sqrt() * noise
        return (self.means[component] + torch.einsum("be,bde->bd", scaled, self.basis[component])).to(dtype)


def _eigen(means: Tensor, std: float | Sequence[float] | None, covariances: Sequence | None) -> tuple[Tensor, Tensor]:
    """The eigenvectors V [K, D, D] and eigenvalues e [K, D] of the covariances, checked."""
    count, dimension = means.shape
    if covariances is None:
        spread = torch.as_tensor(std, dtype=torch.float64, device="cpu").expand(count)
        basis = torch.eye(dimension, dtype=torch.float64, device="cpu").expand(count, -1, -1)
        variances = spread.square()[:, None].expand(-1, dimension)
    else:
        matrices = torch.tensor(covariances, dtype=torch.float64, device="cpu")
        if matrices.shape != (count, dimension, dimension) or not torch.equal(matrices, matrices.mT):
            raise ValueError(
                f"GaussianMixture.covariances must be {count} symmetric {dimension} x {dimension} matrices"
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
        modes: Annotated[int, Interval(ge=1, le=10_000)] = 8,
        radius: NonNegative = 1.0,
        std: Scale = 0.1,
        weights: Sequence[Positive] | None = None,
        classes: Sequence[NonNegativeInt] | None = None,
    ):
        angles = [2 * math.pi * k / modes for k in range(modes)]
        means = [(radius * math.cos(a), radius * math.sin(a)) for a in angles]
        super().__init__(means=means, std=std, weights=weights, classes=classes)


class ExactRatio(RatioEstimator):
    """l = log p_t(x_t) / q_t(x_t) of two mixtures; log p_t comes from the features of the teacher, a mixture.

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
