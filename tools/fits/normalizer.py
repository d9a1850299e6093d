"""The work of tools/fit_normalizer.py: log Z = log E_p[R] of every tilted target of a run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from absl import flags
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from fits.clean_samples import clean_batches
from ratiograph import config
from ratiograph.algebra.targets import Tilted, log_mean_reward
from ratiograph.command_line import overrides
from ratiograph.config import tree
from ratiograph.config.values import spell
from ratiograph.core.types import Batch
from ratiograph.data.embedded import resolve
from ratiograph.data.shards import count_samples
from ratiograph.training import devices

__all__ = ["fit"]

FLAGS = flags.FLAGS


def tilted_targets(cfg: config.Config, task: nn.Module) -> dict[str, Tilted]:
    """Each tilted target that some term has, by the name that gin gives it.

    Raises:
        ValueError: there is none, or gin's names cannot be told apart.
    """
    terms = task.objective.terms.values() if hasattr(task, "objective") else ()
    targets = [term.target for term in terms if isinstance(term.target, Tilted)]
    if not targets:
        raise ValueError("no term of this run has a tilted target (ExactTilted knows its Z)")
    kinds = {type(target).__name__ for target in targets}
    names = [spell(scope, name) for scope, name in cfg.graph.instances if name in kinds]
    if len(names) == 1:
        targets = targets[:1]  # several terms with one configuration, and so with one Z
    if len(names) != len(targets):
        raise ValueError(f"{len(targets)} tilted terms share the configurations {', '.join(names)}: give each a scope")
    return dict(zip(names, targets, strict=True))


def log_rewards(targets: dict[str, Tilted], batches: Iterator[Batch], samples: int) -> dict[str, Tensor]:
    """log R [samples] of each target, by name."""
    found = {name: [] for name in targets}
    passes = -(-samples // FLAGS.batch_size)
    batches = itertools.islice(batches, passes)
    with torch.no_grad():
        for batch in track(batches, "log R", passes, console=Console(stderr=True), transient=True):
            for name, target in targets.items():
                found[name].append(target.reward.log_reward(batch.images, batch.condition).double().cpu())
    return {name: torch.cat(parts)[:samples] for name, parts in found.items()}


def entry(name: str, target: Tilted, log_reward: Tensor, source: str) -> str:
    """The lines of one target in the gin file; ``source`` says in words what was sampled."""
    log_z, error = map(float, log_mean_reward(log_reward))
    effective = len(log_reward) / float((log_reward - log_z).mul(2).exp().mean())
    facts = [
        f"log Z = log E[R] of {source}",
        f"{len(log_reward):,} samples, {effective:,.0f} effective ones; standard error of log Z {error:.2g}",
        *tree.render_tree(tree.describe(target.reward, "reward")).splitlines(),
    ]
    return "\n".join([*(f"# {line}" for line in facts), f"{name}.log_normalizer = {log_z:.6f}", ""])


def fit() -> str:
    """The text of the gin file that the flags ask for.

    Raises:
        ValueError: the configuration is wrong, has no tilted target, or has no samples of p.
    """
    cfg = config.parse(FLAGS.gin_file, FLAGS.gin_param, overrides("data"))
    experiment = config.build(cfg)
    device = devices.choose_device(FLAGS.device)
    targets = tilted_targets(cfg, experiment.task)
    experiment.task.to(device)
    for target in targets.values():
        target.load()
    generator = torch.Generator(device).manual_seed(FLAGS.seed)
    batches = clean_batches(experiment, FLAGS.batch_size, FLAGS.seed, generator)
    samples, source = FLAGS.samples, f"exact samples of {type(experiment.task.teacher).__name__}"
    if experiment.data is not None:
        samples = min(samples, sum(count_samples(path) for path in resolve(experiment.data.urls)))
        source = experiment.data.describe()
    found = log_rewards(targets, batches, samples)
    return "\n".join(entry(name, target, found[name], source) for name, target in targets.items())
