"""The loop round a task: data, seeds, precision, logs, checkpoints, evaluation, report.

A run is a function of its configuration: step k draws everything random from a generator seeded by (seed, k), and the
stream's order is a function of (seed, epoch), so a resumed run needs no random state to be the run that would have
been. Metrics are averaged on the device and read only when they are logged.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ratiograph import checkpoints, graph, weight_files
from ratiograph.experiment import Experiment
from ratiograph.files import write_atomically
from ratiograph.logs import RunLogger, make_grid
from ratiograph.report import write_report
from ratiograph.types import Batch

__all__ = ["autocast_dtype", "choose_device", "step_seed", "train"]


def choose_device(device: str) -> torch.device:
    """The torch device of ``--device``; "auto" is a GPU if there is one.

    Raises:
        ValueError: for a name torch does not know, or a GPU that is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device={device} is no device: give auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device={device}, but torch sees no GPU here: use --device=cpu or --device=auto")
    return chosen


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The networks' autocast type; None is float32. "auto" takes bf16 where the processor computes in it."""
    if precision == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
        capabilities = torch.cpu.get_capabilities()
        return torch.bfloat16 if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else None
    return {"fp32": None, "bf16": torch.bfloat16}[precision]


def step_seed(seed: int, *position: int) -> int:
    """A 63-bit seed for one position of a run, the same on every machine; distinct positions are independent."""
    text = ":".join(map(str, (seed, *position)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


class _Means:
    """Means of metrics over the steps since they were last read, kept on the device."""

    def __init__(self):
        self.totals: dict[str, Tensor] = {}
        self.steps = 0

    def add(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            self.totals[name] = self.totals[name] + value if name in self.totals else value
        self.steps += 1

    def read(self) -> dict[str, float]:
        means = {name: float(total) / self.steps for name, total in self.totals.items()}
        self.totals, self.steps = {}, 0
        return means


class _Run:
    """One call of ``train``."""

    def __init__(self, experiment: Experiment, workdir: Path, device: torch.device):
        self.experiment, self.task, self.workdir, self.device = experiment, experiment.task, workdir, device
        self.folder = workdir / "checkpoints"
        self.generator = torch.Generator(device)

    def seeded(self, *position: int) -> torch.Generator:
        """The run's generator, and torch's own (dropout), at one position."""
        value = step_seed(self.experiment.seed, *position)
        torch.manual_seed(value)
        return self.generator.manual_seed(value)

    def start(self, logger_message) -> int:
        """Prepares the task, from the newest checkpoint if there is one; returns the steps done."""
        experiment, task = self.experiment, self.task
        dtype = autocast_dtype(experiment.precision, self.device)
        self.seeded(0)
        task.prepare(self.device, dtype)
        found = checkpoints.latest(self.folder)
        if found:
            done, state = found
            task.load_training_state(state["task"])
            logger_message(f"resumed from step {done} of {experiment.steps}")
            return done
        logger_message(f"{self.device.type}, networks in {'bf16' if dtype else 'fp32'}, {self.workdir}")
        batches = self.batches(0) if experiment.data else None
        for name, value in task.fit(batches, self.seeded(1)).items():
            logger_message(f"{name} = {value:.5g}")
        if experiment.evaluator:
            rows = experiment.evaluator.before(task, self.device, experiment.seed)
            write_atomically(self.workdir / "before.json", json.dumps(rows).encode())
        return 0

    def batches(self, done: int) -> Iterator[Batch]:
        """Real batches on the device, from the one of step ``done`` + 1 on."""
        experiment = self.experiment
        stream = experiment.data.batches(experiment.batch_size, experiment.seed, done * experiment.batch_size)
        return (batch.to(self.device) for batch in stream)

    def save(self, step: int) -> None:
        checkpoints.save(self.folder, step, {"step": step, "task": self.task.training_state()})
        summary = self.task.summary()
        if summary:
            text = json.dumps({"step": step, **summary}, indent=1)
            write_atomically(self.workdir / "diagnostics.json", text.encode())

    def preview(self, step: int, logger: RunLogger) -> None:
        """A sample grid at the run's one fixed noise."""
        samples = self.task.preview(self.experiment.preview_samples, self.seeded(2))
        if samples is not None and samples.ndim == 4:
            logger.image(step, "samples", make_grid(samples))

    def judge(self, step: int) -> dict[str, float]:
        """The evaluator's quick numbers where they are due."""
        evaluator, every = self.experiment.evaluator, self.experiment.evaluate_every
        if not (evaluator and every and step % every == 0):
            return {}
        found = evaluator.during(self.task, self.device, self.experiment.seed)
        return {f"evaluation/{name}": value for name, value in found.items()}

    def loop(self, done: int, logger: RunLogger) -> None:
        """Steps ``done`` + 1 to the last."""
        experiment, means, waited, marked = self.experiment, _Means(), 0.0, time.perf_counter()
        batches = self.batches(done) if self.task.needs_data else None
        for step in range(done + 1, experiment.steps + 1):
            before = time.perf_counter()
            batch = next(batches) if batches else None
            waited += time.perf_counter() - before
            means.add(self.task.step(batch, experiment.batch_size, self.seeded(3, step)))
            logger.advance(step)
            last = step == experiment.steps
            judged = self.judge(step)
            if last or judged or step % experiment.log_every == 0 or step % experiment.checkpoint_every == 0:
                metrics = means.read()
                self.check_finite(metrics, step)
                now = time.perf_counter()
                logger.log(step, metrics | judged | {"data/wait_fraction": waited / (now - marked)})
                waited, marked = 0.0, now
            if last or step % experiment.preview_every == 0:
                self.preview(step, logger)
            if last or step % experiment.checkpoint_every == 0:
                self.save(step)

    def check_finite(self, metrics: dict[str, float], step: int) -> None:
        """Ends the run before a checkpoint holds what a NaN or infinity has touched."""
        # Exponentials of l overflow where an estimator is very sure, and no weight learns from these two.
        told = [name for name in metrics if not name.startswith(("ratio/", "divergence/"))]
        bad = [name for name in told if not math.isfinite(metrics[name])]
        if bad:
            saved = checkpoints.steps(self.folder)
            kept = f"the checkpoint of step {saved[-1]} is intact" if saved else "no checkpoint was due yet"
            raise ValueError(
                f"{', '.join(bad)} became NaN or infinite at or shortly before step {step}; {kept}. Lower Adam.lr, "
                "clamp the weighting (Clamped.limit), or run with --precision=fp32; rerunning the command resumes"
            )

    def finish(self, logger: RunLogger) -> None:
        """Final weights and evaluation."""
        config = self.workdir / "config.gin"
        metadata = {"config": config.read_text()} if config.exists() else {}
        for name, module in self.task.weights().items():
            weight_files.save_weights(self.workdir / f"{name}.safetensors", module, metadata)
        if self.experiment.evaluator:
            logger.message("evaluating")
            stored = self.workdir / "before.json"
            before = json.loads(stored.read_text()) if stored.exists() else []
            document = self.experiment.evaluator.after(
                self.task, self.device, self.experiment.seed, before, self.workdir
            )
            write_atomically(self.workdir / "evaluation.json", json.dumps(document, indent=1).encode())


def train(experiment: Experiment, *, workdir: Path, device: str = "auto") -> Path:
    """Runs ``experiment`` to its last step, from its newest checkpoint if ``workdir`` has one.

    Args:
        experiment: what to run.
        workdir: folder of the run; see ``WORKSPACE.md`` for the files it leaves.
        device: "auto", "cpu", "cuda", "cuda:1", ...

    Returns:
        The path of ``report.html``.

    Raises:
        ValueError: with the remedy, for anything the user can mend; earlier checkpoints are intact.
    """
    run = _Run(experiment, Path(workdir), choose_device(device))
    run.workdir.mkdir(parents=True, exist_ok=True)
    picture = graph.to_svg(graph.describe(experiment), title=run.workdir.resolve().name)
    write_atomically(run.workdir / "graph.svg", picture.encode())
    messages: list[str] = []
    done = run.start(messages.append)
    with RunLogger(run.workdir, experiment.steps, resume_step=done, images_per_step=experiment.batch_size) as logger:
        for message in messages:
            logger.message(message)
        if done == 0:
            run.preview(0, logger)
        run.loop(done, logger)
        if done < experiment.steps or not (run.workdir / "evaluation.json").exists():
            run.finish(logger)
        report = write_report(run.workdir)
        logger.message(f"done: {report}")
    return report
