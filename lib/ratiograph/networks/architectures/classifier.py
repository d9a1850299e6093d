"""The digit classifier, whose features and labels the evaluation uses.

Notation: images x [B, 1, 28, 28] in [-1, 1]; features f(x) [B, 64]; logits [B, 10] of the classes 0..9.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge, MultipleOf
from torch import Tensor, nn
from torch.nn import functional

from ratiograph.core.domains import PositiveInt
from ratiograph.networks.weights.weight_files import load_weights, shipped, weights_facts

__all__ = ["DigitClassifier"]

SHIPPED_WEIGHTS = shipped("mnist_classifier")


def _block(inputs: int, outputs: int, *, kernel: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(8, outputs), nn.SiLU())


class DigitClassifier(nn.Module):
    """A small convolutional network for 28x28 grey digits, 164 thousand parameters at the default width.

    The features are the outputs of a linear layer, before any non-linearity, so that their distribution over
    images is closer to the Gaussian that the Fréchet distance takes it for.

    Args:
        width: channels of the first layer, a multiple of 8; the later ones have 2 and 3 times as many.
        feature_size: number of features.
        weights: safetensors file that ``load`` reads; None is the one in the package, for the default sizes.
    """

    classes = 10

    def __init__(
        self,
        *,
        width: Annotated[int, Ge(8), MultipleOf(8)] = 32,
        feature_size: PositiveInt = 64,
        weights: str | None = None,
    ):
        super().__init__()
        self.weights = Path(weights) if weights else SHIPPED_WEIGHTS
        self.layers = nn.Sequential(
            _block(1, width, kernel=5, stride=2),  # 28 x 28 -> 14 x 14
            _block(width, 2 * width, kernel=3, stride=1),
            _block(2 * width, 3 * width, kernel=3, stride=2),  # -> 7 x 7
            _block(3 * width, 3 * width, kernel=3, stride=1),
        )
        self.to_features = nn.Linear(3 * width, feature_size)
        self.to_logits = nn.Linear(feature_size, 10)

    def load(self) -> DigitClassifier:
        """Reads the trained weights and freezes them; returns itself.

        Raises:
            FileNotFoundError: there is no such file; gin/mnist_classifier.gin makes one.
            ValueError: the file is damaged, or of a network of other sizes.
        """
        load_weights(self.weights, self)
        return self.requires_grad_(False).eval()

    def file_facts(self) -> dict[str, object]:
        """As of `contracts.Identified`."""
        return weights_facts(str(self.weights))

    def features(self, x: Tensor) -> Tensor:
        """Images [B, 1, 28, 28] in [-1, 1] -> features [B, feature_size]."""
        return self.to_features(self.layers(x).mean(dim=(2, 3)))

    def classify(self, features: Tensor) -> Tensor:
        """Features [B, feature_size] -> logits [B, 10]."""
        return self.to_logits(functional.silu(features))

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 1, 28, 28] in [-1, 1] -> logits [B, 10]."""
        return self.classify(self.features(x))


@torch.no_grad()
def classify_all(classifier: DigitClassifier, images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Features [N, D] and logits [N, 10] of images [N, 1, 28, 28], computed in batches; both on the CPU."""
    device = next(classifier.parameters()).device
    features = [classifier.features(part.to(device)) for part in images.split(batch_size)]
    logits = [classifier.classify(part) for part in features]
    return torch.cat(features).cpu(), torch.cat(logits).cpu()
