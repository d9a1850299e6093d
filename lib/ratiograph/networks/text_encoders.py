"""Text encoders: captions to the states that Stable Diffusion's networks are conditioned on.

Notation: a caption is a string; ``text`` [B, L, E] the states of its L = 77 tokens, ``pooled`` [B, P] SDXL's summary of
it, ``sizes`` [B, 6] SDXL's original size, crop corner and target size, (height, width) in pixels each. Longer captions
are cut at 77 tokens. transformers is imported by ``load``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Len
from safetensors import SafetensorError
from torch import Tensor, nn

from ratiograph.core.domains import NonNegativeInt
from ratiograph.core.files import Missing
from ratiograph.core.types import Condition
from ratiograph.networks.weights.encoder_files import text_facts
from ratiograph.networks.weights.pipeline_files import folder_of, missing_package, weights_of
from ratiograph.networks.weights.weight_files import require_finite

__all__ = ["CaptionEncoder", "SD15CaptionEncoder", "SDXLCaptionEncoder"]


class CaptionEncoder(nn.Module):
    """Base class: frozen text encoders and their tokenizers, in float32. Empty, without weights, before ``load``.

    Args:
        weights: a pipeline's folder in diffusers' format, or ``hf://OWNER/NAME``.
    """

    parts: tuple[tuple[str, str, str], ...] = ()
    """For each encoder: transformers' class, the encoder's folder and its tokenizer's folder."""

    def __init__(self, *, weights: str):
        super().__init__()
        self.weights = weights
        self.encoders = nn.ModuleList()
        self.tokenizers: list = []

    def load(self) -> None:
        """Reads the text encoders. Never called in a dry run.

        Raises:
            FileNotFoundError, ValueError: there are none, or they cannot be read; says how to get them.
        """
        try:
            import transformers
        except ImportError as error:
            raise missing_package("transformers", type(self).__name__) from error
        tokenizers, encoders = [], []
        for model, encoder, tokenizer in self.parts:
            folder = self._folder(self.weights, tokenizer, weights=False)
            tokenizers.append(transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True))
            encoders.append(_read(getattr(transformers, model), self._folder(self.weights, encoder, weights=True)))
            words, known = len(tokenizers[-1]), encoders[-1].config.vocab_size
            if words > known:
                raise ValueError(
                    f"{folder} has {words:,} words, {encoder} beside it knows {known:,}: they are of different models"
                )
        self.tokenizers, self.encoders = tokenizers, nn.ModuleList(encoders)

    @classmethod
    def locate(cls, *, weights: str = "") -> None:
        """Checks that the folders that ``load`` reads are there; those of the hub are downloaded.

        Raises:
            FileNotFoundError, ValueError: one is missing; says how to get it.
        """
        for _, encoder, tokenizer in cls.parts:
            cls._folder(weights, tokenizer, weights=False)
            cls._folder(weights, encoder, weights=True)

    def encoder_facts(self) -> dict[str, object]:
        """As of `contracts.Encoded`."""
        found: dict[str, object] = {}
        for _, encoder, tokenizer in self.parts:
            folders = (self._folder(self.weights, part, part == encoder) for part in (encoder, tokenizer))
            found |= text_facts(*folders)
        return found

    @classmethod
    def _folder(cls, source: str, part: str, weights: bool) -> Path:
        argument = f"{cls.__name__}.weights"
        folder = folder_of(source, part, argument, weights=weights)
        if folder.name != part or (weights and not weights_of(folder)):
            raise Missing(
                source,
                f"no {part} at {argument}={source!r}: give the whole pipeline in diffusers' format, fetched with "
                f"`hf download OWNER/NAME --include '{part}/*' --local-dir FOLDER`",
            )
        return folder

    def encode(self, captions: Sequence[str]) -> Condition:
        """The condition [B] of ``captions``, on the encoders' device.

        Raises:
            ValueError: called before ``load``.
        """
        raise NotImplementedError

    def _ids(self, number: int, captions: Sequence[str]) -> Tensor:
        if not self.tokenizers:
            raise ValueError(f"{type(self).__name__} has no weights yet: call load() first")
        tokenizer, places = self.tokenizers[number], self.encoders[number].config.max_position_embeddings
        tokens = tokenizer(
            list(captions),
            padding="max_length",
            max_length=min(tokenizer.model_max_length, places),  # 1e30 where the tokenizer's files name no length
            truncation=True,
            return_tensors="pt",
        )
        return tokens.input_ids.to(self.encoders[number].device)

    def train(self, mode: bool = True) -> CaptionEncoder:
        """Stays in evaluation mode: it is frozen."""
        return super().train(False)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silences transformers' progress bars and reports: our own error says what is wrong."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _read(model: type, folder: Path) -> nn.Module:
    """The transformers ``model`` in ``folder``, frozen, in float32.

    Raises:
        ValueError: a weight is missing or of another shape, or a file is torn.
    """
    plain = any(folder.glob("model*.safetensors")) and not (folder / "model.fp16.safetensors").is_file()
    variant = None if plain or (folder / "model.safetensors").is_file() else "fp16"
    try:
        with _quietly():
            encoder, info = model.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                variant=variant,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(f"{folder} is not a text encoder that transformers can read: {line}") from error
    absent = sorted(info["missing_keys"])
    if absent:
        raise ValueError(
            f"{folder} lacks {absent[0]} and {len(absent) - 1} more weights of a {model.__name__}: copy it again"
        )
    require_finite(encoder.state_dict(), folder)
    return encoder.requires_grad_(False).eval()


class SD15CaptionEncoder(CaptionEncoder):
    """CLIP ViT-L/14's last states after its final normalisation, ``text`` [B, 77, 768], as SD 1.x was trained.

    Args:
        weights: a pipeline's folder in diffusers' format, with ``text_encoder`` and ``tokenizer`` in it, or
            ``hf://OWNER/NAME``.
    """

    parts = (("CLIPTextModel", "text_encoder", "tokenizer"),)

    @torch.no_grad()
    def encode(self, captions):
        ids = self._ids(0, captions)
        with torch.autocast(ids.device.type, enabled=False):
            return Condition(text=self.encoders[0](ids).last_hidden_state)


class SDXLCaptionEncoder(CaptionEncoder):
    """The last but one states of both encoders, joined: ``text`` [B, 77, 2048], and the second's ``pooled`` [B, 1280].

    Args:
        weights: a pipeline's folder in diffusers' format, with ``text_encoder``, ``tokenizer``, ``text_encoder_2`` and
            ``tokenizer_2`` in it, or ``hf://OWNER/NAME``.
        sizes: the ``sizes`` of every caption; by default an uncropped image of 1024 x 1024.
    """

    parts = (
        ("CLIPTextModel", "text_encoder", "tokenizer"),
        ("CLIPTextModelWithProjection", "text_encoder_2", "tokenizer_2"),
    )

    def __init__(
        self, *, weights: str, sizes: Annotated[Sequence[NonNegativeInt], Len(6, 6)] = (1024, 1024, 0, 0, 1024, 1024)
    ):
        super().__init__(weights=weights)
        self.sizes = tuple(sizes)

    @torch.no_grad()
    def encode(self, captions):
        ids = [self._ids(number, captions) for number in range(2)]
        with torch.autocast(ids[0].device.type, enabled=False):
            outputs = [encoder(i, output_hidden_states=True) for encoder, i in zip(self.encoders, ids, strict=True)]
        text = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        sizes = torch.tensor(self.sizes, dtype=text.dtype, device=text.device).repeat(len(text), 1)
        return Condition(text=text, pooled=outputs[1].text_embeds, sizes=sizes)
