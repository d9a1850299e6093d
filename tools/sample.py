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

from absl import flags

from ratiograph import command_line

SAMPLERS = ("heun", "stochastic", "euler", "ddim", "trailing")

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Folder of a finished run; may be given without the flag.")
command_line.define_bindings()
flags.DEFINE_integer("first", 0, "Index of the first sample.", lower_bound=0, upper_bound=10**15)
flags.DEFINE_integer(
    "samples", None, "How many. Default: 64; with --prompts, one for each.", lower_bound=1, upper_bound=10**8
)
flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=2**63 - 1)
flags.DEFINE_integer("batch_size", 500, "Samples a pass.", lower_bound=1)
flags.DEFINE_multi_integer("class_label", [], "Class of the samples; several are taken in turn. Default: at random.")
flags.DEFINE_string("prompts", None, "Text file with a caption a line, taken in turn.")
flags.DEFINE_string("pipeline", None, "Stable Diffusion's folder: encodes captions, and decodes latents to images.")
flags.DEFINE_bool("compare", False, "Draw the teacher's samples of the same noise above the student's, in a .png.")
flags.DEFINE_enum(
    "sampler", None, SAMPLERS, "Sample the teacher, by this sampler. Default: the student; with --compare, both."
)
flags.DEFINE_integer(
    "steps", None, "Steps of --sampler; its own default if not given.", lower_bound=1, upper_bound=10**5
)
flags.DEFINE_float("guidance_scale", None, "Guidance of the teacher, 1 is none; the run's own if not given.")
flags.DEFINE_string("weights", None, "Student weights; WORKDIR/student.safetensors by default.")
flags.DEFINE_string("out", "samples.png", "A grid (.png), the arrays (.npz), or a folder.")
flags.DEFINE_bool("uint8", False, "Pixels, uint8 [N, H, W, C], in the .npz.")
flags.DEFINE_integer("shards", 0, "Fill the folder with so many webdataset shards in place of PNGs.", lower_bound=0)
command_line.define_device()
flags.DEFINE_enum("precision", "auto", ["auto", "fp32", "bf16"], "Arithmetic of the networks.")


def main(arguments):
    if len(arguments) > 1 or (arguments and FLAGS.workdir):
        raise ValueError(f"'{arguments[-1]}' is no flag: give one folder")
    FLAGS.workdir = FLAGS.workdir or "".join(arguments)
    if not FLAGS.workdir:
        raise ValueError("give the folder of a finished run: tools/sample.py WORKDIR")
    from finished_runs import sampling

    sampling.sample()


if __name__ == "__main__":
    command_line.run(main)
