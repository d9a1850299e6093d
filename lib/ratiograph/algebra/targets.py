"""Targets r* of the ratio r = q/p: 1, or R_t/Z for the reward-tilted p*(x0) = R(x0) p(x0) / Z.

Notation: R_t(x_t) = E_p[R(x0) | x_t], Z = E_p[R] the same for every t, mu = mu_p(x_t) the teacher's denoiser.
Differentiating D_h(r || r*) with r* = R_t/Z gives the field

    v = omega(r) (s_q - s_p) - omega(r*) grad_x log r*,

so the correction is *subtracted*. Eq. 35 of Di-Bregman (arXiv 2510.16983) prints it with the opposite sign; the sign
here is the derived one, and agrees with finite differences of the divergence (``test_field.py``): for KL the
field must be s_q - s_{p*} with s_{p*} = s_p + grad log R_t. Z is needed too: only for KL is omega(R_t/Z) free of it.

What a reward without a gradient (a black box) allows. Every field at x_t whose rest is q = p* needs grad log r* there:
``Term`` and ``AbsorbedTerm`` rest where d = grad log r*, whatever omega > 0, and a field made of d and numbers alone,
g(r, r*) d, rests where d = 0, at q = p: weights cannot tilt. Only the estimate of the ratio can do with log r* alone.
For any function g of x_t, E_p[r*(x0) g(x_t)] = E_p*[g(x_t)], as p* noised is p*_t: positives x0 ~ p weighted by
r*(x0) = R(x0)/Z are positives of p*, at every t, so that the logistic loss E_p[r* softplus(-l)] + E_q[softplus(l)] is
least at l = log p*_t/q_t, and the field omega(l) (-grad l) rests at q = p* only. That is ``RewardWeighted``: neither
R_t nor its gradient appears, nor is anything approximated, but a reward that few samples of p meet is learnt from those
few, the share 1 / E_p[r*^2] of the positives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ratiograph.algebra.directions import Direction
from ratiograph.algebra.rewards import Reward, check_means, take_means
from ratiograph.core.contracts import Evaluation, Needs
from ratiograph.core.distributed import gather, ranks
from ratiograph.core.domains import PositiveInt
from ratiograph.core.types import Batch, expand

__all__ = [
    "CleanTilted",
    "MatchTeacher",
    "RewardTilted",
    "RewardTiltedNoJacobian",
    "RewardWeighted",
    "Target",
]


class Target(nn.Module):
    """Base class."""

    needs = Needs()
    requires: tuple[str, ...] = ()
    needs_samples = False
    """Whether ``fit`` must be called with samples of p before training."""
    weighs_positives = False
    """Whether r* enters as weights of the ratio's positives, so that p stands for p* in the ratio."""

    def check(self, direction: Direction) -> None:
        """Raises a ValueError where ``direction`` cannot lead to this target."""

    def load(self) -> None:
        """Loads pretrained weights, if the target has any. Never called in a dry run."""

    def fit(self, samples: Iterable[Batch]) -> None:
        """Estimates what must be known before training from samples of p."""

    def log_target(self, evaluation: Evaluation) -> tuple[Tensor, Tensor] | None:
        """(log r* [B], grad_x log r* [B, ...]) without a graph, or None where r* is 1 everywhere."""
        raise NotImplementedError


class MatchTeacher(Target):
    """r* = 1: the student is to match the teacher."""

    def log_target(self, evaluation):
        return None


def log_mean_reward(log_reward: Tensor) -> tuple[Tensor, Tensor]:
    """(log Z, its standard error) [] float64 from log R [N] of N > 1 samples of p: log-mean-exp (Di-Bregman Eq. 31).

    The error is the delta method's, std(R) / (mean(R) sqrt(N)); it cannot see a reward that no sample has met.
    """
    log_reward = log_reward.double()
    log_mean = torch.logsumexp(log_reward, 0) - math.log(len(log_reward))
    return log_mean, (log_reward - log_mean).exp().std() / math.sqrt(len(log_reward))


def check_differentiable(target: nn.Module, reward: Reward) -> None:
    """Raises a ValueError that names the alternative if ``reward`` has no gradient."""
    if not reward.differentiable:
        raise ValueError(
            f"{type(target).__name__} needs the gradient of log R, and this {type(reward).__name__} has none: use "
            "the target RewardWeighted with the direction RatioGradient, which needs only values of log R"
        )


class Tilted(Target):
    """Base class of targets r* = R_t/Z that hold a reward and estimate or are given log Z.

    Args:
        reward: log R of clean samples.
        normalizer_samples: samples of p that log Z is estimated from (Eq. 31, log-mean-exp).
        log_normalizer: log Z, if it is known (``tools/fit_normalizer.py`` estimates it once); no sample is read then.

    Raises:
        ValueError: for a reward without a gradient, where the target needs it.
    """

    needs_reward_gradient = False
    """Whether the gradient of log R is needed."""

    def __init__(self, *, reward: Reward, normalizer_samples: PositiveInt = 4096, log_normalizer: float | None = None):
        super().__init__()
        if self.needs_reward_gradient:
            check_differentiable(self, reward)
        self.reward, self.normalizer_samples = reward.requires_grad_(False), normalizer_samples
        self.needs_samples = log_normalizer is None
        self.register_buffer(
            "log_normalizer", torch.tensor(math.nan if log_normalizer is None else float(log_normalizer))
        )

    def load(self) -> None:
        self.reward.load()

    @torch.no_grad()
    def fit(self, samples: Iterable[Batch]) -> None:
        """Sets log Z = log E_p[R] from the first ``normalizer_samples`` of all ranks' ``samples``, unless it was given.

        Raises:
            ValueError: the reward gave NaN or infinity; names it.
        """
        if not self.needs_samples:
            return
        log_rewards, count = [], 0
        for batch in samples:
            log_rewards.append(self.reward(batch.images, batch.condition))
            count += len(batch) * ranks()
            if count >= self.normalizer_samples:
                break
        check_means(take_means(self), f"{count} samples of p")
        self.log_normalizer.copy_(log_mean_reward(gather(torch.cat(log_rewards)))[0])


class RewardTilted(Tilted):
    """r* = R_t/Z to first order, R_t(x_t) ~ R(mu(x_t)) (Di-Bregman Eq. 25), exact vector-Jacobian product through mu.

    The plug-in is biased low by Jensen's inequality wherever p(x0 | x_t) is wide, that is at high noise.
    Z is of the whole p: for a class-conditional teacher it stands for the Z of every class.

    Args:
        reward: log R of clean samples, differentiable.
        normalizer_samples: samples of p that log Z is estimated from (Eq. 31, log-mean-exp).
        log_normalizer: log Z, if it is known (``tools/fit_normalizer.py`` estimates it once); no sample is read then.

    Raises:
        ValueError: for a reward without a gradient.
    """

    needs = Needs(teacher_gradient=True)
    requires = ("teacher",)
    needs_reward_gradient = True

    def log_expected_reward(self, evaluation: Evaluation) -> Tensor:
        """log R_t [B] with a graph to x_t."""
        return self.reward(evaluation.teacher_output, evaluation.condition)

    def log_target(self, evaluation):
        with torch.enable_grad():
            log_reward = self.log_expected_reward(evaluation)
        # Another tilted term, or a ratio estimator on the teacher's features, may differentiate the same pass again.
        (gradient,) = torch.autograd.grad(log_reward.sum(), evaluation.noisy.x_t, retain_graph=True)
        return log_reward.detach() - self.log_normalizer, gradient


class RewardTiltedNoJacobian(RewardTilted):
    """``RewardTilted`` with the Jacobian of mu replaced by I/alpha, its limit at small noise: no pass back through mu.

    Args:
        reward: log R of clean samples.
        normalizer_samples: samples of p that log Z is estimated from.
        log_normalizer: log Z, if it is known.
    """

    needs = Needs()

    def log_target(self, evaluation):
        with torch.enable_grad():
            mu = evaluation.teacher_denoised.requires_grad_()
            log_reward = self.reward(mu, evaluation.condition)
        (gradient,) = torch.autograd.grad(log_reward.sum(), mu)
        return log_reward.detach() - self.log_normalizer, gradient / expand(evaluation.noisy.alpha, gradient)


class RewardWeighted(Tilted):
    """r* = R/Z as weights of the ratio's positives: the tilt of a black box, by the values of log R alone.

    The ratio estimator learns l = log p*_t/q_t, with p* in the place of p, and the term matches it: its field is
    omega(l) (-grad l), at rest at q = p* only (the module's docstring). Exact at every noise level, as no R_t is
    approximated. Every term that asks the ratio is about p* then; scores are not, and are refused beside it.

    An error of log Z is a constant in l, harmless to KL and taken out by ``RatioNormalized``; so is having one Z
    for all classes or captions, each of whose l is off by the log of its own Z over this one.

    Args:
        reward: log R of clean samples, with or without a gradient; never differentiated.
        normalizer_samples: samples of p that log Z is estimated from (Eq. 31, log-mean-exp).
        log_normalizer: log Z, if it is known.
    """

    requires = ("ratio",)
    weighs_positives = True

    def check(self, direction):
        if direction.requires != ("ratio",):
            raise ValueError(
                f"RewardWeighted tilts what the ratio is estimated from, and {type(direction).__name__} knows nothing "
                "of it, so the student would match p: use RatioGradient, or RewardTilted for a reward with a gradient"
            )

    @torch.no_grad()
    def log_weight(self, positives: Batch) -> Tensor:
        """log r* = log R - log Z [B] of clean samples of p."""
        log_reward = self.reward(positives.images, positives.condition)
        return log_reward - self.log_normalizer

    def log_target(self, evaluation):
        return None


class CleanTilted(Target):
    """r* = R/Z of the clean samples x0 themselves, for terms that never noise them; of grad log r* Z is no part.

    Args:
        reward: log R of clean samples, differentiable.

    Raises:
        ValueError: for a reward without a gradient.
    """

    def __init__(self, *, reward: Reward):
        super().__init__()
        check_differentiable(self, reward)
        self.reward = reward.requires_grad_(False)

    def load(self) -> None:
        self.reward.load()

    def log_target(self, evaluation):
        """(log R(x0) [B], grad log R(x0) [B, ...])."""
        with torch.enable_grad():
            x0 = evaluation.x0.detach().requires_grad_()
            log_reward = self.reward(x0, evaluation.condition)
        (gradient,) = torch.autograd.grad(log_reward.sum(), x0)
        return log_reward.detach(), gradient
