"""EDM's denoiser mu(x_t) = E[x0 | x_t], for teacher, student score and student; freezing, placing and precision.

Notation: s = sigma / alpha and y = x_t / alpha, the variance-exploding view of a noisy sample. The score is
(alpha mu - x_t) / sigma^2. A denoiser first encodes (features by resolution, coarsest last), then decodes, so that
features and the denoised sample come from one pass, and where only features are needed the decoder does not run.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ratiograph.algebra.noising import ScaledLinearDDPM
from ratiograph.core.contracts import Denoiser
from ratiograph.core.domains import Scale
from ratiograph.core.files import Missing, expanded
from ratiograph.core.foreign import parse_json, shown
from ratiograph.core.types import Condition, Encoding, Noisy, expand
from ratiograph.networks.compilation import compile_blocks
from ratiograph.networks.weights.weight_files import load_weights, locate_weights, read_header, shipped, weights_facts

__all__ = ["EDM"]

SOURCE = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/ (edm-cifar10-32x32-cond-vp.pkl and others, 0.2 to 1.2 GB)"
DESCRIBED = ("sigma_data", "resolution", "image_channels", "classes", "augment_labels")
"""Arguments of a denoiser and its network that must equal those written in the header of the weights' file."""


class EDM(Denoiser):
    """mu = c_skip y + c_out F(c_in y, log(s) / 4) with s = sigma / alpha, y = x_t / alpha (EDM Eq. 7, Table 1).

    The network runs under autocast in ``autocast_dtype`` when that is set; everything outside it is float32.

    Args:
        network: a module with ``encode`` and ``decode`` (``UNet``, ``MLP``).
        sigma_data: standard deviation of the clean data.
        weights: what to start from: a safetensors file, a converted folder, an official EDM file or the name of weights
            in the package (``mnist_teacher``), see `locate_weights`; None starts from random weights.
        compiled: whether the network's blocks are compiled by torch when they first run, see `compilation`.
    """

    autocast_dtype: torch.dtype | None = None
    process: ScaledLinearDDPM | None = None
    """The discrete process that the network was trained on, if there is one."""

    def __init__(
        self, *, network: nn.Module, sigma_data: Scale = 0.5, weights: str | None = None, compiled: bool = False
    ):
        super().__init__()
        self.network, self.sigma_data, self.weights, self.compiled = network, sigma_data, weights, compiled
        if compiled:
            compile_blocks(network)

    @classmethod
    def locate(cls, *, weights: str | None) -> None:
        """Raises a FileNotFoundError that says where to get ``weights`` if there are none; reads nothing."""
        if weights is not None and not shipped(weights).is_file() and not expanded(weights).exists():
            raise Missing(
                weights,
                f"no weights at {weights}. Give --teacher a safetensors file, a converted folder or an official EDM "
                f"file, from {SOURCE}",
            )

    def load(self) -> None:
        """Loads the weights.

        Raises:
            FileNotFoundError: there are none at ``weights``.
            ValueError: they are of another network or denoiser; says what to set.
        """
        if self.weights is None:
            return
        self.locate(weights=self.weights)
        path = locate_weights(self.weights, type(self).__name__)
        described = read_header(path).get("denoiser")
        if described is not None:
            self._check_description(path, parse_json(described, f"the header of {path}"))
        load_weights(path, self)

    def file_facts(self) -> dict[str, object]:
        """As of `contracts.Identified`."""
        return weights_facts(self.weights)

    def _check_description(self, path: Path, described: object) -> None:
        """ValueError unless the file describes this denoiser and network; widths are checked by the tensors' shapes."""
        wrong = []
        for kind, module in (("denoiser", self), ("network", self.network)):
            ours, found = type(module).__name__, described if isinstance(described, dict) else {}
            theirs, arguments = found.get(kind), found.get(f"{kind}_arguments")
            if not isinstance(theirs, str) or not isinstance(arguments, dict):
                raise ValueError(f"{path} does not say in its header which {kind} it is of: convert it again")
            if theirs != ours:
                wrong.append(f"its {kind} is a {shown(theirs)}, here it is a {ours}")
            for name in arguments.keys() & {*DESCRIBED}:
                value, here = arguments[name], getattr(module, name, arguments[name])
                if here != value:
                    wrong.append(f"its {name} is {shown(value)}, here it is {here} ({ours}.{name})")
        if wrong:
            raise ValueError(
                f"{path} holds weights of another network: {'; '.join(wrong)}. Configure the network as the file's, or "
                "give other weights with --teacher"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.network.shape

    @property
    def class_count(self) -> int:
        """Number of classes of the network, 0 for an unconditional one."""
        return self.network.classes

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of each feature map, finest first."""
        return self.network.feature_channels

    def encode(self, noisy: Noisy, condition: Condition) -> Encoding:
        y, s = noisy.rescaled()
        norm = (s.square() + self.sigma_data**2).sqrt()
        c_skip, c_out = self.sigma_data**2 / norm.square(), s * self.sigma_data / norm
        with autocast(y.device, self.autocast_dtype):
            encoding = self.network.encode(y / expand(norm, y), s.log() / 4, condition)
        return replace(encoding, restore=lambda out: expand(c_skip, y) * y + expand(c_out, y) * out.to(y.dtype))

    def decode(self, encoding: Encoding) -> Tensor:
        with autocast(encoding.features[0].device, self.autocast_dtype):
            out = self.network.decode(encoding)
        return encoding.restore(out)


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """The context of a network's pass on ``device`` under autocast in ``dtype``; None is float32."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def freeze(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Freezes a network for good and casts the weights of its convolutions and linear layers to ``dtype``.

    Autocast would cast them so at every pass; norms and embeddings stay float32.

    Args:
        module: the network.
        dtype: the autocast type; None leaves the weights as they are.
    """
    module.requires_grad_(False).eval()
    for layer in module.modules():
        if dtype is not None and isinstance(layer, nn.Conv2d | nn.Linear):
            layer.to(dtype)


def place(module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """Moves a network to ``device`` and sets the autocast type of every network inside it.

    On a GPU the weights become channels-last, which its convolutions are fastest with; on a CPU that makes no
    difference to speed, and the weights stay the memory-mapped pages of their file.
    """
    module.to(device)
    if device.type == "cuda":
        module.to(memory_format=torch.channels_last)
    set_precision(module, dtype)


def set_precision(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Sets the autocast type of every network inside ``module`` that has one; None is float32."""
    for child in module.modules():
        if hasattr(child, "autocast_dtype"):
            child.autocast_dtype = dtype
