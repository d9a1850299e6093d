"""The collapse detector: its three numbers against their definitions, and its verdict on known samplers."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from scipy.stats import entropy

from ratiograph.data.stream import load_all
from ratiograph.evaluation import collapse
from ratiograph.evaluation.collapse import Collapse, mean_pairwise_distance
from ratiograph.evaluation.sample_distances import class_histogram


@pytest.fixture(scope="module")
def real():
    return load_all("mnist-heldout")


@pytest.mark.parametrize("block", [7, 2048])
def test_mean_pairwise_distance_is_scipys(block, monkeypatch):
    monkeypatch.setattr(collapse, "BLOCK", block)
    samples = np.random.default_rng(0).normal(size=(40, 2, 3, 4)) * 5 + 1e4
    assert mean_pairwise_distance(torch.tensor(samples)) == pytest.approx(pdist(samples.reshape(40, -1)).mean())


def test_repeated_images_are_at_one_less_the_mth_part():
    """m images repeated equally often, in a large set, are at 1 - 1/m of the distance of m real ones."""
    images = torch.eye(4) * 3
    for m in (1, 2, 4):
        copies = images[:m].repeat(500 // m, 1)
        expected = 3 * math.sqrt(2) * (1 - 1 / m) * len(copies) / (len(copies) - 1)
        assert mean_pairwise_distance(copies) == pytest.approx(expected, abs=1e-12)


def test_class_numbers():
    shares = [0.5, 0.3, 0.15, 0.05]
    result = Collapse()(shares, 0.9)
    assert result["class_coverage"] == 1
    assert result["class_entropy"] == pytest.approx(entropy(shares) / math.log(4))
    assert result["in_batch_distance"] == 0.9
    assert result["collapsed"] is False
    assert Collapse()([0.5, 0.3, 0.18, 0.02], 1.0)["class_coverage"] == 3 / 4  # a tenth of the share is 0.025


def test_tenth_of_the_share_counts_as_present():
    assert Collapse()([0.01] * 5 + [0.19] * 5, 1.0)["class_coverage"] == 1
    assert Collapse()([0.0098] * 5 + [0.1902] * 5, 1.0)["class_coverage"] == 0.5


def test_expected_shares_are_the_measure():
    """A sampler that has what a reward asks for is whole, though most of its classes are rare."""
    wanted = [0.85, 0.05, *[0.0125] * 8]
    assert Collapse()(wanted, 1.0)["collapsed"] is True
    result = Collapse()(wanted, 1.0, wanted)
    assert result == {"class_coverage": 1, "class_entropy": 1, "in_batch_distance": 1, "collapsed": False}
    lost = [0.95, 0.05, *[0.0] * 8]
    result = Collapse()(lost, 1.0, wanted)
    assert result["class_coverage"] == 0.2
    assert result["class_entropy"] == pytest.approx(entropy(lost) / entropy(wanted))
    assert result["collapsed"] is True
    assert Collapse()([1.0, 0.0], 1.0, [1.0, 0.0])["class_entropy"] == 1


@pytest.mark.parametrize(
    ("shares", "distance", "collapsed"),
    [
        ([0.1] * 10, 1.0, False),
        ([0.1] * 10, 0.49, True),  # by distance alone
        ([0.1] * 10, 0.51, False),
        ([0.125] * 8 + [0] * 2, 1.0, False),
        ([1 / 7] * 7 + [0] * 3, 1.0, True),  # by coverage alone: its entropy is 0.85
        ([0.73] + [0.03] * 9, 1.0, True),  # by entropy alone
        ([0.46] + [0.06] * 9, 1.0, False),
    ],
)
def test_each_threshold(shares, distance, collapsed):
    assert Collapse()(shares, distance)["collapsed"] is collapsed


def test_thresholds_are_arguments():
    shares = [0.125] * 8 + [0] * 2
    assert Collapse(least_coverage=0.85)(shares, 1.0)["collapsed"] is True
    assert Collapse(least_entropy=0.95)(shares, 1.0)["collapsed"] is True
    assert Collapse(least_distance=1.01)(shares, 1.0)["collapsed"] is True
    assert Collapse()(shares, 1.0)["collapsed"] is False


def test_real_digits_pass_and_degenerate_samplers_do_not(real):
    images, labels = real
    distance = mean_pairwise_distance(images)
    noise = 0.02 * torch.randn(500, 1, 28, 28, generator=torch.Generator().manual_seed(0))

    def judged(chosen):
        shares = class_histogram(labels[chosen], 10)
        return Collapse()(shares, mean_pairwise_distance(images[chosen] + noise[: len(chosen)]) / distance)

    everything = torch.arange(500)
    assert judged(everything)["collapsed"] is False
    assert judged(everything[:100])["collapsed"] is False
    assert judged(everything[:1].repeat(500))["in_batch_distance"] < 0.1
    assert judged(everything[:1].repeat(500))["collapsed"] is True
    assert judged(everything[:2].repeat(250))["collapsed"] is True
    assert judged(everything[labels < 5])["collapsed"] is True
    ones = judged(everything[labels == 1])
    assert ones["in_batch_distance"] == pytest.approx(0.63, abs=0.05)  # of the docstring: above its threshold
    assert ones["collapsed"] is True


def test_errors():
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        mean_pairwise_distance(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="not finite"):
        mean_pairwise_distance(torch.full((3, 3), torch.inf))
    with pytest.raises(ValueError, match="2 class shares and 3 expected"):
        Collapse()([0.5, 0.5], 1.0, [0.2, 0.3, 0.5])
    with pytest.raises(ValueError, match="sum to 1"):
        Collapse()([0.5, 0.2], 1.0)
