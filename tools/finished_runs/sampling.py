"""The work of tools/sample.py: which networks make the samples that its flags ask for, and which file gets them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from absl import flags
from torch import Tensor

from ratiograph.command_line import progress_bar
from ratiograph.core import distributed
from ratiograph.core.draws import SampleDraws
from ratiograph.core.files import expanded
from ratiograph.core.foreign import lines_of, read_text, shown
from ratiograph.networks import denoisers, samplers
from ratiograph.networks.autoencoder import Autoencoder
from ratiograph.networks.conditions import Conditions, FixedLabels, Prompts
from ratiograph.networks.guidance import Guided
from ratiograph.networks.students import OneStep, OneStepDDPM
from ratiograph.networks.text_encoders import CaptionEncoder, SD15CaptionEncoder, SDXLCaptionEncoder
from ratiograph.networks.weights.pipeline_files import HUB
from ratiograph.networks.word_encoder import EncodedStream
from ratiograph.reports import sample_files
from ratiograph.tasks import student_files
from ratiograph.tasks.distillation import Distillation
from ratiograph.training import devices
from ratiograph.training.experiment import Experiment

__all__ = ["sample"]

FLAGS = flags.FLAGS
SAMPLERS = {
    "heun": samplers.HeunSampler,
    "stochastic": samplers.StochasticHeunSampler,
    "euler": samplers.EulerSampler,
    "ddim": samplers.DDIMSampler,
    "trailing": samplers.TrailingDDIMSampler,
}


def build(workdir: Path, device: torch.device) -> Distillation:
    """The run's task on ``device``, with the weights of its student, its teacher or both."""
    with_teacher = FLAGS.compare or FLAGS.sampler is not None
    with_student = FLAGS.compare or not with_teacher
    experiment = student_files.read_experiment(workdir, memory=with_teacher, bindings=FLAGS.gin_param)
    task = experiment.task
    if not hasattr(task, "student_samples"):
        raise ValueError(f"{workdir} trained a {type(task).__name__}, which has no one-step student to sample")
    dtype = devices.autocast_dtype(FLAGS.precision, device)
    task.average = task.student
    if with_student:
        task.average = student_files.load_student(task.student, student_weights(workdir))
    if with_teacher and task.teacher is None:
        raise ValueError("this run has no teacher to sample: leave out --sampler and --compare")
    if with_teacher:
        task.teacher.load()
        denoisers.freeze(task.teacher, dtype)
        denoisers.place(task.teacher, device, dtype)
    if with_student:
        denoisers.place(task.average, device, dtype)
    task.conditions = conditions(experiment, workdir, device)
    return task.eval()


def student_weights(workdir: Path) -> Path:
    """The file of --weights, or of the run."""
    return Path(FLAGS.weights or workdir / student_files.WEIGHTS)


def conditions(experiment: Experiment, workdir: Path, device: torch.device) -> Conditions:
    """The conditions of the samples: the flags' captions or classes, or those of the run's previews."""
    student = experiment.task.student
    if FLAGS.prompts:
        found = Prompts(captions=captions(FLAGS.prompts), encoder=caption_encoder(experiment))
    elif FLAGS.class_label:
        found = FixedLabels(labels=FLAGS.class_label)
    else:
        return student_files.load_conditions(experiment.task.conditions, workdir)
    found.check(student)
    if FLAGS.prompts:
        found.encoder.load()
        found.encoder.to(device)
    return found


def captions(path: str | None) -> list[str]:
    """The lines of the file at ``path`` that are not empty; none without a path."""
    if not path:
        return []
    if not Path(path).exists():
        raise ValueError(f"No such file: --prompts={shown(path)}. Write one, a caption a line")
    found = [line.strip() for line in lines_of(read_text(path)) if line.strip()]
    if not found:
        raise ValueError(f"--prompts={shown(path)} holds no caption: write one a line")
    return found


def caption_encoder(experiment: Experiment) -> CaptionEncoder:
    """The encoder of the run's own data, or the text encoders of a pipeline."""
    if isinstance(experiment.data, EncodedStream) and not FLAGS.pipeline:
        return experiment.data.encoder
    student = experiment.task.student
    source = pipeline(student)
    if source is None:
        raise ValueError("--prompts need text encoders: give --pipeline=FOLDER of Stable Diffusion too")
    sized = getattr(student.denoiser.network, "sized", False)
    return (SDXLCaptionEncoder if sized else SD15CaptionEncoder)(weights=source)


def pipeline(student: OneStep) -> str | None:
    """The pipeline for captions and latents: the flag's, or for captions the one that the student started from."""
    source = getattr(student.denoiser, "weights", None)
    if FLAGS.pipeline or not FLAGS.prompts or source is None or not hasattr(student.denoiser.network, "sized"):
        return FLAGS.pipeline
    whole = source.startswith(HUB) or (expanded(source) / "text_encoder").is_dir()
    return source if whole else None


def decoder(student: OneStep, device: torch.device) -> Callable[[Tensor], Tensor]:
    """decode(x0) => images, for latents where a pipeline is given; the identity otherwise."""
    source = pipeline(student)
    if not source:
        return lambda x0: x0
    autoencoder = Autoencoder(weights=source)
    autoencoder.load()
    return torch.no_grad()(autoencoder.to(device).decode)


def guided(task: Distillation) -> torch.nn.Module:
    """The teacher at the flags' guidance scale."""
    guides = [module for module in task.teacher.modules() if isinstance(module, Guided)]
    if not guides and task.student.captioned:
        raise ValueError("--guidance_scale: this run's teacher is not guided, and its empty prompt is not known")
    for module in guides:
        module.guidance_scale = FLAGS.guidance_scale
    return task.teacher if guides else Guided(denoiser=task.teacher, guidance_scale=FLAGS.guidance_scale)


def generators(task: Distillation) -> dict[str, Callable[[SampleDraws], Tensor]]:
    """{name: generate(draws) => x0 [n, ...]}, in the order that they are drawn in."""
    if not (FLAGS.sampler or FLAGS.compare):
        if FLAGS.steps is not None or FLAGS.guidance_scale is not None:
            raise ValueError("--steps and --guidance_scale are the teacher's: give --sampler=heun too, or --compare")
        return {"student": task.student_samples}
    if FLAGS.guidance_scale is not None:
        task.teacher = guided(task)
    usual = "ddim" if isinstance(task.student, OneStepDDPM) else "heun"
    sampler = SAMPLERS[FLAGS.sampler or usual](**({} if FLAGS.steps is None else {"steps": FLAGS.steps}))
    found = {f"teacher\n{sampler.steps} steps": lambda draws: task.teacher_samples(draws, sampler)}
    return found | ({"student\n1 step": task.student_samples} if FLAGS.compare else {})


def destination(workdir: Path, names: list[str]) -> sample_files.SampleFiles:
    """The file or folder for the samples of the generators ``names``."""
    out = Path(FLAGS.out)
    if FLAGS.uint8 and out.suffix != ".npz":
        raise ValueError("--uint8 is of arrays: give --out=NAME.npz too")
    if out.suffix in (".png", ".npz") and FLAGS.shards:
        raise ValueError(f"--shards fills a folder: give --out=FOLDER instead of {out}")
    if FLAGS.compare and out.suffix != ".png":
        raise ValueError(f"--compare draws a picture: give --out=NAME.png instead of {out}")
    if out.suffix == ".png" and (FLAGS.compare or FLAGS.prompts):
        return sample_files.CaptionSheet(out, names, captions(FLAGS.prompts))
    if out.suffix == ".png":
        return sample_files.GridFile(out)
    if out.suffix == ".npz":
        return sample_files.ArrayFile(out, FLAGS.uint8)
    if out.suffix:
        raise ValueError(f"--out={out}: a name ends in .png or .npz, or is a folder's, without an ending")
    if FLAGS.shards:
        return sample_files.ShardFolder(out, FLAGS.shards)
    return sample_files.ImageFolder(out, settings(workdir))


def settings(workdir: Path) -> dict[str, object]:
    """All that sample i depends on beside i, as JSON values."""
    names = ("seed", "class_label", "pipeline", "sampler", "steps", "guidance_scale", "precision")
    read = {"prompts": FLAGS.prompts, "weights": None if FLAGS.sampler else student_weights(workdir)}
    stamps = {
        name: [str(Path(path).resolve()), Path(path).stat().st_size, Path(path).stat().st_mtime_ns] if path else None
        for name, path in read.items()
    }
    lines = {"gin_param": FLAGS.gin_param} if FLAGS.gin_param else {}
    return {"workdir": str(workdir.resolve()), **{name: FLAGS[name].value for name in names}, **stamps, **lines}


def sample() -> None:
    """Samples into the files that the flags name.

    Raises:
        ValueError: flags contradict each other or the run.
        FileNotFoundError: the run or a file is not there.
    """
    own = f"cuda:{distributed.local_rank()}" if torch.cuda.is_available() else "cpu"
    device = devices.choose_device(own if FLAGS.device == "auto" else FLAGS.device)
    distributed.start(torch.device("cpu"))
    workdir = Path(FLAGS.workdir)
    task = build(workdir, device)
    decode, found = decoder(task.student, device), generators(task)
    out = destination(workdir, list(found))
    count = FLAGS.samples or len(captions(FLAGS.prompts)) or 64

    def generate(indices: range) -> Tensor:
        """x0 [n, ...]; of a sheet [n, generators, ...], each generator with the same draws."""
        images = [decode(each(SampleDraws(FLAGS.seed, indices, device)).float()).cpu() for each in found.values()]
        for name, made in zip(found, images, strict=True):
            if not made.isfinite().all():
                raise ValueError(
                    f"samples of the {name.split()[0]} hold NaN or infinity, and are not written: its training "
                    "diverged, or it needs --precision=fp32"
                )
        return torch.stack(images, 1) if isinstance(out, sample_files.CaptionSheet) else images[0]

    def labels(indices: range) -> Tensor | None:
        classes = getattr(task.student.denoiser.network, "classes", 0)
        return task.conditions.sampled(SampleDraws(FLAGS.seed, indices), task.student).labels if classes else None

    batches = sample_files.batches(FLAGS.first, count, FLAGS.batch_size)
    with progress_bar(transient=True, disable=not (distributed.is_main() and sys.stderr.isatty())) as progress:
        bar = progress.add_task("sampling", total=count)
        sample_files.fill(out, batches, generate, labels, lambda done: progress.advance(bar, done))
    if distributed.is_main():
        print(FLAGS.out)
    distributed.stop()
