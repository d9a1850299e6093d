"""Looks at everything a run will need, in seconds, and says what would fail later and how to mend it.

  python tools/doctor.py --gin_file=gin/mnist_sba.gin
  python tools/doctor.py --gin_file=gin/sd15_di_bregman.gin --teacher=/models/sd15 --data='/data/latents-{000..127}.tar'
  python tools/doctor.py --gin_file=gin/mnist_sba.gin --workdir=/scratch/lam1 --device=cuda:1

Takes flags of launch/main.py and asks what that asks before its first step: the configuration, every file it names
(models of the hub are fetched), memory on the processor or GPU, loggers, weights (do they fit), shards (are all there,
what encoded them, a first batch), the workdir and the disk under it. Nothing is trained and nothing is left behind.

Exit codes: 0 the run would start, 1 it would fail.
"""

from pathlib import Path

from absl import flags

from ratiograph import command_line

FLAGS = flags.FLAGS
command_line.define_configuration(*command_line.OVERRIDES)
command_line.define_device()
flags.DEFINE_string("workdir", None, "Folder of the run. Default: runs/<name of the last gin file>.")
flags.DEFINE_multi_string("allow_change", [], "A binding that may differ from the run's so far; repeatable.")


def main(arguments):
    command_line.needs_configuration(arguments)
    from rich.console import Console
    from rich.text import Text

    import doctor_checks

    workdir = Path(FLAGS.workdir or Path("runs") / Path(FLAGS.gin_file[-1]).stem)
    overrides = command_line.overrides(*command_line.OVERRIDES)
    findings = doctor_checks.findings(
        FLAGS.gin_file,
        FLAGS.gin_param,
        overrides,
        workdir=workdir,
        device=FLAGS.device,
        allowed=FLAGS.allow_change,
    )
    console, failed = Console(highlight=False, soft_wrap=True), 0
    for finding in findings:
        failed += not finding.ok
        state = Text("ok   ", "green") if finding.ok else Text("fails", "bold red")
        console.print(Text.assemble(state, "  ", (finding.subject, "bold"), ": ", finding.found))
    console.print(f"{failed} of these would end the run" if failed else "the run would start")
    return int(failed > 0)


if __name__ == "__main__":
    command_line.run(main)
