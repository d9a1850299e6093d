"""Samples from a finished run's student, in one network evaluation each.

  python tools/sample.py --workdir=runs/mnist_sba                                    64 samples => samples.png
  python tools/sample.py --workdir=runs/mnist_sba --samples=5000 --out=samples.npz   arrays x0 [N, ...] in [-1, 1]
  python tools/sample.py --workdir=runs/mnist_sba --evaluations=35 --out=teacher.png the teacher, by Heun's method
  python tools/sample.py --workdir=runs/mnist_sba --weights=other.safetensors        another student of that graph

The folder's config.gin says what the graph is. The same --seed gives the same noise to student and teacher.
"""

import sys
from pathlib import Path

from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Folder of a finished run.", required=True)
flags.DEFINE_integer("samples", 64, "How many.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0)
flags.DEFINE_integer("batch_size", 500, "Samples a pass.", lower_bound=1)
flags.DEFINE_integer("evaluations", 0, "0 samples the student; an odd number the teacher at that many evaluations.")
flags.DEFINE_string("weights", None, "Student weights; WORKDIR/student.safetensors by default.")
flags.DEFINE_string("out", "samples.png", "A grid (.png) or the arrays (.npz).")
flags.DEFINE_string("device", "auto", "auto, cpu, cuda, cuda:1, ...")
flags.DEFINE_string("precision", "auto", "auto, fp32 or bf16.")


def sample():
    """The samples [N, ...] that the flags ask for, float32 on the CPU."""
    import torch

    from ratiograph import config, trainer, weight_files

    workdir = Path(FLAGS.workdir)
    if not (workdir / "config.gin").is_file():
        raise ValueError(f"{workdir} has no config.gin: give the folder of a run as --workdir")
    task = config.build(config.parse([str(workdir / "config.gin")], [], {})).task
    if not hasattr(task, "student_sampler"):
        raise ValueError(f"{workdir} trained a {type(task).__name__}, which has no one-step student to sample")
    device = trainer.choose_device(FLAGS.device)
    task.prepare(device, trainer.autocast_dtype(FLAGS.precision, device))
    if FLAGS.evaluations:
        sampler = task.teacher_sampler(FLAGS.evaluations)
    else:
        weight_files.load_weights(Path(FLAGS.weights or workdir / "student.safetensors"), task.average)
        sampler = task.student_sampler
    generator = torch.Generator(device).manual_seed(FLAGS.seed)
    sizes = [min(FLAGS.batch_size, FLAGS.samples - k) for k in range(0, FLAGS.samples, FLAGS.batch_size)]
    return torch.cat([sampler(size, generator).float().cpu() for size in sizes])


def write(samples, out):
    """Writes a grid or the arrays."""
    import numpy as np
    from PIL import Image

    from ratiograph.logs import make_grid

    if out.suffix == ".npz":
        np.savez(out, x0=samples.numpy())
    elif samples.ndim == 4:
        Image.fromarray(make_grid(samples)).save(out)
    else:
        raise ValueError(f"samples of shape {list(samples.shape[1:])} are no images: give --out=NAME.npz")


def main(argv):
    try:
        if argv[1:]:
            raise ValueError(f"'{argv[1]}' is no flag. Did you mean --workdir={argv[1]}?")
        out = Path(FLAGS.out)
        if out.suffix not in (".png", ".npz"):
            raise ValueError(f"--out={out}: the name must end in .png or .npz")
        write(sample(), out)
        print(out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
