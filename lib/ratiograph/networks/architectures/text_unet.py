"""The base class of U-Nets of latents that take captions, from the package diffusers, run in two halves.

Notation: x and F [B, 4, H, W] latents; c_noise [B] the step index; ``text`` [B, L, E] the caption's states. The encoder
is everything up to the middle block, the decoder the rest: a caller that needs only features skips the decoder.
diffusers is imported when such a network is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ratiograph.core.differentiation import recomputed_alike
from ratiograph.core.files import Missing, expanded
from ratiograph.core.types import Condition
from ratiograph.networks.architectures.blocks import SkipEncoding
from ratiograph.networks.weights.pipeline_files import (
    HUB,
    fit,
    folder_of,
    missing_package,
    read_part,
    weights_of,
)

PART = "unet"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def build_unet(config: Mapping[str, object], component: str, random_weights: bool) -> nn.Module:
    """diffusers' ``UNet2DConditionModel`` of ``config`` in training mode, with random or uninitialised weights.

    Raises:
        ValueError: diffusers is not installed, or it refuses the configuration.
    """
    try:
        from diffusers.models.modeling_utils import no_init_weights
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    except ImportError as error:
        raise missing_package("diffusers", component) from error
    known = {name: value for name, value in config.items() if not name.startswith("_")}
    try:
        with nullcontext() if random_weights else no_init_weights():
            return UNet2DConditionModel(**known).train()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{component}: diffusers cannot build this U-Net: {error}") from error


def draw_weights(layers: Iterable[nn.Module]) -> None:
    """Initialises each of ``layers`` that has weights as torch does when it builds one."""
    for layer in layers:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()


@dataclass(frozen=True)
class TextUNetEncoding(SkipEncoding):
    """``text``: the caption's states, which the decoder takes too."""

    text: Tensor | None = None

    def detach(self) -> TextUNetEncoding:
        return replace(super().detach(), text=self.text.detach())


class TextUNet(nn.Module):
    """Base class: a ``UNet2DConditionModel`` run in two halves.

    Args:
        config: its configuration in diffusers' names.
        gradient_checkpointing: keep only each block's input for the backward pass and run the block again there.
        double_backward: compute attention as two matrix products and a softmax, since torch's fused attention has no
            second derivative. R1 on checkpointed features needs it. It holds whole attention maps in memory.
        random_weights: whether weights are drawn. If not, they are uninitialised until ``load`` or ``draw``: for a
            full-size network whose weights come from a file, this saves half a minute and the network's memory.
    """

    classes = 0
    """The network takes no class labels: the condition is a caption."""
    sized = False
    """Whether the network also takes SDXL's ``pooled`` and ``sizes``."""

    def __init__(
        self, config: Mapping[str, object], gradient_checkpointing: bool, double_backward: bool, random_weights: bool
    ):
        super().__init__()
        widths, resolution = tuple(config["block_out_channels"]), config["sample_size"]
        if resolution % 2 ** (len(widths) - 1):
            raise ValueError(
                f"{type(self).__name__}: {len(widths)} levels halve the latents {len(widths) - 1} times, so their side "
                f"must be a multiple of {2 ** (len(widths) - 1)}, not {resolution}"
            )
        self.gradient_checkpointing, self.double_backward = gradient_checkpointing, double_backward
        self.random_weights = self.filled = random_weights
        self.text_width = config["cross_attention_dim"]
        self.resolution, self.block_out_channels, self.cross_attention_dim = resolution, widths, self.text_width
        self.layers_per_block, self.norm_groups = config.get("layers_per_block"), config.get("norm_num_groups")
        self.shape = (config["in_channels"], resolution, resolution)
        self.feature_channels = (*widths, widths[-1])
        self.unet = build_unet(config, type(self).__name__, random_weights)
        self.register_load_state_dict_post_hook(_now_filled)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing(
                partial(checkpoint, use_reentrant=False, context_fn=recomputed_alike)
            )
        if double_backward:
            from diffusers.models.attention_processor import AttnProcessor

            self.unet.set_attn_processor(AttnProcessor())

    def load(self, weights: str) -> None:
        """Loads weights from a ``source`` of `pipeline_files`, in any precision.

        Raises:
            FileNotFoundError: no weights there; the message says which file is needed, its size and how to get it.
            ValueError: they do not fit, or the hub refuses them.
        """
        fit(type(self).__name__, self.unet.state_dict(keep_vars=True), self.read(weights), weights)
        self.filled = True

    def read(self, weights: str) -> dict[str, Tensor]:
        """The tensors that ``load`` takes, by diffusers' names."""
        return read_part(self.find(weights), PART, self.unet.config)

    def draw(self) -> None:
        """Draws random weights, if the network has none yet."""
        if not self.filled:
            draw_weights(self.unet.modules())
            self.filled = True

    def encoder_facts(self) -> dict[str, object]:
        """As of `contracts.Encoded`: the widths that its captions must have."""
        config = self.unet.config
        if not self.sized:
            return {"text_width": self.text_width}
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {"text_width": self.text_width, "pooled_width": pooled}

    @classmethod
    def find(cls, weights: str) -> list[Path]:
        """The files that ``load`` reads, fetched from the hub if they lie there. Raises as ``load``."""
        there = weights.startswith(HUB) or expanded(weights).exists()
        files = weights_of(folder_of(weights, PART, "the U-Net's weights")) if there else []
        if not files:
            raise Missing(
                weights,
                f"no U-Net weights at {weights}: give a .safetensors file, or a folder with unet/{WEIGHTS}. "
                f"{cls.source}",
            )
        return files

    source = "Copy it from the model's own repository"
    """A sentence on how to get the weights, for the error message."""

    def drop_decoder(self) -> None:
        """Removes what only ``decode`` needs."""
        del self.unet.up_blocks, self.unet.conv_norm_out, self.unet.conv_act, self.unet.conv_out

    def added(self, condition: Condition) -> dict[str, Tensor] | None:
        """What diffusers calls ``added_cond_kwargs``: SDXL's ``pooled`` and ``sizes``, where the network takes them."""
        if not self.sized:
            return None
        if condition.pooled is None or condition.sizes is None:
            raise ValueError(
                f"{type(self).__name__} needs pooled captions and sizes: set LatentStream.pooled = True for shards "
                "with the members .pooled.npy and .sizes.npy"
            )
        return {"text_embeds": condition.pooled, "time_ids": condition.sizes}

    def encode(self, x: Tensor, c_noise: Tensor, condition: Condition) -> TextUNetEncoding:
        """As ``UNet.encode``.

        Raises:
            ValueError: the condition has no caption, or the network no weights yet.
        """
        if not (self.filled or x.is_meta):
            raise ValueError(f"{type(self).__name__} has no weights yet: call its load() or draw() first")
        if condition.text is None:
            raise ValueError(f"{type(self).__name__} needs captions: bind Distillation.conditions = @BatchConditions()")
        if condition.text.shape[-1] != self.text_width:
            raise ValueError(
                f"the captions' states have {condition.text.shape[-1]} numbers a word, and {type(self).__name__} takes "
                f"{self.text_width} (cross_attention_dim): they are of another text encoder; run "
                "tools/cache_latents.py with this run's model"
            )
        unet, text = self.unet, condition.text.to(x.dtype)
        embedding = unet.time_embedding(unet.get_time_embed(sample=x, timestep=c_noise))
        extra = unet.get_aug_embed(emb=embedding, encoder_hidden_states=text, added_cond_kwargs=self.added(condition))
        embedding = embedding if extra is None else embedding + extra
        h = unet.conv_in(x)
        levels, skips = [], [h]
        for block in unet.down_blocks:
            h, outputs = block(hidden_states=h, temb=embedding, **_captions(block, text))
            levels.append(outputs[-1 if block.downsamplers is None else -2])
            skips += outputs
        h = unet.mid_block(h, embedding, **_captions(unet.mid_block, text))
        return TextUNetEncoding((*levels, h), embedding, skips=tuple(skips), text=text)

    def decode(self, encoding: TextUNetEncoding) -> Tensor:
        unet, h, skips = self.unet, encoding.features[-1], list(encoding.skips)
        for block in unet.up_blocks:
            skips, own = skips[: -len(block.resnets)], tuple(skips[-len(block.resnets) :])
            h = block(h, temb=encoding.embedding, res_hidden_states_tuple=own, **_captions(block, encoding.text))
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))


def _now_filled(network: TextUNet, keys: object) -> None:
    """Runs after ``load_state_dict``, which fills all weights or raises."""
    network.filled = True


def _captions(block: nn.Module, text: Tensor) -> dict[str, Tensor]:
    """The argument by which a block with cross-attention takes the captions; {} for one without."""
    return {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
