"""The work of tools/fit_coefficient.py: the coefficient at which RewardAscent tilts as much as p* does."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from absl import flags
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fits.clean_samples import clean_batches
from ratiograph import config
from ratiograph.algebra.objective import RewardAscent, Term
from ratiograph.algebra.rewards import Reward
from ratiograph.core.types import Condition
from ratiograph.tasks.distillation import Distillation
from ratiograph.training import devices
from ratiograph.training.experiment import Experiment

__all__ = ["Fit", "centred", "fit", "groups_of"]

FLAGS = flags.FLAGS
LEAST_SHARE = 0.01  # of the overall variance of log R that a condition must have to be used


@dataclass(frozen=True)
class Fit:
    """``coefficient``, its standard ``error``, ``weight`` = E[w], and the counts of ``samples`` and ``groups`` used."""

    coefficient: float
    error: float
    weight: float
    samples: int
    groups: int


def terms_of(task: Distillation) -> tuple[RewardAscent, Term]:
    """The RewardAscent, and the term beside it.

    Raises:
        ValueError: the objective is not the two of them, or the other's weighting needs a ratio.
    """
    terms = list(task.objective.terms.values()) if hasattr(task, "objective") else []
    ascents = [term for term in terms if isinstance(term, RewardAscent)]
    others = [term for term in terms if isinstance(term, Term)]
    if len(terms) != 2 or len(ascents) != 1 or len(others) != 1:
        raise ValueError("the objective must be a Term and a RewardAscent, as in gin/captions_reward_ascent.gin")
    if others[0].weighting.needs_ratio:
        raise ValueError("the term beside RewardAscent must have the weighting KL: with others q = p* is not at rest")
    return ascents[0], others[0]


def samples_of_p(experiment: Experiment, generator: torch.Generator) -> tuple[Tensor, Condition]:
    """(images [N, ...] on the generator's device, their condition), N at least --samples."""
    size = min(FLAGS.batch_size, FLAGS.samples)
    batches = clean_batches(experiment, size, FLAGS.seed, generator)
    batches = list(itertools.islice(batches, -(-FLAGS.samples // size)))
    parts = [batch.condition.parts() for batch in batches]
    condition = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return torch.cat([batch.images for batch in batches]), Condition(**condition)


def groups_of(condition: Condition, count: int) -> Tensor:
    """Number [N] of each sample's caption, class or, without either, 0."""
    labels = condition.labels if condition.caption is None else condition.caption
    if labels is None:
        return torch.zeros(count, dtype=torch.long)
    return torch.unique(labels.cpu(), dim=0, return_inverse=True)[1]


def centred(values: Tensor, groups: Tensor) -> Tensor:
    """``values`` [N] less the mean of each one's group."""
    sums = torch.zeros(int(groups.max()) + 1, dtype=values.dtype).index_add(0, groups, values)
    return values - (sums / torch.bincount(groups).clamp(min=1))[groups]


def pulls(
    task: Distillation, term: Term, reward: Reward, images: Tensor, condition: Condition, generator: torch.Generator
) -> tuple[Tensor, float]:
    """(y [N], E[w]): means over times of w(t) log R(mu(x_t)) and of w(t), the term's coefficient included."""
    starts = range(0, len(images), FLAGS.batch_size)
    found, total = torch.zeros(len(images), dtype=torch.float64), 0.0
    passes = [(first, k) for first in starts for k in range(FLAGS.times)]
    for first, _ in track(passes, "teacher", console=Console(stderr=True), transient=True):
        rows = slice(first, first + FLAGS.batch_size)
        evaluation = task.evaluate(images[rows], condition.map(lambda part, rows=rows: part[rows]), generator)
        log_reward = reward.log_reward(evaluation.teacher_denoised, evaluation.condition)
        weight = term.coefficient * term.time_weight(evaluation).double()
        found[rows] += (weight * log_reward).cpu() / FLAGS.times
        total += float(weight.sum())
    return found, total / (len(images) * FLAGS.times)


@torch.no_grad()
def fit() -> Fit:
    """The fit that the flags ask for.

    Raises:
        ValueError: the configuration is wrong, its objective is another, or log R does not vary under any condition.
    """
    experiment = config.build(config.parse(FLAGS.gin_file, FLAGS.gin_param, {}))
    task, device = experiment.task, devices.choose_device(FLAGS.device)
    ascent, term = terms_of(task)
    task.prepare(device, devices.autocast_dtype(experiment.precision, device))
    generator = torch.Generator(device).manual_seed(FLAGS.seed)
    images, condition = samples_of_p(experiment, generator)
    log_reward = ascent.reward.log_reward(images, condition).double().cpu()
    groups = groups_of(condition, len(images))
    variance = torch.zeros(int(groups.max()) + 1, dtype=torch.float64)
    variance.index_add_(0, groups, centred(log_reward, groups).square()).div_(torch.bincount(groups))
    kept = (variance[groups] > LEAST_SHARE * log_reward.var()).nonzero()[:, 0]
    if len(kept) < 3:
        raise ValueError("log R does not vary among samples of one caption or class: take more --samples")
    _, groups = torch.unique(groups[kept], return_inverse=True)
    condition = condition.map(lambda part: part[kept.to(part.device)])
    y, weight = pulls(task, term, ascent.reward, images[kept.to(device)], condition, generator)
    x, y = centred(log_reward[kept], groups), centred(y, groups)
    c = float(x @ y / (x @ x))
    error = float((x.square() @ (y - c * x).square()).sqrt() / (x @ x))
    return Fit(c, error, weight, len(kept), int(groups.max()) + 1)
