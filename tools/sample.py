"""Samples from a finished run's student, in one network evaluation each, or from its teacher in many.

  python tools/sample.py --workdir=runs/mnist_sba                                    64 samples => samples.png, a grid
  python tools/sample.py --workdir=runs/mnist_sba --samples=5000 --out=samples.npz   arrays x0 [N, ...] in [-1, 1]
  python tools/sample.py --workdir=runs/mnist_sba --samples=50000 --out=images       a folder of 000000.png, ...
  python tools/sample.py --workdir=runs/mnist_sba --samples=50000 --out=set --shards=10    webdataset shards, index
  torchrun --nproc_per_node=2 tools/sample.py --workdir=...                          the same files, by two processes
  python tools/sample.py --workdir=runs/mnist_sba --sampler=heun --steps=18 --out=teacher.png
  python tools/sample.py --workdir=runs/mnist_sba --class_label=3 --class_label=5    threes and fives in turn
  python tools/sample.py --workdir=runs/mnist_sba --weights=other.safetensors        another student of that graph
  python tools/sample.py --workdir=runs/sd15 --pipeline=stable-diffusion-v1-5 --prompts=prompts.txt --batch_size=8

The folder's config.gin says what the graph is. Sample i is made of noise and a label of its own, which depend on --seed
and i alone: neither on --batch_size, nor on the number of processes, nor on --first, and student and teacher get the
same. (Networks may differ in a last bit between batch sizes, as processors sum in another order.) A folder of images is
resumable: the same command makes those that are not there yet.
"""

import sys
from pathlib import Path

from absl import app, flags

SAMPLERS = ("heun", "stochastic", "euler", "ddim", "trailing")

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Folder of a finished run.", required=True)
flags.DEFINE_integer("first", 0, "Index of the first sample.", lower_bound=0)
flags.DEFINE_integer("samples", 64, "How many.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0)
flags.DEFINE_integer("batch_size", 500, "Samples a pass.", lower_bound=1)
flags.DEFINE_multi_integer("class_label", [], "Class of the samples; several are taken in turn. Default: at random.")
flags.DEFINE_string("prompts", None, "Text file with a caption a line, taken in turn; needs --pipeline.")
flags.DEFINE_string("pipeline", None, "Stable Diffusion's folder: encodes captions, and decodes latents to images.")
flags.DEFINE_enum("sampler", None, SAMPLERS, "Sample the teacher, by this sampler. Default: the student.")
flags.DEFINE_integer("steps", None, "Steps of --sampler; its own default if not given.", lower_bound=1)
flags.DEFINE_float("guidance_scale", None, "Guidance of the teacher, 1 is none; the run's own if not given.")
flags.DEFINE_string("weights", None, "Student weights; WORKDIR/student.safetensors by default.")
flags.DEFINE_string("out", "samples.png", "A grid (.png), the arrays (.npz), or a folder.")
flags.DEFINE_bool("uint8", False, "Pixels, uint8 [N, H, W, C], in the .npz.")
flags.DEFINE_integer("shards", 0, "Fill the folder with so many webdataset shards in place of PNGs.", lower_bound=0)
flags.DEFINE_string("device", "auto", "auto, cpu, cuda, cuda:1, ...")
flags.DEFINE_string("precision", "auto", "auto, fp32 or bf16.")


def build(workdir, device):
    """The run's task with its student's weights, on the device."""
    import torch

    from ratiograph import config, trainer, weight_files

    if not (workdir / "config.gin").is_file():
        raise ValueError(f"{workdir} has no config.gin: give the folder of a run as --workdir")
    cfg = config.parse([str(workdir / "config.gin")], [], {})
    torch.manual_seed(config.to_dict(cfg)["Experiment.seed"])  # random weights, where a network has no others
    task = config.build(cfg).task
    if not hasattr(task, "student_samples"):
        raise ValueError(f"{workdir} trained a {type(task).__name__}, which has no one-step student to sample")
    task.prepare(device, trainer.autocast_dtype(FLAGS.precision, device))
    if not FLAGS.sampler:
        weight_files.load_weights(student_weights(workdir), task.average)
    task.conditions = conditions(task, workdir, device)
    return task.eval()


def student_weights(workdir):
    return Path(FLAGS.weights or workdir / "student.safetensors")


def conditions(task, workdir, device):
    """What the samples are told: the flags' classes, or what the run itself shows."""
    from ratiograph import checkpoints
    from ratiograph.conditions import FixedLabels

    if FLAGS.prompts:
        return prompts(task.student, device)
    if FLAGS.class_label:
        fixed = FixedLabels(labels=FLAGS.class_label)
        fixed.check(task.student)
        return fixed
    if task.conditions.needs_data:
        found = checkpoints.latest(workdir / "checkpoints")
        if found is None:
            raise ValueError(f"{workdir}/checkpoints, which holds the conditions that the run shows, has no checkpoint")
        task.conditions.load_state_dict(found[1]["task"]["conditions"])
    return task.conditions


def prompts(student, device):
    """The captions of the flags' file, as the student's network is told them."""
    from ratiograph.conditions import Prompts
    from ratiograph.networks.stable_diffusion import SDXLUNet
    from ratiograph.text_encoders import SD15CaptionEncoder, SDXLCaptionEncoder

    if not FLAGS.pipeline:
        raise ValueError("--prompts need text encoders: give --pipeline=FOLDER of Stable Diffusion too")
    captions = [line.strip() for line in Path(FLAGS.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not captions:
        raise ValueError(f"--prompts={FLAGS.prompts} holds no caption: write one a line")
    network = student.denoiser.network
    large = isinstance(network, SDXLUNet) or getattr(network, "sized", False)
    encoder = (SDXLCaptionEncoder if large else SD15CaptionEncoder)(weights=FLAGS.pipeline)
    found = Prompts(captions=captions, encoder=encoder)
    found.check(student)
    encoder.load()
    encoder.to(device)
    return found


def decoder(device):
    """decode(x0) => images, for latents where --pipeline is given; the identity otherwise."""
    if not FLAGS.pipeline:
        return lambda x0: x0

    import torch

    from ratiograph.autoencoder import Autoencoder

    autoencoder = Autoencoder(weights=FLAGS.pipeline)
    autoencoder.load()
    return torch.no_grad()(autoencoder.to(device).decode)


def teacher_sampler():
    """The sampler that the flags ask for."""
    from ratiograph import samplers

    classes = {
        "heun": samplers.HeunSampler,
        "stochastic": samplers.StochasticHeunSampler,
        "euler": samplers.EulerSampler,
        "ddim": samplers.DDIMSampler,
        "trailing": samplers.TrailingDDIMSampler,
    }
    return classes[FLAGS.sampler](**({} if FLAGS.steps is None else {"steps": FLAGS.steps}))


def guide(teacher):
    """The teacher at the flags' guidance scale."""
    from ratiograph.guidance import Guided

    guides = [module for module in teacher.modules() if isinstance(module, Guided)]
    for module in guides:
        module.guidance_scale = FLAGS.guidance_scale
    return teacher if guides else Guided(denoiser=teacher, guidance_scale=FLAGS.guidance_scale)


def maker(task):
    """make(draws) => x0 [n, ...]."""
    if not FLAGS.sampler:
        if FLAGS.steps is not None or FLAGS.guidance_scale is not None:
            raise ValueError("--steps and --guidance_scale are the teacher's: give --sampler=heun too")
        return task.student_samples
    if task.teacher is None:
        raise ValueError("this run has no teacher to sample: leave out --sampler")
    if FLAGS.guidance_scale is not None:
        task.teacher = guide(task.teacher)
    sampler = teacher_sampler()
    return lambda draws: task.teacher_samples(draws, sampler)


def files(workdir):
    """Where the samples go."""
    from ratiograph import sample_files

    out = Path(FLAGS.out)
    if FLAGS.uint8 and out.suffix != ".npz":
        raise ValueError("--uint8 is of arrays: give --out=NAME.npz too")
    if out.suffix in (".png", ".npz") and FLAGS.shards:
        raise ValueError(f"--shards fills a folder: give --out=FOLDER instead of {out}")
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
    return {"workdir": str(workdir.resolve()), **{name: FLAGS[name].value for name in told}, **stamps}


def run():
    """Samples into the files that the flags name."""
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from ratiograph import distributed, sample_files, trainer
    from ratiograph.sampling import SampleDraws

    own = f"cuda:{distributed.local_rank()}" if torch.cuda.is_available() else "cpu"
    device = trainer.choose_device(own if FLAGS.device == "auto" else FLAGS.device)
    distributed.start(torch.device("cpu"))
    workdir = Path(FLAGS.workdir)
    task = build(workdir, device)
    make, decode, destination = maker(task), decoder(device), files(workdir)

    def labels(draws):
        classes = getattr(task.student.denoiser.network, "classes", 0)
        return task.conditions.sampled(draws, task.student).labels if classes else None

    shown = distributed.is_main() and sys.stderr.isatty()
    with Progress(console=Console(stderr=True), disable=not shown, transient=True) as progress:
        bar = progress.add_task("sampling", total=FLAGS.samples)
        sample_files.fill(
            destination,
            sample_files.batches(FLAGS.first, FLAGS.samples, FLAGS.batch_size),
            lambda indices: decode(make(SampleDraws(FLAGS.seed, indices, device)).float()).cpu(),
            lambda indices: labels(SampleDraws(FLAGS.seed, indices)),
            lambda count: progress.advance(bar, count),
        )
    if distributed.is_main():
        print(FLAGS.out)
    distributed.stop()


def main(argv):
    try:
        if argv[1:]:
            raise ValueError(f"'{argv[1]}' is no flag. Did you mean --workdir={argv[1]}?")
        run()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
