"""Where each way to tilt comes to rest: optima over all densities in one dimension, by quadrature, in float64.

Notation: q is a density on a grid of x0; K_t takes it to q_t on a grid of x_t. The objectives with the weighting KL are

    F(q) = E_t[KL(q_t || p_t) - E_{q_t}[T_t(x_t)]] - c E_q[log R(x0)],   w = 1,

with T_t = log R_t (``ExactTilted``), T_t = log R(mu(x_t)) (``RewardTilted``) or T = 0 and c > 0 (``RewardAscent``).
F is convex in q; Newton's method on log q finds its one minimum to rounding. *Gain* is how far E_q[log R] has moved
from p's value towards p*'s: 1 at p*.

KL(q || p*) at the minimum, and the gain, p being two overlapping Gaussians at -1 and 0.8, and p(t) that of the ring's
runs (sigma from 0.05 to 3):

    reward                exact R_t      R(mu(x_t))      ascent, c = 1 = E[w]   ascent, c = g
    e^(x/2)               < 1e-8, 1.000  3.1e-05, 1.013  2.9e-02, 1.422         9.2e-04, 1.025
    e^x                   < 1e-8, 1.000  4.6e-04, 1.026  1.1e-01, 1.388         5.8e-03, 1.064
    classes by e^1.5      < 1e-8, 1.000  2.7e-03, 1.097  4.4e-02, 1.305         1.0e-02, 1.057

and with sigma from 0.05 to 0.1, noise finer than anything in p, less than 5e-05 and 1.007 for ascent with c = 1. g is
E_t[s^2 / (s^2 + sigma^2)] with p's variance s^2.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from exact import LOCATION, SCALE, TEACHER, TILTS, evaluate, student_of
from ratiograph.algebra.directions import ScoreDifference
from ratiograph.algebra.objective import AbsorbedTerm, Objective, RewardAscent, Term
from ratiograph.algebra.rewards import BlackBoxReward, ClassReward, LinearReward, Reward, ScaledReward
from ratiograph.algebra.targets import RewardTilted
from ratiograph.algebra.weightings import KL, LR
from ratiograph.core.contracts import Nodes
from ratiograph.core.types import Condition, Noisy
from ratiograph.networks.teachers.exact_tilting import MixtureClassifier, tilt
from ratiograph.networks.teachers.mixture import ExactRatio, GaussianMixture
from test_field import full

FREE = Condition()
REWARDS = {
    "e^(x/2)": LinearReward(slope=[0.5]),
    "e^x": LinearReward(slope=[1.0]),
    "classes": ClassReward(classifier=MixtureClassifier(mixture=TEACHER), log_rewards=[0.0, 1.5]),
}
X = torch.linspace(-4.5, 5.5, 161, dtype=torch.float64)
X_T = torch.linspace(-13, 14, 541, dtype=torch.float64)


def levels(low: float, high: float, count: int = 8) -> Tensor:
    """Noise levels at the middles of equal shares of ``KarrasIndex``."""
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return (low ** (1 / 7) + u * (high ** (1 / 7) - low ** (1 / 7))) ** 7


WIDE, FINE = levels(0.05, 3.0), levels(0.05, 0.1)


def at(x: Tensor, sigma: float) -> Noisy:
    one = torch.ones_like(x)
    return Noisy(x[:, None], sigma * one, one, sigma * one)


def log_masses(mixture: GaussianMixture) -> Tensor:
    return mixture.log_density(at(X, 0.0), FREE).log_softmax(0)


def first_order(reward: Reward, sigma: float) -> Tensor:
    return reward(TEACHER.denoise(at(X_T, sigma), FREE), FREE)


def exact(reward: Reward, sigma: float) -> Tensor:
    tilted, _ = tilt(reward, TEACHER)
    return tilted.log_density(at(X_T, sigma), FREE) - TEACHER.log_density(at(X_T, sigma), FREE)


def optimum(
    log_p: Tensor,
    sigmas: Tensor,
    pull: Tensor,
    tilts: list[Tensor] | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """log q [N] at the minimum of F: ``pull`` is c log R on the grid, ``tilts`` T_t and ``weights`` w at each level.

    Stationarity is E_t[K_t^T (log q_t/p_t - T_t)] = c log R + const; its Jacobian with respect to log q is the mean of
    K_t^T diag(1/q_t) K_t diag(q), symmetric after scaling by sqrt(q).
    """
    kernels = [torch.exp(-(X_T[:, None] - X).square() / (2 * sigma**2)) for sigma in sigmas]
    kernels = [kernel / kernel.sum(0) for kernel in kernels]
    shares = (torch.ones_like(sigmas) if weights is None else weights) / len(sigmas)
    target, log_q = pull.clone(), log_p.clone()
    for kernel, values, share in zip(kernels, tilts or [], shares, strict=False):
        target += share * kernel.T @ values
    for _ in range(40):
        q, rest, hessian = log_q.exp(), target.clone(), 1e-10 * torch.eye(len(X), dtype=torch.float64)
        for kernel, share in zip(kernels, shares, strict=True):
            noisy, scaled = kernel @ q, kernel * q.sqrt()
            known = noisy > 1e-200
            log_ratio = torch.where(known, (noisy / (kernel @ log_p.exp())).log(), 0.0)
            rest -= share * kernel.T @ log_ratio
            hessian += share * scaled.T @ (torch.where(known, 1 / noisy, 0.0)[:, None] * scaled)
        force = q.sqrt() * (rest - q @ rest)
        if float(force.norm()) < 1e-11:
            return log_q
        step = torch.linalg.solve(hessian, force) / q.sqrt().clamp_min(1e-150)
        log_q = (log_q + (step * min(1.0, 2 / float(step[q > 1e-12].abs().max()))).clamp(-50, 50)).log_softmax(0)
    raise AssertionError("Newton's method did not converge")


def outcome(log_q: Tensor, reward: Reward) -> tuple[float, float]:
    """(KL(q || p*), gain)."""
    log_p, log_star, log_reward = log_masses(TEACHER), log_masses(tilt(reward, TEACHER)[0]), reward(X[:, None], FREE)
    q, p, star = log_q.exp(), log_p.exp(), log_star.exp()
    return float(q @ (log_q - log_star)), float((q - p) @ log_reward / ((star - p) @ log_reward))


def tilted_at_x_t(reward: Reward, sigmas: Tensor, kind) -> tuple[float, float]:
    tilts = [kind(reward, float(sigma)) for sigma in sigmas]
    return outcome(optimum(log_masses(TEACHER), sigmas, torch.zeros_like(X), tilts), reward)


def climbed(reward: Reward, sigmas: Tensor, coefficient: float) -> tuple[float, float]:
    return outcome(optimum(log_masses(TEACHER), sigmas, coefficient * reward(X[:, None], FREE)), reward)


def common_share(sigmas: Tensor) -> float:
    """g of the objective's docstring for the variance of all of p."""
    masses, means = TEACHER.log_weights.exp(), TEACHER.means[:, 0]
    variance = masses @ (TEACHER.variances[:, 0] + means.square()) - (masses @ means).square()
    return float((variance / (variance + sigmas.square())).mean())


TABLE = {
    "e^(x/2)": ((3.1e-5, 1.013), (2.9e-2, 1.422), (9.2e-4, 1.025)),
    "e^x": ((4.6e-4, 1.026), (1.1e-1, 1.388), (5.8e-3, 1.064)),
    "classes": ((2.7e-3, 1.097), (4.4e-2, 1.305), (1.0e-2, 1.057)),
}


@pytest.mark.parametrize("name", REWARDS)
def test_the_table(name):
    reward = REWARDS[name]
    divergence, gain = tilted_at_x_t(reward, WIDE, exact)
    assert abs(divergence) < 1e-8
    assert gain == pytest.approx(1, abs=1e-5)
    found = (
        tilted_at_x_t(reward, WIDE, first_order),
        climbed(reward, WIDE, 1.0),
        climbed(reward, WIDE, common_share(WIDE)),
    )
    for (divergence, gain), (told_divergence, told_gain) in zip(found, TABLE[name], strict=True):
        assert divergence == pytest.approx(told_divergence, rel=0.05)
        assert gain == pytest.approx(told_gain, abs=1.5e-3)


def test_fine_noise_makes_climbing_exact():
    for reward in REWARDS.values():
        divergence, gain = climbed(reward, FINE, 1.0)
        assert 0 < divergence < 5e-5
        assert 1 < gain < 1.007
    wrong, _ = climbed(REWARDS["classes"], FINE, 0.5)
    assert wrong > 1e-2, "half the coefficient is another target"


def test_weights_that_grow_with_the_noise_tilt_far_too_much():
    """w = sigma^2 with c = E[w]: almost four times the tilt of e^(x/2), where w = 1 makes 1.4 times of it."""
    reward, weights = REWARDS["e^(x/2)"], WIDE.square()
    pull = weights.mean() * reward(X[:, None], FREE)
    divergence, gain = outcome(optimum(log_masses(TEACHER), WIDE, pull, weights=weights), reward)
    assert gain == pytest.approx(3.78, rel=0.01)
    assert divergence == pytest.approx(2.06, rel=0.05)


def test_the_coefficient_of_a_gaussian_is_the_one_of_the_docstring():
    """p = N(m, s^2), R = e^(bx): the optimum is N(m + b s^2 c / g, s^2), for every c."""
    mean, std, slope = 0.3, 0.7, 0.8
    gaussian = GaussianMixture(means=[[mean]], std=std)
    g = float((std**2 / (std**2 + WIDE.square())).mean())
    for coefficient in (1.0, g, 0.3):
        q = optimum(log_masses(gaussian), WIDE, coefficient * slope * X).exp()
        centre = float(q @ X)
        assert centre == pytest.approx(mean + slope * std**2 * coefficient / g, abs=1e-4)
        assert float(q @ (X - centre).square()) == pytest.approx(std**2, abs=1e-3)
    assert g < 0.7, "far from E[w] = 1"


def test_far_modes_get_their_masses_whatever_the_noise():
    """Modes further apart than the largest sigma are told apart at every level: c = E[w] is right for their masses."""
    masses = {}
    for distance in (1.0, 12.0):
        p = GaussianMixture(means=[[-distance / 2], [distance / 2]], std=0.15)
        x = p.means[:, 0] + torch.zeros(2, dtype=torch.float64)
        # Between two modes alone the equation is that of log a_1/a_2: its mean under either mode, less the other's.
        nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(80))
        weights = weights / weights.sum()

        def slope(mass: float, p=p, x=x, nodes=nodes, weights=weights) -> float:
            q = GaussianMixture(means=p.means.tolist(), std=0.15, weights=[1 - mass, mass])
            total = 0.0
            for sigma in levels(0.05, 1.0):
                noisy = [at(centre + math.hypot(0.15, sigma) * nodes, float(sigma)) for centre in x]
                low, high = (weights @ (q.log_density(n, FREE) - p.log_density(n, FREE)) for n in noisy)
                total += float(high - low) / 8
            return total

        masses[distance] = slope(0.75)
    assert masses[12.0] == pytest.approx(math.log(3), rel=1e-3)
    assert masses[1.0] < 0.8 * math.log(3)


# --- the term -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", [LinearReward(slope=[0.7]), TILTS["classes"].reward], ids=["linear", "classes"])
def test_field_is_the_gradient_of_minus_the_expected_reward(reward):
    """``x0.backward`` of the field against finite differences of -c E[log R(m + s z)]."""
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])

    def expected(m: float, s: float) -> float:
        return float(density @ reward((m + s * z)[:, None], FREE))

    theta = torch.tensor([LOCATION, SCALE], dtype=torch.float64, requires_grad=True)
    x0, term = (theta[0] + theta[1] * z)[:, None], RewardAscent(reward=reward, coefficient=0.4)
    evaluation = evaluate(at(torch.zeros_like(z), 1.0), x0, term.needs, student_of(LOCATION, SCALE))
    x0.backward(term.field(evaluation) * density[:, None])
    step = 1e-4
    m = (expected(LOCATION + step, SCALE) - expected(LOCATION - step, SCALE)) / (2 * step)
    s = (expected(LOCATION, SCALE + step) - expected(LOCATION, SCALE - step)) / (2 * step)
    torch.testing.assert_close(theta.grad, -0.4 * torch.tensor([m, s], dtype=torch.float64), rtol=1e-6, atol=1e-8)


def test_both_terms_rest_at_the_tilted_gaussian():
    """For a Gaussian p and c = g the two fields, averaged over z and noise, cancel at q = p*, and not at p."""
    std, slope, sigma = 0.7, 0.8, 0.5
    teacher = GaussianMixture(means=[[0.3]], std=std)
    g = std**2 / (std**2 + sigma**2)
    objective = Objective(
        terms={
            "distribution": Term(direction=ScoreDifference(), weighting=KL()),
            "reward": RewardAscent(reward=LinearReward(slope=[slope]), coefficient=g),
        }
    )
    totals = {}
    for name, student in (("p*", tilt(LinearReward(slope=[slope]), teacher)[0]), ("p", teacher)):
        x0 = student.sample(2000, torch.Generator().manual_seed(0), dtype=torch.float64)
        x0 = torch.cat([x0, 2 * student.means - x0])  # symmetric: the mean is exact
        noise = torch.randn(2000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        noisy = Noisy(x0 + sigma * torch.cat([noise, -noise]), *(full(4000, v) for v in (sigma, 1.0, sigma)))
        evaluation = evaluate(noisy, x0, objective.needs, student)
        evaluation.nodes = type(evaluation.nodes)(teacher, student)
        totals[name] = float(torch.stack(list(objective.fields(evaluation).values())).sum(0).mean())
    assert totals["p*"] == pytest.approx(0, abs=1e-6)
    assert totals["p"] == pytest.approx(-g * slope, rel=1e-6)


@pytest.mark.parametrize(("make", "row", "moved"), [(Term, LR, True), (AbsorbedTerm, LR, False), (Term, KL, False)])
def test_one_normaliser_for_all_captions_moves_the_rest_of_the_subtracted_tilt_alone(make, row, moved):
    """The field at q = p*, p Gaussian and R = e^(bx), at every x_t: with the Z of p and with another."""
    mean, std, slope, sigma = 0.3, 0.7, 0.8, 0.5
    teacher, reward = GaussianMixture(means=[[mean]], std=std), LinearReward(slope=[slope])
    student = tilt(reward, teacher)[0]
    hidden = std**2 * sigma**2 / (std**2 + sigma**2)  # variance of x0 given x_t, of which first order knows nothing
    log_z = slope * mean + slope**2 * (std**2 - hidden) / 2
    noisy = at(torch.linspace(-3, 3, 41, dtype=torch.float64), sigma)
    largest = {}
    for shift in (0.0, 1.0):
        target = RewardTilted(reward=reward, log_normalizer=log_z + shift).double()
        term = make(direction=ScoreDifference(), weighting=row(), target=target)
        evaluation = evaluate(noisy, noisy.x_t, term.needs, student)
        evaluation.nodes = Nodes(teacher, student, ExactRatio(student=student))
        largest[shift] = float(term.velocity(evaluation).abs().max())
    assert largest[0.0] < 1e-6
    assert largest[1.0] > 0.05 if moved else largest[1.0] < 1e-6


def test_it_asks_no_network_and_leaves_no_graph():
    term = RewardAscent(reward=LinearReward(slope=[0.7]), coefficient=2.0)
    assert not term.requires
    x0 = torch.randn(5, 1, dtype=torch.float64, requires_grad=True)
    noisy = at(torch.zeros(5, dtype=torch.float64), 1.0)
    field = term.field(evaluate(noisy, x0, term.needs, student_of(LOCATION, SCALE)))
    torch.testing.assert_close(field, torch.full((5, 1), -1.4, dtype=torch.float64), rtol=1e-6, atol=0)
    assert not field.requires_grad
    assert x0.grad is None


def test_beta_divides_the_field():
    x0, noisy = torch.zeros(5, 1, dtype=torch.float64), at(torch.zeros(5, dtype=torch.float64), 1.0)
    term = RewardAscent(reward=ScaledReward(reward=LinearReward(slope=[0.7]), beta=0.5))
    field = term.field(evaluate(noisy, x0, term.needs, student_of(LOCATION, SCALE)))
    torch.testing.assert_close(field, torch.full((5, 1), -1.4, dtype=torch.float64), rtol=1e-6, atol=0)


def test_a_black_box_cannot_be_climbed():
    with pytest.raises(ValueError, match=r"CleanTilted needs the gradient.*RewardWeighted"):
        RewardAscent(reward=BlackBoxReward(reward=LinearReward(slope=[0.7])))
