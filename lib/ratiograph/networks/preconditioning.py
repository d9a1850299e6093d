"""Denoisers with the preconditioning of VP and VE, the score networks before EDM (Karras et al. 2022, Table 1).

Notation: s = sigma / alpha and y = x_t / alpha, the variance-exploding view of a noisy sample, in which
mu = c_skip y + c_out F(c_in y, c_noise) with four functions of s. EDM's own choice is `denoisers.EDM`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge
from torch import Tensor, nn

from ratiograph.algebra.noising import VariancePreserving
from ratiograph.core.domains import Scale
from ratiograph.core.types import Condition, Encoding, Noisy, expand
from ratiograph.networks.denoisers import EDM, autocast

__all__ = ["VEPreconditioned", "VPPreconditioned"]


class Scalings(NamedTuple):
    """c_skip, c_out, c_in and c_noise, each [B]."""

    skip: Tensor
    out: Tensor
    into: Tensor
    noise: Tensor


class Preconditioned(EDM):
    """Base class: mu = c_skip y + c_out F(c_in y, c_noise), whose scalings a subclass gives.

    Arguments as in `denoisers.EDM`; here ``sigma_data`` is used by EDM's training weight alone.
    """

    def scalings(self, s: Tensor) -> Scalings:
        """The four scalings at the noise levels s = sigma / alpha [B]."""
        raise NotImplementedError

    def encode(self, noisy: Noisy, condition: Condition) -> Encoding:
        y, s = noisy.rescaled()
        c = self.scalings(s)
        with autocast(y.device, self.autocast_dtype):
            encoding = self.network.encode(expand(c.into, y) * y, c.noise, condition)
        return replace(encoding, restore=lambda out: expand(c.skip, y) * y + expand(c.out, y) * out.to(y.dtype))


class VPPreconditioned(Preconditioned):
    """c_skip = 1, c_out = -s, c_in = 1 / sqrt(s^2 + 1), c_noise = (steps - 1) t(s), t as in `VariancePreserving`.

    Args:
        network: a module with ``encode`` and ``decode`` that predicts the noise (DDPM++ of Song et al. 2021).
        beta_min: rate of noising at t = 0.
        beta_max: rate of noising at t = 1.
        steps: number of discrete times the network was trained with, M in EDM's Table 1.
        sigma_data: standard deviation of the clean data, for EDM's training weight.
        weights: safetensors file to start from, or None.
        compiled: whether the network's blocks are compiled by torch when they first run, see `compilation`.
    """

    def __init__(
        self,
        *,
        network: nn.Module,
        beta_min: Scale = 0.1,
        beta_max: Scale = 20.0,
        steps: Annotated[int, Ge(2)] = 1000,
        sigma_data: Scale = 0.5,
        weights: str | None = None,
        compiled: bool = False,
    ):
        super().__init__(network=network, sigma_data=sigma_data, weights=weights, compiled=compiled)
        self.process, self.steps = VariancePreserving(beta_min=beta_min, beta_max=beta_max), steps

    def scalings(self, s: Tensor) -> Scalings:
        noise = (self.steps - 1) * self.process.time_of(s)
        return Scalings(torch.ones_like(s), -s, (s.square() + 1).rsqrt(), noise)


class VEPreconditioned(Preconditioned):
    """c_skip = 1, c_out = s, c_in = 1, c_noise = log(s / 2) (NCSN++ of Song et al. 2021)."""

    def scalings(self, s: Tensor) -> Scalings:
        return Scalings(torch.ones_like(s), s, torch.ones_like(s), (s / 2).log())
