"""Estimates the coefficient with which RewardAscent tilts as much as p* does, at the objective's noise levels.

  python tools/fit_coefficient.py --gin_file=gin/captions_reward_ascent.gin
  python tools/fit_coefficient.py --gin_file=gin/captions_reward_ascent.gin --gin_param='GUIDANCE = 4.0'

Noise hides part of the divergence beside the ascent, so that with c = E[w] the student is tilted beyond p*. q = p* is
at rest if E_t[w(t) E[log R_t(x_t) | x0]] = c log R(x0) + a constant of each condition (objective.py). The tool draws
x0 ~ p, from the run's data or, without data, exact samples of the teacher, noises each several times, takes R_t to
first order, R(mu(x_t)), and fits c by least squares, each caption or class with a constant of its own. The standard
error is the fit's (heteroscedastic, White 1980); the bias of the first order is not in it. Samples of conditions under
which log R does not vary say nothing and are left out, so images need captions that others have too.
"""

import itertools
import sys

from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_multi_string("gin_file", [], "A gin file of the run; repeatable, later files win over earlier ones.")
flags.DEFINE_multi_string("gin_param", [], "A line of gin; repeatable, after the files.")
flags.DEFINE_integer("samples", 4000, "Samples x0 of p, those left out included.", lower_bound=3)
flags.DEFINE_integer("times", 20, "Noise levels of each sample.", lower_bound=1)
flags.DEFINE_integer("batch_size", 250, "Samples a pass of the teacher.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Of data, times and noise.", lower_bound=0)
flags.DEFINE_string("device", "auto", "auto, cpu, cuda, cuda:1, ...")

OPEN = 0.01  # share of the overall variance of log R that a condition must have


def terms_of(task):
    """(the RewardAscent, the term beside it).

    Raises:
        ValueError: the objective is not the two of them, or the other's weighting asks a ratio.
    """
    from ratiograph.algebra.objective import RewardAscent, Term

    terms = list(task.objective.terms.values()) if hasattr(task, "objective") else []
    ascents = [term for term in terms if isinstance(term, RewardAscent)]
    others = [term for term in terms if isinstance(term, Term)]
    if len(terms) != 2 or len(ascents) != 1 or len(others) != 1:
        raise ValueError("the objective must be a Term and a RewardAscent, as in gin/captions_reward_ascent.gin")
    if others[0].weighting.needs_ratio:
        raise ValueError("the term beside RewardAscent must have the weighting KL: with others q = p* is not at rest")
    return ascents[0], others[0]


def samples_of_p(experiment, device, generator):
    """(images [N, ...] on ``device``, their condition).

    Raises:
        ValueError: the run has neither data nor a teacher that can be sampled.
    """
    from ratiograph.core.types import Batch, Condition

    size, teacher = min(FLAGS.batch_size, FLAGS.samples), experiment.task.teacher
    if experiment.data is not None:
        batches = (batch.to(device) for batch in experiment.data.batches(size, FLAGS.seed))
    elif getattr(teacher, "can_sample", False):
        batches = (Batch(teacher.sample(size, generator), Condition()) for _ in itertools.count())
    else:
        raise ValueError("samples of p are needed: bind Experiment.data = @ShardStream() (or CaptionedStream)")
    return joined(list(itertools.islice(batches, -(-FLAGS.samples // size))))


def joined(batches):
    """One batch's (images, condition) from many."""
    import torch

    parts = [batch.condition.parts() for batch in batches]
    condition = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return torch.cat([batch.images for batch in batches]), type(batches[0].condition)(**condition)


def groups_of(condition, count):
    """Number [N] of each sample's caption, class or, without either, 0."""
    import torch

    told = condition.caption if condition.caption is not None else condition.labels
    if told is None:
        return torch.zeros(count, dtype=torch.long)
    return torch.unique(told.cpu(), dim=0, return_inverse=True)[1]


def centred(values, groups):
    """``values`` [N] less the mean of each one's group."""
    import torch

    sums = torch.zeros(int(groups.max()) + 1, dtype=values.dtype).index_add(0, groups, values)
    return values - (sums / torch.bincount(groups).clamp(min=1))[groups]


def pulls(task, term, reward, images, condition, generator):
    """(y [N], E[w]): means over times of w(t) log R(mu(x_t)) and of w(t), the term's coefficient included."""
    import torch
    from rich.console import Console
    from rich.progress import track

    parts = range(0, len(images), FLAGS.batch_size)
    found, total = torch.zeros(len(images), dtype=torch.float64), 0.0
    todo = [(first, k) for first in parts for k in range(FLAGS.times)]
    for first, _ in track(todo, "teacher", console=Console(stderr=True), transient=True):
        rows = slice(first, first + FLAGS.batch_size)
        evaluation = task.evaluate(images[rows], condition.map(lambda part, rows=rows: part[rows]), generator)
        log_reward = reward.log_reward(evaluation.teacher_denoised, evaluation.condition)
        weight = term.coefficient * term.time_weight(evaluation).double()
        found[rows] += (weight * log_reward).cpu() / FLAGS.times
        total += float(weight.sum())
    return found, total / (len(images) * FLAGS.times)


def fit():
    """(c, its standard error, E[w], samples used, groups used)."""
    import torch

    from ratiograph import config
    from ratiograph.training import trainer

    experiment = config.build(config.parse(FLAGS.gin_file, FLAGS.gin_param, {}))
    task, device = experiment.task, trainer.choose_device(FLAGS.device)
    ascent, term = terms_of(task)
    task.prepare(device, trainer.autocast_dtype(experiment.precision, device))
    generator = torch.Generator(device).manual_seed(FLAGS.seed)
    images, condition = samples_of_p(experiment, device, generator)
    with torch.no_grad():
        log_reward = ascent.reward.log_reward(images, condition).double().cpu()
        groups = groups_of(condition, len(images))
        variance = torch.zeros(int(groups.max()) + 1, dtype=torch.float64)
        variance.index_add_(0, groups, centred(log_reward, groups).square()).div_(torch.bincount(groups))
        kept = (variance[groups] > OPEN * log_reward.var()).nonzero()[:, 0]
        if len(kept) < 3:
            raise ValueError("log R does not vary among samples of one caption or class: take more --samples")
        _, groups = torch.unique(groups[kept], return_inverse=True)
        condition = condition.map(lambda part: part[kept.to(part.device)])
        y, weight = pulls(task, term, ascent.reward, images[kept.to(device)], condition, generator)
    x, y = centred(log_reward[kept], groups), centred(y, groups)
    c = float(x @ y / (x @ x))
    error = float((x.square() @ (y - c * x).square()).sqrt() / (x @ x))
    return c, error, weight, len(kept), int(groups.max()) + 1


def main(argv):
    try:
        if argv[1:]:
            raise ValueError(f"'{argv[1]}' is no flag. Did you mean --gin_file={argv[1]}?")
        if not FLAGS.gin_file:
            raise ValueError("no configuration: name one, e.g. --gin_file=gin/captions_reward_ascent.gin")
        c, error, weight, samples, groups = fit()
        print(f"# {samples:,} samples in {groups} conditions, {FLAGS.times} noise levels each; E[w] = {weight:.4g}")
        print(f"# standard error {error:.2g}")
        print(f"RewardAscent.coefficient = {c:.4g}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
