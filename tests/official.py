"""Files of the official EDM format, written by torch's own pickling as the official ones are.

They hold records of modules with the source of their classes, which their own loader would run.
"""

from __future__ import annotations

import pickle
import re
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ratiograph.core.types import Condition, Noisy
from ratiograph.networks.architectures.edm import ADM, DDPMPP, NCSNPP

SMALL = {"resolution": 8, "channels": 8, "multipliers": (1, 2, 2), "blocks": 2, "attention_resolutions": (4,)}
NETWORKS = {
    "ddpmpp": lambda: DDPMPP(**SMALL, dropout=0.13),
    "ncsnpp": lambda: NCSNPP(**SMALL, dropout=0.13, classes=3, label_dropout=0.1),
    "adm": lambda: ADM(**{**SMALL, "channels": 64}, classes=3),
}
MARKER = "ran.txt"
SOURCE = f"open({MARKER!r}, 'w').write('the source was run')\n"


def renamed(size: int) -> list[tuple]:
    """Our names => official ones, for images of ``size`` x ``size`` and three levels."""
    return [
        (r"^embedding\.noise\.frequencies", "map_noise.freqs"),
        (r"^embedding\.classes\.table", "map_label.weight"),
        (r"^embedding\.classes", "map_label"),
        (r"^embedding\.augment", "map_augment"),
        (r"^embedding\.layer1", "map_layer0"),
        (r"^embedding\.layer2", "map_layer1"),
        (r"attention\.norm", "norm3"),
        (r"attention\.query_key_value", "qkv"),
        (r"attention\.project", "proj"),
        (r"norm(\d)", lambda m: f"norm{int(m[1]) - 1}"),
        (r"conv(\d)", lambda m: f"conv{int(m[1]) - 1}"),
        (r"^stem", f"enc.{size}x{size}_conv"),
        (r"^encoder\.(\d)\.resample", lambda m: "enc.{0}x{0}_down".format(size >> int(m[1]))),
        (r"^decoder\.(\d)\.resample", lambda m: "dec.{0}x{0}_up".format(size >> int(m[1]))),
        (r"^(enc|dec)oder\.(\d)\.blocks\.(\d)", lambda m: "{1}.{0}x{0}_block{2}".format(size >> int(m[2]), m[1], m[3])),
        (r"^middle\.(\d)", lambda m: "dec.{0}x{0}_in{1}".format(size // 4, m[1])),
        (r"^pyramid\.(\d)", lambda m: "enc.{0}x{0}_aux_residual".format(size // 2 >> int(m[1]))),
    ]


def official_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """The network's state dict as the official classes would have it."""
    size = network.resolution
    last = f"dec.{size}x{size}_aux"
    ends = ("out_norm", "out_conv") if isinstance(network, ADM) else (f"{last}_norm", f"{last}_conv")
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0] if isinstance(network, NCSNPP) else [1.0, 1.0])
    taps = torch.outer(taps, taps)[None, None] / taps.sum() ** 2
    result = {}
    for name, tensor in network.state_dict().items():
        for pattern, replacement in [*renamed(size), ("^out_norm", ends[0]), (r"^out\.", f"{ends[1]}.")]:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor.T if name == "map_label.weight" else tensor
    moved = {name.rsplit(".", 2)[0] for name in result if re.search(r"_(down|up)\.conv0\.", name)}
    return {**result, **{f"{name}.{layer}.resample_filter": taps for name in moved for layer in ("conv0", "skip")}}


class Official:
    """Pickles as a module of an official class."""

    def __init__(self, class_name: str, **state):
        self.class_name, self.state = class_name, state

    def __reduce__(self):
        description = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": self.class_name}
        reconstruct = sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj
        return reconstruct, ({**description, "state": self.state},)


def module_state(**attributes):
    return {"_parameters": {}, "_buffers": {}, "_non_persistent_buffers_set": set(), "_modules": {}, **attributes}


def official_module(state: dict[str, torch.Tensor], class_name: str, of_blocks: dict, **attributes) -> Official:
    """A tree of records from dotted names; blocks get the attributes ``of_blocks``."""
    result = Official(class_name, **module_state(**attributes))
    children: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        first, _, rest = name.partition(".")
        if rest:
            children.setdefault(first, {})[rest] = tensor
        elif first in ("resample_filter", "freqs"):
            result.state["_buffers"][first] = tensor
        else:
            result.state["_parameters"][first] = nn.Parameter(tensor)
    result.state["_parameters"]["absent"] = None
    for name, inside in children.items():
        child = official_module(inside, "Layer", of_blocks, **(of_blocks if "block" in name else {}))
        if name in ("enc", "dec"):
            container = nn.ModuleDict()
            container._modules = child.state["_modules"]
            child = container
        result.state["_modules"][name] = child
    return result


def official_pickle(
    path: Path, network: nn.Module, monkeypatch, *, old: bool = False, denoiser="EDMPrecond", **scalars
):
    """Writes ``network`` as the official code would: today's, or that of 2022 with numpy 1."""

    def _reconstruct_persistent_obj(description):
        raise AssertionError("only its name is needed")

    module = types.ModuleType("torch_utils.persistence")
    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    rate = network.embedding.classes.dropout if network.embedding.classes is not None else 0
    of_blocks = {"dropout": network.encoder[0].blocks[0].dropout, "skip_scale": np.float64(0.5) ** 0.5}
    model = official_module(official_state(network), "AnyUNet", of_blocks, label_dropout=rate)
    scalars = {"sigma_min": 0, "sigma_max": float("inf"), **scalars, "extra": np.arange(6.0).reshape(2, 3)}
    document = {"ema": Official(denoiser, **module_state(_modules={"model": model}, **scalars)), "augment_pipe": None}
    data = pickle.dumps(document, protocol=3 if old else 4)
    if old:  # numpy 1 wrote the same under another module
        assert b"numpy._core.multiarray" in data
        data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path.write_bytes(data)


def random(network: nn.Module) -> nn.Module:
    """Weights at which every tensor counts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def asked():
    """Noisy samples and a condition."""
    generator = torch.Generator().manual_seed(1)
    x, sigma = torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([0.1, 3.0])
    augment = torch.randn(2, 9, generator=generator)
    return Noisy(x, sigma, torch.ones(2), sigma), Condition(torch.tensor([2, 0]), augment)
