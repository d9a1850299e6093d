"""Ratio estimators: l = log p_t(x_t) / q_t(x_t), the logit of a real-against-student classifier of noisy samples.

Notation: real (or teacher) samples are the class 1, student samples 0, so an optimal classifier is D = sigmoid(l). The
logistic loss is E_real[softplus(-l)] + E_student[softplus(l)], 2 log 2 at chance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ratiograph.denoisers import Denoiser
from ratiograph.networks.blocks import NoiseEmbedding, group_norm, zero_
from ratiograph.types import Evaluation, expand

__all__ = ["EncoderRatio", "RatioEstimator", "TeacherFeatureRatio"]


class RatioEstimator(nn.Module):
    """Base class."""

    on_teacher = False
    """Whether ``log_ratio`` reads the teacher's features."""

    def connect(self, teacher: Denoiser | None) -> None:
        """Called once by the root, before anything runs, for estimators whose sizes depend on the teacher."""

    def log_ratio(self, evaluation: Evaluation) -> Tensor:
        """l [B] float32 at ``evaluation.noisy``, differentiable with respect to x_t if the evaluation asks for it."""
        raise NotImplementedError

    def loss(self, evaluation: Evaluation, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logistic loss [] on a batch of noisy real and student samples.

        Args:
            evaluation: of all samples.
            real: [B] bool, True where the sample is real; as many real as student samples.

        Returns:
            The loss, and what to log: the accuracy, and E_student[e^l] and E_real[e^-l], both 1 for the exact ratio.
        """
        l = self.log_ratio(evaluation)  # noqa: E741
        loss = 2 * F.softplus(torch.where(real, -l, l)).mean()
        with torch.no_grad():
            accuracy = ((l > 0) == real).float().mean()
            identity_student, identity_real = l[~real].exp().mean(), (-l[real]).exp().mean()
        return loss, {
            "ratio/accuracy": accuracy,
            "ratio/mean_exp_student": identity_student,
            "ratio/mean_exp_real": identity_real,
        }


class _Head(nn.Module):
    """A feature map [B, C, H, W] and an embedding [B, E] => one number [B]."""

    def __init__(self, channels: int, width: int, embedding: int):
        super().__init__()
        self.norm1, self.conv1 = group_norm(channels), nn.Conv2d(channels, width, 1)
        self.affine = nn.Linear(embedding, 2 * width)
        self.norm2, self.conv2 = group_norm(width), nn.Conv2d(width, width, 3, padding=1)
        self.out = zero_(nn.Linear(width, 1))

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, 1)
        h = torch.addcmul(shift, self.norm2(self.conv1(self.norm1(features))), scale + 1)
        h = F.silu(self.conv2(F.silu(h)))
        return self.out(h.mean((2, 3))).squeeze(1)


class TeacherFeatureRatio(RatioEstimator):
    """Small time-conditioned heads on the frozen teacher's encoder features (f-distill §5), their logits summed.

    Args:
        feature_maps: which of the teacher's feature maps to read, by index; -1 is the middle of the U-Net.
        width: channels of a head.
    """

    on_teacher = True
    autocast_dtype: torch.dtype | None = None

    def __init__(self, *, feature_maps: Sequence[int] = (0, 1, 2), width: int = 64):
        super().__init__()
        self.feature_maps, self.width = tuple(feature_maps), width
        self.noise_embedding = NoiseEmbedding(width)
        self.heads = nn.ModuleList()

    def connect(self, teacher: Denoiser | None) -> None:
        channels = getattr(teacher, "feature_channels", None)
        if channels is None:
            raise ValueError(
                "TeacherFeatureRatio needs a teacher with feature maps: bind Distillation.teacher to a network, or use "
                "EncoderRatio, which has an encoder of its own"
            )
        if max(self.feature_maps) >= len(channels) or min(self.feature_maps) < -len(channels):
            raise ValueError(
                f"TeacherFeatureRatio.feature_maps={self.feature_maps}: the teacher has {len(channels)} feature maps, "
                f"0 to {len(channels) - 1}"
            )
        self.heads.extend(_Head(channels[k], self.width, self.width) for k in self.feature_maps)

    def log_ratio(self, evaluation: Evaluation) -> Tensor:
        features = evaluation.teacher_encoding.features
        relative_sigma = evaluation.noisy.sigma / evaluation.noisy.alpha
        enabled = self.autocast_dtype is not None
        device = relative_sigma.device.type
        with torch.autocast(device, dtype=self.autocast_dtype or torch.bfloat16, enabled=enabled):
            embedding = F.silu(self.noise_embedding(relative_sigma.log() / 4))
            logits = [head(features[k], embedding) for head, k in zip(self.heads, self.feature_maps, strict=True)]
        return torch.stack([logit.to(relative_sigma.dtype) for logit in logits]).sum(0)


class EncoderRatio(RatioEstimator):
    """A network of its own: the time-conditioned encoder half, its last features averaged, one linear logit ([S] §4).

    Args:
        network: ``UNet`` or ``MLP``; its decoder is dropped.
        sigma_data: standard deviation of the clean data, which scales the input as EDM's c_in does.
    """

    autocast_dtype: torch.dtype | None = None

    def __init__(self, *, network: nn.Module, sigma_data: float = 0.5):
        super().__init__()
        self.network, self.sigma_data = network, sigma_data
        network.drop_decoder()
        self.out = zero_(nn.Linear(network.feature_channels[-1], 1))

    def log_ratio(self, evaluation: Evaluation) -> Tensor:
        y, s = evaluation.noisy.rescaled()
        c_in = (s.square() + self.sigma_data**2).rsqrt()
        enabled = self.autocast_dtype is not None
        with torch.autocast(y.device.type, dtype=self.autocast_dtype or torch.bfloat16, enabled=enabled):
            encoding = self.network.encode(expand(c_in, y) * y, s.log() / 4, evaluation.condition)
            pooled = F.silu(encoding.features[-1]).flatten(2).mean(2) if y.ndim > 2 else F.silu(encoding.features[-1])
        return self.out(pooled.to(self.out.weight.dtype)).squeeze(1)
