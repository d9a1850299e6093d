"""Samples from a finished run's student, in one network evaluation each, or from its teacher in many.

  python tools/sample.py runs/mnist_sba                                    64 samples => samples.png, a grid
  python tools/sample.py runs/mnist_sba --samples=5000 --out=samples.npz   arrays x0 [N, ...] in [-1, 1]
  python tools/sample.py runs/mnist_sba --samples=50000 --out=images       a folder of 000000.png, ...
  python tools/sample.py runs/mnist_sba --samples=50000 --out=set --shards=10    webdataset shards with an index
  torchrun --nproc_per_node=2 tools/sample.py --workdir=runs/mnist_sba     the same files, by two processes
  python tools/sample.py runs/mnist_sba --sampler=heun --steps=18 --out=teacher.png
  python tools/sample.py runs/mnist_sba --compare                          teacher above student, of the same noise
  python tools/sample.py runs/mnist_sba --class_label=3 --class_label=5    threes and fives in turn
  python tools/sample.py runs/mnist_sba --weights=other.safetensors        another student of that graph
  python tools/sample.py runs/captions_reward_tilt --prompts=prompts.txt   a sheet: one sample a line, captioned
  python tools/sample.py runs/sd15 --prompts=prompts.txt --compare --guidance_scale=5 --batch_size=8

The folder's config.gin says what the graph is; the folder is a run's, or what tools/export.py made of one. Captions are
encoded and latents decoded by the pipeline that the run's student started from, or by --pipeline. Sample i is made of
noise and a label of its own, which depend on --seed and i alone: neither on --batch_size, nor on the number of
processes, nor on --first, and student and teacher get the same. (Networks may differ in a last bit between batch sizes,
as processors sum in another order.) A folder of images is resumable: the same command makes those that are not there.
"""

import sys
from pathlib import Path

from absl import app, flags

SAMPLERS = ("heun", "stochastic", "euler", "ddim", "trailing")

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Folder of a finished run; may be given without the flag.")
flags.DEFINE_multi_string("gin_param", [], "A line of gin on top of the run's config.gin; repeatable.")
flags.DEFINE_integer("first", 0, "Index of the first sample.", lower_bound=0)
flags.DEFINE_integer("samples", None, "How many. Default: 64; with --prompts, one for each.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0)
flags.DEFINE_integer("batch_size", 500, "Samples a pass.", lower_bound=1)
flags.DEFINE_multi_integer("class_label", [], "Class of the samples; several are taken in turn. Default: at random.")
flags.DEFINE_string("prompts", None, "Text file with a caption a line, taken in turn.")
flags.DEFINE_string("pipeline", None, "Stable Diffusion's folder: encodes captions, and decodes latents to images.")
flags.DEFINE_bool("compare", False, "Draw the teacher's samples of the same noise above the student's, in a .png.")
flags.DEFINE_enum(
    "sampler", None, SAMPLERS, "Sample the teacher, by this sampler. Default: the student; with --compare, both."
)
flags.DEFINE_integer("steps", None, "Steps of --sampler; its own default if not given.", lower_bound=1)
flags.DEFINE_float("guidance_scale", None, "Guidance of the teacher, 1 is none; the run's own if not given.")
flags.DEFINE_string("weights", None, "Student weights; WORKDIR/student.safetensors by default.")
flags.DEFINE_string("out", "samples.png", "A grid (.png), the arrays (.npz), or a folder.")
flags.DEFINE_bool("uint8", False, "Pixels, uint8 [N, H, W, C], in the .npz.")
flags.DEFINE_integer("shards", 0, "Fill the folder with so many webdataset shards in place of PNGs.", lower_bound=0)
flags.DEFINE_string("device", "auto", "auto, cpu, cuda, cuda:1, ...")
flags.DEFINE_string("precision", "auto", "auto, fp32 or bf16.")


def build(workdir, device):
    """(the run's task with its student's weights, what encodes its captions or None), on the device."""
    from ratiograph.networks import denoisers
    from ratiograph.tasks import student_files
    from ratiograph.training import trainer

    with_teacher = FLAGS.compare or FLAGS.sampler is not None
    experiment = student_files.read_experiment(workdir, memory=with_teacher, bindings=FLAGS.gin_param)
    task = experiment.task
    if not hasattr(task, "student_samples"):
        raise ValueError(f"{workdir} trained a {type(task).__name__}, which has no one-step student to sample")
    dtype = trainer.autocast_dtype(FLAGS.precision, device)
    task.average = task.student
    if FLAGS.compare or not with_teacher:
        task.average = student_files.load_student(task.student, student_weights(workdir))
    if with_teacher and task.teacher is None:
        raise ValueError("this run has no teacher to sample: leave out --sampler and --compare")
    if with_teacher:
        task.teacher.load()
        denoisers.freeze(task.teacher, dtype)
        denoisers.place(task.teacher, device, dtype)
    if FLAGS.compare or not with_teacher:
        denoisers.place(task.average, device, dtype)
    task.conditions = conditions(experiment, workdir, device)
    return task.eval()


def student_weights(workdir):
    return Path(FLAGS.weights or workdir / "student.safetensors")


def conditions(experiment, workdir, device):
    """What the samples are told: the flags' captions or classes, or what the run itself shows."""
    from ratiograph.networks.conditions import FixedLabels
    from ratiograph.tasks import student_files

    task = experiment.task
    if FLAGS.prompts:
        return prompts(experiment, device)
    if FLAGS.class_label:
        fixed = FixedLabels(labels=FLAGS.class_label)
        fixed.check(task.student)
        return fixed
    return student_files.remembered(task.conditions, workdir)


def captions():
    """The lines of the flags' file; none without one."""
    if not FLAGS.prompts:
        return []
    if not Path(FLAGS.prompts).exists():
        raise ValueError(f"No such file: --prompts={FLAGS.prompts}. Write one, a caption a line")
    lines = Path(FLAGS.prompts).read_text(encoding="utf-8").splitlines()
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ValueError(f"--prompts={FLAGS.prompts} holds no caption: write one a line")
    return found


def prompts(experiment, device):
    """The captions of the flags' file, as the student's network is told them."""
    from ratiograph.networks.conditions import Prompts

    told, encoder = captions(), caption_encoder(experiment)
    found = Prompts(captions=told, encoder=encoder)
    found.check(experiment.task.student)
    encoder.load()
    encoder.to(device)
    return found


def caption_encoder(experiment):
    """What the run's own data is encoded by, or the text encoders of a pipeline."""
    from ratiograph.networks.text_encoders import SD15CaptionEncoder, SDXLCaptionEncoder
    from ratiograph.networks.word_encoder import EncodedStream

    if isinstance(experiment.data, EncodedStream) and not FLAGS.pipeline:
        return experiment.data.encoder
    source = pipeline(experiment.task.student)
    if source is None:
        raise ValueError("--prompts need text encoders: give --pipeline=FOLDER of Stable Diffusion too")
    sized = getattr(experiment.task.student.denoiser.network, "sized", False)
    return (SDXLCaptionEncoder if sized else SD15CaptionEncoder)(weights=source)


def pipeline(student):
    """The pipeline for captions and latents: the flag's, or for captions the one that the student started from."""
    from ratiograph.networks.weights.pipeline_files import HUB

    source = getattr(student.denoiser, "weights", None)
    if FLAGS.pipeline or not FLAGS.prompts or source is None or not hasattr(student.denoiser.network, "sized"):
        return FLAGS.pipeline
    whole = source.startswith(HUB) or (Path(source).expanduser() / "text_encoder").is_dir()
    return source if whole else None


def decoder(student, device):
    """decode(x0) => images, for latents where a pipeline is given; the identity otherwise."""
    source = pipeline(student)
    if not source:
        return lambda x0: x0

    import torch

    from ratiograph.networks.autoencoder import Autoencoder

    autoencoder = Autoencoder(weights=source)
    autoencoder.load()
    return torch.no_grad()(autoencoder.to(device).decode)


def teacher_sampler(task):
    """The sampler that the flags ask for; by default the one of the teacher's kind."""
    from ratiograph.networks import samplers
    from ratiograph.networks.students import OneStepDDPM

    classes = {
        "heun": samplers.HeunSampler,
        "stochastic": samplers.StochasticHeunSampler,
        "euler": samplers.EulerSampler,
        "ddim": samplers.DDIMSampler,
        "trailing": samplers.TrailingDDIMSampler,
    }
    usual = "ddim" if isinstance(task.student, OneStepDDPM) else "heun"
    return classes[FLAGS.sampler or usual](**({} if FLAGS.steps is None else {"steps": FLAGS.steps}))


def guide(task):
    """The teacher at the flags' guidance scale."""
    from ratiograph.networks.guidance import Guided

    guides = [module for module in task.teacher.modules() if isinstance(module, Guided)]
    if not guides and task.student.captioned:
        raise ValueError("--guidance_scale: this run's teacher is not guided, and its empty prompt is not known")
    for module in guides:
        module.guidance_scale = FLAGS.guidance_scale
    return task.teacher if guides else Guided(denoiser=task.teacher, guidance_scale=FLAGS.guidance_scale)


def makers(task):
    """{name: make(draws) => x0 [n, ...]}, in the order that they are drawn in."""
    if not (FLAGS.sampler or FLAGS.compare):
        if FLAGS.steps is not None or FLAGS.guidance_scale is not None:
            raise ValueError("--steps and --guidance_scale are the teacher's: give --sampler=heun too, or --compare")
        return {"student": task.student_samples}
    if FLAGS.guidance_scale is not None:
        task.teacher = guide(task)
    sampler = teacher_sampler(task)
    found = {f"teacher\n{sampler.steps} steps": lambda draws: task.teacher_samples(draws, sampler)}
    return found | ({"student\n1 step": task.student_samples} if FLAGS.compare else {})


def files(workdir, names):
    """Where the samples of the makers ``names`` go."""
    from ratiograph.reports import sample_files

    out = Path(FLAGS.out)
    if FLAGS.uint8 and out.suffix != ".npz":
        raise ValueError("--uint8 is of arrays: give --out=NAME.npz too")
    if out.suffix in (".png", ".npz") and FLAGS.shards:
        raise ValueError(f"--shards fills a folder: give --out=FOLDER instead of {out}")
    if FLAGS.compare and out.suffix != ".png":
        raise ValueError(f"--compare draws a picture: give --out=NAME.png instead of {out}")
    if out.suffix == ".png" and (FLAGS.compare or FLAGS.prompts):
        return sample_files.CaptionSheet(out, names, captions())
    if out.suffix == ".png":
        return sample_files.GridFile(out)
    if out.suffix == ".npz":
        return sample_files.ArrayFile(out, FLAGS.uint8)
    if out.suffix:
        raise ValueError(f"--out={out}: a name ends in .png or .npz, or is a folder's, without an ending")
    if FLAGS.shards:
        return sample_files.ShardFolder(out, FLAGS.shards)
    return sample_files.ImageFolder(out, settings(workdir))


def settings(workdir):
    """All that sample i depends on beside i, as JSON values."""
    told = ("seed", "class_label", "pipeline", "sampler", "steps", "guidance_scale", "precision")
    read = {"prompts": FLAGS.prompts, "weights": None if FLAGS.sampler else student_weights(workdir)}
    stamps = {
        name: [str(Path(path).resolve()), Path(path).stat().st_size, Path(path).stat().st_mtime_ns] if path else None
        for name, path in read.items()
    }
    lines = {"gin_param": FLAGS.gin_param} if FLAGS.gin_param else {}
    return {"workdir": str(workdir.resolve()), **{name: FLAGS[name].value for name in told}, **stamps, **lines}


def run():
    """Samples into the files that the flags name."""
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from ratiograph.core import distributed
    from ratiograph.core.draws import SampleDraws
    from ratiograph.reports import sample_files
    from ratiograph.training import trainer

    own = f"cuda:{distributed.local_rank()}" if torch.cuda.is_available() else "cpu"
    device = trainer.choose_device(own if FLAGS.device == "auto" else FLAGS.device)
    distributed.start(torch.device("cpu"))
    workdir = Path(FLAGS.workdir)
    task = build(workdir, device)
    decode, found = decoder(task.student, device), makers(task)
    destination = files(workdir, list(found))
    samples = FLAGS.samples or len(captions()) or 64

    def make(indices):
        """x0 [n, ...]; of a sheet [n, makers, ...], each maker with the same draws."""
        made = [decode(each(SampleDraws(FLAGS.seed, indices, device)).float()).cpu() for each in found.values()]
        return torch.stack(made, 1) if isinstance(destination, sample_files.CaptionSheet) else made[0]

    def labels(draws):
        classes = getattr(task.student.denoiser.network, "classes", 0)
        return task.conditions.sampled(draws, task.student).labels if classes else None

    shown = distributed.is_main() and sys.stderr.isatty()
    with Progress(console=Console(stderr=True), disable=not shown, transient=True) as progress:
        bar = progress.add_task("sampling", total=samples)
        sample_files.fill(
            destination,
            sample_files.batches(FLAGS.first, samples, FLAGS.batch_size),
            make,
            lambda indices: labels(SampleDraws(FLAGS.seed, indices)),
            lambda count: progress.advance(bar, count),
        )
    if distributed.is_main():
        print(FLAGS.out)
    distributed.stop()


def main(argv):
    try:
        if len(argv) > 2 or (argv[1:] and FLAGS.workdir):
            raise ValueError(f"'{argv[-1]}' is no flag: give one folder")
        if not (argv[1:] or FLAGS.workdir):
            raise ValueError("give the folder of a finished run: tools/sample.py WORKDIR")
        FLAGS.workdir = FLAGS.workdir or argv[1]
        run()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
