"""Writes the report of a run again, or one page that compares several runs.

  python tools/report.py runs/mnist_sba                              renews runs/mnist_sba/report.html
  python tools/report.py runs/mnist_sba --out=/tmp/sba.html          writes it elsewhere
  python tools/report.py runs/mnist_sba runs/mnist_js                both in one page, comparison.html
  python tools/report.py runs/digits/* --out=digits.html             every run of an ablation
  python tools/report.py runs/mnist_sba --teacher_evaluations=35     also draws the teacher's samples at the same noise

A page is one file that opens anywhere, without a network. It is made from what the folders hold: runs may still be
training, and what a run lacks is said on the page. A comparison shows results with the best in bold and published ones
beside them, the parameters that differ, curves over each other, the last samples side by side, speed and memory.

--teacher_evaluations builds each run's teacher from its config.gin and leaves samples/teacher.png in the run's folder,
which every later report shows above the student's grid; a grid that is there already is made again.
"""

from pathlib import Path

from absl import flags

from ratiograph import command_line

FLAGS = flags.FLAGS
flags.DEFINE_string("out", None, "The page; RUN/report.html for one run, comparison.html for several.")
flags.DEFINE_integer(
    "teacher_evaluations",
    0,
    "Draw the teacher by so many network evaluations a sample; 0 does not.",
    lower_bound=0,
    upper_bound=10**5,
)
command_line.define_bindings("A line of gin for --teacher_evaluations, on top of the run's config.gin; repeatable.")
command_line.define_device("Where the teacher is drawn: auto, cpu, cuda, cuda:1, ...")


def main(arguments):
    workdirs = [Path(name) for name in arguments]
    if not workdirs:
        raise ValueError("no run: give the folder of one, as in tools/report.py runs/mnist_sba")
    if FLAGS.out and Path(FLAGS.out).is_dir():
        raise ValueError(f"--out={FLAGS.out} is a folder: give the page's name too, {FLAGS.out}/report.html")
    from rich.console import Console
    from rich.markup import escape

    from ratiograph.core.foreign import shown
    from ratiograph.reports.comparison import labels_of, write_comparison
    from ratiograph.reports.run_files import check_run
    from ratiograph.reports.run_report import write_report
    from ratiograph.reports.teacher_grid import draw_teacher

    labels_of(workdirs)
    for workdir in workdirs:
        check_run(workdir)
    for workdir in workdirs if FLAGS.teacher_evaluations else ():
        with Console(stderr=True).status(f"drawing the teacher of {escape(shown(workdir))}"):
            draw_teacher(workdir, FLAGS.teacher_evaluations, FLAGS.device, bindings=FLAGS.gin_param)
    if len(workdirs) == 1:
        print(shown(write_report(workdirs[0], FLAGS.out), 4096))
    else:
        print(shown(write_comparison(workdirs, FLAGS.out or "comparison.html"), 4096))


if __name__ == "__main__":
    command_line.run(main)
