"""The variance of omega: closed forms against integrals over the densities, limits and identities; samples too."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from paper_figures import weight_variance
from ratiograph.algebra.normalization import Clamped
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
    SoftenedReverseKL,
    SquaredHellinger,
)

LOG_OMEGA = {
    LR: lambda v: -np.logaddexp(0, -v),
    SoftenedReverseKL: lambda v: -np.logaddexp(0, v),
    BE: lambda v: v,
    Jeffreys: lambda v: np.logaddexp(0, v),
    SquaredHellinger: lambda v: v / 2 - math.log(4),
    LS: lambda v: -v,
}
"""log omega by hand, from the table of the papers."""
DISTANCES = (0.05, 0.3, 1.0, 2.0, 4.0, 6.0)
EVERY = [row() for row in LOG_OMEGA] + [SBA(lam=lam) for lam in (-1.5, -0.5, 0.5, 3.0, 5.0)]


def name_of(weighting):
    return f"SBA({weighting.lam})" if isinstance(weighting, SBA) else type(weighting).__name__


def integral(function, edges) -> float:
    """Gauss-Legendre with 30 nodes between each two edges."""
    nodes, weights = np.polynomial.legendre.leggauss(30)
    middles, halves = np.add(edges[1:], edges[:-1]) / 2, np.diff(edges) / 2
    return float((function(middles[:, None] + halves[:, None] * nodes) * weights * halves[:, None]).sum())


def by_densities(log_omega, m: float) -> float:
    """Var/E^2 from the two densities."""
    edges = np.linspace(-14 - 2 * m, 14 + 2 * m, 101)

    def omega(x):
        return np.exp(log_omega(stats.norm.logpdf(x, m) - stats.norm.logpdf(x)))

    mean = integral(lambda x: omega(x) * stats.norm.pdf(x), edges)
    return integral(lambda x: (omega(x) / mean - 1) ** 2 * stats.norm.pdf(x), edges)


def closed(weighting, m: float) -> float:
    return float(weight_variance.closed_form(weighting, torch.tensor(m, dtype=torch.float64)))


@pytest.mark.parametrize("m", DISTANCES)
@pytest.mark.parametrize("row", LOG_OMEGA)
def test_closed_form_is_the_integral_over_the_densities(row, m):
    assert closed(row(), m) == pytest.approx(by_densities(LOG_OMEGA[row], m), rel=1e-8)


@pytest.mark.parametrize("m", DISTANCES)
@pytest.mark.parametrize("weighting", EVERY, ids=name_of)
def test_quadrature_of_the_librarys_weighting_is_the_closed_form(weighting, m):
    assert weight_variance.quadrature(weighting, m) == pytest.approx(closed(weighting, m), rel=1e-6)


def test_closed_forms_at_numbers_worked_out_by_hand():
    m = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    e = math.e
    for weighting, values in (
        (KL(), [0, 0, 0]),
        (ForwardKL(), [0, e**0.25 - 1, e - 1]),
        (LS(), [0, e**0.25 - 1, e - 1]),
        (SquaredHellinger(), [0, e ** (1 / 16) - 1, e**0.25 - 1]),
        (Jeffreys(), [0, (e**0.25 - 1) / 4, (e - 1) / 4]),
        (SBA(lam=3.0), [0, e**2.25 - 1, e**9 - 1]),
        (JensenShannon(), [0, None, None]),
    ):
        for found, value in zip(weight_variance.closed_form(weighting, m).tolist(), values, strict=True):
            assert value is None or found == pytest.approx(value, rel=1e-14, abs=1e-15)


@pytest.mark.parametrize("m", [0.01, 0.5, 1.0, 3.0, 10.0, 30.0])
def test_overlap_is_its_integral(m):
    def integrand(y):  # of E[sech(m y / 2)], with the sech written so that it cannot overflow
        return 2 * np.exp(-y * y / 2 - m * y / 2) / (1 + np.exp(-m * y)) / math.sqrt(2 * math.pi)

    half = integral(integrand, np.array([0, *np.geomspace(1e-3, 40, 60)]))
    found = float(weight_variance.overlap(torch.tensor(m, dtype=torch.float64)))
    assert found == pytest.approx(math.exp(-m * m / 8) * half, rel=1e-11)


def test_overlap_between_its_limits():
    m = torch.tensor([0.0, 0.01, 40.0], dtype=torch.float64)
    zero, small, large = weight_variance.overlap(m).tolist()
    assert zero == pytest.approx(0.5, rel=1e-15)
    assert small == pytest.approx(0.5 - 0.01**2 / 8, abs=1e-8)  # p q / (p + q) to second order
    assert large == pytest.approx(math.sqrt(math.pi / 2) * math.exp(-200) / 40, rel=1e-2)


def test_every_row_starts_like_the_variance_of_its_slope():
    """For small m, omega is linear in l: Var/E^2 = (omega'/omega)^2 m^2, with omega' over l at l = 0."""
    m = 1e-3
    for weighting in EVERY:
        l = torch.zeros((), dtype=torch.float64, requires_grad=True)  # noqa: E741
        (slope,) = torch.autograd.grad(weighting.log_weight(l, torch.zeros(())), l)
        assert closed(weighting, m) == pytest.approx(float(slope) ** 2 * m**2, rel=1e-4)


def test_monte_carlo_reaches_two_percent_where_its_standard_error_says_so():
    samples, reached, out_of_reach = 200_000, 0, 0
    for weighting in EVERY:
        for m in (0.25, 0.5, 1.0, 2.0, 3.0):
            exact = closed(weighting, m)
            if exact > 1e5:
                continue
            generator = torch.Generator().manual_seed(7)
            plain = weight_variance.monte_carlo(weighting, m, samples, generator)
            weighed = weight_variance.importance_sampling(weighting, m, samples // 2, generator)
            assert weighed == pytest.approx(exact, rel=0.02)
            if 3 * weight_variance.standard_error(weighting, m, samples) <= 0.02:
                reached += 1
                assert plain == pytest.approx(exact, rel=0.02)
            else:
                out_of_reach += 1
    assert reached >= 20
    assert out_of_reach >= 10


@pytest.mark.parametrize("weighting", [LR(), SoftenedReverseKL(), Jeffreys(), SquaredHellinger()], ids=name_of)
def test_standard_error_is_the_spread_of_repeated_estimates(weighting):
    generator, samples, m = torch.Generator().manual_seed(3), 20_000, 0.8
    estimates = [weight_variance.monte_carlo(weighting, m, samples, generator) for _ in range(300)]
    spread = np.std(estimates) / closed(weighting, m)  # known to 1 / sqrt(600) = 4 %
    assert weight_variance.standard_error(weighting, m, samples) == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize(("exponent", "m"), [(0.5, 1.0), (1.0, 0.7), (3.0, 0.25)])
def test_standard_error_of_an_exponential_from_its_moments(exponent, m):
    """E[W^k] = e^(k (k - 1) a^2 m^2 / 2) of W = omega / E[omega], put into the delta method as it stands."""
    two, three, four = (math.exp(k * (k - 1) / 2 * (exponent * m) ** 2) for k in (2, 3, 4))
    gradient = np.array([-2 * two, 1.0])
    covariance = np.array([[two - 1, three - two], [three - two, four - two**2]])
    expected = math.sqrt(gradient @ covariance @ gradient / 1000) / (two - 1)
    assert weight_variance.standard_error(SBA(lam=exponent), m, 1000) == pytest.approx(expected, rel=1e-9)


def test_any_weighting_has_a_quadrature_and_only_rows_a_closed_form():
    bent = CustomWeighting(log_ratios=[-1.0, 1.0], weights=[1.0, 3.0])

    def by_hand(power):
        edges = np.array([-12, -0.5, 1.5, 12])  # the knots, over y = l + 1/2
        return integral(lambda y: (2 + np.clip(y - 0.5, -1, 1)) ** power * stats.norm.pdf(y), edges)

    expected = by_hand(2) / by_hand(1) ** 2 - 1
    assert weight_variance.quadrature(bent, 1.0) == pytest.approx(expected, rel=1e-3)
    assert weight_variance.quadrature(Clamped(weighting=BE(), limit=3.0), 3.0) < closed(BE(), 3.0) / 10
    with pytest.raises(ValueError, match="CustomWeighting has no closed form"):
        closed(bent, 1.0)
    with pytest.raises(ValueError, match="too heavy-tailed"):
        weight_variance.quadrature(SBA(lam=60.0), 2.0)
