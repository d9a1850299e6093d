"""Runs a grid of configurations, and makes one table and one figure of the results.

  python tools/ablate.py --gin_file=gin/mnist_sba.gin --vary='SBA.lam = -1.0, 0.5, 3.0' --folder=runs/lam
  python tools/ablate.py --gin_file=gin/mnist_sba.gin --vary='WEIGHTING = @KL(), @LS()' --vary='Clamped.limit = 2, 3'
  python tools/ablate.py --grid=gin/ablations/digits.toml --out=RESULTS.md     a file's rows; the table into RESULTS.md
  python tools/ablate.py --grid=gin/ablations/digits.toml --dry_run            checks every row and prints its command
  python tools/ablate.py --grid=gin/ablations/digits.toml --only=KL --seeds=0,1,2 --steps=100
  python tools/ablate.py --grid=gin/ablations/digits.toml --slurm --sbatch=--partition=gpu --processes=4

Several --vary make their product. A value is gin text: 0.5, 'mnist', @KL(), (1.0, 2.0). Every row is checked before the
first one runs. Each run is a launch/main.py process with FOLDER/<row>/log.txt; the same command resumes interrupted
runs and skips finished ones, and --table_only makes the table from the runs there are. A failed run ends only those
that need it.

FOLDER (runs/<name of the grid>) gets table.md, table.json, table.csv, figure.png and figure.svg; --out puts the table
between the lines <!-- ablation NAME --> and <!-- /ablation NAME --> of a text file, NAME being the grid file's or, with
--vary, the folder's.

--slurm submits the unfinished runs as job arrays, in waves where rows need others; make the table afterwards with
--table_only. --task=K runs the K-th cell of --dry_run's list, as the tasks of an array do; inside one,
SLURM_ARRAY_TASK_ID is the default.

Exit codes: 0 done, 1 a run failed or the command is wrong, 130 interrupted.
"""

from absl import flags

from ratiograph import command_line

FLAGS = flags.FLAGS
flags.DEFINE_string("grid", None, "A grid as a TOML file, e.g. gin/ablations/digits.toml.")
flags.DEFINE_multi_string("gin_file", [], "Gin files of a grid that --vary makes; repeatable.")
flags.DEFINE_multi_string("vary", [], "'BINDING = value, value, ...', an axis of the grid; repeatable.")
flags.DEFINE_multi_string("gin_param", [], "A line of gin for every run; repeatable.")
flags.DEFINE_string("folder", None, "Folder of the runs. Default: runs/<name of the grid>, or runs/ablation.")
flags.DEFINE_list("columns", None, "Columns of the table, in place of the grid's.")
flags.DEFINE_string("curve", None, "Metric of metrics.jsonl that the figure draws, in place of the grid's.")
flags.DEFINE_string("only", "", "Runs whose name holds this, and those they need; the table has every row.")
flags.DEFINE_list("seeds", [], "Repeat every row at these seeds; the table shows mean and standard deviation.")
flags.DEFINE_integer("steps", None, "Steps of each run, in place of the grid's.", lower_bound=1)
flags.DEFINE_integer("batch_size", None, "Samples a step, for every run.", lower_bound=1)
flags.DEFINE_string("precision", None, "Arithmetic of the networks, for every run.")
flags.DEFINE_string("data", None, "Macro DATA of every run.")
flags.DEFINE_string("teacher", None, "Macro TEACHER of every run.")
flags.DEFINE_list("device", ["auto"], "Devices, given to the runs in turn: auto, cpu, or cuda:0,cuda:1.")
flags.DEFINE_integer("processes", None, "Runs at a time: 2 here; on a cluster all that it has room for.", lower_bound=1)
flags.DEFINE_integer("threads", 1, "Threads of each run here.", lower_bound=1)
flags.DEFINE_string("out", None, "Text file with the markers, e.g. RESULTS.md.")
flags.DEFINE_bool("dry_run", False, "Check every row, print the runs and their commands, run nothing.")
flags.DEFINE_bool("table_only", False, "Make the table from the runs there are.")
flags.DEFINE_bool("slurm", False, "Submit the runs as job arrays.")
flags.DEFINE_bool("slurm_dry_run", False, "Print the sbatch commands of --slurm.")
flags.DEFINE_multi_string("sbatch", [], "An option of sbatch, e.g. --partition=gpu; repeatable.")
flags.DEFINE_integer("task", None, "Run this cell only.", lower_bound=0)


def main(arguments):
    command_line.no_arguments(arguments, "grid")
    if not FLAGS.device:
        raise command_line.UsageError("--device is empty: give auto, cpu, or cuda:0,cuda:1")
    from ablations import session

    return session.ablate()


if __name__ == "__main__":
    command_line.run(main, interrupted="\nstopped; the same command continues")
