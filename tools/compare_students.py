"""Draws what students of the captions runs paint for the same prompts and noise, side by side, after their teacher.

  python tools/compare_students.py --run=runs/captions_distillation --run=runs/captions_reward_tilt --out=sheet.png
  python tools/compare_students.py --run=plain=runs/captions_distillation --run='more red=runs/captions_reward_tilt'
  python tools/compare_students.py --run=runs/captions_distillation --prompt='a purple six' --prompt='a six' --columns=8

The teacher is the first run's, at its guidance scale. A prompt that leaves the colour open shows a tilt, one that names
it should not.
"""

import sys
from pathlib import Path

from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_multi_string("run", None, "Folder of a finished run, or NAME=FOLDER; repeatable.", required=True)
flags.DEFINE_multi_string("prompt", [], "A prompt; repeatable. Default: five with the colour named, five without.")
flags.DEFINE_integer("columns", 5, "Samples of each prompt.", lower_bound=1)
flags.DEFINE_integer("evaluations", 25, "Of the teacher's denoiser, an odd number; 0 leaves the teacher out.")
flags.DEFINE_integer("seed", 0, "Of the noise.", lower_bound=0)
flags.DEFINE_string("out", "sheet.png", "The picture.")
flags.DEFINE_multi_string("gin_param", [], "A line of gin on top of each run's config.gin; repeatable.")
flags.DEFINE_string("device", "auto", "auto, cpu, cuda, cuda:1, ...")

PROMPTS = (
    *("a red seven", "a blue three", "a green zero", "a yellow five", "a purple two"),
    *("a seven", "a three", "a zero", "a five", "a two"),
)


def load(folder, device):
    """(task, encoder of its captions) of the run in ``folder``, the averaged student loaded.

    Raises:
        ValueError: no run of the captions world in the folder.
        FileNotFoundError: the run left no student.
    """
    from ratiograph import config
    from ratiograph.networks.weights import weight_files
    from ratiograph.training import trainer

    if not (folder / "config.gin").is_file():
        raise ValueError(f"{folder} has no config.gin: give the folder of a run as --run")
    experiment = config.build(config.parse([str(folder / "config.gin")], FLAGS.gin_param))
    encoder = getattr(experiment.evaluator, "encoder", None)
    if encoder is None:
        raise ValueError(f"{folder} is no run with captions: its evaluator is not CaptionsEvaluator")
    experiment.task.prepare(device, trainer.autocast_dtype(experiment.precision, device))
    weight_files.load_weights(folder / "student.safetensors", experiment.task.average)
    encoder.load()
    return experiment.task, encoder


def draw():
    """The picture of the flags."""
    from ratiograph.evaluation.caption_evaluator import sheet_of, student_of, teacher_name, teacher_of
    from ratiograph.training import trainer

    device, samplers = trainer.choose_device(FLAGS.device), {}
    for run in FLAGS.run:
        name, _, folder = run.rpartition("=")
        name = name or Path(folder).name
        if name in samplers:
            raise ValueError(f"two runs are called {name}: write --run=NAME={folder}")
        task, encoder = load(Path(folder), device)
        if FLAGS.evaluations and not samplers:
            samplers[teacher_name(task, FLAGS.evaluations)] = teacher_of(task, FLAGS.evaluations)
        samplers[name] = student_of(task)
    prompts, out = FLAGS.prompt or PROMPTS, Path(FLAGS.out)
    sheet = sheet_of(samplers, prompts, FLAGS.columns, encoder=encoder, seed=FLAGS.seed, device=device)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, "PNG")
    print(out)


def main(argv):
    try:
        if argv[1:]:
            raise ValueError(f"'{argv[1]}' is no flag. Did you mean --run={argv[1]}?")
        draw()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
