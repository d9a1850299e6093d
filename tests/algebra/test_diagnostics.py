"""What is logged about a ratio, against closed forms of two Gaussians."""

import math

import pytest
import torch

from exact import ROWS
from ratiograph.algebra.diagnostics import RatioDiagnostics, bregman_divergence, field_metrics, ratio_metrics
from ratiograph.algebra.weightings import KL, LS, CustomWeighting

M = 0.8


def exact(samples=400_000, m=M):
    """(l at real, l at student samples) for p = N(m, 1) and q = N(0, 1)."""
    generator = torch.Generator().manual_seed(0)
    student, real = torch.randn(2, samples, generator=generator, dtype=torch.float64)
    return m * (real + m) - m * m / 2, m * student - m * m / 2


def test_identities_and_kl_of_the_exact_ratio():
    metrics = ratio_metrics(*exact())
    assert float(metrics["ratio/mean_exp_student"]) == pytest.approx(1, abs=0.01)
    assert float(metrics["ratio/mean_exp_real"]) == pytest.approx(1, abs=0.01)
    assert float(metrics["divergence/KL(q||p)"]) == pytest.approx(M * M / 2, rel=0.01)
    accuracy = (1 + math.erf(M / 2 / math.sqrt(2))) / 2  # P(x > M/2) under N(M, 1)
    assert float(metrics["ratio/accuracy"]) == pytest.approx(accuracy, abs=0.003)


def test_divergences_of_two_gaussians():
    """KL in closed form, and D_LS = (E_p[r^2] - 1) / 2 = (e^(M^2) - 1) / 2."""
    real, _ = exact()
    assert float(bregman_divergence(KL(), real)) == pytest.approx(M * M / 2, rel=0.01)
    assert float(bregman_divergence(LS(), real)) == pytest.approx((math.exp(M * M) - 1) / 2, rel=0.03)


@pytest.mark.parametrize("row", [name for name, row in ROWS.items() if type(row) is not CustomWeighting and row.has_h])
def test_divergences_are_those_of_quadrature(row):
    """E_p[h(r)] - h(1) by quadrature, as E_p[r] = 1, at a distance where r^6 still has a mean to sample."""
    weighting, m = ROWS[row], 0.25
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    log_ratio = m * x - m * m / 2
    density = torch.exp(-(x - m).square() / 2) / math.sqrt(2 * math.pi)
    of_one = weighting.h(torch.ones(1, dtype=torch.float64))
    exact_value = torch.trapezoid(density * weighting.h(torch.exp(-log_ratio)), x) - of_one
    assert float(bregman_divergence(weighting, exact(m=m)[0])) == pytest.approx(float(exact_value), rel=0.05)


def test_calibration_of_the_exact_ratio_is_the_diagonal():
    real, student = exact(100_000)
    diagnostics = RatioDiagnostics(bins=2, levels=5)
    early, late = torch.full_like(real, 0.1), torch.full_like(real, 0.9)
    diagnostics.update(real, student, early, early)
    diagnostics.update(2 * real + 1, 2 * student + 1, late, late)
    by_time = diagnostics.summary()["by_time"]
    assert by_time["mean_exp_student"][0] == pytest.approx(1, abs=0.02)
    assert by_time["mean_exp_real"][0] == pytest.approx(1, abs=0.02)
    assert by_time["kl"][0] == pytest.approx(M * M / 2, rel=0.03)
    assert by_time["kl"][1] == pytest.approx(M * M - 1, rel=0.03)
    only_exact = RatioDiagnostics(bins=2, levels=5)
    only_exact.update(real, student, early, early)
    calibration = only_exact.summary()["calibration"]
    assert calibration["observed"] == pytest.approx(calibration["predicted"], abs=0.02)
    assert sum(calibration["share"]) == pytest.approx(1)
    assert only_exact.summary()["by_time"]["accuracy"][1] is None


def test_what_was_begun_is_taken_in_when_it_is_finished():
    later, once = RatioDiagnostics(), RatioDiagnostics()
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        values = torch.randn(4, 9, generator=generator)
        values[2:] = values[2:].sigmoid()
        later.begin(*values)
        once.update(*values)
    assert not later.by_time.any()
    for _ in range(2):  # the second finds nothing
        later.finish()
        assert torch.equal(later.by_time, once.by_time)
        assert torch.equal(later.calibration, once.calibration)


def test_old_updates_fade():
    diagnostics = RatioDiagnostics(bins=1, levels=1, decay=0.5)
    u = torch.zeros(4)
    diagnostics.update(torch.ones(4), -torch.ones(4), u, u)  # all correct
    diagnostics.update(-torch.ones(4), torch.ones(4), u, u)  # all wrong
    assert diagnostics.summary()["by_time"]["accuracy"] == [pytest.approx(0.5 / 1.5)]


def test_norms_and_cosines_of_fields():
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    b = torch.tensor([[4.0, -3.0], [-2.0, 0.0]])
    metrics = field_metrics({"a": a, "b": b, "c": 2 * a})
    assert float(metrics["field/a"]) == pytest.approx(math.sqrt(26 / 4))
    assert float(metrics["cosine/a, b"]) == pytest.approx(-0.5)
    assert float(metrics["cosine/a, c"]) == pytest.approx(1)
    assert len(metrics) == 6
