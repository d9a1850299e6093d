"""Scores of single images with their captions: CLIP score, and any reward.

A *score* is called as ``score(images, captions)`` with images [B, 1 or 3, H, W] in [-1, 1] and B captions (or None),
and returns [B] float32. Its mean over samples is the metric, and std / sqrt(N) its standard error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ratiograph.algebra.rewards import Reward
from ratiograph.core.files import expanded
from ratiograph.core.types import Condition
from ratiograph.data import captions as captions_format
from ratiograph.evaluation.features import to_pixels
from ratiograph.evaluation.result_cache import component_identity

__all__ = ["ClipScore", "ImageScore", "RewardScore"]


class ImageScore:
    """Base class."""

    label: str
    needs_captions = False
    network: nn.Module
    """Exists after ``load``."""

    def load(self) -> Self:
        """Reads the weights; returns itself.

        Raises:
            FileNotFoundError: they are not there; names file, size and command.
        """
        return self

    def to(self, device: torch.device) -> Self:
        self.network.to(device)
        return self

    def __call__(self, images: Tensor, captions: Sequence[str] | None) -> Tensor:
        raise NotImplementedError

    def identity(self) -> str:
        """Changes whenever the scores do."""
        raise NotImplementedError


class ClipScore(ImageScore):
    """100 cos(f(image), g(caption)) of a CLIP model (Hessel et al. 2021, in torchmetrics' scale).

    Args:
        folder: of a CLIP model as transformers saves it, with tokenizer and image processor.
        repository: where the folder can be fetched from, for the message if it is not there.
    """

    label, needs_captions = "CLIP score", True
    files = (
        ("config.json",),
        ("model.safetensors", "model.safetensors.index.json"),
        ("preprocessor_config.json", "processor_config.json"),
        ("tokenizer.json", "vocab.json"),
    )
    """The folder must have one file of each group."""

    def __init__(self, *, folder: str, repository: str = "openai/clip-vit-large-patch14"):
        self.folder, self.repository = expanded(folder), repository

    def load(self):
        if hasattr(self, "network"):
            return self
        has = [any((self.folder / name).is_file() for name in names) for names in self.files]
        if not all(has):
            raise FileNotFoundError(
                f"'{self.label}' needs {self.folder}/model.safetensors (1,711 MB for clip-vit-large-patch14) with its "
                f"tokenizer, and there is no {self.files[has.index(False)][0]}. Fetch it once: hf download "
                f"{self.repository} --local-dir {self.folder}"
            )
        try:
            from transformers import CLIPModel, CLIPProcessor
        except ImportError as error:
            raise ValueError("CLIP scores need transformers: pip install 'ratiograph[text2image]'") from error
        network, info = CLIPModel.from_pretrained(
            self.folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        if info["missing_keys"]:
            raise ValueError(f"{self.folder} lacks {min(info['missing_keys'])} of a CLIP model: fetch it again")
        self.network = network.requires_grad_(False).eval()
        self.processor = CLIPProcessor.from_pretrained(self.folder, local_files_only=True)
        return self

    @torch.no_grad()
    def __call__(self, images, captions):
        pixels = to_pixels(images).to("cpu", torch.uint8)
        inputs = self.processor(
            text=list(captions),
            images=list(pixels),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self.network.config.text_config.max_position_embeddings,
        )
        found = self.network(**inputs.to(self.network.device))
        return 100 * functional.cosine_similarity(found.image_embeds, found.text_embeds).float()

    def identity(self):
        sizes = {path.name: path.stat().st_size for path in sorted(self.folder.glob("*")) if path.is_file()}
        return f"{type(self).__name__}:{self.folder.resolve()}:{sizes}"


class RewardScore(ImageScore):
    """log R(image, caption) of a reward, as its own class scales it: HPSv2's is 100 times the cosine, as published.

    Args:
        reward: judges images (not latents) and, if it reads captions, ``Condition.caption``.
        label: in tables.
    """

    def __init__(self, *, reward: Reward, label: str = "log reward"):
        self.network, self.label = reward, label

    def load(self):
        self.network.load()
        return self

    @torch.no_grad()
    def __call__(self, images, captions):
        condition = Condition(caption=None if captions is None else captions_format.pack(captions))
        levels = to_pixels(images)[:, : images.shape[1]] / 127.5 - 1
        return self.network.log_reward(levels, condition).float()

    def identity(self):
        return f"{type(self).__name__}:{component_identity(self.network)}"
