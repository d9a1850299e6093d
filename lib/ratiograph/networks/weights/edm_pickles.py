"""Reads official EDM network files as data: no code in a file is run.

An official file is a pickle of ``{'ema': network, ...}``. Every module in it is a *record*, a dict of its class name,
the Python source of its class, and its state; the official loader runs that source. Here a record stays a dict, the
source is not read, and tensors come from their bytes. Every other global that the pickle names is refused: the
unpickler of `restricted_pickles` calls only the stand-ins listed here.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ratiograph.core.foreign import shown
from ratiograph.networks.weights.restricted_pickles import (
    Array,
    DType,
    Function,
    Refused,
    Sealed,
    Unpickler,
    numpy_names,
)
from ratiograph.networks.weights.torch_files import load_torch
from ratiograph.networks.weights.weight_files import require_finite, state_dict

__all__ = ["OfficialNetwork", "read_network"]


@dataclass(frozen=True)
class OfficialNetwork:
    """A network as its file describes it.

    ``tensors``: parameters and buffers by their official names, without ``model.``. ``preconditioning``: official
    class name of the network's denoiser, None in a plain state dict. ``settings``: numbers of that denoiser
    (``sigma_data``, ``beta_min``, ...) and of the network (``dropout``, ``label_dropout``), as far as the file says.
    """

    tensors: Mapping[str, Tensor]
    preconditioning: str | None
    settings: Mapping[str, float]


# --- stand-ins ----------------------------------------------------------------------------------------------


class _Record(Sealed):
    """A module: class name and state."""

    __slots__ = ("class_name", "state")

    def __init__(self, description: dict):
        kind = description["type"]
        if kind != "class" or not isinstance(description["class_name"], str):
            raise Refused(f"a record of type '{shown(kind) if isinstance(kind, str) else type(kind).__name__}'")
        self.class_name, self.state = description["class_name"], description["state"] or {}


class _Container(Sealed):
    """A module list or dict: created empty, then its state is set once."""

    __slots__ = ("state",)
    class_name = "container"

    def __setstate__(self, state: object) -> None:
        if hasattr(self, "state") or not isinstance(state, dict):
            raise Refused("a container with two states")
        self.state = state


class _PlainDict(dict, Sealed):
    """A dict with attribute access in the official code."""

    __slots__ = ()
    __setstate__ = Sealed.__setstate__


class _Value(Sealed):
    """A tensor, or the values [N] of a storage."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def _scalar(dtype: DType, data: bytes) -> float:
    return np.frombuffer(data, dtype.dtype).item()


def _storage(data: bytes) -> _Value:
    storage = load_torch(io.BytesIO(data))
    if not isinstance(storage, torch.storage.TypedStorage):
        raise Refused(f"a {type(storage).__name__} in place of a storage")
    with warnings.catch_warnings():  # typed storages are deprecated, and what the files hold
        warnings.simplefilter("ignore", UserWarning)
        return _Value(torch.empty(0, dtype=storage.dtype).set_(storage.untyped()))


def _tensor(storage: _Value, offset: int, size: tuple, stride: tuple, *gradient: object) -> _Value:
    if math.prod(size) > storage.tensor.numel():
        raise Refused("a tensor larger than its storage")
    return _Value(torch.as_strided(storage.tensor, size, stride, offset))


def _parameter(value: _Value, requires_grad: bool, hooks: object) -> _Value:
    return value


_ALLOWED = {
    "torch_utils.persistence._reconstruct_persistent_obj": Function(_Record),
    "torch._utils._rebuild_tensor_v2": Function(_tensor),
    "torch._utils._rebuild_parameter": Function(_parameter),
    "torch.storage._load_from_bytes": Function(_storage),
    "torch.nn.modules.container.ModuleDict": _Container,
    "torch.nn.modules.container.ModuleList": _Container,
    "collections.OrderedDict": Function(dict),
    "builtins.set": Function(set),
    "dnnlib.util.EasyDict": _PlainDict,
    "numpy.dtype": Function(DType),
    "numpy.ndarray": Function(Array),
    **dict.fromkeys(numpy_names("multiarray.scalar"), Function(_scalar)),
    **dict.fromkeys(numpy_names("multiarray._reconstruct"), Function(Array)),
}


# --- files --------------------------------------------------------------------------------------------------


def _modules(module: _Record | _Container) -> dict[str, _Record | _Container]:
    """``module``, by the name '', and all modules in it, each with a dot after its name.

    Raises:
        Refused: one is in two places, as in no network; a pickle could repeat it without end.
    """
    found, seen = {"": module}, {id(module)}
    waiting = [("", module)]
    while waiting:
        prefix, parent = waiting.pop()
        for name, child in parent.state["_modules"].items():
            if child is None:
                continue
            if id(child) in seen:
                raise Refused("one module in two places")
            seen.add(id(child))
            found[f"{prefix}{name}."] = child
            waiting.append((f"{prefix}{name}.", child))
    return found


def _state_tensors(prefix: str, module: _Record | _Container) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the module's own tensors that its ``state_dict()`` would hold."""
    state = module.state
    transient = state.get("_non_persistent_buffers_set", ())
    for name, value in (*state["_parameters"].items(), *state["_buffers"].items()):
        if value is not None and name not in transient:
            yield prefix + name, value.tensor


def _numbers(module: _Record | _Container) -> dict[str, float]:
    """Plain numbers among the attributes of a module."""
    return {name: value for name, value in module.state.items() if isinstance(value, int | float)}


def _from_pickle(path: Path) -> OfficialNetwork:
    with open(path, "rb") as file:
        document = Unpickler(file, _ALLOWED).load()
    network = document["ema"] if isinstance(document, dict) and "ema" in document else document
    if not isinstance(network, _Record):
        raise Refused(f"a {type(network).__name__} in place of a network")
    model = network.state["_modules"]["model"]
    parts = _modules(model)
    dropout = [part.state["dropout"] for name, part in parts.items() if name and "dropout" in part.state]
    settings = {"dropout": max(dropout, default=0.0), **_numbers(model), **_numbers(network)}
    tensors = dict(entry for prefix, part in parts.items() for entry in _state_tensors(prefix, part))
    return OfficialNetwork(tensors, network.class_name, settings)


def _from_state_dict(path: Path) -> OfficialNetwork:
    tensors = state_dict(load_torch(path))
    return OfficialNetwork({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, None, {})


_READERS = {".pkl": _from_pickle, ".pt": _from_state_dict, ".pth": _from_state_dict}


def read_network(path: Path | str) -> OfficialNetwork:
    """The network in an official pickle (``.pkl``), or in a plain state dict with official names (``.pt``, ``.pth``).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another kind, or holds something that no EDM network needs.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}. Official networks are at https://nvlabs-fi-cdn.nvidia.com/edm")
    if path.suffix not in _READERS:
        raise ValueError(f"{path} is neither a pickle (.pkl) nor a state dict ({', '.join([*_READERS][1:])})")
    try:
        network = _READERS[path.suffix](path)
    except Refused as error:
        raise ValueError(
            f"{path}: refused {error}, which no EDM network needs; nothing was run. Get the file from its makers"
        ) from error
    except Exception as error:  # a damaged file can raise any error
        reason = shown(f"{type(error).__name__}: {error}".splitlines()[0])
        raise ValueError(f"{path} is damaged, or no EDM network ({reason}). Download it again") from error
    require_finite(network.tensors, path)
    return network
