"""The U-Nets of Stable Diffusion 1.5 (Rombach et al. 2022) and SDXL (Podell et al. 2023), and of models like them.

Notation as in `text_unet`: x and F [B, 4, H, W] latents, c_noise [B] the step index, ``text`` [B, L, E] the caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import MinLen

from ratiograph.core.domains import Depth, PositiveInt
from ratiograph.networks.architectures.text_unet import PART, WEIGHTS, TextUNet
from ratiograph.networks.weights.pipeline_files import HUB, config_of, folder_of

__all__ = ["SD15UNet", "SDXLUNet", "UNetFromFolder"]

NEEDED = ("sample_size", "in_channels", "block_out_channels", "cross_attention_dim")
FOREIGN = ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "time_cond_proj_dim", "center_input_sample")


def _config(
    resolution: int, kinds: Sequence[str], widths: Sequence[int], layers: int, text_width: int, groups: int
) -> dict[str, object]:
    """Stable Diffusion's U-Nets in diffusers' names: four latent channels, a decoder that mirrors the encoder."""
    return {
        "sample_size": resolution,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": kinds,
        "up_block_types": tuple(kind.replace("Down", "Up") for kind in reversed(kinds)),
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "cross_attention_dim": text_width,
        "norm_num_groups": groups,
    }


class SD15UNet(TextUNet):
    """Stable Diffusion 1.5's U-Net, 859,520,964 parameters at the defaults. Conditioned on ``text``.

    Args:
        resolution: height and width of the latents, an eighth of the image's.
        block_out_channels: channels of each level, finest first; the last level has no attention.
        layers_per_block: residual blocks of a level.
        cross_attention_dim: E, width of the caption's states.
        attention_heads: heads of every attention.
        norm_groups: groups of every group normalisation; divides all channels.
        gradient_checkpointing, double_backward, random_weights: as in ``TextUNet``.
    """

    source = (
        "3.4 GB, with the CLI of huggingface_hub: hf download stable-diffusion-v1-5/stable-diffusion-v1-5 "
        f"unet/{WEIGHTS} scheduler/scheduler_config.json --local-dir FOLDER"
    )

    def __init__(
        self,
        *,
        resolution: PositiveInt = 64,
        block_out_channels: Annotated[Sequence[PositiveInt], MinLen(1)] = (320, 640, 1280, 1280),
        layers_per_block: Depth = 2,
        cross_attention_dim: PositiveInt = 768,
        attention_heads: PositiveInt = 8,
        norm_groups: PositiveInt = 32,
        gradient_checkpointing: bool = False,
        double_backward: bool = False,
        random_weights: bool = True,
    ):
        kinds = (len(block_out_channels) - 1) * ("CrossAttnDownBlock2D",) + ("DownBlock2D",)
        config = _config(resolution, kinds, block_out_channels, layers_per_block, cross_attention_dim, norm_groups)
        config |= {"attention_head_dim": attention_heads}  # diffusers' name for the number of heads
        super().__init__(config, gradient_checkpointing, double_backward, random_weights)
        self.attention_heads = attention_heads


class SDXLUNet(TextUNet):
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
        gradient_checkpointing, double_backward, random_weights: as in ``TextUNet``.
    """

    sized = True
    source = (
        "10.3 GB, with the CLI of huggingface_hub: hf download stabilityai/stable-diffusion-xl-base-1.0 "
        f"unet/{WEIGHTS} scheduler/scheduler_config.json --local-dir FOLDER"
    )

    def __init__(
        self,
        *,
        resolution: PositiveInt = 128,
        block_out_channels: Annotated[Sequence[PositiveInt], MinLen(1)] = (320, 640, 1280),
        transformer_layers: Sequence[Depth] = (1, 2, 10),
        attention_heads: Sequence[PositiveInt] = (5, 10, 20),
        layers_per_block: Depth = 2,
        cross_attention_dim: PositiveInt = 2048,
        pooled_width: PositiveInt = 1280,
        size_embedding: PositiveInt = 256,
        norm_groups: PositiveInt = 32,
        gradient_checkpointing: bool = False,
        double_backward: bool = False,
        random_weights: bool = True,
    ):
        kinds = ("DownBlock2D",) + (len(block_out_channels) - 1) * ("CrossAttnDownBlock2D",)
        config = _config(resolution, kinds, block_out_channels, layers_per_block, cross_attention_dim, norm_groups)
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


class UNetFromFolder(TextUNet):
    """The U-Net of a model in diffusers' format, such as a fine-tune or SD 2.x, built as its ``config.json`` says.

    It takes time and captions, with or without SDXL's sizes. A dry run needs ``config.json`` alone.

    Args:
        folder: the model's folder, or its ``unet``, or ``hf://OWNER/NAME``; must hold ``config.json``.
        gradient_checkpointing, double_backward, random_weights: as in ``TextUNet``.
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
        """The network's ``config.json``, fetched if the model lies on the hub.

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
