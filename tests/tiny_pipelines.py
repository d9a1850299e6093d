"""Tiny Stable Diffusion 1.5 and SDXL pipelines, written by diffusers and transformers with random weights."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

TOKENS = 12
SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Letters as tokens, and one merge, so that "ab" is a token of its own."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "ab", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\na b</w>\n")
    return CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=TOKENS)


def text_encoder(kind, width, seed):
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=192,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=10,
        bos_token_id=190,
        eos_token_id=191,
        pad_token_id=191,
    )
    return kind(config).eval()


def autoencoder(scaling_factor=0.18215, seed=3, levels=2):
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=levels * ("DownEncoderBlock2D",),
        up_block_types=levels * ("UpDecoderBlock2D",),
        block_out_channels=(8, 16, 16, 16)[:levels],
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
        sample_size=16,
        scaling_factor=scaling_factor,
    ).eval()


def unet(seed=0, prediction="epsilon", **more):
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 12,
            "attention_head_dim": 2,
            **more,
        }
    ).eval()


def sd15(folder: Path) -> StableDiffusionPipeline:
    """A whole SD 1.5 pipeline in ``folder``; latents are [4, 8, 8], images 16 x 16."""
    pipeline = StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(CLIPTextModel, 12, seed=1),
        tokenizer=tokenizer(folder.with_name(f"{folder.name}-words")),
        unet=unet(),
        scheduler=DDIMScheduler(**SCALED_LINEAR, steps_offset=1, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return pipeline


def sdxl(folder: Path) -> StableDiffusionXLPipeline:
    """A whole SDXL pipeline in ``folder``; latents are [4, 8, 8], images 16 x 16."""
    words = [tokenizer(folder.with_name(f"{folder.name}-words{number}")) for number in (1, 2)]
    pipeline = StableDiffusionXLPipeline(
        vae=autoencoder(0.13025),
        text_encoder=text_encoder(CLIPTextModel, 4, seed=1),
        tokenizer=words[0],
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, 8, seed=2),
        tokenizer_2=words[1],
        unet=unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=10 + 6 * 4,
        ),
        scheduler=EulerDiscreteScheduler(**SCALED_LINEAR, steps_offset=1, timestep_spacing="leading"),
    )
    pipeline.save_pretrained(folder)
    return pipeline


# --- the naming of the models' authors, the inverse of what diffusers' converters undo --------------------------------

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def _unet_name(name, layers):
    """One tensor's name in the authors' U-Net, for ``layers`` residual blocks a level."""
    for ours, theirs in UNET_ENDS.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    side, *rest = name.split(".")
    if side == "mid_block":
        kind, number, *inner = rest
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
    else:
        level, kind, number, *inner = rest
        up = side == "up_blocks"
        per = layers + 1
        first = int(level) * per + (0 if up else 1)
        slot = {"resnets": 0, "attentions": 1}.get(kind)
        if slot is None:
            inner = ["op" if inner[0] == "conv" and not up else inner[0], *inner[1:]]
            place = f"input_blocks.{(int(level) + 1) * per}.0" if not up else f"output_blocks.{first + layers}.UP"
        else:
            place = f"{'output' if up else 'input'}_blocks.{first + int(number)}.{slot}"
    if kind == "resnets":
        inner = [RESNET[inner[0]], *inner[1:]]
    return ".".join([place, *inner])


def whole_model(unet_state, vae_state, layers, levels):
    """A checkpoint of both in the authors' naming."""
    tensors = {}
    for name, tensor in unet_state.items():
        theirs = _unet_name(name, layers)
        if ".UP." in theirs:
            attended = theirs.split(".UP.")[0] + ".1.norm.weight"
            names = {_unet_name(other, layers) for other in unet_state}
            theirs = theirs.replace(".UP.", ".2." if attended in names else ".1.")
        tensors[f"model.diffusion_model.{theirs}"] = tensor
    for name, tensor in vae_state.items():
        tensors[f"first_stage_model.{_vae_name(name, levels)}"] = (
            tensor[..., None, None] if ".to_" in name and name.endswith("weight") else tensor
        )
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


def _vae_name(name, levels):
    coder, *rest = name.split(".")
    if coder not in ("encoder", "decoder"):
        return name
    if rest[0] in ("down_blocks", "up_blocks"):
        level = int(rest[1]) if rest[0] == "down_blocks" else levels - 1 - int(rest[1])
        kind = {"resnets": f"block.{rest[3]}", "downsamplers": "downsample", "upsamplers": "upsample"}[rest[2]]
        rest = [rest[0].removesuffix("_blocks"), str(level), kind, *rest[4:]]
    elif rest[0] == "mid_block":
        block = f"block_{int(rest[2]) + 1}" if rest[1] == "resnets" else "attn_1"
        rest = ["mid", block, *rest[3:]]
    joined = ".".join([coder, *rest]).replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    for ours, theirs in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        joined = joined.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
    return joined


def clip(folder: Path) -> Path:
    """A CLIP model with its tokenizer in ``folder``."""
    torch.manual_seed(7)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 192, "max_position_embeddings": TOKENS, "bos_token_id": 190, "eos_token_id": 191}
    config = CLIPConfig(
        text_config=sizes | text,
        vision_config=sizes | {"image_size": 16, "patch_size": 8},
        projection_dim=10,
        logit_scale_init_value=4.6,
    )
    model = CLIPModel(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer(folder.with_name(f"{folder.name}-words")).save_pretrained(folder)
    return folder
