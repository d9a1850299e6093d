"""Targets r* of the ratio r = q/p: 1, or R_t/Z for the reward-tilted p*(x0) = R(x0) p(x0) / Z.

Notation: R_t(x_t) = E_p[R(x0) | x_t], Z = E_p[R] the same for every t, mu = mu_p(x_t) the teacher's denoiser.
Differentiating D_h(r || r*) with r* = R_t/Z gives the field

    v = omega(r) (s_q - s_p) - omega(r*) grad_x log r*,

so the correction is *subtracted*. Eq. 35 of Di-Bregman (arXiv 2510.16983) prints it with the opposite sign; the sign
here is the derived one, and agrees with finite differences of the divergence (``tests/test_field.py``): for KL the
field must be s_q - s_{p*} with s_{p*} = s_p + grad log R_t. Z is needed too: only for KL is omega(R_t/Z) free of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ratiograph.rewards import Reward
from ratiograph.types import Batch, Evaluation, Needs, expand

__all__ = ["MatchTeacher", "RewardTilted", "RewardTiltedNoJacobian", "Target"]


class Target(nn.Module):
    """Base class."""

    needs = Needs()
    requires: tuple[str, ...] = ()

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


class RewardTilted(Target):
    """r* = R_t/Z to first order, R_t(x_t) ~ R(mu(x_t)) (Di-Bregman Eq. 25), exact vector-Jacobian product through mu.

    The plug-in is biased low by Jensen's inequality wherever p(x0 | x_t) is wide, that is at high noise.

    Args:
        reward: log R of clean samples.
        normalizer_samples: samples of p that log Z is estimated from (Eq. 31, log-mean-exp).
    """

    needs = Needs(teacher_gradient=True)
    requires = ("teacher",)

    def __init__(self, *, reward: Reward, normalizer_samples: int = 4096):
        super().__init__()
        self.reward, self.normalizer_samples = reward.requires_grad_(False), normalizer_samples
        self.register_buffer("log_normalizer", torch.tensor(math.nan))

    def load(self) -> None:
        self.reward.load()

    @torch.no_grad()
    def fit(self, samples: Iterable[Batch]) -> None:
        """Sets log Z = log E_p[R] from the first ``normalizer_samples`` of ``samples``."""
        log_rewards, count = [], 0
        for batch in samples:
            log_rewards.append(self.reward.log_reward(batch.images, batch.condition))
            count += len(batch)
            if count >= self.normalizer_samples:
                break
        log_reward = torch.cat(log_rewards)
        self.log_normalizer.copy_(torch.logsumexp(log_reward, 0) - math.log(len(log_reward)))

    def log_target(self, evaluation):
        mu = evaluation.teacher_output
        with torch.enable_grad():
            log_reward = self.reward.log_reward(mu, evaluation.condition)
        # Another tilted term, or a ratio estimator on the teacher's features, may differentiate the same pass again.
        (gradient,) = torch.autograd.grad(log_reward.sum(), evaluation.noisy.x_t, retain_graph=True)
        return log_reward.detach() - self.log_normalizer, gradient


class RewardTiltedNoJacobian(RewardTilted):
    """``RewardTilted`` with the Jacobian of mu replaced by I/alpha, its limit at small noise: no pass back through mu.

    Args:
        reward: log R of clean samples.
        normalizer_samples: samples of p that log Z is estimated from.
    """

    needs = Needs()

    def log_target(self, evaluation):
        with torch.enable_grad():
            mu = evaluation.teacher_denoised.requires_grad_()
            log_reward = self.reward.log_reward(mu, evaluation.condition)
        (gradient,) = torch.autograd.grad(log_reward.sum(), mu)
        return log_reward.detach() - self.log_normalizer, gradient / expand(evaluation.noisy.alpha, gradient)
