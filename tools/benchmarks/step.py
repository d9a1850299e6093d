"""A training step against its floor: the bare passes of networks that its graph cannot do without.

Notation: B samples a step; F one pass forward; the *floor* is the sum of the seconds of every pass below, each timed
alone. A pass is written with the network's own ``encode`` and ``decode`` on random numbers, without the framework:
no noising, no weights, no loss, no optimiser, no metrics.

- student: F and backward to its weights; for each further update of a critic on fresh samples, F without a
  graph;
- teacher: F without a graph; its encoder with a graph to x_t where a ratio on its features is differentiated;
- student score: F without a graph; for each of its updates, F and backward to its weights, and through its encoder once
  more where a ratio shares that pass;
- ratio: F with a graph to x_t where it is differentiated; for each of its updates, F and backward on 2 B samples, or on
  the B real ones where it shares the student score's pass; penalised, on B and B, the real ones through their gradient.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks import timing
from benchmarks.inputs import made_up_batch, randomised
from ratiograph import config
from ratiograph.algebra.ratio_losses import RatioLoss
from ratiograph.core.contracts import Denoiser, Evaluation, Needs
from ratiograph.core.types import Noisy
from ratiograph.networks.checkpointing import Checkpointing
from ratiograph.tasks.distillation import Distillation
from ratiograph.training import devices
from ratiograph.training.memory import peak_memory, require_memory
from ratiograph.training.memory_plan import memory_plan

__all__ = ["StepBench", "bench_precisions", "bench_step", "kind_of", "prepared"]

Pass = Callable[[], None]
PATIENCE = 150.0
"""Seconds from which on a step is taken only once, and without its floor."""


class StepBench:
    """One step of a task, and each of the passes that make up its floor.

    Args:
        task: a prepared distillation.
        batch_size: B.
        device: where it lies.
    """

    def __init__(self, task: Distillation, batch_size: int, device: torch.device):
        self.task, self.batch_size = task, batch_size
        self.generator = torch.Generator(device).manual_seed(0)
        self.batch = made_up_batch(self.network, batch_size, torch.Generator().manual_seed(0)).to(device)
        self.condition, self.field = self.batch.condition, torch.randn_like(self.batch.images)

    @property
    def network(self) -> nn.Module:
        """The student's."""
        return self.task.student.denoiser.network

    def step(self) -> None:
        """One training step."""
        self.task.step(self.batch, self.batch_size, self.generator)

    @property
    def has_unit(self) -> bool:
        """Whether the student's network can run in float32: not where its frozen base is held in bf16."""
        return all(parameter.dtype == torch.float32 for parameter in self.network.parameters())

    def unit(self) -> None:
        """Forward and backward of the student's network in plain eager float32, nothing computed again."""
        network = self.network
        policy = getattr(network, "checkpointing", None)
        if policy is not None:
            network.checkpointing = Checkpointing()
        output = network.decode(network.encode(self.field, self.field.flatten(1)[:, 0], self.condition))
        output.square().mean().backward()
        self._clear(network)
        if policy is not None:
            network.checkpointing = policy

    def floor(self) -> dict[str, tuple[int, Pass]]:
        """How often each bare pass is needed in a step, and the pass, by name."""
        return dict(self._passes())

    def _passes(self) -> Iterator[tuple[str, tuple[int, Pass]]]:
        task, needs = self.task, self.task.objective.needs
        updates = max(task.student_score_updates * (task.student_score is not None), self._ratio_updates, 1)
        yield "student, forward and backward", (1, self._student)
        if updates > 1 and task.fresh_samples:
            yield "student, forward", (updates - 1, torch.no_grad()(lambda: task.student(self.field, self.condition)))
        required = task.objective.requires
        if "teacher" in required:
            graph = needs.ratio_gradient and task.ratio.on_teacher
            yield "teacher, forward", (1, self._frozen(task.teacher, graph or needs.teacher_gradient))
        if "student_score" in required:
            graph = needs.ratio_gradient and task.ratio is not None and task.ratio.on_student_score
            yield "student score, forward", (1, self._frozen(task.student_score, graph))
        if task.student_score is not None:
            yield "student score, forward and backward", (task.student_score_updates, self._score_update)
        if self._ratio_updates:
            own = not (task.ratio.on_teacher or task.ratio.on_student_score)
            if own and "ratio" in required:
                yield "ratio, forward and backward to x_t", (1, self._ratio_gradient)
            losses = [task.ratio_loss.at(update) for update in range(self._ratio_updates)]
            penalised = [loss for loss in losses if loss.needs_gradient]
            plain = [loss for loss in losses if not loss.needs_gradient]
            if penalised:
                yield "ratio, penalised", (len(penalised), partial(self._ratio_update, penalised[0]))
            if plain:
                yield "ratio, forward and backward", (len(plain), partial(self._ratio_update, plain[0]))

    @property
    def _ratio_updates(self) -> int:
        ratio = self.task.ratio
        return self.task.ratio_updates if ratio is not None and ratio.learns else 0

    def _noisy(self, samples: Tensor, gradient: bool) -> Noisy:
        sigma = torch.ones(len(samples), device=samples.device)
        return Noisy(samples.detach().clone().requires_grad_(gradient), sigma, torch.ones_like(sigma), sigma)

    def _clear(self, module: nn.Module) -> None:
        for parameter in module.parameters():
            parameter.grad = None

    def _student(self) -> None:
        self.task.student(self.field, self.condition).backward(self.field)
        self._clear(self.task.student)

    def _frozen(self, network: Denoiser, graph: bool) -> Pass:
        """Features and output; with a graph from the features to x_t where a term differentiates them."""

        def run() -> None:
            network.eval()
            noisy = self._noisy(self.field, graph)
            with torch.set_grad_enabled(graph):
                encoding = network.encode(noisy, self.condition)
            with torch.no_grad():
                network.decode(encoding.detach())
            if graph:
                total = sum(feature.float().sum() for feature in self._read(encoding.features))
                torch.autograd.grad(total, noisy.x_t)

        return run

    def _read(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        """The feature maps that the ratio reads."""
        return [features[k] for k in getattr(self.task.ratio, "feature_maps", (-1,))]  # SiDA's mean: the last

    def _score_update(self) -> None:
        network = self.task.student_score.train()
        encoding = network.encode(self._noisy(self.field, False), self.condition)
        network.decode(encoding).backward(self.field, retain_graph=self._shared)
        if self._shared:
            sum(feature.float().sum() for feature in self._read(encoding.features)).backward()
        self._clear(network)

    @property
    def _shared(self) -> bool:
        """Whether the ratio reads the student score's own update, and so goes back through its encoder once more."""
        ratio = self.task.ratio
        return ratio is not None and ratio.on_student_score and self.task.ratio_times is None

    def _evaluation(self, samples: Tensor, needs: Needs) -> Evaluation:
        condition = self.condition if len(samples) == self.batch_size else self.condition.join(self.condition)
        return Evaluation(self._noisy(samples, False), samples, condition, self.task.nodes, needs)

    def _ratio_gradient(self) -> None:
        self.task.ratio.eval()
        evaluation = self._evaluation(self.field, Needs(ratio_gradient=True))
        torch.autograd.grad(evaluation.log_ratio_output.sum(), evaluation.noisy.x_t)

    def _ratio_update(self, ratio_loss: RatioLoss) -> None:
        task = self.task
        task.ratio.train()
        if ratio_loss.needs_gradient:
            real = self._evaluation(self.field, Needs(training=True, ratio_gradient=True, curvature=True))
            student = self._evaluation(self.field, Needs(training=True)).log_ratio_output
            loss = ratio_loss(real.log_ratio_output, student, real.noisy.x_t)
        else:
            samples = self.field if self._shared else torch.cat([self.field, self.field])
            loss = self._evaluation(samples, Needs(training=True)).log_ratio_output.sum()
        loss.backward(inputs=task.critics.ratio_parameters)
        for parameter in task.critics.ratio_parameters:
            parameter.grad = None


class _Hollow(TorchFunctionMode):
    """No random numbers for tensors without contents: on the meta device they import torch's compiler, 0.2 GB."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return (torch.empty if function is torch.randn else function)(*args, **(kwargs or {}))


def prepared(
    gin_file: Sequence[str], gin_param: Sequence[str], precision: str, batch_size: int, device: torch.device
) -> StepBench:
    """The bench of the distillation that gin files describe, on random weights.

    Args:
        gin_file: files, the first of which is the run.
        gin_param: further lines.
        precision: "auto", "fp32" or "bf16".
        batch_size: samples a step.
        device: where.

    Raises:
        ValueError: no file is named, it is not a distillation, or its step would not fit.
    """
    if not gin_file:
        raise ValueError("say which step to time: --gin_file=gin/papers/score_free/cifar10_dijs.gin")
    parsed = config.parse(gin_file, gin_param, {})
    with torch.device("meta"), _Hollow():
        plan = memory_plan(config.build(parsed).task, precision)
    require_memory(plan.held() / 1e9, device, "name a smaller network with --gin_param, or take a larger machine")
    torch.manual_seed(0)
    task = config.build(parsed).task
    if not isinstance(task, Distillation):
        raise ValueError(f"{gin_file[-1]} trains a {type(task).__name__}: give the gin file of a distillation")
    task.critic_steps = 0  # a step of the student too
    randomised(task).prepare(device, devices.autocast_dtype(precision, device))
    return StepBench(task, batch_size, device)


def kind_of(precision: str, device: torch.device) -> str:
    """What ``precision`` stands for on ``device``: "fp32" or "bf16"."""
    return "bf16" if devices.autocast_dtype(precision, device) else "fp32"


def bench_step(
    gin_file: Sequence[str],
    gin_param: Sequence[str],
    *,
    precision: str,
    batch_size: int,
    rounds: int,
    device: torch.device,
) -> dict[str, object]:
    """The record of a training step, its floor, and the step in units of a plain pass; arguments as of ``prepared``.

    With one round only steps are warmed up. A step of more than 150 seconds is taken once; its floor, units and
    operations are None then. The units are None too for adapters on a base in bf16.

    Raises:
        ValueError: as ``prepared``.
    """
    bench = prepared(gin_file, gin_param, precision, batch_size, device)
    begun = time.perf_counter()
    bench.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begun
    found = _step_alone(seconds, device) if seconds > PATIENCE else _step_and_floor(bench, rounds, device)
    return {
        "bench": "step",
        **timing.request(gin_file, gin_param, batch_size=batch_size, rounds=rounds),
        "precision": kind_of(precision, device),
        "images_per_second": batch_size / found["seconds"],
        **found,
    }


def _step_alone(seconds: float, device: torch.device) -> dict[str, object]:
    lacking = dict.fromkeys(("floor", "step_over_floor", "units", "flops", "tflops"))
    rounds = {"step": [seconds]}
    peak = peak_memory(device)
    return {"seconds": seconds, **lacking, "passes": [], "rounds_seconds": rounds, "peak_memory_gb": peak}


def _step_and_floor(bench: StepBench, rounds: int, device: torch.device) -> dict[str, object]:
    bench.step()
    peak = peak_memory(device)  # of steps alone
    flops = timing.count_flops(bench.step)
    floor = bench.floor()
    variants = {"step": bench.step, **{name: run for name, (_, run) in floor.items()}}
    if bench.has_unit:
        variants["unit"] = bench.unit
    if rounds == 1:
        variants = {name: _warm(work) for name, work in variants.items()}
    rounds_seconds = timing.in_turn(variants, rounds, device)
    seconds = timing.medians(rounds_seconds)
    passes = [{"pass": name, "times": times, "seconds": seconds[name]} for name, (times, _) in floor.items()]
    least = sum(row["times"] * row["seconds"] for row in passes)
    return {
        "seconds": seconds["step"],
        "floor": least,
        "step_over_floor": seconds["step"] / least,
        "units": seconds["step"] / seconds["unit"] if bench.has_unit else None,
        "flops": flops,
        "tflops": flops / seconds["step"] / 1e12,
        "passes": passes,
        "rounds_seconds": rounds_seconds,
        "peak_memory_gb": peak,
    }


def _warm(work: Pass) -> Pass:
    """``work`` without its first call, which belongs to the round that is not counted."""
    calls = itertools.count()
    return lambda: work() if next(calls) else None


def bench_precisions(
    gin_file: Sequence[str], gin_param: Sequence[str], *, batch_size: int, rounds: int, device: torch.device
) -> dict[str, object]:
    """The record of the same step in float32 and in bf16, in turn; arguments as of ``prepared``.

    Raises:
        ValueError: as ``prepared``.
    """
    kinds = ("fp32", "bf16")
    benches = {kind: prepared(gin_file, gin_param, kind, batch_size, device) for kind in kinds}
    rounds_seconds = timing.in_turn({kind: bench.step for kind, bench in benches.items()}, rounds, device)
    seconds = timing.medians(rounds_seconds)
    rows = [{"variant": kind, "seconds": seconds[kind], "faster": seconds["fp32"] / seconds[kind]} for kind in kinds]
    request = timing.request(gin_file, gin_param, batch_size=batch_size, rounds=rounds)
    return {"bench": "precisions", **request, "rows": rows, "rounds_seconds": rounds_seconds}
