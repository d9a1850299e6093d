"""Finds the parts of a text-to-image model and reads their tensors in diffusers' naming.

Notation: a *part* is one network of a pipeline by its folder's name, ``unet``, ``vae``, ``text_encoder``. A *source* is
what a user names: a pipeline's folder in diffusers' format, a part's own folder, a ``.safetensors`` file (of the part,
or of the whole model in its authors' naming), or ``hf://OWNER/NAME`` for a model on the Hugging Face hub.
Only safetensors, JSON and text files are ever read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ratiograph.core.files import Missing, expanded
from ratiograph.core.foreign import read_json, shown
from ratiograph.networks.weights.weight_files import plain_names, read_tensors, require_fit

__all__ = [
    "HUB",
    "beside",
    "config_of",
    "fit",
    "folder_of",
    "gated",
    "missing_package",
    "read_part",
    "scheduler_of",
    "weights_of",
]

HUB = "hf://"
WHOLE_FILES = ("diffusion_pytorch_model", "model")
VARIANTS = (".safetensors", ".fp16.safetensors")
PLAIN = re.compile(r"\w[\w.+-]*\.safetensors")
"""A name that is no path."""
SMALL_FILES = ("*.json", "*.txt")
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def missing_package(package: str, component: str) -> ValueError:
    """The error that ``component`` (a class or argument in a message) needs ``package``, which is not installed."""
    return ValueError(
        f"{component} needs the package {package}: pip install 'ratiograph[text2image]' "
        "(in a checkout: pip install -e '.[text2image]')"
    )


def gated(source: str, then: str) -> ValueError:
    """The error that says how to get access to the gated model ``source`` of the hub, and what to do ``then``."""
    return ValueError(
        f"{source} is gated: accept its licence at https://huggingface.co/{source.removeprefix(HUB)}, run `hf auth "
        f"login`, then {then}"
    )


# --- folders ----------------------------------------------------------------------------------------------------------


def _local(source: str, part: str) -> Path | None:
    """The part's own folder, or the file that ``source`` is; None where there is neither."""
    path = expanded(source)
    if not path.exists():
        return None
    return path / part if (path / part).is_dir() else path


def _stored(source: str, part: str) -> Path | None:
    """As ``_local``, and for a model of the hub the folder of an earlier download; nothing is fetched."""
    if not source.startswith(HUB):
        return _local(source, part)
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    found = try_to_load_from_cache(source.removeprefix(HUB), f"{part}/config.json")
    return Path(found).parent if isinstance(found, str) else None


def beside(source: str, part: str) -> Path | None:
    """The folder ``part`` of the pipeline that a U-Net belongs to, if it is on this machine already, else None.

    Args:
        source: of the U-Net: a pipeline's folder, its ``unet`` or a file in that, or ``hf://OWNER/NAME``.
        part: another part of the pipeline.
    """
    found = _stored(source, "unet")
    found = found and found.absolute()
    while found is not None and found.name != "unet" and found.parent.name == "unet":
        found = found.parent
    if found is None or found.is_file():
        return None
    there = (found.parent if found.name == "unet" else found) / part
    return there if there.is_dir() else None


def config_of(source: str | None, part: str) -> dict[str, object] | None:
    """The part's ``config.json``, if it is on this machine already, else None.

    Raises:
        ValueError: the file is no JSON of an object.
    """
    folder = None if source is None else _stored(source, part)
    path = None if folder is None else folder / "config.json"
    if path is None or not path.is_file():
        return None
    return _described(path)


def _described(path: Path) -> dict[str, object]:
    """The object in a JSON file."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{shown(path)} holds no JSON object: copy it again")
    return found


def scheduler_of(source: str | None) -> tuple[Path, dict[str, object]] | None:
    """(path, content) of the scheduler's configuration beside a U-Net, if there is one; ``source`` as in `beside`."""
    folder = None if source is None else beside(source, "scheduler")
    path = None if folder is None else folder / "scheduler_config.json"
    return (path, _described(path)) if path is not None and path.is_file() else None


def folder_of(source: str, part: str, argument: str, *, weights: bool = True) -> Path:
    """The part's folder, or the file that ``source`` is; a model of the hub is downloaded, this part only.

    Args:
        source: as in this module's docstring.
        part: which of its parts.
        argument: the argument that has the value ``source`` ('TextEncoder.weights'), for errors.
        weights: whether safetensors files are needed, and not only configurations and vocabularies.

    Raises:
        Missing: there is no such folder or file; the message says how to get it.
        ValueError: the part cannot be downloaded (gated, absent, unreachable).
    """
    if source.startswith(HUB):
        return _downloaded(source.removeprefix(HUB), part, argument, weights)
    found = _local(source, part)
    if found is None:
        raise Missing(
            source,
            f"no {part} at {argument}={source!r}: give a folder in diffusers' format, fetched with "
            f"`hf download OWNER/NAME --include '{part}/*' 'scheduler/*' --local-dir FOLDER`, or {HUB}OWNER/NAME",
        )
    return found


def _downloaded(name: str, part: str, argument: str, weights: bool) -> Path:
    """The part's folder in huggingface_hub's cache. Weights are taken in float32, in float16 where that is all."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise missing_package("huggingface_hub", argument) from error
    small = ["scheduler/*.json", *(f"{part}/{pattern}" for pattern in SMALL_FILES)]
    wanted = [[*small, *(f"{part}/{stem}{variant}" for stem in WHOLE_FILES)] for variant in VARIANTS]
    command = f"`hf download {name} --include '{part}/*' 'scheduler/*' --local-dir FOLDER`, then {argument}=FOLDER"
    try:
        for offline in (True, False):
            for patterns in wanted if weights else [small]:
                try:
                    root = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=offline))
                except LocalEntryNotFoundError:
                    if offline:
                        continue
                    raise
                if (root / part).is_dir() and (not weights or weights_of(root / part)):
                    return root / part
    except GatedRepoError as error:
        raise gated(f"{HUB}{name}", command) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"cannot fetch {HUB}{name} ({type(error).__name__}): check the name and the connection, or on a machine "
            f"that is online {command}"
        ) from error
    raise ValueError(f"{HUB}{name} has no {part} with safetensors weights: give another model, or convert this one")


# --- tensors ----------------------------------------------------------------------------------------------------------


def weights_of(folder: Path) -> list[Path]:
    """The safetensors files that hold the part in ``folder`` (or that file itself): one, or the pieces of one.

    Of several variants the one in single precision is taken, else that in half precision; a variant's index is believed
    before the names of its files.

    Raises:
        ValueError: an index is damaged, or a piece that it names is missing.
    """
    if folder.is_file():
        return [folder]
    for variant in VARIANTS:
        half = variant.removesuffix(".safetensors")  # '.fp16', or nothing; older files have it before the numbers
        for stem in WHOLE_FILES:
            index, whole = folder / f"{stem}.safetensors.index{half}.json", folder / f"{stem}{variant}"
            if index.is_file():
                return _indexed(index)
            if whole.is_file():
                return [whole]
            names = re.compile(rf"{stem}({half}-\d+-of-\d+|-\d+-of-\d+{half})\.safetensors")
            pieces = [path for path in sorted(folder.glob("*-of-*.safetensors")) if names.fullmatch(path.name)]
            if pieces:
                return pieces
    return []


def _indexed(index: Path) -> list[Path]:
    """The files beside an index that it names."""
    names = _described(index).get("weight_map")
    names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    missing = [name for name in names if not PLAIN.fullmatch(name) or not (index.parent / name).is_file()]
    if missing or not names:
        fault = f"names {shown(missing[0])}, which is no file beside it" if missing else "names no files"
        raise ValueError(f"{shown(index)} {fault}: copy the folder again")
    return [index.parent / name for name in names]


def read_part(files: Sequence[Path], part: str, config: Mapping[str, object]) -> dict[str, Tensor]:
    """The part's tensors, in diffusers' current naming.

    Args:
        files: as `weights_of` lists them; a whole model in its authors' naming goes through diffusers' converters.
        part: ``unet`` or ``vae``.
        config: the part's configuration in diffusers' names.

    Raises:
        ValueError: a file is torn or no safetensors file.
    """
    tensors = plain_names({name: tensor for path in files for name, tensor in read_tensors(path)[0].items()})
    if any(name.startswith(("model.diffusion_model.", "first_stage_model.")) for name in tensors):
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

        converters = {"unet": convert_ldm_unet_checkpoint, "vae": convert_ldm_vae_checkpoint}
        return converters[part](tensors, config)
    return {_renamed(name): tensor for name, tensor in tensors.items()}


def _renamed(name: str) -> str:
    """The name of an attention's tensor, as diffusers writes it since 0.18."""
    *owner, layer, kind = name.split(".") if name.count(".") > 1 else ("", name, "")
    return ".".join([*owner, OLD_ATTENTION[layer], kind]) if layer in OLD_ATTENTION and kind else name


@torch.no_grad()
def fit(kind: str, here: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Fills the tensors ``here`` with those of the same names in ``tensors``: every one with its shape, or nothing.

    Where dtype and device agree, nothing is copied: a tensor ``here`` shares the memory of the mapped file.

    Args:
        kind: the name of the module that the tensors belong to, for errors.
        here: a module's own parameters and buffers; they keep their precision and device.
        tensors: as `read_part` gives them.
        source: the name of their file, for errors.

    Raises:
        ValueError: a tensor is missing, left over or of another shape.
    """
    tensors = plain_names(tensors, here)
    require_fit(here, tensors, kind, source, "the weights' own config.json")
    for name, tensor in here.items():
        if (tensor.device, tensor.dtype) == (tensors[name].device, tensors[name].dtype):
            tensor.data = tensors[name]
        else:
            tensor.copy_(tensors[name])
