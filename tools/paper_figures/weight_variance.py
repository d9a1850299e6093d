"""Normalised variance Var_q[omega] / E_q[omega]^2 for two unit Gaussians at distance m (f-distill §4, Fig. 5a).

Notation: p = N(m, 1), q = N(0, 1), y ~ q. Then l = log p/q = m y - m^2/2, so that l ~ N(-m^2/2, m^2), and
E_q[e^(a l)] = e^(a (a - 1) m^2 / 2). NV is short for the normalised variance. Three ways lead to it: ``closed_form``,
``quadrature`` of any weighting, and two Monte Carlo estimates that draw y and evaluate the library's own weightings.

Closed forms. An exponential weight has

    omega = e^(a l):      NV = e^(a (2a - 1) m^2) / e^(a (a - 1) m^2) - 1 = e^(a^2 m^2) - 1,

the same for a and -a. Jeffreys' 1 + e^l has E = 2 and the variance of e^l, so NV = (e^(m^2) - 1) / 4. For the sigmoids
let A = E_q[sigmoid(l)] = int p q / (p + q). Swapping p and q maps int p^2 q / (p + q)^2 to int p q^2 / (p + q)^2; both
are half of their sum A, and the first is E_q[sigmoid(l)^2]. Hence

    omega = sigmoid(l):   E = A,      Var = A/2 - A^2,   NV = 1/(2A) - 1
    omega = sigmoid(-l):  E = 1 - A,  the same Var,      NV = A (1 - 2A) / (2 (1 - A)^2)

and only A is not elementary: A = e^(-m^2/8) E[sech(m y / 2)] / 2 = e^(-m^2/8) sum_k (-1)^k erfcx((2k + 1) m / sqrt 8).
"""

from __future__ import annotations

import math
from functools import singledispatch

import torch
from torch import Tensor

from ratiograph.algebra.weightings import BE, KL, LR, LS, SBA, Jeffreys, SoftenedReverseKL, SquaredHellinger, Weighting

__all__ = ["closed_form", "importance_sampling", "monte_carlo", "overlap", "quadrature", "standard_error"]

_TERMS = 24  # of the accelerated series: its error is below 2 / 5.8^24 = 1e-18
_REACH, _STEP = 200.0, 1 / 32  # of the quadrature over y: the sigmoids' pole at i pi/m costs e^(-64 pi^2 / m)


def overlap(m: Tensor) -> Tensor:
    """A(m) = int p q / (p + q) = E_q[sigmoid(l)]: 1/2 at m = 0, sqrt(pi/2) e^(-m^2/8) / m for large m.

    Expanding sech in e^(-m |y|) gives the alternating series of ``erfcx`` above. Its terms are the moments of a
    positive measure on [0, 1] (erfcx is a Laplace transform), so that Cohen, Rodriguez Villegas and Zagier's
    acceleration (2000, Algorithm 1) is exact to (3 + sqrt 8)^-n after n terms, whatever m.

    Args:
        m: distances >= 0, any shape.

    Returns:
        A, float64, exact to rounding.
    """
    m = torch.as_tensor(m, dtype=torch.float64)
    scale = ((3 + math.sqrt(8)) ** _TERMS + (3 - math.sqrt(8)) ** _TERMS) / 2
    b, c, total = -1.0, -scale, torch.zeros_like(m)
    for k in range(_TERMS):
        c = b - c
        total = total + c * torch.special.erfcx((2 * k + 1) * m / math.sqrt(8))
        b *= (k + _TERMS) * (k - _TERMS) / ((k + 0.5) * (k + 1))
    return torch.exp(-m.square() / 8) * total / scale


@singledispatch
def closed_form(weighting: Weighting, m: Tensor) -> Tensor:
    """Exact Var_q[omega] / E_q[omega]^2 of a row of the table, in the shape of ``m``, float64.

    Args:
        weighting: a row without wrappers.
        m: distances >= 0.

    Raises:
        ValueError: for a weighting without one; ``quadrature`` takes any.
    """
    raise ValueError(f"{type(weighting).__name__} has no closed form of its variance: use weight_variance.quadrature")


def _exponential(exponent: float, m: Tensor) -> Tensor:
    return torch.expm1((exponent * torch.as_tensor(m, dtype=torch.float64)).square())


@closed_form.register
def _(weighting: KL, m: Tensor) -> Tensor:
    return _exponential(0.0, m)


@closed_form.register
def _(weighting: BE, m: Tensor) -> Tensor:
    return _exponential(1.0, m)


@closed_form.register
def _(weighting: LS, m: Tensor) -> Tensor:
    return _exponential(-1.0, m)


@closed_form.register
def _(weighting: SquaredHellinger, m: Tensor) -> Tensor:
    return _exponential(0.5, m)


@closed_form.register
def _(weighting: SBA, m: Tensor) -> Tensor:
    return _exponential(-weighting.lam, m)


@closed_form.register
def _(weighting: Jeffreys, m: Tensor) -> Tensor:
    return _exponential(1.0, m) / 4


@closed_form.register
def _(weighting: LR, m: Tensor) -> Tensor:
    return 1 / (2 * overlap(m)) - 1


@closed_form.register
def _(weighting: SoftenedReverseKL, m: Tensor) -> Tensor:
    a = overlap(m)
    return a * (1 - 2 * a) / (2 * (1 - a).square())


def _log_weight(weighting: Weighting, y: Tensor, m: float) -> Tensor:
    return weighting.log_weight(m * y - m**2 / 2, torch.zeros_like(y))


def _log_deviation(d: Tensor) -> Tensor:
    """log |e^d - 1|, without overflow."""
    return d.clamp(min=0) + torch.log(-torch.expm1(-d.abs()))


def _log_grid(weighting: Weighting, m: float) -> tuple[Tensor, Tensor]:
    """(log quadrature weights, log omega) on a grid of y."""
    y = torch.arange(-_REACH, _REACH + _STEP, _STEP, dtype=torch.float64)
    return -y.square() / 2 + math.log(_STEP) - math.log(2 * math.pi) / 2, _log_weight(weighting, y, m)


def _check_inside(log_integrand: Tensor, weighting: Weighting, m: float) -> None:
    if max(log_integrand[0], log_integrand[-1]) > log_integrand.max() - 40:
        raise ValueError(f"omega of {type(weighting).__name__} at m = {m:g} is too heavy-tailed for the quadrature")


def quadrature(weighting: Weighting, m: float) -> float:
    """Var_q[omega] / E_q[omega]^2 by the trapezoidal rule over y, which converges exponentially for smooth omega.

    The variance is summed as E_q[(omega / E_q[omega] - 1)^2], so that nothing cancels at small m.

    Args:
        weighting: any function of l alone; kinks (``Clamped``, ``CustomWeighting``) leave an error of order 1e-4.
        m: distance >= 0.

    Raises:
        ValueError: if omega^2 q has mass beyond |y| = 200.
    """
    log_q, log_weight = _log_grid(weighting, m)
    _check_inside(log_q + 2 * log_weight, weighting, m)
    deviation = _log_deviation(log_weight - torch.logsumexp(log_q + log_weight, 0))
    return float(torch.logsumexp(log_q + 2 * deviation, 0).exp())


def standard_error(weighting: Weighting, m: float, samples: int) -> float:
    """Standard error of ``monte_carlo`` relative to the exact value, by the delta method on its four moments.

    With W = omega / E_q[omega] and S = (W - 1)^2, the estimate's influence function is S - NV - 2 NV (W - 1). For
    omega = e^(a l) its second moment grows like e^(6 a^2 m^2), so the relative error is about
    e^(2 a^2 m^2) / sqrt(samples): where |a| m is large, no number of samples helps. NaN for KL, whose variance is 0.

    Args:
        weighting: a row.
        m: distance >= 0.
        samples: how many are drawn.
    """
    log_q, log_weight = _log_grid(weighting, m)
    _check_inside(log_q + 4 * log_weight, weighting, m)
    centred = log_weight - torch.logsumexp(log_q + log_weight, 0)
    deviation, half = _log_deviation(centred), log_q / 2
    exact = quadrature(weighting, m)
    # Each term is multiplied by sqrt(q) while it is still a logarithm: alone it would overflow in the tails.
    influence = (
        (2 * deviation + half).exp() - exact * half.exp() - 2 * exact * centred.sign() * (deviation + half).exp()
    )
    return float((influence.square().sum() / samples).sqrt() / exact)


def monte_carlo(weighting: Weighting, m: float, samples: int, generator: torch.Generator) -> float:
    """Var_q[omega] / E_q[omega]^2 from plain samples of q; ``standard_error`` says how far to trust it.

    Args:
        weighting: evaluated at ``samples`` values of l.
        m: distance >= 0.
        samples: how many.
        generator: the source of randomness.
    """
    log_weight = _log_weight(weighting, torch.randn(samples, dtype=torch.float64, generator=generator), m)
    omega = (log_weight - log_weight.max()).exp()
    return float(omega.var(correction=0) / omega.mean().square())


def importance_sampling(weighting: Weighting, m: float, samples: int, generator: torch.Generator) -> float:
    """The same from an equal mixture of N(0, 1), N(c/2, 1) and N(c, 1), c the mode of (omega / E_q[omega] - 1)^2 q.

    Where omega = e^(a l) the second moment is the mass of N(2 a m, 1), of which plain samples see nothing once 2 |a| m
    is beyond sqrt(2 log samples), and the first that of N(a m, 1). There c = 2 a m, q is never more than three times
    as dense as what was drawn from, and the relative error of either moment is below 2 / sqrt(samples) for every m.

    Args:
        weighting: evaluated at about ``samples`` values of l.
        m: distance >= 0.
        samples: how many, at least 3.
        generator: the source of randomness.
    """
    log_q, log_weight = _log_grid(weighting, m)
    deviation = _log_deviation(log_weight - torch.logsumexp(log_q + log_weight, 0))
    mode = (log_q + 2 * deviation).argmax() * _STEP - _REACH
    centres = mode * torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    y = (torch.randn(samples // 3, 3, dtype=torch.float64, generator=generator) + centres).flatten()
    log_proposal = torch.logsumexp(-(y[:, None] - centres).square() / 2, 1) - math.log(3)
    log_share, log_weight = -y.square() / 2 - log_proposal - math.log(len(y)), _log_weight(weighting, y, m)
    deviation = _log_deviation(log_weight - torch.logsumexp(log_share + log_weight, 0))
    return float(torch.logsumexp(log_share + 2 * deviation, 0).exp())
