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

SIGTERM, SIGUSR1 and Ctrl-C end the run after the step in hand, with a checkpoint; a second Ctrl-C ends it at once.

Exit codes: 0 done, 1 the run failed, 2 the configuration or the command line is wrong, 75 the run was asked to end and
the same command goes on, 130 ended at once.
"""

import contextlib
import sys
import traceback
from pathlib import Path

from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_multi_string("gin_file", [], "A gin file; repeatable, later files win over earlier ones.")
flags.DEFINE_multi_string("gin_param", [], "A line of gin, e.g. 'SBA.lam=1.0'; repeatable, after the files.")
flags.DEFINE_string("workdir", None, "Folder of the run. Default: runs/<name of the last gin file>.")
flags.DEFINE_integer("steps", None, "Optimisation steps of the whole run (Experiment.steps).", lower_bound=1)
flags.DEFINE_integer("batch_size", None, "Samples a step (Experiment.batch_size).", lower_bound=1)
flags.DEFINE_integer("seed", None, "Seed of everything random (Experiment.seed).", lower_bound=0)
flags.DEFINE_string("precision", None, "Arithmetic of the networks, e.g. auto (Experiment.precision).")
flags.DEFINE_string("data", None, "Data set: an embedded one by name, or shards by pattern (macro DATA).")
flags.DEFINE_string("teacher", None, "Weights of the teacher: a file or folder (macro TEACHER).")
flags.DEFINE_string("device", "auto", "auto, cpu, cuda, cuda:1, ...: auto takes a GPU if there is one.")
flags.DEFINE_string("parallel", "auto", "How processes share a run: auto, none, ddp (copies), fsdp, hsdp (shards).")
flags.DEFINE_list("loggers", None, "Where metrics go beside the run's folder: tensorboard, wandb, trackio.")
flags.DEFINE_bool("resume", True, "Continue from the last checkpoint; --noresume refuses if there is one.")
flags.DEFINE_bool("dry_run", False, "Build on the meta device, without weights or data, print the graph, stop.")
flags.DEFINE_bool("verbose_errors", False, "Show the traceback of an error too.")

OVERRIDES = {
    "steps": "Experiment.steps",
    "batch_size": "Experiment.batch_size",
    "seed": "Experiment.seed",
    "precision": "Experiment.precision",
    "data": "DATA",
    "teacher": "TEACHER",
}
LOGGERS = {"tensorboard": "TensorBoard", "wandb": "WeightsAndBiases", "trackio": "Trackio"}


HARMLESS = [
    f"Experiment.{name}"
    for name in (
        *("steps", "accumulation", "log_every", "preview_every", "preview_samples", "teacher_evaluations", "loggers"),
        *("checkpoint_every", "keep_last", "keep_every", "best_metric", "evaluate_every"),
        *("max_bad_steps", "hang_minutes"),
    )
]
HARMLESS += [f"WeightsAndBiases.{name}" for name in ("project", "entity", "name", "group", "tags")]
HARMLESS += [f"Trackio.{name}" for name in ("project", "name", "group")]
"""Run-level values that a run may go on with changed: no step depends on them."""


def parse_flags(config, arguments):
    """The checked configuration that the command line asks for."""
    if arguments:
        raise config.ConfigError(f"'{arguments[0]}' is no flag. Did you mean --gin_file={arguments[0]}?")
    if not FLAGS.gin_file:
        raise config.ConfigError("no configuration: name one, e.g. --gin_file=gin/mnist_sba.gin.")
    overrides = {key: FLAGS[flag].value for flag, key in OVERRIDES.items() if FLAGS[flag].value is not None}
    for name in FLAGS.loggers or []:
        if name not in LOGGERS:
            raise config.ConfigError(f"--loggers={name}: choose from {', '.join(LOGGERS)}")
    lines = list(FLAGS.gin_param)
    if FLAGS.loggers is not None:
        lines.append(f"Experiment.loggers = [{', '.join(f'@{LOGGERS[name]}()' for name in FLAGS.loggers)}]")
    return config.parse(FLAGS.gin_file, lines, overrides)


def claim(config, cfg, workdir):
    """Refuses a folder that holds another run's results; what no step depends on may differ."""
    saved = workdir / "config.gin"
    results = [*sorted(workdir.glob("checkpoints/*.pt")), *workdir.glob("*.safetensors")]
    if results and not FLAGS.resume:
        raise config.ConfigError(
            f"--noresume: {workdir} already holds {results[0].relative_to(workdir)}. Give another --workdir, "
            "delete the folder, or drop --noresume to continue its run."
        )
    differing = config.changes(cfg, saved, ignore=HARMLESS) if saved.exists() else []
    if results and differing:
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise config.ConfigError(
            f"{saved}: the folder holds a run of another configuration: {differing[0]}{more}. "
            "Give another --workdir, or delete the folder to start over."
        )
    steps = config.to_dict(cfg)["Experiment.steps"]
    reached = max((int(path.stem.rpartition("_")[2]) for path in workdir.glob("checkpoints/step_*.pt")), default=0)
    if reached > steps:
        raise config.ConfigError(
            f"{workdir} is at step {reached} already, beyond the {steps} asked for: ask for --steps={reached} or more, "
            "or give another --workdir."
        )
    workdir.mkdir(parents=True, exist_ok=True)
    config.save(cfg, saved)


def dry_run(config, cfg):
    """Builds the graph without memory for its weights and prints it."""
    import torch

    from ratiograph.config import tree
    from ratiograph.training import memory_plan, trainer

    trainer.named_device(FLAGS.device)  # a GPU need not be there where a job is only looked at
    with torch.device("meta"):
        experiment = config.build(cfg)
    print(tree.render_tree(tree.describe(experiment)))
    plan = memory_plan.render(memory_plan.memory_plan(experiment.task, experiment.precision), experiment.batch_size)
    print(f"\n{plan}" if plan else "", end="\n" if plan else "")


def run(config, cfg):
    """Builds, trains and writes the report; rerunning the same command resumes."""
    import torch

    from ratiograph.core import distributed
    from ratiograph.reports import graph_picture, run_report, teacher_grid
    from ratiograph.training import parallel, trainer, workdir

    config.check_files(cfg)
    folder = Path(FLAGS.workdir or Path("runs") / Path(FLAGS.gin_file[-1]).stem)
    device = trainer.choose_device(FLAGS.device)
    distributed.start(device)
    with contextlib.ExitStack() as stack:
        stack.callback(distributed.stop)
        torch.manual_seed(config.to_dict(cfg)["Experiment.seed"])  # random weights are made while building
        with parallel.building(FLAGS.parallel):
            experiment = config.build(cfg)
        if distributed.is_main():
            stack.enter_context(workdir.locked(folder))
            claim(config, cfg, folder)
            graph_picture.save(experiment, folder)
        distributed.wait_for_all()
        trainer.train(experiment, workdir=folder, device=FLAGS.device, mode=FLAGS.parallel)
        teacher_grid.draw_once(experiment, folder, device)
        if distributed.is_main():
            print(f"done: {run_report.write_report(folder)}", flush=True)


def execute(arguments):
    """The run that the command line asks for; its exit code."""
    from ratiograph import config  # after the flags are known to be right, so that --help is instant

    try:
        cfg = parse_flags(config, arguments)
        (dry_run if FLAGS.dry_run else run)(config, cfg)
    except (ValueError, OSError) as error:
        if FLAGS.verbose_errors:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, config.ConfigError) else 1
    return 0


def flags_of(argv):
    """What of the command line is no flag; a wrong flag ends the program with 2, not with absl's 1."""
    try:
        return FLAGS(argv)
    except flags.Error as error:
        print(f"error: {error} (--help lists all)", file=sys.stderr)
        sys.exit(2)


def main(argv):
    from ratiograph.training.preemption import EXIT_CODE, Preempted, Preemption

    try:
        with Preemption():
            code = execute(argv[1:])
    except Preempted as stop:
        print(stop, file=sys.stderr)
        code = EXIT_CODE
    except KeyboardInterrupt:
        print("ended at once; the same command goes on from the last checkpoint", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=flags_of)
