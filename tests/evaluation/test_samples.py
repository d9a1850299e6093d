"""Energy distance and class shares against double loops, scipy and closed forms."""

import math

import pytest
import scipy.stats
import torch

from ratiograph.evaluation import sample_distances
from ratiograph.evaluation.sample_distances import class_histogram, energy_distance


def draw(seed, n, d=2):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loops(x, y):
    def mean(a, b):
        return math.fsum(math.dist(p, q) for p in a.tolist() for q in b.tolist()) / (len(a) * len(b))

    return 2 * mean(x, y) - mean(x, x) - mean(y, y)


@pytest.mark.parametrize("block", [7, 1024])
def test_energy_distance_is_the_double_sum(monkeypatch, block):
    monkeypatch.setattr(sample_distances, "BLOCK", block)
    x, y = draw(0, 23), draw(1, 31) * 1.5 + 0.3
    assert energy_distance(x, y) == pytest.approx(by_loops(x, y), rel=1e-12)


def test_energy_distance_in_one_dimension_is_the_square_of_scipys():
    x, y = draw(2, 200, 1), draw(3, 150, 1) + 0.4
    expected = scipy.stats.energy_distance(x[:, 0].numpy(), y[:, 0].numpy()) ** 2
    assert energy_distance(x, y) == pytest.approx(expected, rel=1e-10)


def test_energy_distance_of_points():
    # two points a distance 3 apart, twice each: 2 * 3 - 0 - 0
    x, y = torch.zeros(2, 2), torch.tensor([[0.0, 3.0]]).repeat(2, 1)
    assert energy_distance(x, y) == 6


def test_small_differences_of_close_points_do_not_cancel():
    """In float32, or with distances from |x|^2 - 2xy + |y|^2, this would be lost."""
    x = torch.tensor([[1e4, 0.0], [1e4, 1e-4]], dtype=torch.float64)
    y = x + torch.tensor([1e-4, 0.0], dtype=torch.float64)
    assert energy_distance(x, y) == pytest.approx(by_loops(x, y), rel=1e-6)


def test_samples_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(5, 2\) and \(5, 3\)"):
        energy_distance(draw(0, 5), draw(0, 5, 3))
    with pytest.raises(ValueError, match="at least two samples"):
        energy_distance(draw(0, 1), draw(0, 5))


def test_class_shares():
    assert class_histogram(torch.tensor([0, 2, 2, 3]), 5) == [0.25, 0, 0.5, 0.25, 0]
    for wrong in ([0, 5], [-1], []):
        with pytest.raises(ValueError, match=r"0 \.\. 4"):
            class_histogram(torch.tensor(wrong), 5)
