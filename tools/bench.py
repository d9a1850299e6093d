"""Times networks and training steps against what they must cost at least.

  python tools/bench.py network                                       DDPM++ for CIFAR-10, forward and backward
  python tools/bench.py network --network=ADM --batch_size=1          the network of EDM's ImageNet-64 model
  python tools/bench.py step --gin_file=gin/papers/score_free/cifar10_dijs.gin --precision=fp32     a whole step
  OMP_NUM_THREADS=1 python tools/bench.py scaling --gin_file=gin/mnist_js.gin --batch_size=64        1 and 2 processes

`network` runs one network of random weights forward and backward as plain eager float32 code does it, and channels-last
and in bf16 as a training run does, in turn in one process. It prints the median of each and its ratio to the first, and
how far its output is from the first's. Ratios carry from machine to machine, seconds do not; let nothing else run.

`step` runs training steps of a gin file, with random weights and images instead of files, in turn with the bare passes
of networks that such a step cannot do without: the floor. It prints step / floor, and the step in units of one forward
and backward pass of the student's network in plain eager float32.

`scaling` compares the images a second of several processes with as many times those of one.

Every result is one JSON line more, with the date and the hardware, in --out.
"""

import sys
from pathlib import Path

from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_string("network", "DDPMPP", "Class of the network: DDPMPP, NCSNPP, ADM or UNet, with its default sizes.")
flags.DEFINE_multi_string("gin_file", [], "For step: a gin file; repeatable, as in launch/main.py.")
flags.DEFINE_multi_string("gin_param", [], "For step: a line of gin; repeatable.")
flags.DEFINE_string("precision", "auto", "For step: auto, fp32 or bf16.")
flags.DEFINE_integer("batch_size", 4, "Images a pass.", lower_bound=1)
flags.DEFINE_integer("rounds", 7, "Timed runs of each variant; the median counts.", lower_bound=1)
flags.DEFINE_string("device", "auto", "auto, cpu, cuda, cuda:1, ...")
flags.DEFINE_string("out", "BENCHMARKS/results.jsonl", "File that gets one JSON line more.")


def build_network(name):
    """The network, with weights at which no layer is idle."""
    import torch

    from ratiograph.networks import edm, unet

    classes = {c.__name__: c for c in (edm.DDPMPP, edm.NCSNPP, edm.ADM, unet.UNet)}
    if name not in classes:
        raise ValueError(f"--network={name}: choose one of {', '.join(classes)}")
    torch.manual_seed(0)
    network = classes[name]().train()
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.normal_(0, 0.02)
    return network


def bench_network(device):
    """The record of one network's forward and backward passes."""
    import copy

    import torch

    from ratiograph import benchmark
    from ratiograph.types import Condition

    network = build_network(FLAGS.network).to(device)
    for module in network.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0  # so that outputs can be compared
    size = FLAGS.batch_size
    images = torch.randn(size, *network.shape, device=device)
    c_noise = torch.randn(size, device=device)
    condition = Condition(torch.arange(size, device=device) % network.classes if network.classes else None)
    outputs = {}

    def variant(name, net, x, bf16):
        def work():
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                output = net.decode(net.encode(x, c_noise, condition))
            output.float().square().mean().backward()
            net.zero_grad(set_to_none=True)
            outputs[name] = output.detach().float()

        return work

    plain = network, images
    last = tuple(each.to(memory_format=torch.channels_last) for each in (copy.deepcopy(network), images))
    settings = {
        "fp32": (*plain, False),
        "fp32, channels-last": (*last, False),
        "bf16": (*plain, True),
        "bf16, channels-last": (*last, True),
    }
    variants = {name: variant(name, *setting) for name, setting in settings.items()}
    flops = benchmark.count_flops(variants["fp32"])
    seconds = benchmark.medians(benchmark.in_turn(variants, FLAGS.rounds, device))
    reference = outputs["fp32"]
    rows = [
        {
            "variant": name,
            "seconds": seconds[name],
            "faster": seconds["fp32"] / seconds[name],
            "tflops": flops / seconds[name] / 1e12,
            "relative_difference": float((outputs[name] - reference).norm() / reference.norm()),
        }
        for name in variants
    ]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {
        "bench": "network",
        "network": FLAGS.network,
        "parameters": parameters,
        "batch_size": size,
        "rounds": FLAGS.rounds,
        "rows": rows,
        "peak_memory_gb": benchmark.peak_memory(device),
    }


def build_bench(device):
    """The step of the gin file on random weights, and the plain pass that is its unit."""
    import torch

    from ratiograph import benchmark_step, config, trainer
    from ratiograph.distillation import Distillation

    torch.manual_seed(0)
    task = config.build(config.parse(FLAGS.gin_file, FLAGS.gin_param, {})).task
    if not isinstance(task, Distillation):
        raise ValueError(f"{FLAGS.gin_file[-1]} trains a {type(task).__name__}: give the gin file of a distillation")
    benchmark_step.randomised(task).prepare(device, trainer.autocast_dtype(FLAGS.precision, device))
    return benchmark_step.StepBench(task, FLAGS.batch_size, device)


def bench_step(device):
    """The record of a training step, its floor, and the step in units of a plain pass."""
    from ratiograph import benchmark

    if not FLAGS.gin_file:
        raise ValueError("say which step to time: --gin_file=gin/papers/score_free/cifar10_dijs.gin")
    bench = build_bench(device)
    floor = bench.floor()
    variants = {"step": bench.step, "unit": bench.unit, **{name: run for name, (_, run) in floor.items()}}
    bench.step()
    flops = benchmark.count_flops(bench.step)
    peak = benchmark.peak_memory(device)  # of steps alone
    seconds = benchmark.medians(benchmark.in_turn(variants, FLAGS.rounds, device))
    passes = [{"pass": name, "times": times, "seconds": seconds[name]} for name, (times, _) in floor.items()]
    least = sum(row["times"] * row["seconds"] for row in passes)
    return {
        "bench": "step",
        "gin_file": FLAGS.gin_file,
        "gin_param": FLAGS.gin_param,
        "precision": FLAGS.precision,
        "batch_size": FLAGS.batch_size,
        "rounds": FLAGS.rounds,
        "seconds": seconds["step"],
        "images_per_second": FLAGS.batch_size / seconds["step"],
        "floor": least,
        "step_over_floor": seconds["step"] / least,
        "units": seconds["step"] / seconds["unit"],
        "tflops": flops / seconds["step"] / 1e12,
        "passes": passes,
        "peak_memory_gb": peak,
    }


def show_step(record):
    """The record as a table."""
    print(f"{' '.join(record['gin_file'])}, batch {record['batch_size']}, {record['precision']}")
    for row in record["passes"]:
        print(f"  {row['times']} x {row['pass']:44}{row['seconds']:>9.3f} s")
    print(f"  floor {record['floor']:>51.3f} s")
    print(f"  step  {record['seconds']:>51.3f} s   = {record['step_over_floor']:.3f} floors")
    print(f"  = {record['units']:.2f} forward and backward passes of the student in plain eager float32")
    print(f"  {record['images_per_second']:.2f} images/s, {record['tflops']:.3f} TFLOP/s; ", end="")
    print(f"peak memory {record['peak_memory_gb']:.2f} GB; {record['hardware']['device']}")


def bench_scaling(device):
    """The record of weak scaling."""
    from ratiograph import benchmark_scaling

    if not FLAGS.gin_file:
        raise ValueError("say which step to scale: --gin_file=gin/mnist_js.gin")
    asked = {"gin_file": FLAGS.gin_file, "gin_param": FLAGS.gin_param, "batch_size": FLAGS.batch_size}
    return benchmark_scaling.weak_scaling(**asked, rounds=FLAGS.rounds, device=device.type)


def show_scaling(record):
    """The record as a table."""
    print(f"{' '.join(record['gin_file'])}, batch {record['batch_size']} a process")
    for row in record["rows"]:
        print(
            f"  {row['processes']} processes{row['seconds']:>10.3f} s{row['images_per_second']:>10.1f} images/s"
            f"   efficiency {row['efficiency']:.3f}"
        )


def show_network(record):
    """The record as a table."""
    print(f"{record['network']}, {record['parameters']:,} parameters, batch {record['batch_size']}, forward + backward")
    print(f"{'':22}{'seconds':>10}{'faster':>10}{'TFLOP/s':>10}{'difference':>12}")
    for row in record["rows"]:
        print(
            f"{row['variant']:22}{row['seconds']:>10.3f}{row['faster']:>9.2f}x{row['tflops']:>10.3f}"
            f"{row['relative_difference']:>12.1e}"
        )
    print(f"peak memory {record['peak_memory_gb']:.2f} GB; {record['hardware']['device']}")


def main(argv):
    try:
        kinds = {
            "network": (bench_network, show_network),
            "step": (bench_step, show_step),
            "scaling": (bench_scaling, show_scaling),
        }
        if len(argv) != 2 or argv[1] not in kinds:
            raise ValueError(f"say what to time, {', '.join(kinds)} (not {' '.join(argv[1:]) or 'nothing'})")
        from ratiograph import benchmark, trainer

        device = trainer.choose_device(FLAGS.device)
        bench, show = kinds[argv[1]]
        show(benchmark.append_record(Path(FLAGS.out), bench(device), device))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
