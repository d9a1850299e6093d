"""Draws the samples of students of captions runs for the same prompts and noise, side by side, after their teacher.

  python tools/compare_students.py --run=runs/captions_distillation --run=runs/captions_reward_tilt --out=sheet.png
  python tools/compare_students.py --run=plain=runs/captions_distillation --run='more red=runs/captions_reward_tilt'
  python tools/compare_students.py --run=runs/captions_distillation --prompt='a purple six' --prompt='a six' --columns=8

The teacher is the first run's, at its guidance scale. A prompt that leaves the colour open shows a tilt, one that names
it should not.
"""

from pathlib import Path

from absl import flags

from ratiograph import command_line

FLAGS = flags.FLAGS
flags.DEFINE_multi_string("run", None, "Folder of a finished run, or NAME=FOLDER; repeatable.", required=True)
flags.DEFINE_multi_string("prompt", [], "A prompt; repeatable. Default: five with the colour named, five without.")
flags.DEFINE_integer("columns", 5, "Samples of each prompt.", lower_bound=1, upper_bound=1000)
flags.DEFINE_integer(
    "evaluations",
    25,
    "Of the teacher's denoiser, an odd number; 0 leaves the teacher out.",
    lower_bound=0,
    upper_bound=10**5,
)
flags.DEFINE_integer("seed", 0, "Of the noise.", lower_bound=0, upper_bound=2**63 - 1)
flags.DEFINE_string("out", "sheet.png", "The picture.")
command_line.define_bindings("A line of gin on top of each run's config.gin; repeatable.")
command_line.define_device()

PROMPTS = (
    *("a red seven", "a blue three", "a green zero", "a yellow five", "a purple two"),
    *("a seven", "a three", "a zero", "a five", "a two"),
)


def draw():
    """Writes the picture.

    Raises:
        ValueError: a folder holds no run with captions, or two runs have one name.
        FileNotFoundError: a folder holds no run, or the run left no student.
    """
    from ratiograph.core.files import write_atomically
    from ratiograph.core.foreign import shown
    from ratiograph.evaluation.candidates import AveragedStudent
    from ratiograph.evaluation.prompt_sheet import draw_sheet, sampler_of, teacher_name, teacher_of
    from ratiograph.networks.weights.weight_files import load_weights
    from ratiograph.tasks.student_files import WEIGHTS, read_experiment
    from ratiograph.training import devices

    device, samplers = devices.choose_device(FLAGS.device), {}
    for run in FLAGS.run:
        name, _, folder = run.rpartition("=")
        name, folder = name or Path(folder).name, Path(folder)
        if name in samplers:
            raise ValueError(f"two runs are called {name}: write --run=NAME={folder}")
        experiment = read_experiment(folder, memory=True, bindings=FLAGS.gin_param)
        task, encoder = experiment.task, getattr(experiment.evaluator, "encoder", None)
        if encoder is None:
            raise ValueError(f"{folder} is no run with captions: its evaluator is not CaptionsEvaluator")
        task.prepare(device, devices.autocast_dtype(experiment.precision, device))
        load_weights(folder / WEIGHTS, task.average)
        encoder.load()
        if FLAGS.evaluations and not samplers:
            samplers[teacher_name(task, FLAGS.evaluations)] = sampler_of(task, teacher_of(FLAGS.evaluations))
        samplers[name] = sampler_of(task, AveragedStudent())
    prompts, out = FLAGS.prompt or PROMPTS, Path(FLAGS.out)
    sheet = draw_sheet(samplers, prompts, FLAGS.columns, encoder=encoder, seed=FLAGS.seed, device=device)
    write_atomically(out, lambda file: sheet.save(file, "PNG"))
    print(shown(out, 4096))


def main(arguments):
    command_line.no_arguments(arguments, "run")
    draw()


if __name__ == "__main__":
    command_line.run(main)
