"""The figures that tools/figures.py can draw, by name: each function gives (rows, figure) as its flags ask for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from absl import flags

from paper_figures import normalized_weights as weights
from paper_figures import reward_tilts, run_curves
from paper_figures import score_difference as scores
from paper_figures import weighting_curves as weightings
from paper_figures.drawing import save
from ratiograph.training.devices import choose_device

__all__ = ["FIGURES", "draw"]

FLAGS = flags.FLAGS


def normalized_variance():
    """Var[ω]/E[ω]² of two unit Gaussians over their distance, exact and from samples (f-distill Fig. 5a)."""
    rows = weightings.normalized_variance(samples=FLAGS.samples or 2_000_000, seed=FLAGS.seed)
    return rows, weightings.draw_normalized_variance(rows)


def h_curves():
    """The generators h(r) and f(ρ) of every divergence (Di-Bregman Table 1, f-distill Fig. 4a)."""
    rows = weightings.h_curves()
    return rows, weightings.draw_h_curves(rows)


def weighting_curves():
    """The weightings ω over l, r and ρ (Di-Bregman Table 1, f-distill Fig. 4b)."""
    rows = weightings.weighting_curves()
    return rows, weightings.draw_weighting_curves(rows)


def normalized_weights():
    """The variance of ω before and after the two normalisations, on exact mixtures (f-distill Fig. 5b)."""
    rows = weights.normalized_weights(seed=FLAGS.seed)
    return rows, weights.draw_normalized_weights(rows)


def reward_error():
    """The error of first- and second-order R_t over noise, against exact mixtures (Di-Bregman Eq. 24 and 25)."""
    rows = reward_tilts.reward_error(samples=FLAGS.samples or 1000, seed=FLAGS.seed)
    return rows, reward_tilts.draw_reward_error(rows)


def score_difference():
    """ω against the difference of the scores in a run, --workdir (f-distill Fig. 6)."""
    if not FLAGS.workdir:
        raise ValueError("score_difference needs a run: give its folder as --workdir")
    device = choose_device(FLAGS.device)
    task, step = scores.load_run(Path(FLAGS.workdir), device)
    generator = torch.Generator(device).manual_seed(FLAGS.seed)
    rows = scores.score_difference(task, samples=FLAGS.samples or 6400, generator=generator)
    print(f"step {step}; correlation of ω with the difference: Pearson's, Spearman's, and Spearman's at equal times")
    for by, symbol in scores.DIFFERENCES.items():
        for label, values in scores.correlations(rows, by).items():
            print(f"  {symbol}  {label:20}" + "".join(f"{value:8.3f}" for value in values))
    return rows, scores.draw_score_difference(rows)


def lambda_curves():
    """Fréchet distance and inception score over training, --folder or --run (Di-Bregman Fig. 1, 4, 5)."""
    rows = run_curves.lambda_curves(chosen_runs())
    return rows, run_curves.draw_lambda_curves(rows)


def initialisations():
    """Samples before and after training, --folder or --run (score-free paper, Fig. 3)."""
    rows = run_curves.initialisations(chosen_runs())
    return rows, run_curves.draw_initialisations(rows)


WITHOUT_RUN = (normalized_variance, h_curves, weighting_curves, normalized_weights, reward_error)
FIGURES = {figure.__name__: figure for figure in (*WITHOUT_RUN, score_difference, lambda_curves, initialisations)}


def chosen_runs() -> dict[str, Path]:
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
    return (run_curves.find_runs(Path(FLAGS.folder)) if FLAGS.folder else {}) | named


def draw(names: Sequence[str]) -> None:
    """Draws the figures ``names``, or with "all" those that need no run, and prints the files.

    Raises:
        ValueError: a figure has no such name, or lacks the runs that it needs.
    """
    if list(names) == ["all"]:
        names = [figure.__name__ for figure in WITHOUT_RUN]
    unknown = [f", not {name}" for name in names if name not in FIGURES]
    if unknown or not names:
        raise ValueError(f"give the name of a figure{''.join(unknown[:1])}: {', '.join(FIGURES)}")
    for name in names:
        rows, figure = FIGURES[name]()
        for path in save(figure, rows, Path(FLAGS.out) / name):
            print(path)
