"""Weights of the denoising loss against the losses they stand for."""

import pytest
import torch
import torch.nn.functional as F

from ratiograph.algebra.denoising_weights import (
    EDMWeight,
    EpsilonWeight,
    SampleWeight,
    SNRClipped,
    weighted_denoising_loss,
)
from ratiograph.algebra.noising import RectifiedFlow, ScaledLinearDDPM, VarianceExploding
from ratiograph.core.types import expand

TIMES = {VarianceExploding: (0.05, 3.0, 80.0), ScaledLinearDDPM: (3.0, 500.0, 999.0), RectifiedFlow: (0.1, 0.5, 0.9)}


@pytest.fixture(params=TIMES, ids=lambda kind: kind.__name__)
def case(request):
    """(noisy, noise, x0, mu) at three noise levels."""
    generator = torch.Generator().manual_seed(0)
    x0, noise, mu = (torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    t = torch.tensor(TIMES[request.param], dtype=torch.float64)
    return request.param().add_noise(x0, t, noise), noise, x0, mu


def test_epsilon_is_the_error_of_the_predicted_noise(case):
    noisy, noise, x0, mu = case
    predicted = (noisy.x_t - expand(noisy.alpha, mu) * mu) / expand(noisy.sigma, mu)
    torch.testing.assert_close(weighted_denoising_loss(mu, x0, noisy, EpsilonWeight()), F.mse_loss(predicted, noise))


def test_sample_is_the_plain_error(case):
    noisy, _, x0, mu = case
    torch.testing.assert_close(weighted_denoising_loss(mu, x0, noisy, SampleWeight()), F.mse_loss(mu, x0))


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_is_the_error_of_its_network_s_output(case, sigma_data):
    """c_out^2 lambda = 1: EDM's network F is fitted with weight 1 (Karras et al. 2022, Eq. 8)."""
    noisy, _, x0, mu = case
    y, s = noisy.rescaled()
    norm = (s.square() + sigma_data**2).sqrt()
    c_skip, c_out = expand(sigma_data**2 / norm.square(), y), expand(s * sigma_data / norm, y)
    output, target = (mu - c_skip * y) / c_out, (x0 - c_skip * y) / c_out
    found = weighted_denoising_loss(mu, x0, noisy, EDMWeight(sigma_data=sigma_data))
    torch.testing.assert_close(found, F.mse_loss(output, target))


def test_min_snr_clips_low_noise_only(case):
    noisy, *_ = case
    expected = [min((a / b) ** 2, 2.0) for a, b in zip(noisy.alpha.tolist(), noisy.sigma.tolist(), strict=True)]
    assert SNRClipped(limit=2.0)(noisy).tolist() == pytest.approx(expected)
