"""Evaluates a finished run once more, by the evaluator's present metrics, and renews its report.

  python tools/evaluate_run.py --workdir=runs/mnist_sba                          rewrites evaluation.json, report.html
  python tools/evaluate_run.py --workdir=runs/mnist_sba --out=/tmp/more.json     leaves the run's folder as it is
  python tools/evaluate_run.py --workdir=runs/mnist_sba --gin_param='DigitsEvaluator.samples=20000' --out=/tmp/more.json

The folder's config.gin says what the graph is; student.safetensors, and student_NAME.safetensors of a further average,
what was trained. The student before its first step is made again from the run's seed and measured anew too; nothing is
trained.
"""

import json
from pathlib import Path

from absl import flags

from ratiograph import command_line

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Folder of a finished run.", required=True)
flags.DEFINE_string("out", None, "The document; WORKDIR/evaluation.json by default.")
command_line.define_bindings()
command_line.define_device()


def main(arguments):
    command_line.no_arguments(arguments, "workdir")
    import torch

    from ratiograph.core.files import write_atomically
    from ratiograph.reports.run_report import write_report
    from ratiograph.tasks import student_files
    from ratiograph.training import devices, trainer

    workdir = Path(FLAGS.workdir)
    out = Path(FLAGS.out or workdir / "evaluation.json")
    experiment = student_files.read_experiment(workdir, memory=True, bindings=FLAGS.gin_param)
    task, evaluator = experiment.task, experiment.evaluator
    if not hasattr(task, "student_sampler"):
        raise ValueError(f"{workdir} trained a {type(task).__name__}, which has no one-step student to evaluate")
    if evaluator is None:
        line = "--gin_param='Experiment.evaluator = @DigitsEvaluator()'"
        raise ValueError(f"{workdir} has no evaluator: add one, {line}")
    device = devices.choose_device(FLAGS.device)
    torch.manual_seed(trainer.step_seed(experiment.seed, 0))  # as the trainer seeds random weights
    task.prepare(device, devices.autocast_dtype(experiment.precision, device))
    before = evaluator.before(task, device, experiment.seed)
    student_files.load_students(task, workdir, raw=getattr(evaluator, "raw", False))
    document = evaluator.after(task, device, experiment.seed, before, out.parent)
    write_atomically(out, json.dumps(document, indent=1).encode())
    if not FLAGS.out:
        write_report(workdir)
    print(out)


if __name__ == "__main__":
    command_line.run(main)
