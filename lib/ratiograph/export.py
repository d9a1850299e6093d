"""A finished text-to-image student as files that diffusers loads: a pipeline's folder, or a LoRA.

Notation: T is the step that the student is asked at; G(z) = mu(x_T = z). The exported scheduler is DDIM on the
process that ends at T, whose one step from T is x0 = mu exactly, in the arithmetic of `teachers.stable_diffusion`: in
float32 on a CPU the pipeline's latents are the student's to the bit. Nothing but safetensors, JSON and text is written.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from ratiograph import config
from ratiograph.lora import LoRA
from ratiograph.pipeline_files import HUB, SMALL_FILES, folder_of, weights_of
from ratiograph.students import OneStepDDPM
from ratiograph.teachers.stable_diffusion import StableDiffusion
from ratiograph.weight_files import load_weights

__all__ = ["export_lora", "export_pipeline", "scheduler_config"]

CARD = """---
library_name: diffusers
tags: [text-to-image, one-step, distillation]
---
# {name}

A one-step student of `{teacher}`, distilled by ratiograph. The licence of those weights applies.

```python
{usage}
```

One network evaluation at step {timestep}; guidance is part of the student, so `guidance_scale` stays 1.

## Numbers
{numbers}

## Recipe
`config.gin` beside this file repeats the run: `python launch/main.py --gin_file=config.gin`.

```
{tree}
```
"""
USE_PIPELINE = """import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{out}", torch_dtype=torch.float16).to("cuda")
image = pipeline("a photo of a cat", num_inference_steps=1, guidance_scale=1.0).images[0]"""
USE_LORA = """import torch
from diffusers import DDIMScheduler, DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{teacher}", torch_dtype=torch.float16).to("cuda")
pipeline.scheduler = DDIMScheduler.from_pretrained("{out}", subfolder="scheduler")
pipeline.load_lora_weights("{out}")
image = pipeline("a photo of a cat", num_inference_steps=1, guidance_scale=1.0).images[0]"""


def scheduler_config(student: OneStepDDPM) -> dict[str, Any]:
    """Arguments of a ``DDIMScheduler`` whose one step is ``student``'s: it starts at T and ends in x0."""
    beta = student.denoiser.native_beta[: student.timestep + 1]
    return {
        "num_train_timesteps": student.timestep + 1,
        "trained_betas": beta.tolist(),
        "timestep_spacing": "trailing",
        "prediction_type": student.denoiser.prediction.name,
        "set_alpha_to_one": True,
        "clip_sample": False,
        "steps_offset": 1,
    }


# --- the student ------------------------------------------------------------------------------------------------------


def load_student(workdir: Path) -> tuple[object, OneStepDDPM]:
    """(experiment, averaged student) of the finished run in ``workdir``; the rest of the graph stays without memory.

    Raises:
        FileNotFoundError, ValueError: the folder holds no finished run of a text-to-image student.
    """
    for name in ("config.gin", "student.safetensors"):
        if not (workdir / name).is_file():
            raise FileNotFoundError(f"{workdir} has no {name}: give the workdir of a finished run")
    with torch.device("meta"):
        experiment = config.build(config.parse([str(workdir / "config.gin")]))
    student = getattr(experiment.task, "student", None)
    if not isinstance(student, OneStepDDPM) or not isinstance(student.denoiser, StableDiffusion):
        raise ValueError(f"{workdir} trained no student of Stable Diffusion: diffusers has no pipeline for others")
    student.denoiser.network.unet.to_empty(device="cpu")
    if isinstance(student.denoiser.network, LoRA):
        student.denoiser.load()
    load_weights(workdir / "student.safetensors", student)
    return experiment, student.requires_grad_(False).eval()


def plain_unet(student: OneStepDDPM) -> nn.Module:
    """The student's U-Net without wrappers, adapters merged, float32."""
    network = student.denoiser.network
    if not isinstance(network, LoRA):
        return network.unet
    with torch.device("meta"):
        unet = type(network.unet).from_config(network.unet.config)
    unet.load_state_dict(network.merged(), strict=True, assign=True)
    return unet.eval()


# --- files ------------------------------------------------------------------------------------------------------------


def export_pipeline(workdir: Path, out: Path, *, teacher: str | None = None, half: bool = False) -> Path:
    """Writes the student as a pipeline's folder that ``DiffusionPipeline.from_pretrained(out)`` loads.

    Args:
        workdir: of a finished run.
        out: folder to make; must not exist, or be empty.
        teacher: pipeline in diffusers' format for the other parts; the teacher's own by default.
        half: whether the U-Net is written in float16; load the folder with ``torch_dtype=torch.float16`` to run in it.

    Returns:
        ``out``.

    Raises:
        FileNotFoundError, ValueError: no finished run, no pipeline, or ``out`` is taken; says what to do.
    """
    experiment, student = load_student(Path(workdir))
    source = _pipeline(student.denoiser.weights if teacher is None else teacher)
    with _made_whole(out) as made:
        index = json.loads((source / "model_index.json").read_text())
        for part, kind in index.items():
            if isinstance(kind, list) and part not in ("unet", "scheduler"):
                index[part] = kind if _copy_part(source / part, made / part) else [None, None]
        index |= {"scheduler": ["diffusers", "DDIMScheduler"], "unet": ["diffusers", "UNet2DConditionModel"]}
        (made / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        unet = plain_unet(student)
        (unet.half() if half else unet).save_pretrained(made / "unet", safe_serialization=True)
        _write_rest(made, workdir, experiment, student, out, USE_PIPELINE)
    return Path(out)


def export_lora(workdir: Path, out: Path) -> Path:
    """Writes the student's adapters as a LoRA that ``pipeline.load_lora_weights(out)`` loads, with its scheduler.

    Args:
        workdir: of a finished run whose student's network is a ``LoRA``.
        out: folder to make; must not exist, or be empty.

    Returns:
        ``out``.

    Raises:
        FileNotFoundError, ValueError: as `export_pipeline`, or the student has no adapters.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from peft import get_peft_model_state_dict

    experiment, student = load_student(Path(workdir))
    network = student.denoiser.network
    if not isinstance(network, LoRA):
        raise ValueError(f"{workdir} trained whole networks, not a LoRA: export the pipeline, without --lora")
    with _made_whole(out) as made:
        (StableDiffusionXLPipeline if network.sized else StableDiffusionPipeline).save_lora_weights(
            made,
            unet_lora_layers=get_peft_model_state_dict(network.unet),
            unet_lora_adapter_metadata=network.unet.peft_config["default"].to_dict(),
            safe_serialization=True,
        )
        _write_rest(made, workdir, experiment, student, out, USE_LORA)
    return Path(out)


class _made_whole:
    """A folder that appears under its name when it is complete, and not at all after an error."""

    def __init__(self, out: Path):
        self.out = Path(out)
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ValueError(f"{self.out} exists already: give another OUT, or delete it")

    def __enter__(self) -> Path:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.aside = Path(tempfile.mkdtemp(prefix=f".{self.out.name}-", dir=self.out.parent))
        return self.aside

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None:
            shutil.rmtree(self.aside, ignore_errors=True)
            return
        self.aside.chmod(0o755)
        if self.out.is_dir():
            self.out.rmdir()
        self.aside.rename(self.out)


def _pipeline(source: str | None) -> Path:
    """The folder of a whole pipeline."""
    if source is None:
        raise ValueError("the run names no teacher's weights: give --teacher=FOLDER, a pipeline in diffusers' format")
    if source.startswith(HUB):
        raise ValueError(f"download {source} first, and give its folder: --teacher=FOLDER")
    folder = folder_of(source, ".", "--teacher", weights=False)
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} has no model_index.json: give --teacher=FOLDER, the whole pipeline in diffusers' format, for "
            "the parts beside the U-Net"
        )
    return folder


def _copy_part(source: Path, target: Path) -> bool:
    """Copies a part's safetensors and small files, all in float32 as one precision must do; False if it is absent."""
    if not source.is_dir():
        return False
    target.mkdir()
    for path in (path for pattern in SMALL_FILES for path in source.glob(pattern)):
        shutil.copyfile(path, target / path.name)
    for path in weights_of(source):
        tensors = safetensors.torch.load_file(path)
        single = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        safetensors.torch.save_file(single, target / path.name.replace(".fp16.", "."), metadata={"format": "pt"})
    written = target / "config.json"
    if written.is_file():
        described = json.loads(written.read_text())
        named = {name: "float32" for name in ("dtype", "torch_dtype") if name in described}
        written.write_text(json.dumps(described | named, indent=2) + "\n")
    return True


def _write_rest(made: Path, workdir: Path, experiment: object, student: OneStepDDPM, out: Path, usage: str) -> None:
    from diffusers import DDIMScheduler

    from ratiograph import graph

    DDIMScheduler(**scheduler_config(student)).save_pretrained(made / "scheduler")
    shutil.copyfile(Path(workdir) / "config.gin", made / "config.gin")
    teacher = student.denoiser.weights or "the teacher"
    card = CARD.format(
        name=Path(out).name,
        teacher=teacher,
        usage=usage.format(out=Path(out).name, teacher=teacher),
        timestep=student.timestep,
        numbers=_numbers(Path(workdir)),
        tree=graph.render_tree(graph.describe(experiment)).strip(),
    )
    (made / "README.md").write_text(card)


def _numbers(workdir: Path) -> str:
    """The run's evaluation as a list, or what its last logged step says."""
    lines = []
    if (workdir / "evaluation.json").is_file():
        lines = list(_flat("", json.loads((workdir / "evaluation.json").read_text())))
    elif (workdir / "metrics.jsonl").is_file():
        logged = (workdir / "metrics.jsonl").read_text().splitlines()
        lines = list(_flat("", json.loads(logged[-1]))) if logged else []
    return "\n".join(lines) or "None were measured."


def _flat(prefix: str, value: object):
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(f"{prefix}{name}.", inner)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _flat(f"{prefix}{number}.", inner)
    elif isinstance(value, int | float | str):
        yield f"- {prefix[:-1]}: {value:.6g}" if isinstance(value, float) else f"- {prefix[:-1]}: {value}"
