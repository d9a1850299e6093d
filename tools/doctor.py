"""Looks at everything a run will need, in seconds, and says what would fail later and how to mend it.

  python tools/doctor.py --gin_file=gin/mnist_sba.gin
  python tools/doctor.py --gin_file=gin/sd15_di_bregman.gin --teacher=/models/sd15 --data='/data/latents-{000..127}.tar'
  python tools/doctor.py --gin_file=gin/mnist_sba.gin --workdir=/scratch/lam1 --device=cuda:1

Takes the flags of launch/main.py. It looks at the configuration, the processor or GPU, weight files (are they there, do
they fit), shards (are all there, can a sample be decoded), the workdir and the disk under it. Nothing is trained and
nothing is left behind.

Exit codes: 0 the run would start, 1 it would fail.
"""

import sys
from pathlib import Path

from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_multi_string("gin_file", [], "A gin file; repeatable, later files win over earlier ones.")
flags.DEFINE_multi_string("gin_param", [], "A line of gin, e.g. 'SBA.lam=1.0'; repeatable, after the files.")
flags.DEFINE_string("workdir", None, "Folder of the run. Default: runs/<name of the last gin file>.")
flags.DEFINE_integer("steps", None, "Optimisation steps of the whole run.", lower_bound=1)
flags.DEFINE_integer("batch_size", None, "Samples a step.", lower_bound=1)
flags.DEFINE_integer("seed", None, "Seed of everything random.", lower_bound=0)
flags.DEFINE_string("precision", None, "Arithmetic of the networks, e.g. auto.")
flags.DEFINE_string("data", None, "Data set: an embedded one by name, or shards by pattern (macro DATA).")
flags.DEFINE_string("teacher", None, "Weights file of the teacher (macro TEACHER).")
flags.DEFINE_string("device", "auto", "auto, cpu, cuda, cuda:1, ...")

OVERRIDES = {name: f"Experiment.{name}" for name in ("steps", "batch_size", "seed", "precision")}
OVERRIDES |= {"data": "DATA", "teacher": "TEACHER"}


def findings():
    """The configuration's own finding, then those of what it describes."""
    import torch

    from doctor_checks import Finding, examine
    from ratiograph import config

    overrides = {key: FLAGS[flag].value for flag, key in OVERRIDES.items() if FLAGS[flag].value is not None}
    try:
        cfg = config.parse(FLAGS.gin_file, FLAGS.gin_param, overrides)
        with torch.device("meta"):
            experiment = config.build(cfg)
    except (ValueError, OSError) as error:
        yield Finding("configuration", False, str(error))
        return
    yield Finding("configuration", True, f"{', '.join(FLAGS.gin_file)}: {type(experiment.task).__name__}")
    workdir = Path(FLAGS.workdir or Path("runs") / Path(FLAGS.gin_file[-1]).stem)
    yield from examine(experiment, workdir=workdir, device=FLAGS.device)


def main(argv):
    from rich.console import Console
    from rich.text import Text

    if argv[1:] or not FLAGS.gin_file:
        print("error: name a configuration, e.g. --gin_file=gin/mnist_sba.gin", file=sys.stderr)
        sys.exit(1)
    console, failed = Console(highlight=False, soft_wrap=True), 0
    for finding in findings():
        failed += not finding.ok
        state = Text("ok   ", "green") if finding.ok else Text("fails", "bold red")
        console.print(Text.assemble(state, "  ", (finding.subject, "bold"), ": ", finding.found))
    console.print(f"{failed} of these would end the run" if failed else "the run would start")
    sys.exit(int(failed > 0))


if __name__ == "__main__":
    app.run(main)
