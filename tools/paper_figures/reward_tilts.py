"""How far the approximations of R_t are from the truth, over noise and over the strength of the reward.

Notation: p is a mixture of three overlapping Gaussians, R(x0) = exp(-|x0 - c|^2 / (2 tau^2)), so that the exact
log R_t(x_t) = log E_p[R | x_t] is a closed form; tau is the reward's width, small where it is strong.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

from paper_figures.drawing import PALETTE, columns, curves, new_figure, set_title
from ratiograph.algebra.rewards import QuadraticReward
from ratiograph.algebra.second_order_targets import RewardTiltedCumulant, RewardTiltedSecondOrder
from ratiograph.algebra.targets import RewardTilted
from ratiograph.core.contracts import Evaluation, Nodes
from ratiograph.core.types import Condition, Noisy
from ratiograph.networks.teachers.exact_tilting import ExactTilted
from ratiograph.networks.teachers.mixture import GaussianMixture

__all__ = ["draw_reward_error", "reward_error"]

TEACHER = GaussianMixture(means=[[0.0, 0.6], [-0.5, 0.3], [0.6, -0.4]], std=[0.6, 0.5, 0.7], weights=[0.3, 0.4, 0.3])
CENTRE = (0.8, 0.4)
STYLES = ("-", "-", "-", "--")
WIDTHS = (4.0, 2.0, 1.0, 0.5)
SIGMAS = (0.1, 0.2, 0.3, 0.6, 1.0, 2.0, 3.0, 6.0, 10.0, 30.0, 80.0)
TARGETS = {
    "first order (Eq. 25)": (RewardTilted, {}),
    "second order (Eq. 24), 1 probe": (RewardTiltedSecondOrder, {"probes": 1}),
    "second order, 64 probes": (RewardTiltedSecondOrder, {"probes": 64}),
    "second cumulant, 1 probe": (RewardTiltedCumulant, {"probes": 1}),
}


def reward_error(*, samples: int = 1000, sigmas: Sequence[float] = SIGMAS, seed: int = 0) -> list[dict]:
    """Root mean square error of log R_t under p_t.

    Args:
        samples: x_t a noise level.
        sigmas: noise levels, alpha = 1.
        seed: of the samples and of the probes.

    Returns:
        Rows with ``target``, ``tau``, ``sigma``, ``rms_error`` and ``gain``, how many times smaller than first order's.
    """
    rows = []
    for tau in WIDTHS:
        reward = QuadraticReward(curvature=-1 / tau**2, slope=[c / tau**2 for c in CENTRE])
        for sigma in sigmas:
            generator = torch.Generator().manual_seed(seed)
            x0 = TEACHER.sample(samples, generator, dtype=torch.float64)
            x_t = x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
            found = {name: _error(kind, options, reward, x_t, sigma, seed) for name, (kind, options) in TARGETS.items()}
            first = next(iter(found.values()))
            rows += [
                {"target": name, "tau": tau, "sigma": sigma, "rms_error": error, "gain": first / error}
                for name, error in found.items()
            ]
    return rows


def _error(kind, options: dict, reward: QuadraticReward, x_t: torch.Tensor, sigma: float, seed: int) -> float:
    target = kind(reward=reward, log_normalizer=0.0, **options).double()
    level = torch.full((len(x_t),), sigma, dtype=torch.float64)
    evaluation = Evaluation(
        Noisy(x_t, level, torch.ones_like(level), level), x_t, Condition(), Nodes(teacher=TEACHER), target.needs
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found, _ = target.log_target(evaluation)
    exact = ExactTilted(reward=reward).log_expected_reward(evaluation)
    return float((found - exact.detach()).square().mean().sqrt())


def draw_reward_error(rows: Sequence[dict]) -> Figure:
    """One panel for each width of the reward."""
    figure, axes = new_figure(13, 3.8, len(WIDTHS), sharey=True)
    for axis, (tau, of_tau) in zip(axes, curves(rows, "tau").items(), strict=True):
        # Dashed, the cumulant lets the second order be seen where the two agree.
        for colour, dashes, (name, curve) in zip(PALETTE[:4], STYLES, curves(of_tau, "target").items(), strict=True):
            sigma, error = columns(curve, "sigma", "rms_error")
            axis.plot(sigma, error, dashes, color=colour, marker="o", markersize=3.5, label=name)
        axis.set(xscale="log", yscale="log", xlabel="noise level σ")
        set_title(axis, f"reward of width τ = {tau:g}")
    axes[0].set_ylabel("RMS error of log R_t")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(TARGETS))
    return figure
