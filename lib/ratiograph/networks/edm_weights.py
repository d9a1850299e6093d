"""Converts official EDM networks to ours: architecture from the names and shapes of the tensors, names, files.

The official names are ``enc.32x32_block0.conv0.weight`` and the like; ours number the levels from the finest.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ratiograph.core.files import write_atomically
from ratiograph.core.foreign import shown
from ratiograph.data.remote import cache_folder
from ratiograph.data.shards import file_digest
from ratiograph.networks.architectures.edm import ADM, DDPMPP, NCSNPP
from ratiograph.networks.denoisers import EDM
from ratiograph.networks.preconditioning import VEPreconditioned, VPPreconditioned
from ratiograph.networks.weights.edm_pickles import OfficialNetwork, read_network
from ratiograph.networks.weights.weight_files import differences, listed, register_converter, save_weights

__all__ = ["Description", "convert", "convert_file", "converted"]

NETWORKS = {c.__name__: c for c in (DDPMPP, NCSNPP, ADM)}
DENOISERS = {c.__name__: c for c in (EDM, VPPreconditioned, VEPreconditioned)}


@dataclass(frozen=True)
class Description:
    """Class names and constructor arguments of a denoiser and of its network."""

    denoiser: str
    denoiser_arguments: Mapping[str, float]
    network: str
    network_arguments: Mapping[str, int | float | tuple[int, ...]]

    def build(self) -> EDM:
        """The denoiser, on the current default device."""
        network = NETWORKS[self.network](**self.network_arguments)
        return DENOISERS[self.denoiser](network=network, **self.denoiser_arguments)

    def gin(self, weights: Path, title: str) -> str:
        """The gin lines that build the denoiser from ``weights``."""
        values = {f"{self.denoiser}.{name}": value for name, value in self.denoiser_arguments.items()}
        values |= {f"{self.network}.{name}": value for name, value in self.network_arguments.items()}
        lines = [f"# {title}", "", f"TEACHER = {str(weights)!r}", "", f"{self.denoiser}.network = @{self.network}()"]
        lines += [f"{self.denoiser}.weights = %TEACHER", *(f"{name} = {value!r}" for name, value in values.items())]
        return "\n".join(lines) + "\n"


# --- architecture -------------------------------------------------------------------------------------------


def _preconditioning(official: OfficialNetwork, requested: str | None) -> tuple[str, dict[str, float]]:
    """Class name and arguments of the denoiser; the file's class must be ``requested``, unless that is None."""
    name, settings = official.preconditioning, official.settings
    sigma_data = {"sigma_data": float(settings.get("sigma_data", 0.5))}
    known = {"EDMPrecond": EDM, "VPPrecond": VPPreconditioned, "VEPrecond": VEPreconditioned}
    if name is not None and name not in known:
        raise ValueError(f"its network is a {shown(name)}; only {', '.join(known)} can be converted")
    found = known[name].__name__ if name else requested or EDM.__name__
    if requested not in (None, found):
        raise ValueError(f"its network is a {name}, so its denoiser is {found} and not {requested}")
    if found == VPPreconditioned.__name__:
        beta_min = float(settings.get("beta_min", 0.1))
        beta_max = beta_min + float(settings.get("beta_d", 19.9))
        return found, {"beta_min": beta_min, "beta_max": beta_max, "steps": int(settings.get("M", 1000)), **sigma_data}
    return found, sigma_data


def _variant(tensors: Mapping[str, Tensor]) -> str:
    """Class name of the network."""
    taps = {tensor.shape[-1] for name, tensor in tensors.items() if name.endswith(".resample_filter")}
    fourier, pyramid = "map_noise.freqs" in tensors, any("_aux_residual." in name for name in tensors)
    variants = {
        (False, False, False, 2): DDPMPP,
        (False, True, True, 4): NCSNPP,
        (True, False, False, 2): ADM,
    }
    for features, network in variants.items():
        if ("out_conv.weight" in tensors, fourier, pyramid, *taps) == features:
            return network.__name__
    raise ValueError(
        f"it is none of DDPM++, NCSN++ and ADM: random Fourier features {fourier}, image pyramid {pyramid}, "
        f"resampling filters of {sorted(taps)} taps"
    )


def _check_filters(tensors: Mapping[str, Tensor]) -> None:
    """ValueError unless every resampling filter is one of the two that our layers have fixed."""
    for name, tensor in tensors.items():
        if name.endswith(".resample_filter"):
            taps = torch.tensor({2: [0.5, 0.5], 4: [0.125, 0.375, 0.375, 0.125]}[tensor.shape[-1]])
            if not torch.allclose(tensor.float(), torch.outer(taps, taps)):
                raise ValueError(f"{shown(name)} is neither (1, 1) nor (1, 3, 3, 1)")


def _architecture(official: OfficialNetwork) -> tuple[str, dict[str, int | float | tuple[int, ...]]]:
    """Class name and arguments of the network."""
    tensors, settings = official.tensors, official.settings
    variant = _variant(tensors)
    _check_filters(tensors)
    blocks = [re.fullmatch(r"enc\.([1-9]\d*)x\1_block\d+\.conv0\.weight", name) for name in tensors]
    blocks = [int(match[1]) for match in blocks if match]  # the resolution of each block
    sizes = sorted(set(blocks), reverse=True)
    if not sizes or sizes != [sizes[0] >> k for k in range(len(sizes))]:
        raise ValueError(f"its encoder has the resolutions {sizes}, which do not halve from level to level")
    stem = tensors[f"enc.{sizes[0]}x{sizes[0]}_conv.weight"]
    channels = tensors["map_layer0.weight"].shape[1] if variant == "ADM" else stem.shape[0]
    widths = [tensors[f"enc.{size}x{size}_block0.conv0.weight"].shape[0] for size in sizes]
    if any(width % channels for width in widths):
        raise ValueError(f"its widths {widths} are no multiples of {channels}")
    arguments = {
        "resolution": sizes[0],
        "image_channels": stem.shape[1],
        "channels": channels,
        "multipliers": tuple(width // channels for width in widths),
        "blocks": blocks.count(sizes[0]),
        "attention_resolutions": tuple(s for s in sizes if f"enc.{s}x{s}_block0.qkv.weight" in tensors),
        "dropout": float(settings.get("dropout", 0.0)),
        "classes": tensors["map_label.weight"].shape[1] if "map_label.weight" in tensors else 0,
        "augment_labels": tensors["map_augment.weight"].shape[1] if "map_augment.weight" in tensors else 0,
        "label_dropout": float(settings.get("label_dropout", 0.0)),
    }
    return variant, arguments


# --- names --------------------------------------------------------------------------------------------------

_TOP = {
    "map_noise": "embedding.noise",
    "map_label": "embedding.classes",
    "map_augment": "embedding.augment",
    "map_layer0": "embedding.layer1",
    "map_layer1": "embedding.layer2",
    "out_norm": "out_norm",
    "out_conv": "out",
}
_PLACES = {
    "enc.conv": "stem",
    "enc.down": "encoder.{level}.resample",
    "enc.aux_residual": "pyramid.{previous}",
    "enc.block": "encoder.{level}.blocks.{index}",
    "dec.in": "middle.{index}",
    "dec.up": "decoder.{level}.resample",
    "dec.block": "decoder.{level}.blocks.{index}",
    "dec.aux_norm": "out_norm",
    "dec.aux_conv": "out",
}
"""By the official name without size and number: 'enc.block' of ``enc.32x32_block0``."""
_LAYERS = {
    "freqs": "frequencies",
    "norm0": "norm1",
    "conv0": "conv1",
    "norm1": "norm2",
    "conv1": "conv2",
    "norm2": "attention.norm",
    "qkv": "attention.query_key_value",
    "proj": "attention.project",
}


def our_name(name: str, resolution: int) -> str:
    """Our name of an official parameter ``name`` of a network for images of size ``resolution``.

    Raises:
        ValueError: no network has such a parameter.
    """
    first, *rest = name.split(".")
    found = re.fullmatch(r"([1-9]\d*)x\1_([a-z_]+)(\d*)", rest[0]) if first in ("enc", "dec") and rest else None
    place = _PLACES.get(f"{first}.{found[2]}") if found else _TOP.get(first)
    if place is None:
        raise ValueError(f"its tensor {shown(name)} has no place in DDPM++, NCSN++ or ADM")
    if found:
        level = (resolution // int(found[1])).bit_length() - 1
        place, rest = place.format(level=level, previous=level - 1, index=found[3]), rest[1:]
    return ".".join([place, *(_LAYERS.get(part, part) for part in rest)])


def _renamed(tensors: Mapping[str, Tensor], resolution: int) -> dict[str, Tensor]:
    """Our state dict of a network, float32."""
    kept = {name: tensor.float() for name, tensor in tensors.items() if not name.endswith(".resample_filter")}
    ours = {our_name(name, resolution): tensor for name, tensor in kept.items()}
    if len(ours) < len(kept):
        raise ValueError("two of its tensors have the same place")
    if "embedding.classes.weight" in ours:
        ours["embedding.classes.table"] = ours.pop("embedding.classes.weight").T
    return ours


# --- conversion ---------------------------------------------------------------------------------------------


def convert(official: OfficialNetwork, preconditioning: str | None = None) -> tuple[EDM, Description]:
    """The denoiser with the official weights, and how to build it.

    Args:
        official: from `edm_pickles.read_network`.
        preconditioning: class name of the denoiser (``EDM``, ``VPPreconditioned``, ``VEPreconditioned``), which a
            plain state dict does not state; None takes the file's own, EDM for a state dict.

    Raises:
        ValueError: not one of the three networks, or a tensor is missing, left over or of another shape.
    """
    denoiser, denoiser_arguments = _preconditioning(official, preconditioning)
    try:
        network, network_arguments = _architecture(official)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"a tensor is missing or has the wrong shape ({shown(error)})") from error
    description = Description(denoiser, denoiser_arguments, network, network_arguments)
    tensors = _renamed(official.tensors, network_arguments["resolution"])
    with torch.device("meta"):
        result = description.build()
    wrong = list(differences("", result.network.state_dict(), tensors))
    if wrong:
        raise ValueError(f"its tensors do not make a {network}: {listed(wrong)}")
    result.network.load_state_dict(tensors, strict=True, assign=True)
    return result.eval(), description


@functools.cache
def _identity(path: Path, size: int, changed: int) -> str:
    """The digest of a file's bytes; a process reads them once unless the file's size or time changes."""
    return file_digest(path)


@register_converter(".pkl", ".pt", ".pth")
def converted(path: Path, preconditioning: str | None = None) -> Path:
    """The weights of an official file, converted into the cache folder unless they are there; see ``convert_file``.

    Raises:
        ValueError: as ``convert_file``.
    """
    path = Path(path).resolve()
    status = path.stat()
    identity = _identity(path, status.st_size, status.st_mtime_ns)[:16]
    folder = cache_folder() / "teachers" / f"{path.stem}-{preconditioning or EDM.__name__}-{identity}"
    weights = folder / "weights.safetensors"
    if not weights.is_file():
        convert_file(path, folder, preconditioning)
    return weights


def convert_file(path: Path | str, folder: Path | str, preconditioning: str | None = None) -> Description:
    """Reads an official file and writes ``weights.safetensors``, ``network.json`` and ``network.gin`` to ``folder``.

    Args:
        path: an official pickle, or a plain state dict (``.pt``, ``.pth``).
        folder: made if missing; files of these names are replaced.
        preconditioning: as in `convert`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read or converted, or the folder cannot be written.
    """
    path, folder = Path(path), Path(folder).resolve()
    official = read_network(path)
    try:
        denoiser, description = convert(official, preconditioning)
    except ValueError as error:
        raise ValueError(f"{path} cannot be converted: {error}") from error
    digest = file_digest(path)
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    document = {**asdict(description), "parameters": parameters, "source": shown(path.name), "source_sha256": digest}
    title = f"The network of {shown(path.name)}, {parameters:,} parameters."
    weights = folder / "weights.safetensors"
    header = {"source": shown(path.name), "source_sha256": digest, "denoiser": json.dumps(asdict(description))}
    save_weights(weights, denoiser, header)
    write_atomically(folder / "network.json", (json.dumps(document, indent=1) + "\n").encode())
    write_atomically(folder / "network.gin", description.gin(weights, title).encode())
    return description
