"""Fréchet distance against clean-fid's function and against closed forms."""

from types import SimpleNamespace

import cleanfid.fid
import numpy as np
import pytest
import scipy.linalg
import torch

from ratiograph.evaluation.frechet import FeatureStatistics, frechet_distance


def statistics(features, parts=1):
    result = FeatureStatistics(features.shape[1])
    for part in torch.as_tensor(features).tensor_split(parts):
        result.update(part)
    return result


def correlated(seed, n, d, rank=None):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, rank or d)) @ rng.normal(size=(rank or d, d)) + rng.normal(size=d)


@pytest.mark.parametrize("parts", [1, 7])
def test_statistics_are_numpys(parts):
    features = correlated(0, 100, 5) * [1, 10, 1e3, 1e-3, 1] + [0, 1e6, 0, 0, -1e4]
    result = statistics(features, parts)
    assert result.count == 100
    np.testing.assert_allclose(result.mean, features.mean(0), rtol=1e-12)
    expected = np.cov(features, rowvar=False)
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert np.abs(result.covariance.numpy() - expected).max() / scale.max() < 1e-9
    np.testing.assert_allclose(result.covariance.numpy() / scale, expected / scale, atol=1e-8)


@pytest.mark.parametrize("d", [1, 3, 64])
def test_distance_is_cleanfids(d, monkeypatch):
    # clean-fid asks sqrtm for a pair through the argument ``disp``, which scipy is about to drop.
    pair = SimpleNamespace(sqrtm=lambda matrix, disp=True: (scipy.linalg.sqrtm(matrix), None))
    monkeypatch.setattr(cleanfid.fid, "linalg", pair)
    a, b = correlated(1, 400, d), correlated(2, 300, d)
    expected = cleanfid.fid.frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(expected, rel=1e-8)


def test_commuting_covariances_have_a_closed_form():
    # d^2 = sum (m_a - m_b)^2 + (s_a - s_b)^2 for diagonal covariances
    a, b = statistics(torch.zeros(2, 3)), statistics(torch.zeros(2, 3))
    a.mean, b.mean = torch.tensor([[1.0, 2, 3], [1, 0, -1]], dtype=torch.float64)
    scale_a, scale_b = torch.tensor([[1.0, 2, 3], [4, 2, 0]], dtype=torch.float64)
    a.scatter, b.scatter = scale_a.square().diag(), scale_b.square().diag()  # count - 1 = 1
    assert frechet_distance(a, b) == pytest.approx((0 + 4 + 16) + (9 + 0 + 9), rel=1e-12)


def test_singular_covariances():
    """Fewer samples than features: the matrices have rank 4 at most, as have those of a projection to 9 axes."""
    a, b = correlated(3, 5, 9, rank=4), correlated(4, 5, 9, rank=4)
    # Closed form through the nuclear norm: tr (C_a^1/2 C_b C_a^1/2)^1/2 = |A B^T|_* / (n - 1), A and B centred data.
    centred_a, centred_b = a - a.mean(0), b - b.mean(0)
    cross = np.linalg.norm(centred_a @ centred_b.T, "nuc") / 4
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + ((centred_a**2).sum() + (centred_b**2).sum()) / 4
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(expected - 2 * cross, rel=1e-6)


def test_same_features_are_at_distance_zero_and_the_distance_is_symmetric():
    a, b = correlated(5, 200, 8), correlated(6, 200, 8)
    forward = frechet_distance(statistics(a), statistics(b))
    assert frechet_distance(statistics(a), statistics(a, 3)) == pytest.approx(0, abs=1e-6 * forward)
    assert frechet_distance(statistics(b), statistics(a)) == pytest.approx(forward, rel=1e-9)


def test_features_that_are_not_finite_are_counted():
    features = torch.zeros(6, 2)
    features[1, 0], features[4] = torch.nan, torch.inf
    with pytest.raises(ValueError, match="2 of 6 feature vectors are not finite"):
        FeatureStatistics(2).update(features)
