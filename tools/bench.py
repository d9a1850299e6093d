"""Times networks, training steps and data against what they must cost at least.

  python tools/bench.py network                                       DDPM++ for CIFAR-10, forward and backward
  python tools/bench.py network --network=ADM --batch_size=1          the network of EDM's ImageNet-64 model
  python tools/bench.py network --network=SD15UNet --batch_size=1 --rounds=1 --settings=bf16
  python tools/bench.py step --gin_file=gin/papers/score_free/cifar10_dijs.gin --precision=fp32     a whole step
  python tools/bench.py precisions --gin_file=gin/papers/score_free/cifar10_dijs.gin   a step in fp32 and in bf16
  python tools/bench.py data --gin_file=gin/mnist_sba.gin --batch_size=64      does training wait for its data?
  python tools/bench.py data --gin_file=gin/sd15_di_bregman.gin --made_up=1000   ... of latents of its shapes, made up
  OMP_NUM_THREADS=1 python tools/bench.py scaling --gin_file=gin/mnist_js.gin --batch_size=64        1 and 2 processes
  python tools/bench.py plan --gin_file=gin/papers/dmd2/sdxl.gin --batch_size=4   operations and memory, by arithmetic
  python tools/bench.py compare old.jsonl new.jsonl        what became slower or larger, beyond noise
  python tools/bench.py compare results.jsonl@5f67086a results.jsonl@2026-12      ... by revision, by date
  python tools/bench.py table --page=RESULTS.md            the table of everything measured
  python tools/bench.py gpu --minutes=10                   steps of all configurations on this machine's GPU

`network` runs one network of random weights forward and backward as plain eager float32 code does it, and as a training
run does (--settings: fp32 or bf16, with channels-last, compiled or both; several by ';', or all), in turn in one
process. It prints the median of each, its ratio to the first, and how far its output is from the first's. Ratios carry
from machine to machine, seconds do not; let nothing else run.

`step` runs training steps of a gin file, with random weights and images instead of files, in turn with the bare passes
of networks that such a step cannot do without: the floor. It prints step / floor, and the step in units of one forward
and backward pass of the student's network in plain eager float32. --gin_param='EDM.compiled = True' compiles.

`data` takes steps with the run's own data. `scaling` compares the images a second of several processes with as many
times those of one. `plan` needs no memory and no GPU; without --gin_file it plans every configuration of the table.
`compare` exits with 3 if something became worse. `gpu --tiny --device=cpu` tries it out without a GPU.

Every result is one JSON line more, with date, revision, hardware and load of the machine before, in --out.
"""

from absl import flags

from ratiograph import command_line

SETTINGS = "fp32, channels-last; bf16; bf16, channels-last"

FLAGS = flags.FLAGS
command_line.define_configuration()
command_line.define_device()
flags.DEFINE_string("network", "DDPMPP", "For network: DDPMPP, NCSNPP, ADM, UNet, SD15UNet or SDXLUNet.")
flags.DEFINE_string("settings", SETTINGS, "For network: settings by ';', or all.")
flags.DEFINE_multi_string("size", [], "For network: an argument other than the default, e.g. channels=64; repeatable.")
flags.DEFINE_enum("precision", "auto", ["auto", "fp32", "bf16"], "Arithmetic of the networks.")
flags.DEFINE_integer("batch_size", 4, "Images a pass.", lower_bound=1)
flags.DEFINE_integer("rounds", 7, "Timed runs of each variant, or steps; the median counts.", lower_bound=1)
flags.DEFINE_integer("made_up", 0, "For data: latents to make up instead of reading the run's.", lower_bound=0)
flags.DEFINE_float("tolerance", 0.05, "For compare: relative change that counts for nothing.", lower_bound=0)
flags.DEFINE_float("minutes", 10, "For gpu: no measurement goes on for longer.", lower_bound=0)
flags.DEFINE_bool("tiny", False, "For gpu: tiny networks, to try it out.")
flags.DEFINE_string("out", "tools/benchmarks/results.jsonl", "File that gets one JSON line more.")
flags.DEFINE_string("page", None, "For table: text file to write it to, between <!-- bench --> and <!-- /bench -->.")


def main(arguments):
    from benchmarks import commands

    return commands.run(*arguments)


if __name__ == "__main__":
    command_line.run(main)
