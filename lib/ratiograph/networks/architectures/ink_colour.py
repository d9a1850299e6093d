"""The colour of an image on black: a classifier without weights.

Notation: x [B, 3, H, W] in [-1, 1]; u(x) [B, 3] the direction of the mean of its pixels' light, which does not depend
on brightness and shape; u_k the directions of the K colours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ratiograph.core.domains import Scale
from ratiograph.data.coloured_digits import COLOURS

__all__ = ["InkColour"]

DARK = 1e-3  # mean light of an image that is too dark to have a colour


class InkColour(nn.Module):
    """Logits [B, K] of the colours of `COLOURS`, -|u(x) - u_k|^2 / (2 width^2): smooth in x, greatest for the nearest.

    Args:
        width: standard deviation of a colour's directions about u_k; neighbouring u_k are about 0.55 apart.
    """

    def __init__(self, *, width: Scale = 0.15):
        super().__init__()
        self.width = width
        palette = torch.tensor(list(COLOURS.values()), device="cpu")
        self.register_buffer("directions", functional.normalize(palette, dim=1), persistent=False)

    def load(self) -> InkColour:
        """There is nothing to read; returns itself."""
        return self

    def ink(self, x: Tensor) -> Tensor:
        """u(x) [B, 3], of length 1, or less for images that are nearly black."""
        light = ((x.to(torch.promote_types(x.dtype, torch.float32)) + 1) / 2).clamp(min=0).mean((2, 3))
        return light / (light.norm(dim=1, keepdim=True) + DARK)

    def forward(self, x: Tensor) -> Tensor:
        ink = self.ink(x)
        distances = (ink[:, None] - self.directions.to(ink)).square().sum(2)
        return -distances / (2 * self.width**2)
