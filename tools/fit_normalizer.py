"""Estimates log Z of a run's reward-tilted targets once, from samples of p, and writes it as a gin file.

  python tools/fit_normalizer.py --gin_file=gin/mnist_reward_tilt.gin --samples=5000 --out=normalizer.gin
  python launch/main.py --gin_file=gin/mnist_reward_tilt.gin --gin_file=normalizer.gin

Z = E_p[R] is one number for all noise levels, and every weighting but KL's needs it, as omega(R_t/Z) depends on it.
Without the file a run estimates it anew from RewardTilted.normalizer_samples samples before its first step; with it,
none is read. The samples are the first of the run's data in its own shuffled order, none of them twice, or, for a run
without data, exact ones of the teacher. The file says what it is of, from how many samples, and the standard error of
log Z: at an error of 0.05 omega(r*) of the least-squares weighting is off by 5%. Few effective samples,
N / E[(R/Z)^2], mean that a few samples carry the estimate, and then its error is underestimated too.
"""

import itertools
import sys
from pathlib import Path

from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_multi_string("gin_file", [], "A gin file of the run; repeatable, later files win over earlier ones.")
flags.DEFINE_multi_string("gin_param", [], "A line of gin, e.g. 'ScaledReward.beta=0.5'; repeatable, after the files.")
flags.DEFINE_string("data", None, "Data set: an embedded one by name, or shards by pattern (macro DATA).")
flags.DEFINE_integer("samples", 5000, "Samples of p.", lower_bound=2)
flags.DEFINE_integer("batch_size", 500, "Samples a pass of the reward.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of the order of the data, or of the teacher's samples.", lower_bound=0)
flags.DEFINE_string("device", "auto", "auto, cpu, cuda, cuda:1, ...")
flags.DEFINE_string("out", "normalizer.gin", "The file to write.")


def tilted_targets(cfg, task):
    """Gin's name => target, for each tilted target that some term has.

    Raises:
        ValueError: there is none, or gin's names cannot be told apart.
    """
    from ratiograph.algebra.targets import Tilted
    from ratiograph.config.values import spell

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


def samples_of_p(experiment, device, generator):
    """(batches of clean samples, how many there are at most, what they are in words).

    Raises:
        ValueError: the run has neither data nor a teacher that can be sampled.
    """
    from ratiograph.core.types import Batch, Condition
    from ratiograph.data.embedded import resolve
    from ratiograph.data.shards import count_samples

    if experiment.data is not None:
        batches = experiment.data.batches(FLAGS.batch_size, FLAGS.seed)
        size = sum(count_samples(path) for path in resolve(experiment.data.urls))
        return (batch.to(device) for batch in batches), size, experiment.data.describe()
    teacher = experiment.task.teacher
    if not getattr(teacher, "can_sample", False):
        raise ValueError("Z is estimated from samples of p: bind Experiment.data = @ShardStream() (or give --data)")
    draws = (Batch(teacher.sample(FLAGS.batch_size, generator), Condition()) for _ in itertools.count())
    return draws, FLAGS.samples, f"exact samples of {type(teacher).__name__}"


def log_rewards(targets, batches, samples):
    """log R [samples] of each target, by name."""
    import torch
    from rich.console import Console
    from rich.progress import track

    found = {name: [] for name in targets}
    passes = -(-samples // FLAGS.batch_size)
    console = Console(stderr=True)
    with torch.no_grad():
        for batch in track(itertools.islice(batches, passes), "log R", passes, console=console, transient=True):
            for name, target in targets.items():
                found[name].append(target.reward.log_reward(batch.images, batch.condition).double().cpu())
    return {name: torch.cat(parts)[:samples] for name, parts in found.items()}


def entry(name, target, log_reward, source):
    """The lines of one target."""
    from ratiograph.algebra.targets import log_mean_reward
    from ratiograph.config import tree

    log_z, error = map(float, log_mean_reward(log_reward))
    effective = len(log_reward) / float((log_reward - log_z).mul(2).exp().mean())
    tree = tree.render_tree(tree.describe(target.reward, "reward"))
    facts = [
        f"log Z = log E[R] of {source}",
        f"{len(log_reward):,} samples, {effective:,.0f} effective ones; standard error of log Z {error:.2g}",
        *tree.splitlines(),
    ]
    return "\n".join([*(f"# {line}" for line in facts), f"{name}.log_normalizer = {log_z:.6f}", ""])


def fit():
    """The text of the gin file."""
    import torch

    from ratiograph import config
    from ratiograph.training import trainer

    cfg = config.parse(FLAGS.gin_file, FLAGS.gin_param, {} if FLAGS.data is None else {"DATA": FLAGS.data})
    experiment = config.build(cfg)
    device = trainer.choose_device(FLAGS.device)
    targets = tilted_targets(cfg, experiment.task)
    experiment.task.to(device)
    for target in targets.values():
        target.load()
    batches, size, source = samples_of_p(experiment, device, torch.Generator(device).manual_seed(FLAGS.seed))
    found = log_rewards(targets, batches, min(size, FLAGS.samples))
    return "\n".join(entry(name, target, found[name], source) for name, target in targets.items())


def main(argv):
    try:
        if argv[1:]:
            raise ValueError(f"'{argv[1]}' is no flag. Did you mean --gin_file={argv[1]}?")
        if not FLAGS.gin_file:
            raise ValueError("no configuration: name one, e.g. --gin_file=gin/mnist_reward_tilt.gin")
        from ratiograph.core.files import write_atomically

        text = fit()
        write_atomically(Path(FLAGS.out), text.encode())
        print(f"{text}\n{FLAGS.out}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
