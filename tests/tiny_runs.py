"""Text-to-image runs at a tiny size: pipelines, caches of latents, and the bindings that lead to them."""

import subprocess
import sys
from pathlib import Path

import torch

import tiny_pipelines
from preparation.latent_cache import cache_shards, write_empty_prompt
from ratiograph import config
from ratiograph.networks.text_encoders import SD15CaptionEncoder, SDXLCaptionEncoder
from ratiograph.training import trainer
from test_cache_latents import CAPTIONS, cached, write_inputs

ROOT = Path(__file__).parent.parent
UNET = {
    "resolution": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "norm_groups": 4,
}
SIZES = {
    "SD15UNet": UNET | {"attention_heads": 2},
    "SDXLUNet": UNET
    | {"transformer_layers": (1, 2), "attention_heads": (1, 2), "pooled_width": 10, "size_embedding": 4},
    "StudentScoreHeadRatio": {"width": 8},
    "LoRA": {"rank": 2, "alpha": 4.0},
    "LatentStream": {"workers": 0},
    "Experiment": {"batch_size": 4, "checkpoint_every": 2, "preview_samples": 4, "precision": "fp32"},
}
KINDS = {"sd15": (tiny_pipelines.sd15, SD15CaptionEncoder), "sdxl": (tiny_pipelines.sdxl, SDXLCaptionEncoder)}


def material(folder: Path, kind: str) -> dict[str, str]:
    """Everything that a run needs, made in ``folder``: the macros that name it."""
    make, encoder_class = KINDS[kind]
    make(folder / "pipeline")
    tiny_pipelines.clip(folder / "clip")
    cache_shards(cached(folder / "pipeline", write_inputs(folder / "in"), encoder_class), folder / "cache", {})
    encoder = encoder_class(weights=str(folder / "pipeline"))
    encoder.load()
    write_empty_prompt(folder / "empty.safetensors", encoder)
    return {
        "DATA": f"{folder}/cache/shard-{{000000..000001}}.tar",
        "TEACHER": str(folder / "pipeline"),
        "EMPTY_PROMPT": str(folder / "empty.safetensors"),
        "REWARD": str(folder / "clip"),
        "STUDENT": str(folder / "pipeline"),
    }


def bindings(files, macros, *more, steps=2):
    """The lines after ``files`` that change paths and sizes only."""
    flat = config.to_dict(config.parse(files, more))
    built = {name.partition(".")[0].rpartition("/")[2] for name in flat}
    lines = [f"{name} = {value!r}" for name, value in macros.items() if name in flat]
    lines += [f"{k}.{p} = {v!r}" for k, values in SIZES.items() if k in built for p, v in values.items()]
    return [*more, *lines, f"Experiment.steps = {steps}"]


def parse(files, macros, *more, steps=2):
    """The configuration of ``files`` with only paths and sizes changed."""
    return config.parse(files, bindings(files, macros, *more, steps=steps))


def train(cfg, workdir: Path):
    """Trains to the last step, or on to it; returns the task."""
    torch.manual_seed(0)
    experiment = config.build(cfg)
    workdir.mkdir(exist_ok=True)
    config.save(cfg, workdir / "config.gin")
    trainer.train(experiment, workdir=workdir, device="cpu")
    return experiment.task


def tool(name, *arguments):
    """One of tools/*.py; its standard output."""
    command = [sys.executable, ROOT / "tools" / f"{name}.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


__all__ = ["CAPTIONS", "bindings", "material", "parse", "tool", "train"]
