"""Trains what a gin file describes, and leaves everything a reader needs in one folder.

  python launch/main.py --gin_file=gin/mnist_sba.gin                     train; rerun the same line to resume
  python launch/main.py --gin_file=gin/mnist_sba.gin --dry_run           print the graph, build nothing heavy
  python launch/main.py --gin_file=gin/mnist_sba.gin --gin_param='SBA.lam=1.0' --workdir=runs/lam1
  python launch/main.py --gin_file=runs/lam1/config.gin --workdir=runs/again      repeat a run exactly
  torchrun --nproc_per_node=8 launch/main.py --gin_file=gin/mnist_sba.gin         the same steps, by eight processes
  torchrun --nproc_per_node=8 launch/main.py --gin_file=gin/mnist_sba.gin --parallel=fsdp      ... each with a shard

Files are read in order, then --gin_param lines, then the flags for run-level values: --steps, --seed,
--batch_size and --precision stand for `Experiment.steps = ...` and so on, --data and --teacher for the macros
`DATA = ...` and `TEACHER = ...`. A later value wins. Strings in --gin_param need quotes of their own:
--gin_param="DATA='mnist'".

A folder goes on with the configuration that began it. --allow_change=Adam.lr accepts another value from here on, which
WORKDIR/history.jsonl and the report record; a scope or a component stands for all of its parameters.

SIGTERM, SIGUSR1, SIGHUP and Ctrl-C end the run after the step in hand, with a checkpoint; a second Ctrl-C ends it at
once.

Exit codes: 0 done, 1 the run failed, 2 the configuration or the command line is wrong, 75 the run was asked to end and
the same command goes on, 130 ended at once.
"""

import contextlib
import sys
from pathlib import Path

from absl import flags

from ratiograph import command_line

FLAGS = flags.FLAGS
command_line.define_configuration(*command_line.OVERRIDES)
command_line.define_device()
flags.DEFINE_string("workdir", None, "Folder of the run. Default: runs/<name of the last gin file>.")
flags.DEFINE_string("parallel", "auto", "How processes share a run: auto, none, ddp (copies), fsdp, hsdp (shards).")
flags.DEFINE_list("loggers", None, "Where metrics go beside the run's folder: tensorboard, wandb, trackio.")
flags.DEFINE_bool("resume", True, "Continue from the last checkpoint; --noresume refuses if there is one.")
flags.DEFINE_multi_string("allow_change", [], "A binding that may differ from the run's so far; repeatable.")
flags.DEFINE_bool("dry_run", False, "Build on the meta device, without weights or data, print the graph, stop.")

LOGGERS = {"tensorboard": "TensorBoard", "wandb": "WeightsAndBiases", "trackio": "Trackio"}
INTERRUPTED = "ended at once; the same command goes on from the last checkpoint"


def parse_flags(config):
    """The checked configuration that the flags ask for."""
    for name in FLAGS.loggers or []:
        if name not in LOGGERS:
            raise config.ConfigError(f"--loggers={name}: choose from {', '.join(LOGGERS)}")
    lines = list(FLAGS.gin_param)
    if FLAGS.loggers is not None:
        lines.append(f"Experiment.loggers = [{', '.join(f'@{LOGGERS[name]}()' for name in FLAGS.loggers)}]")
    return config.parse(FLAGS.gin_file, lines, command_line.overrides(*command_line.OVERRIDES))


def dry_run(config, cfg):
    """Builds the graph without memory for its weights and prints it."""
    import torch

    from ratiograph.config import tree
    from ratiograph.training import devices, memory_plan

    devices.named_device(FLAGS.device)  # a GPU need not be there where a job is only looked at
    with torch.device("meta"):
        experiment = config.build(cfg)
    print(tree.render_tree(tree.describe(experiment)))
    plan = memory_plan.render(memory_plan.memory_plan(experiment.task, experiment.precision), experiment.batch_size)
    print(f"\n{plan}" if plan else "", end="\n" if plan else "")


def run(config, cfg):
    """Builds, trains and writes the report; rerunning the same command resumes."""
    import torch

    import ratiograph
    from ratiograph.core import distributed
    from ratiograph.reports.run_and_report import run_and_report
    from ratiograph.training import devices, parallel
    from ratiograph.training.run_folder import claimed

    folder = Path(FLAGS.workdir or Path("runs") / Path(FLAGS.gin_file[-1]).stem)
    device, values = devices.choose_device(FLAGS.device), config.to_dict(cfg)
    versions = {"ratiograph": ratiograph.__version__, "torch": torch.__version__}
    with distributed.joined(device), contextlib.ExitStack() as stack:
        distributed.check_same({**versions, "--parallel": FLAGS.parallel, "the device": device.type, **values})
        with distributed.agreed():
            config.check_files(cfg)
            torch.manual_seed(values["Experiment.seed"])  # random weights are made while building
            with parallel.building(FLAGS.parallel):
                experiment = config.build(cfg)
            held = contextlib.nullcontext(lambda: None)
            if distributed.is_main():
                held = claimed(folder, cfg, resume=FLAGS.resume, allowed=FLAGS.allow_change)
            check_held = stack.enter_context(held)
        report = run_and_report(
            experiment, workdir=folder, device=FLAGS.device, mode=FLAGS.parallel, check_held=check_held
        )
        if distributed.is_main():
            print(f"done: {report}", flush=True)


def main(arguments):
    command_line.needs_configuration(arguments)
    from ratiograph.training.preemption import EXIT_CODE, Preempted, Preemption

    try:
        with Preemption():
            from ratiograph import config  # imports torch, which takes seconds: --help and wrong flags need not wait

            cfg = parse_flags(config)
            (dry_run if FLAGS.dry_run else run)(config, cfg)
    except Preempted as stop:
        print(stop, file=sys.stderr)
        return EXIT_CODE
    return 0


if __name__ == "__main__":
    command_line.run(main, code_of=command_line.configuration_code, interrupted=INTERRUPTED)
