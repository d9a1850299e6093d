"""Evaluates a finished run once more, by the evaluator's present metrics, and renews its report.

  python tools/evaluate_run.py --workdir=runs/mnist_sba                          rewrites evaluation.json, report.html
  python tools/evaluate_run.py --workdir=runs/mnist_sba --out=/tmp/more.json     leaves the run's folder as it is
  python tools/evaluate_run.py --workdir=runs/mnist_sba --gin_param='DigitsEvaluator.samples=20000' --out=/tmp/more.json

The folder's config.gin says what the graph is; student.safetensors, and student_NAME.safetensors of a further average,
what was trained. The student before its first step is made again from the run's seed and measured anew too; nothing is
trained.
"""

import json
import sys
from pathlib import Path

from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Folder of a finished run.", required=True)
flags.DEFINE_string("out", None, "The document; WORKDIR/evaluation.json by default.")
flags.DEFINE_multi_string("gin_param", [], "A line of gin on top of the run's config.gin; repeatable.")
flags.DEFINE_string("device", "auto", "auto, cpu, cuda, cuda:1, ...")


def evaluate(workdir, folder):
    """The document of evaluation.json; its figures go to ``folder``.

    Raises:
        ValueError: no finished run of a one-step student with an evaluator in the folder.
        FileNotFoundError: the run left no student.
    """
    if not (workdir / "config.gin").is_file():
        raise ValueError(f"{workdir} has no config.gin: give the folder of a run as --workdir")

    import torch

    from ratiograph import config
    from ratiograph.tasks.student_files import load_students
    from ratiograph.training import trainer

    cfg = config.parse([str(workdir / "config.gin")], FLAGS.gin_param, {})
    torch.manual_seed(config.to_dict(cfg)["Experiment.seed"])  # as launch/main.py and the trainer seed random weights
    experiment = config.build(cfg)
    task, evaluator = experiment.task, experiment.evaluator
    if not hasattr(task, "student_sampler"):
        raise ValueError(f"{workdir} trained a {type(task).__name__}, which has no one-step student to evaluate")
    if evaluator is None:
        raise ValueError(
            f"{workdir} has no evaluator: add one, --gin_param='Experiment.evaluator = @DigitsEvaluator()'"
        )
    device = trainer.choose_device(FLAGS.device)
    torch.manual_seed(trainer.step_seed(experiment.seed, 0))
    task.prepare(device, trainer.autocast_dtype(experiment.precision, device))
    before = evaluator.before(task, device, experiment.seed)
    load_students(task, workdir, raw=getattr(evaluator, "raw", False))
    return evaluator.after(task, device, experiment.seed, before, folder)


def main(argv):
    try:
        if argv[1:]:
            raise ValueError(f"'{argv[1]}' is no flag. Did you mean --workdir={argv[1]}?")
        workdir = Path(FLAGS.workdir)
        out = Path(FLAGS.out) if FLAGS.out else workdir / "evaluation.json"
        document = evaluate(workdir, out.parent)

        from ratiograph.core.files import write_atomically
        from ratiograph.reports.run_report import write_report

        write_atomically(out, json.dumps(document, indent=1).encode())
        if not FLAGS.out:
            write_report(workdir)
        print(out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
