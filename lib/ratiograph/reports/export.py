"""Exports the student of a finished run: for Stable Diffusion a pipeline or a LoRA that diffusers loads, for any other
network a folder of weights, configuration and model card that tools/sample.py samples.

Notation: T is the timestep at which the student is evaluated; G(z) = mu(x_T = z). The exported scheduler is DDIM on the
process that ends at T, whose one step from T is x0 = mu exactly, in the arithmetic of
`networks.teachers.stable_diffusion`: in
float32 on a CPU the pipeline's latents are the student's to the bit. Nothing but safetensors, JSON and text is written.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from ratiograph.core.files import write_atomically
from ratiograph.core.foreign import read_json
from ratiograph.networks.lora import LoRA
from ratiograph.networks.students import OneStep, OneStepDDPM
from ratiograph.networks.teachers.stable_diffusion import StableDiffusion
from ratiograph.networks.weights.pipeline_files import HUB, SMALL_FILES, folder_of, weights_of
from ratiograph.networks.weights.weight_files import read_tensors
from ratiograph.reports import model_card
from ratiograph.tasks import student_files
from ratiograph.tasks.student_files import CONDITIONS, WEIGHTS

__all__ = ["export_lora", "export_pipeline", "export_plain", "is_pipeline", "scheduler_config"]


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


def finished(workdir: Path, bindings: Sequence[str] = ()) -> tuple[object, OneStep]:
    """(experiment, student) of the finished run in ``workdir``, both on the meta device.

    Raises:
        FileNotFoundError, ValueError: the folder holds no finished run of a one-step student.
    """
    for name in ("config.gin", WEIGHTS):
        if not (workdir / name).is_file():
            raise FileNotFoundError(f"{workdir} has no {name}: give the workdir of a finished run")
    experiment = student_files.read_experiment(workdir, memory=False, bindings=bindings)
    student = getattr(experiment.task, "student", None)
    if student is None:
        raise ValueError(f"{workdir} trained a {type(experiment.task).__name__}, which has no one-step student")
    return experiment, student


def is_pipeline(student: OneStep) -> bool:
    """Whether diffusers has a pipeline for ``student``."""
    return isinstance(student, OneStepDDPM) and isinstance(student.denoiser, StableDiffusion)


def load_student(workdir: Path, bindings: Sequence[str] = ()) -> tuple[object, OneStepDDPM]:
    """(experiment, averaged student) of the finished run in ``workdir``; the rest stays on the meta device.

    Raises:
        FileNotFoundError, ValueError: the folder holds no finished run of a text-to-image student.
    """
    experiment, student = finished(workdir, bindings)
    if not is_pipeline(student):
        raise ValueError(f"{workdir} trained no student of Stable Diffusion: diffusers has no pipeline for others")
    return experiment, student_files.load_student(student, workdir / WEIGHTS)


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


def export_pipeline(
    workdir: Path, out: Path, *, teacher: str | None = None, half: bool = False, bindings: Sequence[str] = ()
) -> Path:
    """Writes the student as a pipeline's folder that ``DiffusionPipeline.from_pretrained(out)`` loads.

    Args:
        workdir: of a finished run.
        out: folder to make; must not exist, or be empty.
        teacher: pipeline in diffusers' format for the other parts; the teacher's own by default.
        half: whether the U-Net is written in float16; load the folder with ``torch_dtype=torch.float16`` to run in it.
        bindings: lines of gin on top of the run's config.gin.

    Returns:
        ``out``.

    Raises:
        FileNotFoundError, ValueError: no finished run, no pipeline, or ``out`` is taken; says what to do.
    """
    experiment, student = load_student(Path(workdir), bindings)
    source = _pipeline(student.denoiser.weights if teacher is None else teacher)
    with _whole_folder(out) as made:
        index = read_json(source / "model_index.json")
        for part, kind in index.items():
            if isinstance(kind, list) and part not in ("unet", "scheduler"):
                index[part] = kind if _copy_part(source / part, made / part) else [None, None]
        index |= {"scheduler": ["diffusers", "DDIMScheduler"], "unet": ["diffusers", "UNet2DConditionModel"]}
        (made / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        unet = plain_unet(student)
        (unet.half() if half else unet).save_pretrained(made / "unet", safe_serialization=True)
        _write_rest(made, workdir, experiment, student, out, model_card.USE_PIPELINE)
    return Path(out)


def export_lora(workdir: Path, out: Path, *, bindings: Sequence[str] = ()) -> Path:
    """Writes the student's adapters as a LoRA that ``pipeline.load_lora_weights(out)`` loads, with its scheduler.

    Args:
        workdir: of a finished run whose student's network is a ``LoRA``.
        out: folder to make; must not exist, or be empty.
        bindings: lines of gin on top of the run's config.gin.

    Returns:
        ``out``.

    Raises:
        FileNotFoundError, ValueError: as `export_pipeline`, or the student has no adapters.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from peft import get_peft_model_state_dict

    experiment, student = load_student(Path(workdir), bindings)
    network = student.denoiser.network
    if not isinstance(network, LoRA):
        raise ValueError(f"{workdir} trained whole networks, not a LoRA: export the pipeline, without --lora")
    with _whole_folder(out) as made:
        (StableDiffusionXLPipeline if network.sized else StableDiffusionPipeline).save_lora_weights(
            made,
            unet_lora_layers=get_peft_model_state_dict(network.unet),
            unet_lora_adapter_metadata=network.unet.peft_config["default"].to_dict(),
            safe_serialization=True,
        )
        _write_rest(made, workdir, experiment, student, out, model_card.USE_LORA)
    return Path(out)


def export_plain(workdir: Path, out: Path, *, bindings: Sequence[str] = ()) -> Path:
    """Writes a student that is not Stable Diffusion's as a folder that ``tools/sample.py`` samples as it does the run.

    The folder holds the weights, the configuration, a model card, and the conditions of the run's previews where they
    came from its data.

    Args:
        workdir: of a finished run.
        out: folder to make; must not exist, or be empty.
        bindings: lines of gin on top of the run's config.gin.

    Returns:
        ``out``.

    Raises:
        FileNotFoundError, ValueError: no finished run, weights of another network, or ``out`` is taken.
    """
    workdir = Path(workdir)
    experiment, student = finished(workdir, bindings)
    student_files.load_student(student, workdir / WEIGHTS)
    conditions = student_files.load_conditions(experiment.task.conditions, workdir).state_dict()
    with _whole_folder(out) as made:
        for name in (WEIGHTS, "config.gin"):
            shutil.copyfile(workdir / name, made / name)
        if conditions:
            tensors = {name: tensor.contiguous() for name, tensor in conditions.items()}
            write_atomically(made / CONDITIONS, safetensors.torch.save(tensors))
        source = getattr(student.denoiser, "weights", None)
        usage = model_card.USE_PLAIN + (model_card.USE_PROMPTS if student.captioned else "")
        parameters = sum(parameter.numel() for parameter in student.parameters())
        model_card.write_card(
            *(made, workdir, experiment),
            library="ratiograph",
            tags="one-step, distillation",
            name=Path(out).name,
            teacher="" if source is None else f" of `{source}`",
            licence="One network evaluation a sample.",
            language="",
            usage=usage.format(out=Path(out).name),
            remark=f"`student.safetensors` holds the {parameters:,} averaged parameters.",
        )
    return Path(out)


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to ``out`` when the block ends, and deleted after an error.

    Raises:
        ValueError: ``out`` exists and is not an empty folder.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already: give another OUT, or delete it")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    aside.chmod(0o755)
    if out.is_dir():
        out.rmdir()
    aside.rename(out)


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
        if ".safetensors.index." not in path.name:
            shutil.copyfile(path, target / path.name)
    placed, files = {}, weights_of(source)
    for path in files:
        tensors = read_tensors(path)[0]
        single = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        name = path.name.replace(".fp16", "")
        safetensors.torch.save_file(single, target / name, metadata={"format": "pt"})
        placed |= dict.fromkeys(single, name)
    if len(files) > 1:
        index = target / f"{files[0].name.partition('-')[0].removesuffix('.fp16')}.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": placed}, indent=2) + "\n")
    written = target / "config.json"
    if written.is_file():
        described = read_json(written)
        named = {name: "float32" for name in ("dtype", "torch_dtype") if name in described}
        written.write_text(json.dumps(described | named, indent=2) + "\n")
    return True


def _write_rest(made: Path, workdir: Path, experiment: object, student: OneStepDDPM, out: Path, usage: str) -> None:
    from diffusers import DDIMScheduler

    DDIMScheduler(**scheduler_config(student)).save_pretrained(made / "scheduler")
    shutil.copyfile(Path(workdir) / "config.gin", made / "config.gin")
    teacher = student.denoiser.weights or "the teacher"
    model_card.write_card(
        *(made, Path(workdir), experiment),
        library="diffusers",
        tags="text-to-image, one-step, distillation",
        name=Path(out).name,
        teacher=f" of `{teacher}`",
        licence="The licence of those weights applies.",
        language="python",
        usage=usage.format(out=Path(out).name, teacher=teacher),
        remark=(
            f"One network evaluation at step {student.timestep}; guidance is part of the student, so `guidance_scale` "
            "must be set to 1: the pipeline's own default is another."
        ),
    )
