"""One network forward and backward: plain eager float32, channels-last, bf16 and compiled, in turn in one process.

Notation: a *setting* is how the same weights run; ``fp32`` is plain eager float32 code, to which the others are
compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.inputs import filled, made_up_condition
from ratiograph.core.differentiation import uncompiled
from ratiograph.networks import compilation
from ratiograph.networks.architectures import edm, unet
from ratiograph.networks.architectures.stable_diffusion_unets import SD15UNet, SDXLUNet
from ratiograph.training.memory import available_memory, peak_memory, require_memory

__all__ = ["SETTINGS", "Setting", "bench_network", "network_classes"]

PRECISIONS = ("fp32", "bf16")
OPTIONS = ("channels-last", "compiled")


@dataclass(frozen=True)
class Setting:
    """How the network runs. ``last``: channels-last; ``bf16``: under autocast; ``compiled``: its blocks."""

    last: bool = False
    bf16: bool = False
    compiled: bool = False

    @classmethod
    def parse(cls, text: str) -> Setting:
        """The setting that words separated by commas say, in any order: a precision, then options.

        Raises:
            ValueError: a word is unknown or there twice, or there is not one precision.
        """
        words = [word.strip() for word in text.split(",")]
        known = len(set(words)) == len(words) and set(words) <= {*PRECISIONS, *OPTIONS}
        if not known or len(set(words) & set(PRECISIONS)) != 1:
            raise ValueError(
                f"--settings: {text!r} is no setting: write {' or '.join(PRECISIONS)}, then {', '.join(OPTIONS)} or "
                f"both where wanted, as in {str(cls(True, True, True))!r}; ';' goes between settings"
            )
        return cls("channels-last" in words, "bf16" in words, "compiled" in words)

    def __str__(self) -> str:
        options = [word for word, there in zip(OPTIONS, (self.last, self.compiled), strict=True) if there]
        return ", ".join([PRECISIONS[self.bf16], *options])


SETTINGS = tuple(str(Setting(last, bf16, compiled)) for compiled, bf16, last in product((False, True), repeat=3))
"""All there are: eager before compiled, float32 before bf16."""
BYTES = 12
"""Of a trained weight in two memory formats with a gradient in float32, without activations."""


def network_classes() -> dict[str, type[nn.Module]]:
    """The networks that can be timed, by class name."""
    return {c.__name__: c for c in (edm.DDPMPP, edm.NCSNPP, edm.ADM, unet.UNet, SD15UNet, SDXLUNet)}


def build(name: str, sizes: Mapping[str, object]) -> nn.Module:
    """The network at its default sizes but for ``sizes``, without dropout, with weights at which no layer is idle.

    Raises:
        ValueError: there is no such network or argument, or it would not fit into memory.
    """
    classes = network_classes()
    if name not in classes:
        raise ValueError(f"--network={name}: choose one of {', '.join(classes)}")
    try:
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in classes[name](**sizes).parameters())
    except TypeError as error:
        raise ValueError(f"--network={name}: {error}") from error
    require_memory(BYTES * parameters / 1e9, torch.device("cpu"), "close other programs, or take a smaller network")
    torch.manual_seed(0)
    network = filled(classes[name](**sizes).train())
    for module in network.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0  # so that outputs can be compared
    return network


class _Variants:
    """The network in the memory formats that the settings ask for, which share nothing but their values."""

    def __init__(self, network: nn.Module, settings: Sequence[Setting], batch_size: int, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        self.device, self.outputs = device, {}
        self.images = torch.randn(batch_size, *network.shape, generator=generator).to(device)
        self.c_noise = torch.rand(batch_size, generator=generator).to(device)
        self.condition = made_up_condition(network, batch_size, generator).to(device)
        self.networks = {False: network.to(device)}
        if any(setting.last for setting in settings):
            self.networks[True] = copy.deepcopy(network).to(memory_format=torch.channels_last)
        if any(setting.compiled for setting in settings):
            for each in self.networks.values():
                compilation.compile_blocks(each)

    def work(self, name: str, setting: Setting) -> Callable[[], None]:
        """One forward and backward pass under ``setting``; its output is kept under ``name``."""
        network = self.networks[setting.last]
        images = self.images.to(memory_format=torch.channels_last) if setting.last else self.images

        def run() -> None:
            eager = nullcontext() if setting.compiled else uncompiled()
            with eager, torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=setting.bf16):
                output = network.decode(network.encode(images, self.c_noise, self.condition))
            output.float().square().mean().backward()
            network.zero_grad(set_to_none=True)
            self.outputs[name] = output.detach().float()

        return run


def bench_network(
    name: str,
    *,
    sizes: Mapping[str, object],
    settings: Sequence[str],
    batch_size: int,
    rounds: int,
    device: torch.device,
) -> dict[str, object]:
    """The record of one network's forward and backward passes.

    Args:
        name: its class.
        sizes: arguments that differ from its defaults.
        settings: what ``Setting.parse`` reads; "fp32" is added where it is missing.
        batch_size: samples a pass.
        rounds: timed runs of each setting.
        device: where.

    Raises:
        ValueError: a name is unknown, or the network does not fit.
    """
    chosen = {str(each): each for each in map(Setting.parse, ("fp32", *settings))}
    network = build(name, sizes)
    variants = _Variants(network, list(chosen.values()), batch_size, device)
    works = {each: variants.work(each, setting) for each, setting in chosen.items()}
    flops = timing.count_flops(works["fp32"])
    rounds_seconds = timing.in_turn(works, rounds, device)
    seconds = timing.medians(rounds_seconds)
    return {
        "bench": "network",
        "network": name,
        "sizes": dict(sizes),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "batch_size": batch_size,
        "rounds": rounds,
        "flops": flops,
        "rows": [_row(each, seconds, flops, variants.outputs) for each in chosen],
        "rounds_seconds": rounds_seconds,
        "peak_memory_gb": peak_memory(device),
        "left_memory_gb": available_memory(device),
    }


def _row(name: str, seconds: Mapping[str, float], flops: int, outputs: Mapping[str, Tensor]) -> dict[str, object]:
    reference = outputs["fp32"]
    return {
        "variant": name,
        "seconds": seconds[name],
        "faster": seconds["fp32"] / seconds[name],
        "tflops": flops / seconds[name] / 1e12,
        "relative_difference": float((outputs[name] - reference).norm() / reference.norm()),
    }
