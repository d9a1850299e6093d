"""Facts of the autoencoder and text encoders in a text-to-image model's files, by which data and models are compared.

Notation: a fact is a plain value by its name. ``autoencoder``, ``text_encoder`` and ``text_encoder_2`` are digests of
weights in half precision, so that a model's files of either precision have the same ones. Of the autoencoder its
encoder alone counts, as latents do not depend on the decoder. ``tokenizer`` and ``tokenizer_2`` are digests of the
words. Facts of files that are not there, or cannot be read, are left out.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ratiograph.core.files import expanded
from ratiograph.core.foreign import read_json
from ratiograph.networks.weights.pipeline_files import beside, config_of, read_part, weights_of

__all__ = ["autoencoder_config", "autoencoder_facts", "model_facts", "text_facts"]

STANDARD = {
    "down_block_types": 4 * ("DownEncoderBlock2D",),
    "up_block_types": 4 * ("UpDecoderBlock2D",),
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
"""The configuration of the autoencoders of SD 1.x and SD 2.x; SDXL's differs in its scaling factor alone."""
SDXL_SCALING_FACTOR = 0.13025
SDXL_PREFIX = "conditioner.embedders."
"""What precedes the text encoders' tensors in one file of a whole SDXL model; SD 1.x and 2.x: cond_stage_model."""
ENCODING = ("encoder.", "quant_conv.")
TEXT_PARTS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))


def autoencoder_config(source: str | None) -> Mapping[str, object]:
    """The autoencoder's ``config.json`` if it is on this machine already, else that of Stable Diffusion's or SDXL's.

    Args:
        source: as of `pipeline_files`; None for no files.

    Raises:
        ValueError: the file is no JSON.
    """
    config = config_of(source, "vae")
    path = None if config is not None or source is None else expanded(source)
    with suppress(SafetensorError, OSError):  # who reads the weights will say what is wrong
        if path is not None and path.is_file():
            with safe_open(path, framework="pt") as file:
                if any(name.startswith(SDXL_PREFIX) for name in file.keys()):  # noqa: SIM118
                    return STANDARD | {"scaling_factor": SDXL_SCALING_FACTOR}
    return STANDARD if config is None else config


def autoencoder_facts(files: Sequence[Path], config: Mapping[str, object]) -> dict[str, object]:
    """Facts of the autoencoder in ``files``, as `weights_of` lists them, with its configuration; {} without any."""
    with suppress(ValueError, OSError, KeyError):
        return {
            "autoencoder": _weights_digest(_stamped(files), "vae", json.dumps(dict(config))),
            "scaling_factor": config.get("scaling_factor", STANDARD["scaling_factor"]),
            "shift_factor": config.get("shift_factor"),
        }
    return {}


def text_facts(encoder: Path | None, tokenizer: Path | None) -> dict[str, object]:
    """Facts of the text encoder and tokenizer in two folders of a pipeline, by the folders' names."""
    found: dict[str, object] = {}
    with suppress(ValueError, OSError):
        if encoder is not None and weights_of(encoder):
            found[encoder.name] = _weights_digest(_stamped(weights_of(encoder)), encoder.name, "{}")
    with suppress(ValueError, OSError, KeyError, TypeError):
        if tokenizer is not None:
            found[tokenizer.name] = _words_digest(tokenizer)
    return found


def model_facts(unet: str) -> dict[str, object]:
    """Facts of the model that a U-Net belongs to, as far as it is on this machine already.

    Args:
        unet: the source of the U-Net, see `pipeline_files`; a file may hold the autoencoder too.
    """
    found: dict[str, object] = {}
    path = expanded(unet)
    place = beside(unet, "vae") or (path if path.is_file() else None)
    if place is not None:
        with suppress(ValueError):  # a configuration that is no JSON
            found |= autoencoder_facts(weights_of(place), autoencoder_config(str(place)))
    for encoder, tokenizer in TEXT_PARTS:
        found |= text_facts(beside(unet, encoder), beside(unet, tokenizer))
    return found


def _stamped(files: Sequence[Path]) -> tuple[tuple[Path, int, int], ...]:
    """The files with what changes when they do."""
    return tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files)


@functools.lru_cache(maxsize=16)  # several nodes of a graph start from the same model
def _weights_digest(files: tuple[tuple[Path, int, int], ...], part: str, config: str) -> str:
    tensors = read_part([path for path, *_ in files], part, json.loads(config))
    if part == "vae":
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(ENCODING)}
    plain = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    if not plain:
        raise ValueError(f"no {part} in {files}")
    digest = hashlib.sha256()
    for name in sorted(name for name in plain if not name.endswith("position_ids")):
        digest.update(name.encode())
        digest.update(_bytes(plain[name]))
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().to(torch.float16).contiguous().numpy().tobytes()


def _words_digest(folder: Path) -> str:
    """Of the words with their numbers, and of the word that fills up a caption."""
    words, whole, settings = (folder / name for name in ("vocab.json", "tokenizer.json", "tokenizer_config.json"))
    known = read_json(words) if words.is_file() else read_json(whole)["model"]["vocab"]
    filling = read_json(settings).get("pad_token") if settings.is_file() else None
    filling = filling["content"] if isinstance(filling, dict) else filling
    return hashlib.sha256(json.dumps([known, filling], sort_keys=True).encode()).hexdigest()[:16]
