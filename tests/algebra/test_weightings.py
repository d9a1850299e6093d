"""Weightings against their divergences, their closed forms and their limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from exact import ROWS
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

T = torch.zeros(())

OMEGA = {
    "KL": lambda rho: rho**0,
    "LR": lambda rho: rho / (1 + rho),
    "SoftenedReverseKL": lambda rho: 1 / (1 + rho),
    "BE": lambda rho: rho,
    "Jeffreys": lambda rho: 1 + rho,
    "SquaredHellinger": lambda rho: rho.sqrt() / 4,
    "LS": lambda rho: 1 / rho,
    "SBA(3.0)": lambda rho: rho**-3,
    "SBA(-0.5)": lambda rho: rho.sqrt(),
}
"""omega of rho = p/q, from the table of the papers."""

GENERATORS = {
    "ReverseKL": lambda rho: -rho.log(),
    "JensenShannon": lambda rho: rho * rho.log() - (rho + 1) * ((rho + 1) / 2).log(),
    "SoftenedReverseKL": lambda rho: (rho + 1) * ((rho + 1) / (2 * rho)).log(),
    "ForwardKL": lambda rho: rho * rho.log(),
    "Jeffreys": lambda rho: (rho - 1) * rho.log(),
    "SquaredHellinger": lambda rho: 1 - rho.sqrt(),
}
"""f-distill's f, from the table of the paper."""


def ratios(dtype=torch.float64) -> Tensor:
    return torch.linspace(-4, 4, 81, dtype=dtype)


def second_derivative(function, at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(at).sum(), at, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), at, allow_unused=True)
    return torch.zeros_like(at) if second is None else second


@pytest.mark.parametrize("row", OMEGA)
def test_omega_has_the_value_of_the_table(row):
    l = ratios()  # noqa: E741
    torch.testing.assert_close(ROWS[row](l, T), OMEGA[row](l.exp()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("row", ROWS)
def test_both_generators_have_the_row_as_their_weighting(row):
    l, weighting = ratios(), ROWS[row]  # noqa: E741
    omega = weighting(l, T)
    r, rho = (-l).exp(), l.exp()
    smooth = slice(None)
    if row == "CustomWeighting":  # h'' jumps in slope at the knots; stay off them
        smooth = (l[:, None] - l.new_tensor(weighting.log_ratios)).abs().amin(1) > 1e-6
    bregman = second_derivative(weighting.h, r) * r
    perspective = second_derivative(weighting.f, rho) * rho.square()
    torch.testing.assert_close(bregman[smooth], omega[smooth], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(perspective[smooth], omega[smooth], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("row", GENERATORS)
def test_f_is_the_papers_up_to_an_affine_function(row):
    rho = ratios().exp()
    difference = ROWS[row].f(rho) - GENERATORS[row](rho)
    affine = torch.stack([torch.ones_like(rho), rho], 1)
    fit = affine @ torch.linalg.lstsq(affine, difference[:, None]).solution
    torch.testing.assert_close(fit[:, 0], difference, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("one", "other", "scale"),
    [
        (ReverseKL(), KL(), 1),
        (JensenShannon(), LR(), 1),
        (ForwardKL(), BE(), 1),
        (SBA(lam=0), KL(), 1),
        (SBA(lam=1), LS(), 1),
        (SBA(lam=-1), BE(), 1),
        (SBA(lam=-0.5), SquaredHellinger(), 4),
    ],
)
def test_synonyms(one, other, scale):
    l = ratios()  # noqa: E741
    torch.testing.assert_close(one(l, T), scale * other(l, T), rtol=1e-12, atol=0)


def test_sba_is_continuous_in_lambda():
    r = ratios().exp()
    affine = torch.stack([torch.ones_like(r), r], 1)
    for special in (0.0, -1.0):
        difference = SBA(lam=special + 1e-6).h(r) - SBA(lam=special).h(r)
        residual = difference - (affine @ torch.linalg.lstsq(affine, difference[:, None]).solution)[:, 0]
        assert residual.abs().max() < 1e-3


def test_sums_of_divergences_are_sums_of_weightings():
    l = ratios()  # noqa: E741
    torch.testing.assert_close(Jeffreys()(l, T), KL()(l, T) + BE()(l, T))
    torch.testing.assert_close(LR()(l, T) + SoftenedReverseKL()(l, T), KL()(l, T))


INF = math.inf


@pytest.mark.parametrize(
    ("weighting", "at_zero", "at_infinity"),
    [
        (KL(), 1, 1),
        (LR(), 0, 1),
        (SoftenedReverseKL(), 1, 0),
        (BE(), 0, INF),
        (Jeffreys(), 1, INF),
        (SquaredHellinger(), 0, INF),
        (LS(), INF, 0),
        (SBA(lam=3), INF, 0),
        (SBA(lam=-0.5), 0, INF),
        (CustomWeighting(log_ratios=[-1, 1], weights=[0.25, 4]), 0.25, 4),
    ],
)
def test_limits_as_rho_goes_to_zero_and_infinity(weighting, at_zero, at_infinity):
    ends = weighting(torch.tensor([-3000.0, 3000.0], dtype=torch.float64), T)
    assert ends.tolist() == pytest.approx([at_zero, at_infinity], abs=1e-100)


@pytest.mark.parametrize("row", ROWS)
def test_one_finite_log_weight_a_sample_in_float32(row):
    l = torch.tensor([-80.0, -1.0, 0.0, 1.0, 80.0])  # noqa: E741
    log_weight = ROWS[row].log_weight(l, torch.rand(5))
    assert log_weight.shape == l.shape
    assert log_weight.isfinite().all()
    torch.testing.assert_close(log_weight.double(), ROWS[row].log_weight(l.double(), T), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lam", [-1.0, -0.5, 1.0, 2.0])
@pytest.mark.parametrize("m", [0.5, 1.0, 1.5])
def test_normalised_variance_of_two_unit_gaussians(lam, m):
    """f-distill's Fig. 5(a): log r is N(., m^2) under q, so Var[omega] / E[omega]^2 = exp(lam^2 m^2) - 1."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(100))
    weights = weights / weights.sum()
    l = (nodes.square() - (nodes - m).square()) / 2  # noqa: E741  p = N(m, 1), x ~ q = N(0, 1)
    omega = SBA(lam=lam)(l, T)
    mean = (weights * omega).sum()
    found = (weights * (omega - mean).square()).sum() / mean.square()
    assert float(found) == pytest.approx(math.expm1(lam**2 * m**2), rel=1e-9)


def test_custom_weighting_interpolates_its_table():
    weighting = CustomWeighting(log_ratios=[-2, 0, 1], weights=[1, 3, 0])
    l = torch.tensor([-9.0, -2.0, -1.0, 0.0, 0.5, 1.0, 9.0])  # noqa: E741
    assert weighting(l, T).tolist() == pytest.approx([1, 1, 2, 3, 1.5, 0, 0], abs=1e-6)


def test_custom_weighting_approximates_a_row():
    grid = np.linspace(-10, 10, 2001)
    table = CustomWeighting(log_ratios=grid.tolist(), weights=(1 / (1 + np.exp(-grid))).tolist())
    l = ratios()  # noqa: E741
    torch.testing.assert_close(table(l, T), LR()(l, T), rtol=0, atol=2e-6)


@pytest.mark.parametrize("weighting", [KL(), ReverseKL()])
def test_only_kl_runs_without_a_ratio(weighting: Weighting):
    assert not weighting.needs_ratio
    assert weighting(torch.tensor([-3.0, 3.0]), T).tolist() == [1, 1]
    assert all(ROWS[row].needs_ratio for row in ROWS if row not in ("KL", "ReverseKL"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: CustomWeighting(log_ratios=[0], weights=[1]),
        lambda: CustomWeighting(log_ratios=[0, 1], weights=[1]),
        lambda: CustomWeighting(log_ratios=[1, 0], weights=[1, 1]),
        lambda: CustomWeighting(log_ratios=[0, 1], weights=[0, 0]),
    ],
)
def test_refusals(make):
    with pytest.raises(ValueError, match="CustomWeighting"):
        make()


@pytest.mark.parametrize("row", sorted(ROWS.keys() - {"CustomWeighting"}))  # whose table has kinks
def test_the_blogs_field_in_terms_of_d_is_the_field_in_terms_of_l(row):
    """Zhu 2025's boxed h''((1 - D)/D)/D^2 grad D against omega(l) grad l, with h'' from autograd."""
    weighting = ROWS[row]
    l = ratios().requires_grad_()  # noqa: E741
    d = torch.sigmoid(l)
    r = ((1 - d) / d).detach().requires_grad_()
    (slope,) = torch.autograd.grad(weighting.h(r).sum(), r, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), r) if slope.requires_grad else (torch.zeros_like(r),)
    boxed = curvature / d.detach() ** 2
    torch.testing.assert_close(weighting.discriminator_coefficient(d.detach()), boxed, rtol=1e-9, atol=0)
    (gradient_of_d,) = torch.autograd.grad(d.sum(), l)
    torch.testing.assert_close(boxed * gradient_of_d, weighting(l.detach(), T), rtol=1e-9, atol=0)


def test_the_blogs_kl_is_the_gradient_of_the_logit():
    d = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(KL().discriminator_coefficient(d), 1 / (d * (1 - d)))


def test_a_weighting_without_weights_says_what_to_define():
    class Unfinished(Weighting):
        pass

    with pytest.raises(ValueError, match=r"^Unfinished has no weights: define log_weight\(self, log_ratio, t\)"):
        Unfinished()(torch.zeros(2), torch.zeros(2))
