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
  python tools/bench.py table --readme=README.md           the table of everything measured
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

import sys
from pathlib import Path

from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_string("network", "DDPMPP", "For network: DDPMPP, NCSNPP, ADM, UNet, SD15UNet or SDXLUNet.")
flags.DEFINE_string(
    "settings", "fp32, channels-last; bf16; bf16, channels-last", "For network: settings by ';', or all."
)
flags.DEFINE_multi_string("size", [], "For network: an argument other than the default, e.g. channels=64; repeatable.")
flags.DEFINE_multi_string("gin_file", [], "A gin file; repeatable, as in launch/main.py.")
flags.DEFINE_multi_string("gin_param", [], "A line of gin; repeatable.")
flags.DEFINE_enum("precision", "auto", ["auto", "fp32", "bf16"], "Arithmetic of the networks.")
flags.DEFINE_integer("batch_size", 4, "Images a pass.", lower_bound=1)
flags.DEFINE_integer("rounds", 7, "Timed runs of each variant, or steps; the median counts.", lower_bound=1)
flags.DEFINE_integer("made_up", 0, "For data: latents to make up instead of reading the run's.", lower_bound=0)
flags.DEFINE_float("tolerance", 0.05, "For compare: relative change that counts for nothing.", lower_bound=0)
flags.DEFINE_float("minutes", 10, "For gpu: no measurement goes on for longer.", lower_bound=0)
flags.DEFINE_bool("tiny", False, "For gpu: tiny networks, to try it out.")
flags.DEFINE_string("device", "auto", "auto, cpu, cuda, cuda:1, ...")
flags.DEFINE_string("out", "BENCHMARKS/results.jsonl", "File that gets one JSON line more.")
flags.DEFINE_string("readme", None, "For table: text file to write it to, between <!-- bench --> and <!-- /bench -->.")


def asked():
    """What most measurements are told."""
    return {"gin_file": FLAGS.gin_file, "gin_param": FLAGS.gin_param, "batch_size": FLAGS.batch_size}


def sizes():
    """The network's arguments of --size."""
    import ast

    try:
        return {name: ast.literal_eval(value) for name, value in (each.split("=", 1) for each in FLAGS.size)}
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"--size={' '.join(FLAGS.size)}: write an argument and its value, e.g. channels=64") from error


def network(device):
    """The record of one network's forward and backward passes."""
    from benchmarks.network import SETTINGS, bench_network

    settings = list(SETTINGS) if FLAGS.settings == "all" else [each.strip() for each in FLAGS.settings.split(";")]
    told = {"settings": settings, "batch_size": FLAGS.batch_size, "rounds": FLAGS.rounds, "device": device}
    return bench_network(FLAGS.network, sizes=sizes(), **told)


def step(device):
    """The record of a training step, its floor, and the step in units of a plain pass."""
    from benchmarks.step import bench_step

    return bench_step(**asked(), precision=FLAGS.precision, rounds=FLAGS.rounds, device=device)


def precisions(device):
    """The record of a step in fp32 and in bf16."""
    from benchmarks.step import bench_precisions

    return bench_precisions(**asked(), rounds=FLAGS.rounds, device=device)


def data(device):
    """The record of a run's data."""
    from benchmarks.data_wait import bench_data

    told = {"precision": FLAGS.precision, "steps": FLAGS.rounds, "made_up": FLAGS.made_up}
    return bench_data(**asked(), **told, device=device)


def scaling(device):
    """The record of weak scaling."""
    from benchmarks.scaling import weak_scaling

    if not FLAGS.gin_file:
        raise ValueError("say which step to scale: --gin_file=gin/mnist_js.gin")
    return weak_scaling(**asked(), rounds=FLAGS.rounds, device=device.type)


def plan(device):
    """The record of a plan."""
    from benchmarks.plan import bench_plan

    return bench_plan(**asked(), precision="bf16" if FLAGS.precision == "auto" else FLAGS.precision)


MEASUREMENTS = {each.__name__: each for each in (network, step, precisions, data, scaling, plan)}


def measure(kind):
    """Takes one measurement, writes its record and prints it."""
    from benchmarks import printing, timing
    from ratiograph.training import trainer

    before, device = timing.load(), trainer.choose_device(FLAGS.device)
    record = MEASUREMENTS[kind](device) | {"load": before}
    print(printing.shown(timing.append_record(Path(FLAGS.out), record, device)))


def plans():
    """Plans every configuration of the table, each in a process of its own."""
    from benchmarks import suite

    suite.run(suite.plans(FLAGS.precision), minutes=float("inf"), common=[f"--out={FLAGS.out}"])


def compare(old, new):
    """Prints what changed between two runs; exits with 3 if something became worse."""
    from benchmarks import changes, timing

    runs = [timing.read_records(Path(name), start) for name, _, start in (each.partition("@") for each in (old, new))]
    changes = changes.compared(*runs, tolerance=FLAGS.tolerance)
    print(changes.render(changes))
    sys.exit(3 if any(change.worse for change in changes) else 0)


def table():
    """Prints the table of everything measured, and writes it to --readme."""
    from benchmarks import results_table, timing

    text = results_table.render(timing.read_records(Path(FLAGS.out)))
    print(text)
    if FLAGS.readme:
        results_table.write(Path(FLAGS.readme), text)


def gpu():
    """Measures steps of all configurations until the time is up."""
    from benchmarks import suite
    from ratiograph.training import trainer

    device = "cuda" if FLAGS.device == "auto" else FLAGS.device
    trainer.choose_device(device)
    common = [f"--device={device}", f"--out={FLAGS.out}"]
    counts = suite.run(suite.steps(FLAGS.tiny), minutes=FLAGS.minutes, common=common)
    print(", ".join(f"{count} {name}" for name, count in counts.items()))


def main(argv):
    commands = {"compare": (compare, 2), "table": (table, 0), "gpu": (gpu, 0)}
    try:
        names = [*MEASUREMENTS, *commands]
        kind = argv[1] if len(argv) > 1 else None
        if kind not in names:
            raise ValueError(f"say what to do, {', '.join(names)} (not {' '.join(argv[1:]) or 'nothing'})")
        command, expected = commands.get(kind, (None, 0))
        if len(argv) - 2 != expected:
            raise ValueError(f"{kind} takes {expected} names beside flags, not {len(argv) - 2}")
        if command:
            command(*argv[2:])
        elif kind == "plan" and not FLAGS.gin_file:
            plans()
        else:
            measure(kind)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
