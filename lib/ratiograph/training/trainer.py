"""The training loop of any task: data, seeds, precision, logs, checkpoints, evaluation.

A run is a function of its configuration: step k draws all random numbers from a generator seeded by (seed, k), and the
order of the data is a function of (seed, epoch). A resumed run therefore equals an uninterrupted one, without any saved
random state. Metrics are averaged on the device and read only when they are logged.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ratiograph.config import tree
from ratiograph.core import distributed
from ratiograph.core.files import write_atomically
from ratiograph.core.foreign import read_text
from ratiograph.core.randomness import BatchGenerator
from ratiograph.core.types import Batch
from ratiograph.training import parallel
from ratiograph.training.checkpoint_manager import CheckpointManager, config_digest, graph_nodes, load_state
from ratiograph.training.devices import autocast_dtype, choose_device
from ratiograph.training.encoder_check import check_encoders
from ratiograph.training.experiment import Experiment
from ratiograph.training.faults import REMEDY, Means, StepGuard, Watchdog, check_weights
from ratiograph.training.final_files import set_aside, whole, write_results
from ratiograph.training.loggers import checked
from ratiograph.training.logs import make_grid, significant
from ratiograph.training.memory import peak_memory
from ratiograph.training.memory_plan import explained, memory_plan, require_batch, shortage
from ratiograph.training.preemption import Preemption
from ratiograph.training.run_facts import run_facts
from ratiograph.training.run_logger import RunLogger, SilentLogger

__all__ = ["step_seed", "train"]


def step_seed(seed: int, *position: int) -> int:
    """A 63-bit seed for one position of a run, the same on every machine; different positions have unrelated seeds."""
    text = ":".join(map(str, (seed, *position)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


Check = Callable[[], None]

_PREPARE, _FIT, _PREVIEW, _STEP = range(4)
"""Positions of a run that have seeds of their own; that of a step also has its number."""


class _Run:
    """One call of ``train``."""

    def __init__(self, experiment: Experiment, workdir: Path, device: torch.device, mode: str, check_held: Check):
        self.experiment, self.task, self.workdir, self.device = experiment, experiment.task, workdir, device
        self.postponed = False
        """Whether a checkpoint is due that waits for a good step."""
        self.checkpoints = CheckpointManager(
            workdir / "checkpoints",
            keep_last=experiment.keep_last,
            keep_every=experiment.keep_every,
            best_metric=experiment.best_metric,
            check_held=check_held,
        )
        self.samples_here = experiment.samples_each(distributed.ranks())  # of a step, on this process
        require_batch(self.task.sample_shape, self.samples_here)
        self.loggers = checked(experiment.loggers)
        self.task.accumulation = experiment.accumulation
        self.task.parallel = parallel.choose(mode, self.task, device, lambda parts: memory_plan(self.task).held(parts))
        self._generator = BatchGenerator(device, distributed.rank(), distributed.ranks())
        self._common_generator = torch.Generator(device)
        self.files = run_facts(experiment)  # before the networks are wrapped, which changes their names
        self.nodes = graph_nodes(tree.describe(experiment.task))
        config = workdir / "config.gin"
        self.config = read_text(config) if config.exists() else ""

    def logger(self, done: int) -> RunLogger | SilentLogger:
        """The logger for the steps after ``done``: only that of the main process writes and prints."""
        if not distributed.is_main():
            return SilentLogger()
        return RunLogger(
            self.workdir,
            self.experiment.steps,
            resume_step=done,
            images_per_step=self.experiment.batch_size,
            loggers=self.loggers,
            config=self.config,
        )

    def generator(self, *position: int) -> torch.Generator:
        """The generator of the global batch at one position; also seeds this rank's own random numbers (dropout)."""
        value = step_seed(self.experiment.seed, *position)
        torch.manual_seed(value if distributed.is_main() else step_seed(value, distributed.rank()))
        return self._generator.manual_seed(value)

    def common_generator(self, *position: int) -> torch.Generator:
        """A generator at one position that draws the same numbers on every rank, for what one rank computes whole."""
        value = step_seed(self.experiment.seed, *position)
        torch.manual_seed(value)
        return self._common_generator.manual_seed(value)

    def start(self, tell: Callable[[str], None]) -> tuple[int, int]:
        """Prepares the task, from the newest checkpoint if there is one; returns (steps done, samples read)."""
        experiment, task = self.experiment, self.task
        dtype = autocast_dtype(experiment.precision, self.device)
        self.generator(_PREPARE)
        if experiment.precision == "fp64":
            task.double()
        task.prepare(self.device, dtype)
        found = self.checkpoints.latest()
        if found:
            return self.resume(*found, tell)
        kind = "bf16" if dtype else "fp64" if experiment.precision == "fp64" else "fp32"
        held = "each a shard of the weights" if task.parallel.shards else "each a copy of the weights"
        processes = f"{distributed.ranks()} processes, {held}, " if distributed.ranks() > 1 else ""
        tell(f"{processes}{self.device.type}, networks in {kind}, {self.workdir}")
        data = experiment.data
        batches = self.on_device(data.batches(experiment.batch_size, experiment.seed)) if data else None
        for name, value in task.fit(batches, self.common_generator(_FIT)).items():
            tell(f"{name} = {value:.5g}")
        if experiment.evaluator:
            with task.parallel.whole():
                rows = experiment.evaluator.before(task, self.device, experiment.seed)
            if distributed.is_main():
                write_atomically(self.workdir / "before.json", json.dumps(rows).encode())
        return 0, 0

    def resume(self, done: int, state: dict, tell: Callable[[str], None]) -> tuple[int, int]:
        """Loads a checkpoint; returns (steps done, samples read)."""
        run = load_state(self.task, self.nodes, self.files, state, self.checkpoints.folder)
        check_weights(self.task, done, lambda: "delete that checkpoint to go on from the one before it")
        if distributed.is_main():
            whole(self.workdir / "diagnostics.json", dict, tell)
        tell(f"resumed from step {done} of {self.experiment.steps}")
        if run.get("config", config_digest(self.config)) != config_digest(self.config):
            tell("the configuration is not the one that the checkpoint was made with")
        return done, run.get("samples", done * self.experiment.batch_size)

    def batches(self, samples: int) -> Iterator[Batch]:
        """This rank's batches on the device, after the first ``samples`` samples of all ranks."""
        data, seed = self.experiment.data, self.experiment.seed
        return self.on_device(data.batches(self.samples_here, seed, samples, distributed.rank(), distributed.ranks()))

    def on_device(self, stream: Iterator[Batch]) -> Iterator[Batch]:
        """The batches on the device in the networks' precision, once shape of the first and labels are checked."""
        for index, batch in enumerate(stream):
            self.task.check_labels(batch) if index else self.task.check_samples(batch)
            batch = batch.to(self.device)
            yield replace(batch, images=batch.images.double()) if self.experiment.precision == "fp64" else batch

    def save(self, step: int, samples: int) -> None:
        """Saves a checkpoint: all ranks gather the state, the main one writes it."""
        state = self.task.training_state()
        if not distributed.is_main():
            return
        run = {"samples": samples, "config": config_digest(self.config), "graph": self.nodes, "files": self.files}
        self.checkpoints.save(step, state, run)
        summary = self.task.summary()
        if summary:
            text = json.dumps({"step": step, **summary}, indent=1)
            write_atomically(self.workdir / "diagnostics.json", text.encode())

    def preview(self, step: int, logger: RunLogger) -> None:
        """Logs a grid of samples from noise that is the same at every step.

        Raises:
            ValueError: this is the last step, and a sample is not finite.
        """
        with self.task.parallel.whole():
            if not distributed.is_main():
                return
            samples = self.task.preview(self.experiment.preview_samples, self.common_generator(_PREVIEW))
        if step == self.experiment.steps and samples is not None and not samples.isfinite().all():
            raise ValueError(f"the samples of step {step} are not finite; {self.remedy()}")
        if samples is not None and samples.ndim == 4:
            logger.image(step, "samples", make_grid(samples))

    def evaluate(self, step: int, logger: RunLogger) -> dict[str, float]:
        """The evaluator's quick measurements, where they are due; a message if the student may be collapsing."""
        evaluator, every = self.experiment.evaluator, self.experiment.evaluate_every
        if not (evaluator and every and step % every == 0):
            return {}
        with self.task.parallel.whole():
            found = distributed.from_main(evaluator.during(self.task, self.device, self.experiment.seed))
        if found.get("collapsed"):
            cover = (
                f": its samples cover {100 * found['coverage']:.1f} % of the real ones" if "coverage" in found else ""
            )
            logger.message(f"step {step}: the student may be collapsing{cover}")
        return {f"evaluation/{name}": value for name, value in found.items()}

    def loop(self, done: int, samples: int, logger: RunLogger, preemption: Preemption) -> None:
        """Takes the steps ``done`` + 1 to the last.

        Raises:
            Preempted: a signal was received, and the step's checkpoint is written.
            ValueError: too many steps in a row without a finite gradient; a checkpoint that cannot be written.
        """
        experiment, means, guard = self.experiment, Means(self.device), StepGuard(self.task, self.device)
        if distributed.is_main():  # a finished run that goes on needs a new evaluation
            set_aside(self.workdir, done)
        batches = self.batches(samples) if self.task.needs_data else itertools.repeat(None)
        first, waited, started = samples, 0.0, time.perf_counter()
        logged = started
        with Watchdog(experiment.hang_minutes) as watchdog, preemption.at_step_ends():
            for step in range(done + 1, experiment.steps + 1):
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                generator = self.generator(_STEP, step)
                with guard:
                    means.add(self.task.step(batch, self.samples_here, generator))
                samples += experiment.batch_size
                logger.advance(step)
                watchdog.beat(step)
                self.checkpoints.poll()
                # All ranks agree once a step: a signal that comes later takes effect after the next one.
                last = preemption.join(distributed.any_rank(bool(preemption.received))) or step == experiment.steps
                evaluation = self.evaluate(step, logger)
                saving = self.is_due(step, last, evaluation, guard)
                if saving or self.postponed or evaluation or step % experiment.log_every == 0:
                    now = time.perf_counter()
                    usage = {"data/wait_fraction": waited / (now - logged), "memory/peak_gb": peak_memory(self.device)}
                    self.record(step, means, guard, evaluation | usage, logger)
                    waited, logged = 0.0, now
                if step == experiment.steps or step % experiment.preview_every == 0:
                    self.preview(step, logger)
                if saving:
                    check_weights(self.task, step, self.remedy)
                    self.save(step, samples)
                if last:
                    self.checkpoints.wait()
                    distributed.wait_for_all()
                    preemption.end_if_received(step, experiment.steps, saving)
        guard.remove()
        rate, memory = (samples - first) / (time.perf_counter() - started), peak_memory(self.device)
        logger.message(f"{significant(rate, 3)} images/s, at most {significant(memory, 3)} GB of memory")

    def is_due(self, step: int, last: bool, evaluation: dict[str, float], guard: StepGuard) -> bool:
        """Whether to save a checkpoint after ``step``: not before a good step, except after the run's last."""
        due = self.postponed or last or step % self.experiment.checkpoint_every == 0
        bad = bool(due or evaluation) and distributed.any_rank(guard.streak() > 0)
        due = (not bad and self.checkpoints.improves(step, evaluation)) or due
        self.postponed = due and bad and step < self.experiment.steps
        return due and not self.postponed

    def remedy(self) -> str:
        """What to do about gradients, weights or samples that are not finite."""
        return f"{self.checkpoints.newest()}. {REMEDY}"

    def record(self, step: int, means: Means, guard: StepGuard, extra: dict, logger: RunLogger) -> None:
        """Logs the metrics since the last time and the skipped updates; raises where too many were skipped in a row."""
        metrics, bad = means.read()
        metrics = distributed.average_metrics(metrics, self.device)
        faults = guard.read()
        rewards = [name.removeprefix("reward/") for name in bad if name.startswith("reward/")]
        if rewards:  # their gradient may still be finite, so that no step is skipped
            logger.message(f"step {step}: log R of {', '.join(rewards)} was NaN or infinite for some samples")
        logger.log(step, metrics | extra | ({"faults/skipped_steps": faults.skipped} if faults.skipped else {}))
        if not faults.new:
            return
        report = guard.report(bad)
        logger.message(f"step {step}: {faults.new} steps without a finite gradient since the last line; {report}")
        if faults.longest >= min(self.experiment.max_bad_steps, self.experiment.steps):
            raise ValueError(
                f"{faults.longest} steps in a row up to step {step} had no finite gradient; {report}; {self.remedy()}"
            )


def train(
    experiment: Experiment,
    *,
    workdir: Path,
    device: str = "auto",
    mode: str = "auto",
    check_held: Check = lambda: None,
) -> Path:
    """Runs ``experiment`` to its last step, from the newest checkpoint in ``workdir`` if there is one.

    Args:
        experiment: what to run.
        workdir: folder of the run; see ``WORKSPACE.md`` for the files it leaves.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        mode: how several processes hold the networks, "auto", "none", "ddp", "fsdp" or "hsdp"; see `parallel.choose`.
        check_held: called by the main process before each checkpoint, as of `workdir.locked`.

    Returns:
        The folder, which `reports.run_report.write_report` makes a page of.

    Raises:
        ValueError: anything that the user can mend, with the remedy; earlier checkpoints are intact.
        Preempted: the run ended on a signal; the same call continues it.
    """
    run = _Run(experiment, Path(workdir), choose_device(device), mode, check_held)
    run.workdir.mkdir(parents=True, exist_ok=True)
    short = shortage(run.task, experiment.precision, run.device, run.task.parallel.parts)
    messages = [*check_encoders(experiment), *([short] if short else [])]
    fits = explained(run.task, experiment.precision, experiment.batch_size, experiment.accumulation)
    with fits, Preemption() as preemption, run.checkpoints:
        done, samples = run.start(messages.append)
        with run.logger(done) as logger:
            for message in messages:
                logger.message(message)
            if done == 0:
                run.preview(0, logger)
            if done < experiment.steps:
                run.loop(done, samples, logger, preemption)
            write_results(experiment, run.workdir, run.device, run.config, logger.message, done < experiment.steps)
    return run.workdir
