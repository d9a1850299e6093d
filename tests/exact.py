"""The 1-D exact world of the proofs: a two-component teacher and a student x0 = m + s z, in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ratiograph.algebra.rewards import ClassReward, LinearReward
from ratiograph.algebra.weightings import (
    BE,
    KL,
    LR,
    LS,
    SBA,
    CustomWeighting,
    ForwardKL,
    Jeffreys,
    JensenShannon,
    ReverseKL,
    SoftenedReverseKL,
    SquaredHellinger,
    Weighting,
)
from ratiograph.core.contracts import Evaluation, Needs, Nodes
from ratiograph.core.types import Condition, Noisy
from ratiograph.networks.teachers.exact_tilting import ExactTilted, MixtureClassifier
from ratiograph.networks.teachers.mixture import ExactRatio, GaussianMixture


class Tabulated(CustomWeighting):
    """A ``CustomWeighting`` with its h integrated numerically."""

    def h(self, r: Tensor) -> Tensor:
        """Taylor's remainder, h(r) = int_0^y (e^y - e^v) omega(-v) dv at y = log r.

        Between knots omega is linear, and 20 Gauss-Legendre nodes are exact to rounding.
        """
        y = r.log()
        edges = y.new_tensor([-200.0, *sorted(-l for l in self.log_ratios), 200.0])  # noqa: E741
        nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(20))
        low, high = y.clamp(max=0)[:, None], y.clamp(min=0)[:, None]
        a, b = edges[:-1].clamp(min=low, max=high), edges[1:].clamp(min=low, max=high)  # [N, segments]
        v = (a + b)[..., None] / 2 + (b - a)[..., None] / 2 * nodes
        omega = self(-v.flatten(), v.new_zeros(())).view_as(v)
        integrand = (y.exp()[:, None, None] - v.exp()) * omega
        return y.sign() * ((integrand * weights).sum(2) * (b - a) / 2).sum(1)


ROWS: dict[str, Weighting] = {
    "KL": KL(),
    "ReverseKL": ReverseKL(),
    "LR": LR(),
    "JensenShannon": JensenShannon(),
    "SoftenedReverseKL": SoftenedReverseKL(),
    "BE": BE(),
    "ForwardKL": ForwardKL(),
    "Jeffreys": Jeffreys(),
    "SquaredHellinger": SquaredHellinger(),
    "LS": LS(),
    **{f"SBA({lam})": SBA(lam=lam) for lam in (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 5.0)},
    "CustomWeighting": Tabulated(log_ratios=[-3.0, -0.5, 0.4, 2.0], weights=[0.2, 1.5, 0.4, 2.5]),
}
"""Every row of the table of weightings."""

TEACHER = GaussianMixture(means=[[-1.0], [0.8]], std=[0.6, 0.5], weights=[0.4, 0.6])
TILTS = {
    "linear": ExactTilted(reward=LinearReward(slope=[0.7])),
    "classes": ExactTilted(reward=ClassReward(classifier=MixtureClassifier(mixture=TEACHER), log_rewards=[0.0, 1.5])),
}
LOCATION, SCALE = 0.3, 0.55


def student_of(location: float, scale: float) -> GaussianMixture:
    """The distribution of x0 = location + scale z."""
    return GaussianMixture(means=[[location]], std=scale)


def evaluate(noisy: Noisy, x0: Tensor, needs: Needs, student: GaussianMixture) -> Evaluation:
    """An evaluation in which all three networks are exact."""
    return Evaluation(noisy, x0, Condition(), Nodes(TEACHER, student, ExactRatio(student=student)), needs)


def finite_difference(divergence: Callable[..., float], *arguments) -> Tensor:
    """Gradient [2] of ``divergence(*arguments, m, s)`` at (LOCATION, SCALE), by the fourth-order central stencil."""
    step = 2e-4

    def slope(dm: float, ds: float) -> float:
        d = [divergence(*arguments, LOCATION + k * dm * step, SCALE + k * ds * step) for k in (-2, -1, 1, 2)]
        return (d[0] - 8 * d[1] + 8 * d[2] - d[3]) / (12 * step)

    return torch.tensor([slope(1, 0), slope(0, 1)], dtype=torch.float64)
