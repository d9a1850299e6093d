"""Noising processes against their definitions, and denoisers across them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ratiograph.algebra.noising import RectifiedFlow, ScaledLinearDDPM, VarianceExploding, VariancePreserving
from ratiograph.core.types import Condition, Noisy
from ratiograph.networks.architectures.unet import MLP
from ratiograph.networks.denoisers import EDM
from ratiograph.networks.teachers.mixture import GaussianMixture

CONTINUOUS = {"ve": VarianceExploding(), "vp": VariancePreserving(), "flow": RectifiedFlow()}
PROCESSES = {**CONTINUOUS, "ddpm": ScaledLinearDDPM()}


def times_of(process, count: int = 101) -> torch.Tensor:
    start, end = process.t_range
    return torch.linspace(start, end, count, dtype=torch.float64)


def test_variance_exploding_values():
    alpha, sigma = VarianceExploding().alpha_sigma(torch.tensor([0.002, 1.0, 80.0]))
    assert alpha.tolist() == [1, 1, 1]
    assert sigma.tolist() == pytest.approx([0.002, 1, 80])


def test_variance_preserving_solves_its_equation():
    """d log alpha / dt = -beta(t) / 2 with beta linear, and alpha^2 + sigma^2 = 1."""
    process = VariancePreserving(beta_min=0.1, beta_max=20.0)
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64, requires_grad=True)
    alpha, sigma = process.alpha_sigma(t)
    (slope,) = torch.autograd.grad(alpha.log().sum(), t)
    torch.testing.assert_close(slope, -(0.1 + 19.9 * t.detach()) / 2)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones_like(t))
    assert float(alpha[-1].detach()) == pytest.approx(np.exp(-10.05 / 2))


def test_scaled_linear_ddpm_is_the_cumulative_product():
    process = ScaledLinearDDPM()
    beta = np.linspace(np.sqrt(0.00085), np.sqrt(0.012), 1000) ** 2
    expected = np.sqrt(np.cumprod(1 - beta))
    t = torch.arange(1000, dtype=torch.float64)
    alpha, sigma = process.alpha_sigma(t)
    np.testing.assert_allclose(alpha.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(sigma.numpy(), np.sqrt(1 - expected**2), rtol=1e-9)
    assert float(alpha[-1] ** 2) == pytest.approx(0.00466, rel=1e-3)  # Stable Diffusion's last alpha-bar
    rounded, _ = process.alpha_sigma(torch.tensor([499.6]))
    assert float(rounded) == pytest.approx(expected[500], rel=1e-6)


def test_rectified_flow_is_the_straight_path():
    alpha, sigma = RectifiedFlow().alpha_sigma(torch.tensor([0.0, 0.25, 1.0]))
    assert alpha.tolist() == [1, 0.75, 0]
    assert sigma.tolist() == [0, 0.25, 1]


@pytest.mark.parametrize("name", PROCESSES)
def test_time_of_inverts_the_noise_to_signal_ratio(name):
    process = PROCESSES[name]
    t = times_of(process, 1000)
    alpha, sigma = process.alpha_sigma(t)
    ratio = sigma / alpha
    assert (ratio.diff() > 0).all()
    torch.testing.assert_close(process.time_of(ratio), t, rtol=1e-9, atol=1e-12)


def test_ddpm_time_of_takes_the_nearest_step_in_log_sigma():
    process = ScaledLinearDDPM(steps=50)
    alpha, sigma = process.alpha_sigma(torch.arange(50, dtype=torch.float64))
    table = (sigma / alpha).log()
    asked = torch.linspace(float(table[0]) - 1, float(table[-1]) + 1, 777, dtype=torch.float64)
    brute = (asked[:, None] - table).abs().argmin(1)
    assert torch.equal(process.time_of(asked.exp()), brute.double())


@pytest.mark.parametrize("name", PROCESSES)
def test_add_noise(name):
    process, generator = PROCESSES[name], torch.Generator().manual_seed(0)
    t = times_of(process, 5)
    x0, noise = (torch.randn(5, 2, 3, 4, generator=generator) for _ in range(2))
    noisy = process.add_noise(x0, t, noise)
    alpha, sigma = process.alpha_sigma(t)
    for i in range(5):
        expected = float(alpha[i]) * x0[i] + float(sigma[i]) * noise[i]
        torch.testing.assert_close(noisy.x_t[i], expected)
    assert noisy.x_t.dtype == noisy.alpha.dtype == noisy.sigma.dtype == torch.float32
    assert torch.equal(noisy.t, t)


def random_edm() -> EDM:
    torch.manual_seed(0)
    denoiser = EDM(network=MLP(dimension=3, width=16), sigma_data=0.7)
    torch.nn.init.normal_(denoiser.network.out.weight)  # it starts at zero
    return denoiser.double()


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("kind", ["edm", "mixture"])
def test_denoisers_do_not_change_under_rescheduling(name, kind):
    """At (alpha, sigma) a denoiser is the variance-exploding one at x_t / alpha and sigma / alpha."""
    mixture = GaussianMixture(means=[[0, 0, 1], [1, -1, 0]], std=[0.4, 0.8])
    denoiser = {"edm": random_edm(), "mixture": mixture}[kind]
    start, end = PROCESSES[name].t_range
    t = torch.linspace(start + 0.1 * (end - start), start + 0.9 * (end - start), 9, dtype=torch.float64)
    x0, noise = torch.randn(2, 9, 3, dtype=torch.float64)
    noisy = PROCESSES[name].add_noise(x0, t, noise)
    y, s = noisy.rescaled()
    native = Noisy(y, s, torch.ones_like(s), s)
    with torch.no_grad():
        found, expected = denoiser.denoise(noisy, Condition()), denoiser.denoise(native, Condition())
    tolerance = 1e-5 if kind == "edm" else 1e-9  # the noise embedding is computed in float32
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert (found - x0).abs().max() > 1e-3


def test_edm_preconditioning():
    """With a network that outputs F, mu = c_skip y + c_out F, and F = 0 gives the Gaussian's own denoiser."""
    denoiser = EDM(network=MLP(dimension=3, width=16), sigma_data=0.7)
    noisy = VarianceExploding().add_noise(torch.randn(4, 3), torch.tensor([0.01, 0.5, 3.0, 80.0]), torch.randn(4, 3))
    gaussian = GaussianMixture(means=[[0, 0, 0]], std=0.7)
    torch.testing.assert_close(denoiser.denoise(noisy, Condition()), gaussian.denoise(noisy, Condition()))
    torch.nn.init.constant_(denoiser.network.out.bias, 1.0)  # F = 1 everywhere
    c_out = noisy.sigma * 0.7 / (noisy.sigma**2 + 0.49).sqrt()
    gain = denoiser.denoise(noisy, Condition()) - gaussian.denoise(noisy, Condition())
    torch.testing.assert_close(gain, c_out[:, None].expand(4, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: VarianceExploding(sigma_min=0),
        lambda: VarianceExploding(sigma_min=2, sigma_max=1),
        lambda: VariancePreserving(beta_min=3, beta_max=2),
        lambda: ScaledLinearDDPM(steps=1),
        lambda: ScaledLinearDDPM(beta_end=1.5),
    ],
)
def test_refusals(make):
    with pytest.raises(ValueError, match=r"sigma|beta"):
        make()
