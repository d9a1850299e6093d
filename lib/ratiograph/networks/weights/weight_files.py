"""Weights that leave or enter a run, as safetensors files: every tensor with its shape, or nothing.

Names are those of a module's ``state_dict()``. Nothing in such a file can run code.

A file is mapped, not read: on the CPU a module's tensors *are* the file's pages until something writes to them, so
several networks that start from one file share its memory, and a frozen one never has a copy of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from ratiograph.core.files import Missing, expanded, sampled_digest, write_atomically
from ratiograph.core.foreign import shown
from ratiograph.networks.weights.restricted_pickles import Refused
from ratiograph.networks.weights.torch_files import load_torch

__all__ = [
    "differences",
    "listed",
    "load_part",
    "load_weights",
    "locate_weights",
    "plain_names",
    "read_header",
    "read_state",
    "read_tensors",
    "register_converter",
    "require_finite",
    "require_fit",
    "save_weights",
    "state_dict",
    "weights_facts",
]

ASSETS = Path(__file__).parents[2] / "assets"

Converter = Callable[[Path, str | None], Path]
"""(file, class name of the denoiser that takes it) -> the safetensors file that it was converted to."""

_converters: dict[str, Converter] = {}

WRAPPINGS = ("ema", "params_ema", "state_dict", "model", "module")
"""Where training scripts put the weights in a larger dict; the first that is there is taken."""


def register_converter(*suffixes: str) -> Callable[[Converter], Converter]:
    """Decorator of the function that converts files of these suffixes to safetensors."""

    def register(convert: Converter) -> Converter:
        _converters.update(dict.fromkeys(suffixes, convert))
        return convert

    return register


def shipped(name: str) -> Path:
    """The path in the package of weights of this bare name, whether or not there are any."""
    return ASSETS / f"{name}.safetensors"


def locate_weights(name: str, denoiser: str | None = None) -> Path:
    """The safetensors file that ``name`` stands for.

    Args:
        name: its path; a folder that ``tools/convert_edm.py`` wrote; an official EDM file, which is converted once
            into the cache folder; or the bare name of weights that ship inside the package.
        denoiser: class name of the denoiser that takes them, which a plain state dict does not state.
    """
    if shipped(name).is_file():
        return shipped(name)
    path = expanded(name)
    if path.is_dir():
        return path / "weights.safetensors"
    if path.suffix in _converters and path.is_file():
        return _converters[path.suffix](path, denoiser)
    return path


def weights_facts(name: str | None) -> dict[str, object]:
    """As of `contracts.Identified`: of the weights that ``name`` stands for in `locate_weights`; {} of None."""
    if name is None:
        return {}
    path = expanded(name)  # an official file itself, which need not be converted for this
    named = path.is_file() and not shipped(name).is_file()
    return {f"weights {name}": sampled_digest([path if named else locate_weights(name)])}


def differences(name: str, here: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Iterator[str]:
    """Sentences on how the tensors ``found`` in a file differ from those ``here``; ``name`` precedes their names."""
    for key, tensor in here.items():
        if key not in found:
            yield f"{name}{key} is not in the file"
        elif not isinstance(found[key], Tensor):
            yield f"{name}{key} is a tensor here and a {type(found[key]).__name__} in the file"
        elif found[key].shape != tensor.shape:
            yield f"{name}{key} has shape {list(tensor.shape)} here and {list(found[key].shape)} in the file"
    yield from (f"{name}{shown(key)} is in the file and not here" for key in found if key not in here)


def listed(sentences: list[str], limit: int = 3) -> str:
    """The first ``limit`` of the sentences, and how many more there are."""
    rest = len(sentences) - limit
    return "; ".join(sentences[:limit]) + (f"; and {rest} more" if rest > 0 else "")


def state_dict(found: object) -> dict[str, Tensor]:
    """The tensors of a state dict that ``torch.save`` wrote, alone or in a larger dict under a name of ``WRAPPINGS``.

    Raises:
        Refused: there is something else; the message says what.
    """
    while isinstance(found, dict) and not any(isinstance(value, Tensor) for value in found.values()):
        name = next((name for name in WRAPPINGS if isinstance(found.get(name), dict)), None)
        if name is None:
            break
        found = found[name]
    if not isinstance(found, dict):
        raise Refused("something else than a dict of tensors")
    for name, tensor in found.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            raise Refused(f"something else than a dict of tensors: {shown(name)}, a {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise Refused(f"the tensor {shown(name)}, which has no values of its own")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise Refused(f"the tensor {shown(name)}, which is larger than its storage")
    return plain_names(found)


def plain_names(tensors: Mapping[str, Tensor], here: Iterable[str] = ()) -> dict[str, Tensor]:
    """``tensors`` without what wrappers put into names: ``_orig_mod.`` of torch.compile, ``module.`` of DDP, ``ema.``.

    Args:
        tensors: by their names in a file.
        here: names in the module that takes them; if these are the file's own, nothing is changed, and ``model.`` is
            taken off only if that gives one of them.
    """
    here = set(here)
    if here == set(tensors):
        return dict(tensors)
    plain = {re.sub(r"(^|\.)_orig_mod\.", r"\1", name): tensor for name, tensor in tensors.items()}
    for wrapping in WRAPPINGS if here.isdisjoint(plain) else ():
        inner = {name.removeprefix(f"{wrapping}."): name for name in plain if name.startswith(f"{wrapping}.")}
        whole = len(inner) == len(plain) or wrapping in ("ema", "params_ema")
        if inner and whole and (wrapping != "model" or not here.isdisjoint(inner)):
            return plain_names({short: plain[name] for short, name in inner.items()}, here)
    return plain


def require_finite(tensors: Mapping[str, Tensor], source: object) -> None:
    """Raises a ValueError that names the first of ``tensors`` with a NaN or an infinite number, and its file."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            values = tensor if tensor.element_size() > 1 else tensor.float()
            # A minimum and a maximum are NaN if one number is, and need no memory.
            if not all(bool(end.isfinite()) for end in values.aminmax()):
                raise ValueError(
                    f"{shown(source)} holds NaN or infinity, first in its tensor {shown(name)}: the training that "
                    "wrote it diverged, or the file is damaged. Give other weights"
                )


def require_fit(
    here: Mapping[str, Tensor], found: Mapping[str, Tensor], owner: str, source: object, configuration: str
) -> None:
    """Checks that the tensors ``found`` have the names and shapes of those ``here``.

    Args:
        here: parameters and buffers of a module.
        found: the tensors of a file.
        owner: the module's name in the message.
        source: the file's name in the message.
        configuration: the file that says how to configure the network, in the message.

    Raises:
        ValueError: a tensor is missing, left over or of another shape.
    """
    sentences = list(differences("", here, found))
    if sentences:
        raise ValueError(
            f"{source} does not fit {owner}: {listed(sentences)}. Give the weights of this network, or configure the "
            f"network as {configuration} does"
        )


def save_weights(path: Path, module: nn.Module, metadata: Mapping[str, str] | None = None) -> None:
    """Writes ``module``'s parameters and buffers to a safetensors file, whole or not at all.

    Args:
        path: destination, ``*.safetensors``; an existing file is replaced.
        module: what to save; tensors are saved in their own dtype, under the names of its ``state_dict()``.
        metadata: strings to keep in the file's header, e.g. the gin file that made it.

    Raises:
        ValueError: the file cannot be written; an earlier one is intact.
    """
    tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in module.state_dict().items()}
    write_atomically(Path(path), safetensors.torch.save(tensors, metadata=dict(metadata or {})))


def is_whole(path: Path) -> bool:
    """Whether ``path`` is a safetensors file with all the bytes that its header promises."""
    try:
        with safetensors.safe_open(path, framework="pt"):
            return True
    except (safetensors.SafetensorError, OSError):
        return False


def read_header(path: Path) -> dict[str, str]:
    """The strings in the header of a safetensors file; errors as of ``load_weights``."""
    return _read(Path(path), names=())[1]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header strings) of a safetensors file. Errors as of `read_state`."""
    tensors, header = _read(Path(path))
    require_finite(tensors, path)
    return tensors, header


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a state dict that ``torch.save`` wrote; no code of the file is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or of another kind, or a tensor holds a NaN or an infinite number.
    """
    if path.suffix == ".safetensors" or not path.is_file():
        return plain_names(read_tensors(path)[0])
    try:
        tensors = state_dict(load_torch(path))
    except Refused as error:
        raise ValueError(
            f"{path} is damaged or no file of tensors: refused {error}; nothing was run. Get it from its makers"
        ) from error
    except Exception as error:  # a damaged file can raise any error
        raise ValueError(f"{path} is damaged or no file of tensors ({type(error).__name__}): fetch it again") from error
    require_finite(tensors, path)
    return tensors


def _read(path: Path, names: Iterable[str] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise Missing(
            str(path),
            f"no weights at {path}. Give the path of a safetensors file (--teacher for the teacher), or train one "
            "first",
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = file.keys() if names is None else names
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({shown(error)}). Copy or convert it again"
        ) from error


def _load_tensors(path: Path, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives the module ``tensors`` in its dtypes: assigned, or copied into weights that are tied or on a GPU."""
    here = module.state_dict()
    tensors = plain_names(tensors, here)
    require_fit(here, tensors, type(module).__name__, path, "the file's own gin file")
    tied = len({tensor.data_ptr() for tensor in here.values()}) < len(here)
    if tied or any(tensor.device.type != "cpu" for tensor in here.values()):
        module.load_state_dict(tensors, strict=True)
        return
    converted = {name: tensor.to(here[name].dtype) for name, tensor in tensors.items()}
    module.load_state_dict(converted, strict=True, assign=True)


def load_weights(path: Path, module: nn.Module) -> dict[str, str]:
    """Loads a safetensors file into ``module``: every tensor, with its shape, or nothing.

    Args:
        path: a safetensors file.
        module: receives the tensors, converted to its own dtypes and device. Its parameters may be replaced, so load
            before handing them to an optimiser.

    Returns:
        The strings in the file's header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a safetensors file (or a torn one), or a tensor is missing, left over, of another shape or not
            finite.
    """
    tensors, metadata = read_tensors(Path(path))
    _load_tensors(Path(path), module, tensors)
    return metadata


def load_part(path: Path, module: nn.Module, prefix: str) -> None:
    """Loads ``module``, a part of a larger network, from the file of that network.

    Args:
        path: a safetensors file.
        module: a part of the network that the file holds, such as its encoder; every tensor must be there.
        prefix: what precedes the part's own names in the file.

    Raises:
        FileNotFoundError, ValueError: as ``load_weights``, but tensors of the rest are not looked at.
    """
    tensors = plain_names(read_tensors(Path(path))[0])
    wanted = {key: tensors[prefix + key] for key in module.state_dict() if prefix + key in tensors}
    _load_tensors(Path(path), module, wanted)
