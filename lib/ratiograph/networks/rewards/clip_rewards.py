"""Rewards from CLIP's embeddings: how well an image fits its caption, and how pleasing it is.

Notation: u(image) and v(caption) are CLIP's embeddings [E], normalised; their product is the cosine of their angle;
a is the model's own logit scale, 100 in the published models. Captions come from ``Condition.caption``. Images
in [-1, 1] are resized and cropped to the tower's size (bicubic with antialiasing, as by the models' image processors,
but without rounding to 8 bits), so that everything is differentiable.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from ratiograph.core.files import Missing, expanded, sampled_digest
from ratiograph.networks.rewards.image_rewards import (
    CaptionCache,
    PretrainedReward,
    cropped,
    empty,
    fill,
    normalised,
    path_of,
)
from ratiograph.networks.weights.pipeline_files import HUB, missing_package, weights_of
from ratiograph.networks.weights.weight_files import read_state

__all__ = ["AestheticReward", "CLIPReward", "PickScoreReward"]

CONFIG_FILES = ("*.json", "*.txt")


def _tower(width: int, layers: int, heads: int, **others: object) -> dict[str, object]:
    """A tower's configuration in transformers' names."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width}
    return {**sizes, "num_hidden_layers": layers, "num_attention_heads": heads, **others}


LARGE = {
    "projection_dim": 768,
    "vision_config": _tower(1024, 24, 16, patch_size=14, image_size=224),
    "text_config": _tower(768, 12, 12),
}
"""OpenAI's CLIP ViT-L/14, 428M parameters, in transformers' names."""
HUGE = {
    "projection_dim": 1024,
    "vision_config": _tower(1280, 32, 16, patch_size=14, image_size=224, hidden_act="gelu"),
    "text_config": _tower(1024, 24, 16, hidden_act="gelu"),
}
"""LAION's CLIP ViT-H/14, 986M parameters."""


class _CLIPTowers(PretrainedReward):
    """Base class: a CLIP model of transformers.

    Args:
        weights: a folder in transformers' format (config.json, safetensors, tokenizer), or ``hf://OWNER/NAME``.
    """

    standard: dict[str, object] = LARGE
    """The architecture, as long as the config.json of the weights is not on this machine."""
    repository = "openai/clip-vit-large-patch14"
    size = "1.7 GB"

    def __init__(self, *, weights: str):
        super().__init__()
        self.weights = weights
        self.config = self._config(expanded(weights)) or self.standard
        self.network = self._empty()
        self.embed_captions, self.tokenizer = CaptionCache(self._embed_captions), None

    @staticmethod
    def _config(folder: Path) -> dict[str, object] | None:
        path = folder / "config.json"
        try:
            return json.loads(path.read_text()) if path.is_file() else None
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}): copy it again") from error

    def _empty(self) -> nn.Module:
        try:
            from transformers import CLIPConfig, CLIPModel
        except ImportError as error:
            raise missing_package("transformers", type(self).__name__) from error
        return empty(lambda: CLIPModel(CLIPConfig.from_dict(dict(self.config))))

    @classmethod
    def locate(cls, *, weights: str) -> None:
        """Checks that what ``load`` reads is there; a model of the hub is downloaded. Errors as of ``load``."""
        cls._folder(weights)

    @classmethod
    def _folder(cls, weights: str) -> Path:
        argument = f"{cls.__name__}.weights"
        folder = path_of(weights, argument, cls._hint(), (*CONFIG_FILES, "model*.safetensors"))
        if not weights_of(folder):
            raise Missing(weights, f"no safetensors file in {argument}={weights!r}: {cls._hint()}")
        return folder

    def load(self) -> None:
        """Reads the weights.

        Raises:
            FileNotFoundError, ValueError: there are none, or they are not a CLIP model's; says how to get them.
        """
        folder = self._folder(self.weights)
        files = weights_of(folder)
        config = self._config(folder)
        if config is not None and config != self.config:  # a model of the hub, whose config.json came with the weights
            self.config, like = config, next(self.network.parameters())
            self.network = self._empty().to(like.device, like.dtype)
        tensors = {name: tensor for path in files for name, tensor in read_state(path).items()}
        fill(self.network, {k: v for k, v in tensors.items() if not k.endswith("position_ids")}, folder)
        self.embed_captions, self.loaded = CaptionCache(self._embed_captions), True

    def file_facts(self) -> dict[str, object]:
        """As of `contracts.Identified`."""
        return {f"weights {self.weights}": sampled_digest(weights_of(self._folder(self.weights)))}

    @classmethod
    def _hint(cls) -> str:
        return (
            f"`hf download {cls.repository} --local-dir FOLDER` ({cls.size}), then {cls.__name__}.weights = "
            f"'FOLDER' (or '{HUB}{cls.repository}')"
        )

    def embed_images(self, images: Tensor) -> Tensor:
        """u [B, E] of ``images`` [B, 3, H, W] in [-1, 1]."""
        size = self.network.config.vision_config.image_size
        pooled = self.network.vision_model(pixel_values=normalised(cropped(images, size))).pooler_output
        return F.normalize(self.network.visual_projection(pooled), dim=1)

    def _embed_captions(self, texts: list[str]) -> Tensor:
        length = self.network.config.text_config.max_position_embeddings
        if self.tokenizer is None:
            self.tokenizer = self._tokenizer()
        tokens = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        pooled = self.network.text_model(input_ids=tokens.input_ids.to(self.network.device)).pooler_output
        return F.normalize(self.network.text_projection(pooled), dim=1)

    def _tokenizer(self) -> Callable:
        from transformers import CLIPTokenizer

        argument = f"{type(self).__name__}.weights"
        folder = path_of(self.weights, argument, self._hint(), CONFIG_FILES)
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise FileNotFoundError(
                f"no tokenizer in {argument}={self.weights!r}: copy vocab.json and merges.txt there, as every CLIP "
                f"model has them (`hf download {CLIPReward.repository} vocab.json merges.txt --local-dir FOLDER`)"
            )
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


class CLIPReward(_CLIPTowers):
    """log R = a <u(image), v(caption)>: CLIP's logit of the pair (Radford et al. 2021), 100 times the similarity.

    It estimates log p(image, caption) / p(image) p(caption) up to a constant, so that R p is p given the caption. The
    published models are far too confident for that; a ``ScaledReward.beta`` of 1 to 10 is usual.

    Args:
        weights: a CLIP model's folder in transformers' format (config.json, safetensors, tokenizer), or
            ``hf://OWNER/NAME``; openai/clip-vit-large-patch14 takes 1.7 GB.
    """

    def score(self, images, condition):
        texts = self.embed_captions(self.captions_of(condition)).to(images)
        return self.network.logit_scale.exp() * (self.embed_images(images) * texts).sum(1)


class PickScoreReward(CLIPReward):
    """log R = a <u(image), v(caption)> of a CLIP ViT-H/14 tuned to people's choices (Kirstain et al. 2023).

    The softmax of two images' log R is the probability that the first is preferred; published scores are these.

    Args:
        weights: the model's folder in transformers' format with its tokenizer, or ``hf://yuvalkirstain/PickScore_v1``,
            3.9 GB.
    """

    standard = HUGE
    repository = "yuvalkirstain/PickScore_v1"
    size = "3.9 GB"


def score_head(width: int) -> nn.Sequential:
    """The published stack of linear layers, ``width`` => 1024 => 128 => 64 => 16 => 1, with dropout between them."""
    one, two, three, four, five = (nn.Linear(a, b) for a, b in pairwise((width, 1024, 128, 64, 16, 1)))
    return nn.Sequential(one, nn.Dropout(0.2), two, nn.Dropout(0.2), three, nn.Dropout(0.1), four, five)


class AestheticReward(_CLIPTowers):
    """log R = the score, about 1 to 10, of LAION's aesthetic predictor (Schuhmann 2022): layers on CLIP ViT-L/14's u.

    Args:
        weights: the CLIP model's folder in transformers' format, or ``hf://openai/clip-vit-large-patch14``, 1.7 GB.
        head: the predictor's own file, ``sac+logos+ava1-l14-linearMSE.pth`` as published or as safetensors, 4 MB.
    """

    source = (
        "`curl -LO https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
        "sac+logos+ava1-l14-linearMSE.pth` (4 MB), then AestheticReward.head = its path"
    )

    def __init__(self, *, weights: str, head: str):
        super().__init__(weights=weights)
        self.head = head
        self.layers = score_head(self.network.config.projection_dim).requires_grad_(False).eval()

    @classmethod
    def locate(cls, *, weights: str, head: str) -> None:
        path_of(head, "AestheticReward.head", cls.source, ())
        cls._folder(weights)

    def load(self) -> None:
        path = path_of(self.head, "AestheticReward.head", self.source, ())
        super().load()
        tensors = read_state(path)
        fill(self.layers, {name.removeprefix("layers."): tensor for name, tensor in tensors.items()}, path)

    def file_facts(self) -> dict[str, object]:
        return super().file_facts() | {f"head {self.head}": sampled_digest([expanded(self.head)])}

    def score(self, images, condition):
        return self.layers(self.embed_images(images)).squeeze(1)
