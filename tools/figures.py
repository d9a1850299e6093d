"""Draws the papers' figures: NAME.png, NAME.svg, and their numbers in NAME.csv.

python tools/figures.py --list                                what there is
python tools/figures.py all                                   those that need no run => figures/
python tools/figures.py normalized_variance --samples=200000  a quicker Monte Carlo
python tools/figures.py score_difference --workdir=runs/mnist_sba
python tools/figures.py lambda_curves --folder=runs/lambdas   one folder a lambda, the legend from their config.gin
python tools/figures.py initialisations --run="teacher's weights=runs/a" --run="random=runs/b"
"""

import sys
from pathlib import Path

from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_string("out", "figures", "Folder of the figures.")
flags.DEFINE_bool("list", False, "Says what there is, and ends.")
flags.DEFINE_integer("samples", None, "Samples: of a Monte Carlo estimate, or of the student.", lower_bound=100)
flags.DEFINE_integer("seed", 0, "Seed of the samples.", lower_bound=0)
flags.DEFINE_string("workdir", None, "Folder of a run, for score_difference.")
flags.DEFINE_string("folder", None, "Folder with a folder for each run, for lambda_curves and initialisations.")
flags.DEFINE_multi_string("run", [], "LABEL=FOLDER of one run; repeat it for several.")
flags.DEFINE_string("device", "auto", "auto, cpu, cuda, cuda:1, ..., for score_difference.")


def normalized_variance():
    """Var[ω]/E[ω]² of two unit Gaussians over their distance, exact and from samples (f-distill Fig. 5a)."""
    from paper_figures import weighting_curves

    rows = weighting_curves.normalized_variance(samples=FLAGS.samples or 2_000_000, seed=FLAGS.seed)
    return rows, weighting_curves.draw_normalized_variance(rows)


def h_curves():
    """The generators h(r) and f(ρ) of every divergence (Di-Bregman Table 1, f-distill Fig. 4a)."""
    from paper_figures import weighting_curves

    rows = weighting_curves.h_curves()
    return rows, weighting_curves.draw_h_curves(rows)


def weighting_curves():
    """The weightings ω over l, r and ρ (Di-Bregman Table 1, f-distill Fig. 4b)."""
    from paper_figures import weighting_curves

    rows = weighting_curves.weighting_curves()
    return rows, weighting_curves.draw_weighting_curves(rows)


def normalized_weights():
    """The variance of ω before and after the two normalisations, on exact mixtures (f-distill Fig. 5b)."""
    from paper_figures import normalized_weights

    rows = normalized_weights.normalized_weights(seed=FLAGS.seed)
    return rows, normalized_weights.draw_normalized_weights(rows)


def reward_error():
    """The error of first- and second-order R_t over noise, against exact mixtures (Di-Bregman Eq. 24 and 25)."""
    from paper_figures import reward_tilts

    rows = reward_tilts.reward_error(samples=FLAGS.samples or 1000, seed=FLAGS.seed)
    return rows, reward_tilts.draw_reward_error(rows)


def score_difference():
    """ω against the difference of the scores in a run, --workdir (f-distill Fig. 6)."""
    if not FLAGS.workdir:
        raise ValueError("score_difference needs a run: give its folder as --workdir")

    import torch

    from paper_figures import score_difference
    from ratiograph.training.trainer import choose_device

    device = choose_device(FLAGS.device)
    task, step = score_difference.load_run(Path(FLAGS.workdir), device)
    generator = torch.Generator(device).manual_seed(FLAGS.seed)
    rows = score_difference.score_difference(task, samples=FLAGS.samples or 6400, generator=generator)
    print(f"step {step}; correlation of ω with the difference: Pearson's, Spearman's, and Spearman's at equal times")
    for by, symbol in score_difference.DIFFERENCES.items():
        for label, values in score_difference.correlations(rows, by).items():
            print(f"  {symbol}  {label:20}" + "".join(f"{value:8.3f}" for value in values))
    return rows, score_difference.draw_score_difference(rows)


def lambda_curves():
    """Fréchet distance and inception score over training, --folder or --run (Di-Bregman Fig. 1, 4, 5)."""
    chosen = chosen_runs()

    from paper_figures import run_curves

    rows = run_curves.lambda_curves(chosen)
    return rows, run_curves.draw_lambda_curves(rows)


def initialisations():
    """Samples before and after training, --folder or --run (score-free paper, Fig. 3)."""
    chosen = chosen_runs()

    from paper_figures import run_curves

    rows = run_curves.initialisations(chosen)
    return rows, run_curves.draw_initialisations(rows)


WITHOUT_RUN = (normalized_variance, h_curves, weighting_curves, normalized_weights, reward_error)
FIGURES = {figure.__name__: figure for figure in (*WITHOUT_RUN, score_difference, lambda_curves, initialisations)}


def chosen_runs():
    """Folders by label, of --folder and then of --run."""
    named = {}
    for text in FLAGS.run:
        # Labels and folders may hold the sign themselves: the split is where a folder begins.
        splits = [(text[:k], text[k + 1 :]) for k in range(1, len(text)) if text[k] == "="]
        found = next(((label, folder) for label, folder in splits if Path(folder).is_dir()), None)
        if found is None:
            raise ValueError(f"--run={text}: give LABEL=FOLDER, where FOLDER is that of a run")
        named[found[0]] = Path(found[1])
    if not (named or FLAGS.folder):
        raise ValueError("this figure compares runs: give --folder=FOLDER, or --run=LABEL=FOLDER once for each")
    if not FLAGS.folder:
        return named

    from paper_figures.run_curves import find_runs

    return find_runs(Path(FLAGS.folder)) | named


def draw(name):
    """Draws one figure and writes its files."""
    from paper_figures.drawing import save

    rows, figure = FIGURES[name]()
    for path in save(figure, rows, Path(FLAGS.out) / name):
        print(path)


def main(argv):
    try:
        if FLAGS.list:
            for name, figure in FIGURES.items():
                print(f"{name:20} {figure.__doc__}")
            return
        names = [figure.__name__ for figure in WITHOUT_RUN] if argv[1:] == ["all"] else argv[1:]
        unknown = [name for name in names if name not in FIGURES]
        if unknown or not names:
            raise ValueError(
                f"give the name of a figure{f', not {unknown[0]}' if unknown else ''}: {', '.join(FIGURES)}"
            )
        for name in names:
            draw(name)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
