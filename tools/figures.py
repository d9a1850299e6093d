"""Draws the papers' figures: NAME.png, NAME.svg, and their numbers in NAME.csv.

python tools/figures.py --list                                what there is
python tools/figures.py all                                   those that need no run => figures/
python tools/figures.py normalized_variance --samples=200000  a quicker Monte Carlo
python tools/figures.py score_difference --workdir=runs/mnist_sba
python tools/figures.py lambda_curves --folder=runs/lambdas   one folder a lambda, the legend from their config.gin
python tools/figures.py initialisations --run="teacher's weights=runs/a" --run="random=runs/b"
"""

from absl import flags

from ratiograph import command_line

FLAGS = flags.FLAGS
flags.DEFINE_string("out", "figures", "Folder of the figures.")
flags.DEFINE_bool("list", False, "Says what there is, and ends.")
flags.DEFINE_integer(
    "samples", None, "Samples: of a Monte Carlo estimate, or of the student.", lower_bound=100, upper_bound=10**8
)
flags.DEFINE_integer("seed", 0, "Seed of the samples.", lower_bound=0, upper_bound=2**63 - 1)
flags.DEFINE_string("workdir", None, "Folder of a run, for score_difference.")
flags.DEFINE_string("folder", None, "Folder with a folder for each run, for lambda_curves and initialisations.")
flags.DEFINE_multi_string("run", [], "LABEL=FOLDER of one run; repeat it for several.")
command_line.define_device("auto, cpu, cuda, cuda:1, ..., for score_difference.")


def main(arguments):
    from paper_figures import catalogue

    if FLAGS.list:
        for name, figure in catalogue.FIGURES.items():
            print(f"{name:20} {figure.__doc__}")
    else:
        catalogue.draw(arguments)


if __name__ == "__main__":
    command_line.run(main)
