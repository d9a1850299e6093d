"""Rewards trained on people's rankings of images: HPSv2 and ImageReward."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ratiograph.core.domains import Depth, PositiveInt
from ratiograph.core.files import Missing, sampled_digest
from ratiograph.networks.rewards.clip_rewards import score_head
from ratiograph.networks.rewards.image_rewards import (
    CaptionCache,
    PretrainedReward,
    cropped,
    empty,
    fill,
    normalised,
    padded,
    path_of,
)
from ratiograph.networks.weights.pipeline_files import HUB, missing_package
from ratiograph.networks.weights.weight_files import read_state

__all__ = ["HPSv2Reward", "ImageReward"]


def _file(source: str, argument: str, hint: str, name: str) -> Path:
    """The file ``source``, or the file ``name`` in that folder; arguments and errors as of `path_of`."""
    path = path_of(source, argument, hint, (name,))
    path = path / name if path.is_dir() else path
    if not path.is_file():
        raise Missing(source, f"no {name} in {argument}={source!r}: {hint}")
    return path


class HPSv2Reward(PretrainedReward):
    """log R = a <u(image), v(caption)> of open_clip's ViT-H-14 tuned to people's choices, HPS v2 (Wu et al. 2023).

    a is the model's logit scale, 100. The softmax of two images' log R is the probability that the first is preferred;
    published scores are the cosine, log R / a, around 0.27. Images that are not square are padded, as in HPS v2.

    Args:
        weights: ``HPS_v2.1_compressed.pt`` (or v2) as published, the same state dict as safetensors, a folder that
            holds the former, or ``hf://xswu/HPSv2``; 2 GB.
        model: open_clip's name of the architecture.

    Raises:
        ValueError: open_clip is not installed, or knows no such model.
    """

    published = "HPS_v2.1_compressed.pt"
    hint = f"`hf download xswu/HPSv2 {published} --local-dir FOLDER` (2 GB), then HPSv2Reward.weights = 'FOLDER'"

    def __init__(self, *, weights: str, model: str = "ViT-H-14"):
        super().__init__()
        self.weights, self.model = weights, model
        try:
            import open_clip
        except ImportError as error:
            raise missing_package("open_clip_torch", "HPSv2Reward") from error
        config = open_clip.get_model_config(model)
        if config is None:
            raise ValueError(f"HPSv2Reward.model={model!r} is no model of open_clip; HPS v2 is a ViT-H-14")
        self.network = empty(lambda: open_clip.model.CLIP(**config))
        self.tokenizer = open_clip.get_tokenizer(model)
        self.embed_captions = CaptionCache(self._embed_captions)

    @classmethod
    def locate(cls, *, weights: str) -> Path:
        """The file that ``load`` reads; that of a model of the hub is downloaded. Errors as of ``load``."""
        return _file(weights, "HPSv2Reward.weights", cls.hint, cls.published)

    def file_facts(self) -> dict[str, object]:
        """As of `contracts.Identified`."""
        return {f"weights {self.weights}": sampled_digest([self.locate(weights=self.weights)])}

    def load(self) -> None:
        """Reads the weights.

        Raises:
            FileNotFoundError, ValueError: there are none, or they do not fit; says how to get them.
        """
        path = self.locate(weights=self.weights)
        fill(self.network, read_state(path), path)
        self.embed_captions, self.loaded = CaptionCache(self._embed_captions), True

    def _embed_captions(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(texts, context_length=self.network.context_length)
        return self.network.encode_text(tokens.to(self.network.logit_scale.device), normalize=True)

    def score(self, images, condition):
        texts = self.embed_captions(self.captions_of(condition)).to(images)
        pixels = normalised(padded(images, self.network.visual.image_size[0]))
        return self.network.logit_scale.exp() * (self.network.encode_image(pixels, normalize=True) * texts).sum(1)


class ImageReward(PretrainedReward):
    """log R = the normalised score of ImageReward (Xu et al. 2023): layers on a BLIP encoder of image and caption.

    The caption's first state, after cross-attention to all image patches in every layer, goes through linear layers;
    scores are shifted and scaled by the mean and standard deviation of their training set, so that they are around 0
    with a spread of about 1. transformers' BLIP classes hold the networks; ``published_names`` maps the published file.

    Args:
        weights: ``ImageReward.pt`` as published, the same state dict as safetensors, a folder that holds the former, or
            ``hf://THUDM/ImageReward``; 1.8 GB.
        tokenizer: folder with BERT's ``vocab.txt`` (bert-base-uncased), 0.2 MB, or ``hf://google-bert/bert-base-uncased``.
        vision_width: width of the vision tower, 1024 as published.
        vision_layers: its depth.
        text_width: width of the text tower.
        text_layers: its depth.
        image_size: height and width that images are resized and cropped to.

    Raises:
        ValueError: transformers is not installed.
    """

    mean, std = 0.16717362830052426, 1.0333394966054072
    """Of the unnormalised scores, as published."""
    tokens = 35
    """Length that captions are cut or padded to."""
    published = "ImageReward.pt"
    hint = (
        f"`hf download THUDM/ImageReward {published} --local-dir FOLDER` (1.8 GB), then ImageReward.weights = 'FOLDER'"
    )
    words_hint = (
        "`hf download google-bert/bert-base-uncased vocab.txt --local-dir FOLDER` (0.2 MB), then ImageReward.tokenizer "
        f"= 'FOLDER' (or '{HUB}google-bert/bert-base-uncased')"
    )

    def __init__(
        self,
        *,
        weights: str,
        tokenizer: str,
        vision_width: PositiveInt = 1024,
        vision_layers: Depth = 24,
        text_width: PositiveInt = 768,
        text_layers: Depth = 12,
        image_size: PositiveInt = 224,
    ):
        super().__init__()
        self.weights, self.tokenizer, self.image_size = weights, tokenizer, image_size
        self.vision_width, self.vision_layers = vision_width, vision_layers
        self.text_width, self.text_layers = text_width, text_layers
        self.vision, self.text = self._towers()
        self.layers = score_head(text_width).requires_grad_(False).eval()
        self.words, self.tokens_of = None, CaptionCache(self._tokens)

    def _towers(self) -> tuple[nn.Module, nn.Module]:
        """BLIP's vision and text towers; heads are 64 wide as published, fewer only where a tower is that narrow."""
        try:
            from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
        except ImportError as error:
            raise missing_package("transformers", "ImageReward") from error
        vision = BlipVisionConfig(
            hidden_size=self.vision_width,
            intermediate_size=4 * self.vision_width,
            num_hidden_layers=self.vision_layers,
            num_attention_heads=max(self.vision_width // 64, 1),
            image_size=self.image_size,
            patch_size=16,
            layer_norm_eps=1e-6,
        )
        text = BlipTextConfig(
            hidden_size=self.text_width,
            intermediate_size=4 * self.text_width,
            num_hidden_layers=self.text_layers,
            num_attention_heads=max(self.text_width // 64, 1),
            encoder_hidden_size=self.vision_width,
            vocab_size=30524,  # bert-base-uncased's and two more
            layer_norm_eps=1e-12,
            is_decoder=True,  # transformers' condition for having cross-attention; attention itself is not causal
        )
        return empty(lambda: BlipVisionModel(vision)), empty(lambda: BlipTextModel(text, add_pooling_layer=False))

    @classmethod
    def locate(cls, *, weights: str, tokenizer: str) -> tuple[Path, Path]:
        """The files that ``load`` reads; those of a model of the hub are downloaded. Errors as of ``load``."""
        words = _file(tokenizer, "ImageReward.tokenizer", cls.words_hint, "vocab.txt")
        return _file(weights, "ImageReward.weights", cls.hint, cls.published), words

    def file_facts(self) -> dict[str, object]:
        """As of `contracts.Identified`."""
        return {f"weights {self.weights}": sampled_digest(self.locate(weights=self.weights, tokenizer=self.tokenizer))}

    def load(self) -> None:
        """Reads the weights and the vocabulary.

        Raises:
            FileNotFoundError, ValueError: there are none, or they do not fit; says how to get them.
        """
        from transformers import BertTokenizer

        path, words = self.locate(weights=self.weights, tokenizer=self.tokenizer)
        tensors = published_names(read_state(path))
        for name, module in (("vision", self.vision), ("text", self.text), ("layers", self.layers)):
            part = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            fill(module, part, path)
        self.words = BertTokenizer(vocab=str(words), do_lower_case=True)
        self.tokens_of, self.loaded = CaptionCache(self._tokens), True

    def _tokens(self, texts: list[str]) -> Tensor:
        """(ids, mask) [N, 2, 35] of captions."""
        tokens = self.words(texts, padding="max_length", truncation=True, max_length=self.tokens, return_tensors="pt")
        return torch.stack([tokens.input_ids, tokens.attention_mask], 1)

    def score(self, images, condition):
        ids, mask = self.tokens_of(self.captions_of(condition)).to(images.device).unbind(1)
        patches = self.vision(pixel_values=normalised(cropped(images, self.image_size))).last_hidden_state
        states = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
        return (self.layers(states[:, 0]).squeeze(1) - self.mean) / self.std


VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "blocks.": "encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.proj.": ".self_attn.projection.",
    ".attn.": ".self_attn.",
}
"""Parts of the names of the published vision tower => transformers' names."""


def published_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``ImageReward.pt`` under ``vision.``, ``text.`` and ``layers.`` in transformers' names.

    Tensors that the score does not use are left out: the projections of BLIP's pretraining, and position indices.
    """
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("blip.visual_encoder."):
            name = name.removeprefix("blip.visual_encoder.")
            name = name.replace("norm.", "post_layernorm.") if name.startswith("norm.") else name
            for old, new in VISION_NAMES.items():
                name = name.replace(old, new)
            renamed[f"vision.{name}"] = tensor
        elif name.startswith("blip.text_encoder.") and not name.endswith("position_ids"):
            renamed[f"text.{name.removeprefix('blip.text_encoder.')}"] = tensor
        elif name.startswith("mlp.layers."):
            renamed[name.removeprefix("mlp.")] = tensor
    return renamed
