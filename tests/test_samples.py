"""Energy distance, MMD and class shares against double loops, scipy and closed forms."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from ratiograph.evaluation import sample_distances
from ratiograph.evaluation.sample_distances import class_histogram, energy_distance, mmd_rbf


def draw(seed, n, d=2):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loops(x, y, kernel, unbiased):
    def mean(a, b, same):
        pairs = [
            kernel(math.dist(p, q))
            for i, p in enumerate(a.tolist())
            for j, q in enumerate(b.tolist())
            if not (same and unbiased and i == j)
        ]
        return math.fsum(pairs) / len(pairs)

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("block", [7, 1024])
def test_both_distances_are_the_double_sums(monkeypatch, unbiased, block):
    monkeypatch.setattr(sample_distances, "BLOCK", block)
    x, y = draw(0, 23), draw(1, 31) * 1.5 + 0.3
    expected = by_loops(x, y, lambda d: -d, unbiased)
    assert energy_distance(x, y, unbiased=unbiased) == pytest.approx(expected, rel=1e-12)
    expected = by_loops(x, y, lambda d: math.exp(-d * d / (2 * 0.7**2)), unbiased)
    assert mmd_rbf(x, y, bandwidth=0.7, unbiased=unbiased) == pytest.approx(expected, rel=1e-12)


def test_energy_distance_in_one_dimension_is_the_square_of_scipys():
    x, y = draw(2, 200, 1), draw(3, 150, 1) + 0.4
    expected = scipy.stats.energy_distance(x[:, 0].numpy(), y[:, 0].numpy()) ** 2
    assert energy_distance(x, y) == pytest.approx(expected, rel=1e-10)


def test_energy_distance_of_points():
    # two points a distance 3 apart, twice each: 2 * 3 - 0 - 0
    x, y = torch.zeros(2, 2), torch.tensor([[0.0, 3.0]]).repeat(2, 1)
    assert energy_distance(x, y) == 6
    assert energy_distance(x, y, unbiased=True) == 6


def test_small_differences_of_close_points_do_not_cancel():
    """In float32, or with distances from |x|^2 - 2xy + |y|^2, this would be lost."""
    x = torch.tensor([[1e4, 0.0], [1e4, 1e-4]], dtype=torch.float64)
    y = x + torch.tensor([1e-4, 0.0], dtype=torch.float64)
    expected = by_loops(x, y, lambda d: -d, False)
    assert energy_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_unbiased_estimates_have_the_exact_mean():
    """Gaussians N(0, 1) and N((m, 0), 1) in 2-D: E k has a closed form; 400 sets of 40 samples, 4 standard errors."""
    m, h, sets, n = 1.0, 1.0, 400, 40
    x, y = draw(4, sets * n).reshape(sets, n, 2), draw(5, sets * n).reshape(sets, n, 2)
    y = y + torch.tensor([m, 0], dtype=torch.float64)
    exact = 2 * (h * h / (h * h + 2)) * (1 - math.exp(-m * m / (2 * (h * h + 2))))
    unbiased = np.array([mmd_rbf(a, b, bandwidth=h, unbiased=True) for a, b in zip(x, y, strict=True)])
    biased = np.array([mmd_rbf(a, b, bandwidth=h) for a, b in zip(x, y, strict=True)])
    error = unbiased.std() / sets**0.5
    assert abs(unbiased.mean() - exact) < 4 * error
    assert biased.mean() - exact > 10 * error


def test_samples_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(5, 2\) and \(5, 3\)"):
        energy_distance(draw(0, 5), draw(0, 5, 3))
    with pytest.raises(ValueError, match="at least two samples"):
        energy_distance(draw(0, 1), draw(0, 5))
    with pytest.raises(ValueError, match="bandwidth=0"):
        mmd_rbf(draw(0, 5), draw(0, 5), bandwidth=0)


def test_class_shares():
    assert class_histogram(torch.tensor([0, 2, 2, 3]), 5) == [0.25, 0, 0.5, 0.25, 0]
    for wrong in ([0, 5], [-1], []):
        with pytest.raises(ValueError, match=r"0 \.\. 4"):
            class_histogram(torch.tensor(wrong), 5)
