"""The figure of R_t's errors: its numbers against a brute-force average over samples of p."""

import torch

from paper_figures import reward_tilts
from paper_figures.drawing import curves


def test_first_orders_error_is_that_of_brute_force():
    """E_p[R | x_t] as the average of R over 200,000 samples of p, weighted by N(x_t; x0, sigma^2)."""
    rows = reward_tilts.reward_error(samples=60, sigmas=(3.0,), seed=3)
    of_tau = curves(curves(rows, "target")["first order (Eq. 25)"], "tau")
    generator = torch.Generator().manual_seed(3)
    x0 = reward_tilts.TEACHER.sample(60, generator, dtype=torch.float64)
    x_t = x0 + 3.0 * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    many = reward_tilts.TEACHER.sample(200_000, torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = (-(x_t[:, None] - many).square().sum(2) / 18).softmax(1)
    mean = weights @ many
    for tau, (row,) in of_tau.items():
        centre = torch.tensor(reward_tilts.CENTRE, dtype=torch.float64)
        log_reward = lambda x, c=centre, w=tau: (x @ c - x.square().sum(-1) / 2) / w**2  # noqa: E731
        error = log_reward(mean) - (weights @ log_reward(many).exp()).log()
        assert abs(float(error.square().mean().sqrt()) / row["rms_error"] - 1) < 0.03


def test_gains_and_limits():
    """Threefold and better for mild rewards; none for one that is narrower than the posterior."""
    rows = reward_tilts.reward_error(samples=300, sigmas=(10.0,))
    for name in ("second order (Eq. 24), 1 probe", "second order, 64 probes"):
        gains = {row["tau"]: row["gain"] for row in rows if row["target"] == name}
        assert gains[4.0] > 3
        assert gains[2.0] > 3
        assert gains[0.5] < 1
    figure = reward_tilts.draw_reward_error(rows)
    assert [axis.get_title(loc="left") for axis in figure.axes] == [
        f"reward of width τ = {t}" for t in ("4", "2", "1", "0.5")
    ]
