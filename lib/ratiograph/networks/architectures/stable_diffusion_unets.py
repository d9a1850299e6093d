"""The U-Nets of Stable Diffusion 1.5 (Rombach et al. 2022) and SDXL (Podell et al. 2023), from the package diffusers.

Notation: x and F [B, 4, H, W] latents; c_noise [B] the step index; ``text`` [B, L, E] the caption's states. The encoder
is everything up to the middle block, the decoder the rest, so that whoever needs only features stops half-way.
diffusers is imported when such a network is built and not before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ratiograph.core.differentiation import recomputed_alike
from ratiograph.core.files import Missing
from ratiograph.core.types import Condition, Encoding
from ratiograph.networks.weights.pipeline_files import (
    HUB,
    config_of,
    fit,
    folder_of,
    missing_package,
    read_part,
    weights_of,
)

__all__ = ["SD15UNet", "SDXLUNet", "UNetFromFolder"]

PART = "unet"
WEIGHTS = "diffusion_pytorch_model.safetensors"
NEEDED = ("sample_size", "in_channels", "block_out_channels", "cross_attention_dim")
FOREIGN = ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "time_cond_proj_dim", "center_input_sample")


def build_unet(config: Mapping[str, object], asked_by: str, random_weights: bool) -> nn.Module:
    """diffusers' ``UNet2DConditionModel`` of ``config`` in training mode; its memory as it lies, or random weights.

    Raises:
        ValueError: diffusers is not installed, or it refuses the configuration.
    """
    try:
        from diffusers.models.modeling_utils import no_init_weights
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    except ImportError as error:
        raise missing_package("diffusers", asked_by) from error
    known = {name: value for name, value in config.items() if not name.startswith("_")}
    try:
        with nullcontext() if random_weights else no_init_weights():
            return UNet2DConditionModel(**known).train()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{asked_by}: diffusers cannot build this U-Net: {error}") from error


def standard_config(
    *,
    resolution: int,
    down_block_types: Sequence[str],
    block_out_channels: Sequence[int],
    layers_per_block: int,
    cross_attention_dim: int,
    norm_groups: int,
) -> dict[str, object]:
    """What Stable Diffusion's U-Nets share, in diffusers' names: four latent channels, levels up as they are down."""
    return {
        "sample_size": resolution,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": tuple(down_block_types),
        "up_block_types": tuple(kind.replace("Down", "Up") for kind in reversed(down_block_types)),
        "block_out_channels": tuple(block_out_channels),
        "layers_per_block": layers_per_block,
        "cross_attention_dim": cross_attention_dim,
        "norm_num_groups": norm_groups,
    }


def draw_weights(layers: Iterable[nn.Module]) -> None:
    """Gives each of ``layers`` with weights the random ones that torch builds it with."""
    for layer in layers:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()


def explicit_attention() -> Callable:
    """Attention as two matrix products and a softmax: torch's fused attention has no second derivative."""
    from diffusers.models.attention_processor import AttnProcessor

    return AttnProcessor()


@dataclass(frozen=True)
class TextUNetEncoding(Encoding):
    """``features``: the last map of each level, finest first, then the middle's. The decoder takes the rest too."""

    skips: tuple[Tensor, ...] = ()
    text: Tensor | None = None

    def detach(self) -> TextUNetEncoding:
        detached = super().detach()
        skips = tuple(skip.detach() for skip in self.skips)
        return replace(detached, skips=skips, embedding=self.embedding.detach(), text=self.text.detach())


class TextUNet(nn.Module):
    """Base class: a ``UNet2DConditionModel`` run in two halves.

    Args:
        config: its configuration in diffusers' names.
        gradient_checkpointing: keep only each block's input for the backward and run the block again there.
        double_backward: compute attention in a form that can be differentiated twice, which R1 on checkpointed features
            asks for, as a block run again no longer knows that it should; holds whole attention maps in memory.
        random_weights: whether weights are drawn; if not, memory is left as it lies until ``load`` or ``draw``, which
            spares a full-size network, whose weights come from a file, half a minute and its memory.
    """

    classes = 0
    """No class labels: the condition is a caption."""
    sized = False
    """Whether the condition holds SDXL's ``pooled`` and ``sizes`` too."""

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
            self.unet.set_attn_processor(explicit_attention())

    def load(self, weights: str) -> None:
        """Loads weights from a ``source`` of `pipeline_files`, in any precision.

        Raises:
            FileNotFoundError: there are none; says which file is meant, its size and how to get it.
            ValueError: they do not fit, or the hub does not give them.
        """
        fit(type(self).__name__, self.unet.state_dict(keep_vars=True), self.read(weights), weights)
        self.filled = True

    def read(self, weights: str) -> dict[str, Tensor]:
        """The tensors that ``load`` takes, by diffusers' names."""
        return read_part(self.find(weights), PART, self.unet.config)

    def draw(self) -> None:
        """Random weights, for a network that has none yet."""
        if not self.filled:
            draw_weights(self.unet.modules())
            self.filled = True

    @classmethod
    def find(cls, weights: str) -> list[Path]:
        """The files that ``load`` reads; those of the hub are fetched. Errors as of ``load``, as far as these go."""
        there = weights.startswith(HUB) or Path(weights).expanduser().exists()
        files = weights_of(folder_of(weights, PART, "the U-Net's weights")) if there else []
        if not files:
            raise Missing(
                weights,
                f"no U-Net weights at {weights}: give --teacher a .safetensors file, or a folder with unet/{WEIGHTS}. "
                f"{cls.source}",
            )
        return files

    source = "Copy it from the model's own repository"
    """How to get the weights, a sentence."""

    def drop_decoder(self) -> None:
        """Leaves only what ``encode`` needs."""
        del self.unet.up_blocks, self.unet.conv_norm_out, self.unet.conv_act, self.unet.conv_out

    def added(self, condition: Condition) -> dict[str, Tensor] | None:
        """What diffusers calls ``added_cond_kwargs``."""
        return None

    def encode(self, x: Tensor, c_noise: Tensor, condition: Condition) -> TextUNetEncoding:
        """As ``UNet.encode``.

        Raises:
            ValueError: the condition has no caption, or the network no weights yet.
        """
        if not (self.filled or x.is_meta):
            raise ValueError(f"{type(self).__name__} has no weights yet: call its load() or draw() first")
        if condition.text is None:
            raise ValueError(f"{type(self).__name__} needs captions: bind Distillation.conditions = @BatchConditions()")
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
    """After a strict load of a whole state."""
    network.filled = True


def _captions(block: nn.Module, text: Tensor) -> dict[str, Tensor]:
    """The argument by which a block with cross-attention takes the captions; {} for one without."""
    return {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}


class SD15UNet(TextUNet):
    """Stable Diffusion 1.5's U-Net, 859,520,964 parameters at the defaults. Conditioned on ``text``.

    Args:
        resolution: height and width of the latents, an eighth of the image's.
        block_out_channels: channels of each level, finest first; the last level has no attention.
        layers_per_block: residual blocks of a level.
        cross_attention_dim: E, width of the caption's states.
        attention_heads: heads of every attention.
        norm_groups: groups of every group normalisation; divides all channels.
        gradient_checkpointing: keep only each block's input for the backward and run the block again there.
        double_backward: compute attention in a form that can be differentiated twice, which R1 on checkpointed features
            asks for, as a block run again no longer knows that it should; holds whole attention maps in memory.
        random_weights: whether weights are drawn; if not, memory is left as it lies until ``load`` or ``draw``.
    """

    source = (
        "3.4 GB, with the CLI of huggingface_hub: hf download stable-diffusion-v1-5/stable-diffusion-v1-5 "
        f"unet/{WEIGHTS} --local-dir FOLDER"
    )

    def __init__(
        self,
        *,
        resolution: int = 64,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        cross_attention_dim: int = 768,
        attention_heads: int = 8,
        norm_groups: int = 32,
        gradient_checkpointing: bool = False,
        double_backward: bool = False,
        random_weights: bool = True,
    ):
        config = standard_config(
            resolution=resolution,
            down_block_types=(len(block_out_channels) - 1) * ("CrossAttnDownBlock2D",) + ("DownBlock2D",),
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            cross_attention_dim=cross_attention_dim,
            norm_groups=norm_groups,
        )
        config |= {"attention_head_dim": attention_heads}  # diffusers' name for the number of heads
        super().__init__(config, gradient_checkpointing, double_backward, random_weights)
        self.attention_heads = attention_heads


class _SizedUNet(TextUNet):
    """A U-Net conditioned on ``text``, ``pooled`` and ``sizes``, as SDXL's."""

    sized = True

    def added(self, condition: Condition) -> dict[str, Tensor]:
        if condition.pooled is None or condition.sizes is None:
            raise ValueError(
                f"{type(self).__name__} needs pooled captions and sizes: set LatentStream.pooled = True for shards "
                "with the members .pooled.npy and .sizes.npy"
            )
        return {"text_embeds": condition.pooled, "time_ids": condition.sizes}


class SDXLUNet(_SizedUNet):
    """SDXL base's U-Net, 2,567,463,684 parameters at the defaults. Conditioned on ``text``, ``pooled`` and ``sizes``.

    Args:
        resolution: height and width of the latents, an eighth of the image's.
        block_out_channels: channels of each level, finest first; the first level has no attention.
        transformer_layers: depth of each level's transformers.
        attention_heads: heads of each level's attention.
        layers_per_block: residual blocks of a level.
        cross_attention_dim: E, width of the caption's states (both text encoders', side by side).
        pooled_width: P, width of the pooled caption.
        size_embedding: sinusoids of each of the six sizes.
        norm_groups: groups of every group normalisation; divides all channels.
        gradient_checkpointing: keep only each block's input for the backward and run the block again there.
        double_backward: compute attention in a form that can be differentiated twice, which R1 on checkpointed features
            asks for, as a block run again no longer knows that it should; holds whole attention maps in memory.
        random_weights: whether weights are drawn; if not, memory is left as it lies until ``load`` or ``draw``.
    """

    source = (
        "10.3 GB, with the CLI of huggingface_hub: hf download stabilityai/stable-diffusion-xl-base-1.0 "
        f"unet/{WEIGHTS} --local-dir FOLDER"
    )

    def __init__(
        self,
        *,
        resolution: int = 128,
        block_out_channels: Sequence[int] = (320, 640, 1280),
        transformer_layers: Sequence[int] = (1, 2, 10),
        attention_heads: Sequence[int] = (5, 10, 20),
        layers_per_block: int = 2,
        cross_attention_dim: int = 2048,
        pooled_width: int = 1280,
        size_embedding: int = 256,
        norm_groups: int = 32,
        gradient_checkpointing: bool = False,
        double_backward: bool = False,
        random_weights: bool = True,
    ):
        config = standard_config(
            resolution=resolution,
            down_block_types=("DownBlock2D",) + (len(block_out_channels) - 1) * ("CrossAttnDownBlock2D",),
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            cross_attention_dim=cross_attention_dim,
            norm_groups=norm_groups,
        )
        config |= {
            "attention_head_dim": tuple(attention_heads),  # diffusers' name for the number of heads
            "transformer_layers_per_block": tuple(transformer_layers),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": size_embedding,
            "projection_class_embeddings_input_dim": pooled_width + 6 * size_embedding,
        }
        super().__init__(config, gradient_checkpointing, double_backward, random_weights)
        self.transformer_layers, self.attention_heads = tuple(transformer_layers), tuple(attention_heads)
        self.pooled_width, self.size_embedding = pooled_width, size_embedding


class UNetFromFolder(_SizedUNet):
    """The U-Net of a model in diffusers' format, as its ``config.json`` describes it: fine-tunes, SD 2.x, small ones.

    Time- and text-conditioned U-Nets with or without SDXL's sizes; the configuration is read when it is built, so that
    a dry run needs this one file.

    Args:
        folder: the model's folder, or its ``unet``, or ``hf://OWNER/NAME``; must hold ``config.json``.
        gradient_checkpointing: keep only each block's input for the backward and run the block again there.
        double_backward: compute attention in a form that can be differentiated twice, which R1 on checkpointed features
            asks for, as a block run again no longer knows that it should; holds whole attention maps in memory.
        random_weights: whether weights are drawn; if not, memory is left as it lies until ``load`` or ``draw``.
    """

    def __init__(
        self,
        *,
        folder: str,
        gradient_checkpointing: bool = False,
        double_backward: bool = False,
        random_weights: bool = True,
    ):
        config = self.locate(folder=folder)
        strange = [name for name in NEEDED if name not in config] + [name for name in FOREIGN if config.get(name)]
        if strange:
            raise ValueError(f"{folder} is not a U-Net that runs on time and captions alone: see its {strange[0]!r}")
        super().__init__(config, gradient_checkpointing, double_backward, random_weights)
        self.folder = folder
        self.sized = config.get("addition_embed_type") == "text_time"

    @staticmethod
    def locate(*, folder: str) -> dict[str, object]:
        """The network's ``config.json``; that of a model of the hub is fetched.

        Raises:
            ValueError: there is none.
        """
        if folder.startswith(HUB) and config_of(folder, PART) is None:
            folder_of(folder, PART, "UNetFromFolder.folder", weights=False)
        config = config_of(folder, PART)
        if config is None:
            raise ValueError(
                f"UNetFromFolder.folder={folder!r} holds no config.json: give a model in diffusers' format"
            )
        return config

    def added(self, condition: Condition) -> dict[str, Tensor] | None:
        return super().added(condition) if self.sized else None
