"""Writes a finished student as files for others, safetensors only: of Stable Diffusion what plain diffusers loads.

  python tools/export.py runs/sd15_reward_tilt students/cat               a pipeline's folder
  python tools/export.py runs/sd15_reward_tilt students/cat --half        the U-Net in float16
  python tools/export.py runs/sd15_lora students/cat-lora --lora          the adapters of a LoRA student alone
  python tools/export.py runs/captions_reward_tilt students/red           any other student: weights, config.gin, card

The last is sampled by tools/sample.py students/red, the others anywhere:

  pipeline = DiffusionPipeline.from_pretrained("students/cat")
  image = pipeline("a cat", num_inference_steps=1, guidance_scale=1.0).images[0]

The parts beside the U-Net are the teacher's, from the run's own --teacher or from one given here. The folder gets a
model card (README.md) with the run's numbers and its graph, and the config.gin that repeats the run.
"""

import sys
from pathlib import Path

from absl import flags

from ratiograph import command_line

FLAGS = flags.FLAGS
command_line.define_bindings()
flags.DEFINE_string("teacher", None, "Pipeline's folder for the parts beside the U-Net; the run's own by default.")
flags.DEFINE_bool("half", False, "Write the U-Net in float16.")
flags.DEFINE_bool("lora", False, "Write a LoRA, of a student that is one, instead of a pipeline.")
SETTINGS = "call it with num_inference_steps=1, guidance_scale=1.0: the pipeline's own defaults are others"


def main(arguments):
    command_line.exactly(arguments, 2, "give two names: tools/export.py WORKDIR OUT")
    of_pipeline = FLAGS.half or FLAGS.teacher
    if FLAGS.lora and of_pipeline:
        raise ValueError("--lora writes adapters in float32 and no other part: drop --half and --teacher")
    from ratiograph.reports import export

    lines, (workdir, out) = FLAGS.gin_param, map(Path, arguments)
    if FLAGS.lora:
        print(export.export_lora(workdir, out, bindings=lines))
        print(SETTINGS, file=sys.stderr)
    elif export.is_pipeline(export.finished(workdir, lines)[1]):
        print(export.export_pipeline(workdir, out, teacher=FLAGS.teacher, half=FLAGS.half, bindings=lines))
        print(SETTINGS, file=sys.stderr)
    elif of_pipeline:
        raise ValueError(f"{workdir} trained no student of Stable Diffusion: drop --half and --teacher")
    else:
        print(export.export_plain(workdir, out, bindings=lines))


if __name__ == "__main__":
    command_line.run(main)
