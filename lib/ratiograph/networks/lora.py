"""Low-rank adapters: students and student scores that learn a small change of frozen weights (Hu et al. 2022).

Notation: a layer with the frozen weight W computes (W + (alpha / rank) B A) x, with A [rank, in] random and B zero at
first, so that the network begins as its *base*, the network without adapters. peft is imported when a `LoRA` is built.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ratiograph.core.domains import Positive, PositiveInt
from ratiograph.core.types import Condition, Encoding
from ratiograph.networks.architectures.text_unet import TextUNet, draw_weights
from ratiograph.networks.teachers.stable_diffusion import StableDiffusion
from ratiograph.networks.weights.frozen import save_only
from ratiograph.networks.weights.pipeline_files import fit, missing_package

__all__ = ["LoRA"]

ADAPTER = ".lora_"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
REST = ("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut", "time_emb_proj")
SCALES = ("downsamplers.0.conv", "upsamplers.0.conv")


class LoRA(nn.Module):
    """A U-Net with adapters on some of its layers; only the adapters are trained, saved and averaged.

    Nodes whose bases have the same weights share one copy of them (`share_bases`), and so do copies of a node. At rank
    64 on all default targets the adapters of SD 1.5, their gradients, Adam's state and average take 8 % of its size.

    Args:
        network: ``SD15UNet``, ``SDXLUNet`` or ``UNetFromFolder``, the base.
        rank: of each adapter, at least 1.
        alpha: strength; the change is alpha / rank times B A.
        targets: the layers adapted, by the ends of their names; attention, feed-forward and convolutions by default.

    Raises:
        ValueError: peft is not installed, or targets that name no layer.
    """

    def __init__(
        self,
        *,
        network: nn.Module,
        rank: PositiveInt = 64,
        alpha: Positive = 64.0,
        targets: Sequence[str] = (*ATTENTION, *REST, *SCALES),
    ):
        super().__init__()
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise missing_package("peft", "LoRA") from error
        self.rank, self.alpha, self.targets = rank, alpha, tuple(targets)
        settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(self.targets))
        try:
            inject_adapter_in_model(settings, network.unet)
        except ValueError as error:
            raise ValueError(f"LoRA.targets={self.targets}: no layer's name ends so ({error})") from error
        self.network = network
        save_only(self, ADAPTER)

    unet = property(lambda self: self.network.unet, doc="diffusers' module with its adapters.")
    sized = property(lambda self: self.network.sized)
    classes = property(lambda self: self.network.classes)
    shape = property(lambda self: self.network.shape)
    feature_channels = property(lambda self: self.network.feature_channels)
    text_width = property(lambda self: self.network.text_width)

    def load(self, weights: str) -> None:
        """Loads the base's weights, as the base's own ``load``."""
        base = {name: owner._parameters[key] for name, owner, key in base_slots(self.unet)}
        fit(f"LoRA.network = @{type(self.network).__name__}()", base, self.network.read(weights), weights)
        self.network.filled = True

    def draw(self) -> None:
        """Draws random weights for a base that has none yet; the adapters stay."""
        if not self.network.filled:
            draw_weights(layer for path, layer in self.unet.named_modules() if ADAPTER not in f".{path}.")
            self.network.filled = True

    find = staticmethod(TextUNet.find)

    def drop_decoder(self) -> None:
        """Removes what ``encode`` does not need."""
        self.network.drop_decoder()

    def encode(self, x: Tensor, c_noise: Tensor, condition: Condition) -> Encoding:
        return self.network.encode(x, c_noise, condition)

    def decode(self, encoding: Encoding) -> Tensor:
        return self.network.decode(encoding)

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """The base's tensors with the adapters added, float32, by diffusers' names."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        tensors = {name: owner._parameters[key].detach().float() for name, owner, key in base_slots(self.unet)}
        for name, layer in self.unet.named_modules():
            if isinstance(layer, BaseTunerLayer):
                tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + layer.get_delta_weight("default").float()
        return tensors

    def __deepcopy__(self, memo: dict) -> LoRA:
        """A copy with adapters of its own and the same base."""
        memo |= {id(owner._parameters[key]): owner._parameters[key] for _, owner, key in base_slots(self.unet)}
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied


def base_slots(unet: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name in diffusers, module, name in that module) of every parameter of ``unet`` that is no adapter's."""
    for path, module in unet.named_modules():
        if ADAPTER not in f".{path}.":
            for key in module._parameters:
                if module._parameters[key] is not None:
                    yield f"{path}.{key}".replace(".base_layer.", "."), module, key


def share_bases(*nodes: nn.Module | None) -> None:
    """Lets frozen U-Nets in ``nodes`` with the same ``weights`` and architecture share one copy of the parameters.

    A frozen U-Net is a teacher's, or the base of a ``LoRA``. Call it before weights are loaded, once the teacher is
    frozen; the parameters become the same objects, so that moving or casting one moves or casts all.
    """
    first: dict[tuple[str, str], dict[str, nn.Parameter]] = {}
    denoisers = [m for node in nodes if node is not None for m in node.modules() if isinstance(m, StableDiffusion)]
    for denoiser in denoisers:
        slots = list(base_slots(denoiser.network.unet))
        frozen = not any(owner._parameters[key].requires_grad for _, owner, key in slots)
        if denoiser.weights is None or not frozen:
            continue
        kind = (denoiser.weights, json.dumps(dict(denoiser.network.unet.config), default=str, sort_keys=True))
        shared = first.setdefault(kind, {name: owner._parameters[key] for name, owner, key in slots})
        for name, owner, key in slots:
            owner._parameters[key] = shared[name]
