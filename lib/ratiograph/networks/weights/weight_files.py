"""Weights that leave or enter a run, as safetensors files: every tensor with its shape, or nothing.

Names are those of a module's ``state_dict()``. Nothing in such a file can run code.

A file is mapped, not read: on the CPU a module's tensors *are* the file's pages until something writes to them, so
several networks that start from one file share its memory, and a frozen one never has a copy of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from ratiograph.core.files import write_atomically

__all__ = [
    "differences",
    "listed",
    "load_part",
    "load_weights",
    "locate_weights",
    "read_header",
    "read_tensors",
    "register_converter",
    "require_fit",
    "save_weights",
]

ASSETS = Path(__file__).parents[2] / "assets"

Converter = Callable[[Path, str | None], Path]
"""(file, class name of the denoiser that takes it) -> the safetensors file that it was converted to."""

_converters: dict[str, Converter] = {}


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
    path = Path(name).expanduser()
    if path.is_dir():
        return path / "weights.safetensors"
    if path.suffix in _converters and path.is_file():
        return _converters[path.suffix](path, denoiser)
    return path


def differences(name: str, here: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Iterator[str]:
    """Sentences on how the tensors ``found`` in a file differ from those ``here``; ``name`` precedes their names."""
    for key, tensor in here.items():
        if key not in found:
            yield f"{name}{key} is not in the file"
        elif not isinstance(found[key], Tensor):
            yield f"{name}{key} is a tensor here and a {type(found[key]).__name__} in the file"
        elif found[key].shape != tensor.shape:
            yield f"{name}{key} has shape {list(tensor.shape)} here and {list(found[key].shape)} in the file"
    yield from (f"{name}{key} is in the file and not here" for key in found if key not in here)


def listed(sentences: list[str], limit: int = 3) -> str:
    """The first ``limit`` of the sentences, and how many more there are."""
    rest = len(sentences) - limit
    return "; ".join(sentences[:limit]) + (f"; and {rest} more" if rest > 0 else "")


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
    return read_tensors(Path(path), names=())[1]


def read_tensors(path: Path, names: Iterable[str] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header strings) of a safetensors file; all tensors, or those of ``names``. Errors as `load_weights`."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}. Give the path of a safetensors file (--teacher for the teacher), or train one first"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = file.keys() if names is None else names
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}). Copy or convert it again") from error


def _load_tensors(path: Path, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives the module ``tensors`` in its dtypes: assigned, or copied into weights that are tied or on a GPU."""
    here = module.state_dict()
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
        ValueError: not a safetensors file (or a torn one), or a tensor is missing, left over or of another
            shape.
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
    tensors, _ = read_tensors(Path(path))
    wanted = {key: tensors[prefix + key] for key in module.state_dict() if prefix + key in tensors}
    _load_tensors(Path(path), module, wanted)
