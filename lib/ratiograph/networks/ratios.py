"""Ratio estimators: l = log p_t(x_t) / q_t(x_t), the logit of a real-against-student classifier of noisy samples.

Notation: real (or teacher) samples are the class 1, student samples 0, so an optimal classifier is D = sigmoid(l).
Three sources of features: the frozen teacher's encoder, the student score's encoder, and an encoder of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import MinLen
from torch import Tensor, nn

from ratiograph.core.contracts import Denoiser, Evaluation, RatioEstimator
from ratiograph.core.domains import PositiveInt, Scale
from ratiograph.core.types import Noisy, expand
from ratiograph.networks.architectures.blocks import NoiseEmbedding, group_norm, zero_
from ratiograph.networks.compilation import compile_blocks
from ratiograph.networks.denoisers import autocast
from ratiograph.networks.weights.weight_files import load_part, load_weights, locate_weights, weights_facts

__all__ = [
    "EncoderRatio",
    "StudentScoreHeadRatio",
    "StudentScoreMeanRatio",
    "TeacherFeatureRatio",
]


class PretrainedRatio(RatioEstimator):
    """Base class of estimators that may start from trained weights.

    Args:
        weights: safetensors file of a trained estimator to start from, such as the ``ratio.safetensors`` of an earlier
            run; None starts at l = 0.
    """

    def __init__(self, *, weights: str | None = None):
        super().__init__()
        self.weights = weights

    def load(self) -> None:
        if self.weights is not None:
            load_weights(locate_weights(self.weights), self)

    def file_facts(self) -> dict[str, object]:
        """As of `contracts.Identified`."""
        return weights_facts(self.weights)


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


def _map_channels(maps: Sequence[int], network: Denoiser | None, estimator: RatioEstimator, node: str) -> list[int]:
    """Channels of the feature maps ``maps`` of ``network``, which is the graph's ``node``.

    Raises:
        ValueError: the graph has no such node, or the node no such map.
    """
    name = type(estimator).__name__
    channels = getattr(network, "feature_channels", None)
    if channels is None:
        raise ValueError(
            f"{name} needs a {node} with feature maps: bind Distillation.{node} to a network, or use "
            "EncoderRatio, which has an encoder of its own"
        )
    if max(maps) >= len(channels) or min(maps) < -len(channels):
        raise ValueError(
            f"{name}.feature_maps={tuple(maps)}: the {node} has {len(channels)} feature maps, 0 to {len(channels) - 1}"
        )
    return [channels[k] for k in maps]


class _HeadsRatio(PretrainedRatio):
    """Small time-conditioned heads on some feature maps of another node's encoder, their logits summed."""

    autocast_dtype: torch.dtype | None = None

    def __init__(self, feature_maps: Sequence[int], width: int, weights: str | None):
        super().__init__(weights=weights)
        self.feature_maps, self.width = tuple(feature_maps), width
        self.noise_embedding = NoiseEmbedding(width)
        self.heads = nn.ModuleList()

    def _add_heads(self, network: Denoiser | None, node: str) -> None:
        channels = _map_channels(self.feature_maps, network, self, node)
        self.heads.extend(_Head(c, self.width, self.width) for c in channels)

    def _logit(self, features: Sequence[Tensor], noisy: Noisy) -> Tensor:
        relative_sigma = noisy.sigma / noisy.alpha
        with autocast(relative_sigma.device, self.autocast_dtype):
            embedding = F.silu(self.noise_embedding(relative_sigma.log() / 4))
            logits = [head(features[k], embedding) for head, k in zip(self.heads, self.feature_maps, strict=True)]
        return torch.stack([logit.to(relative_sigma.dtype) for logit in logits]).sum(0)


class TeacherFeatureRatio(_HeadsRatio):
    """Heads on the frozen teacher's encoder features (f-distill §5), which cost no pass of their own.

    Args:
        feature_maps: which of the teacher's feature maps to read, by index; -1 is the middle of the U-Net.
        width: channels of a head.
        weights: trained heads to start from.
    """

    on_teacher = True

    def __init__(
        self,
        *,
        feature_maps: Annotated[Sequence[int], MinLen(1)] = (0, 1, 2),
        width: PositiveInt = 64,
        weights: str | None = None,
    ):
        super().__init__(feature_maps, width, weights)

    def connect(self, teacher, student_score):
        self._add_heads(teacher, "teacher")

    def log_ratio(self, evaluation: Evaluation) -> Tensor:
        return self._logit(evaluation.teacher_encoding.features, evaluation.noisy)


class StudentScoreHeadRatio(_HeadsRatio):
    """A head on the student score's own encoder, which learns both tasks (DMD2's bottleneck head, Yin et al. 2024).

    Args:
        feature_maps: which of its feature maps to read; the bottleneck by default.
        width: channels of a head.
        weights: a trained head to start from.
    """

    on_student_score = True

    def __init__(
        self,
        *,
        feature_maps: Annotated[Sequence[int], MinLen(1)] = (-1,),
        width: PositiveInt = 64,
        weights: str | None = None,
    ):
        super().__init__(feature_maps, width, weights)

    def connect(self, teacher, student_score):
        self._add_heads(student_score, "student_score")

    def log_ratio(self, evaluation: Evaluation) -> Tensor:
        return self._logit(evaluation.student_score_encoding.features, evaluation.noisy)


class StudentScoreMeanRatio(RatioEstimator):
    """The mean of the student score's bottleneck features as the logit, without weights of its own.

    From SiDA (Zhou et al. 2024); Di-Bregman uses it on CIFAR-10. l does not start at 0.

    Args:
        feature_map: which feature map to average; the bottleneck by default.
    """

    on_student_score = True

    def __init__(self, *, feature_map: int = -1):
        super().__init__()
        self.feature_map = feature_map

    def connect(self, teacher, student_score):
        _map_channels((self.feature_map,), student_score, self, "student_score")

    def log_ratio(self, evaluation: Evaluation) -> Tensor:
        features = evaluation.student_score_encoding.features[self.feature_map]
        return features.flatten(1).to(evaluation.noisy.sigma.dtype).mean(1)


class EncoderRatio(PretrainedRatio):
    """A network of its own: a time-conditioned encoder, the mean of its last features, and one linear layer.

    Args:
        network: ``UNet`` or ``MLP``; its decoder is dropped.
        sigma_data: standard deviation of the clean data, which scales the input as EDM's c_in does.
        encoder_weights: safetensors file of an ``EDM`` denoiser with the same network, whose encoder to start from.
        weights: a trained estimator to start from.
        compiled: whether the network's blocks are compiled by torch when they first run, see `compilation`.
    """

    autocast_dtype: torch.dtype | None = None

    def __init__(
        self,
        *,
        network: nn.Module,
        sigma_data: Scale = 0.5,
        encoder_weights: str | None = None,
        weights: str | None = None,
        compiled: bool = False,
    ):
        super().__init__(weights=weights)
        self.network, self.sigma_data, self.encoder_weights = network, sigma_data, encoder_weights
        self.compiled = compiled
        network.drop_decoder()
        if compiled:
            compile_blocks(network)
        self.out = zero_(nn.Linear(network.feature_channels[-1], 1))
        self.shape, self.class_count = network.shape, network.classes

    def load(self) -> None:
        if self.encoder_weights is not None:
            load_part(locate_weights(self.encoder_weights), self.network, prefix="network.")
        super().load()

    def file_facts(self) -> dict[str, object]:
        """As of `contracts.Identified`."""
        return {"encoder_" + name: fact for name, fact in weights_facts(self.encoder_weights).items()} | (
            super().file_facts()
        )

    def log_ratio(self, evaluation: Evaluation) -> Tensor:
        y, s = evaluation.noisy.rescaled()
        c_in = (s.square() + self.sigma_data**2).rsqrt()
        with autocast(y.device, self.autocast_dtype):
            encoding = self.network.encode(expand(c_in, y) * y, s.log() / 4, evaluation.condition)
            last = F.silu(encoding.features[-1])
            pooled = last.flatten(2).mean(2) if y.ndim > 2 else last
        return self.out(pooled.to(self.out.weight.dtype)).squeeze(1)
