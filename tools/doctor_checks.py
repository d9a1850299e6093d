"""The checks of tools/doctor.py: what a launch asks before its first step, asked one after another.

Networks are built on the meta device, so that nothing takes memory; their weights are read as a launch reads them, and
compared by names and shapes.
"""

from __future__ import annotations

import copy
import os
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from ratiograph import config
from ratiograph.config.locating import missing_files
from ratiograph.data.remote import is_remote
from ratiograph.data.stream import SampleStream
from ratiograph.training import checkpoints
from ratiograph.training.devices import autocast_dtype, choose_device
from ratiograph.training.encoder_check import check_encoders
from ratiograph.training.experiment import Experiment
from ratiograph.training.loggers import checked
from ratiograph.training.memory import available_memory
from ratiograph.training.memory_plan import memory_plan, shortage
from ratiograph.training.run_folder import check_folder
from ratiograph.training.workdir import locked

__all__ = ["Finding", "findings"]

_COPIES = 4  # of a trained weight in a checkpoint: itself, its average, and Adam's two moments
_LABELS = 64  # samples that are read at least, so that a label out of range shows


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Args:
        subject: what was checked.
        ok: whether a run would get past it.
        found: what is there; where not ``ok``, what would fail and the remedy.
    """

    subject: str
    ok: bool
    found: str


def findings(
    gin_files: Sequence[str],
    bindings: Sequence[str],
    overrides: Mapping[str, object],
    *,
    workdir: Path,
    device: str = "auto",
    allowed: Sequence[str] = (),
) -> Iterator[Finding]:
    """Checks everything that a run needs, one after another; raises nothing and leaves nothing behind.

    Weights and data are looked at where every file that the configuration names is there, as in a launch.

    Args:
        gin_files, bindings, overrides: as of `config.parse`.
        workdir: folder of the run, which need not exist.
        device: as of `trainer.train`.
        allowed: as of `run_folder.claimed`.
    """
    yield _environment()
    try:
        cfg = config.parse(gin_files, bindings, overrides)
        missing = missing_files(cfg)
    except Exception as error:
        yield _failure("configuration", error)
        return
    yield from (Finding("files", False, line) for line in missing)
    try:
        with torch.device("meta"):
            experiment = config.build(cfg)
    except Exception as error:
        if not missing:
            yield _failure("configuration", error)
        return
    yield Finding("configuration", True, f"{', '.join(gin_files)}: {type(experiment.task).__name__}")
    for subject, check in _checks(cfg, experiment, not missing, workdir, device, allowed):
        try:
            with warnings.catch_warnings(action="ignore"):
                yield Finding(subject, True, check())
        except Exception as error:
            yield _failure(subject, error)


def _failure(subject: str, error: Exception) -> Finding:
    """A finding in one line; the error's type is told where it is none that is meant for users."""
    line = " ".join(str(error).split())
    expected = isinstance(error, ValueError | OSError) and line
    return Finding(subject, False, line if expected else f"{type(error).__name__}: {line}")


def _checks(
    cfg: config.Config, experiment: Experiment, complete: bool, workdir: Path, device: str, allowed: Sequence[str]
) -> Iterator[tuple[str, Callable[[], str]]]:
    """(subject, check) in order; a check returns what it found, or raises what would end the run."""
    yield "device", lambda: _device(device, experiment)
    yield "memory", lambda: _memory(device, experiment)
    yield "loggers", lambda: ", ".join(type(each).__name__ for each in checked(experiment.loggers)) or "none"
    if complete:
        yield "weights", lambda: _weights(experiment)
        yield "data", lambda: _data(experiment)
    yield "workdir", lambda: _workdir(workdir, cfg, experiment.steps, allowed)
    yield "disk space", lambda: _space(experiment, workdir)


def _environment() -> Finding:
    found = f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} processors"
    return Finding("environment", True, found)


def _device(name: str, experiment: Experiment) -> str:
    device = choose_device(name)
    precision = "bf16" if autocast_dtype(experiment.precision, device) else "fp32"
    if device.type != "cuda":
        return f"{device.type} in {precision}, {torch.get_num_threads()} threads; torch sees no GPU it should use"
    found = torch.cuda.get_device_properties(device)
    if not bool(torch.ones(8, device=device).sum() == 8):
        raise ValueError(f"{found.name} adds wrongly: check its driver, or choose another --device")
    count = torch.cuda.device_count()
    nccl = f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if torch.distributed.is_nccl_available() else ""
    if count > 1 and not nccl:
        raise ValueError(f"{count} GPUs, but this torch has no NCCL: install a CUDA build of torch")
    return f"{count} x {found.name}, {found.total_memory / 1e9:.1f} GB, {precision}{nccl}"


def _memory(name: str, experiment: Experiment) -> str:
    """The plan of a launch on one device."""
    device, samples = choose_device(name), experiment.samples_each(1) // experiment.accumulation
    short = shortage(experiment.task, experiment.precision, device)
    if short:
        return short  # no failure: the run may be meant for another machine, and a launch warns only
    plan = memory_plan(experiment.task, experiment.precision)
    batch = ""
    if plan.activations:
        batch = f", {plan.held_by(samples, plan.precision) / 1e9:.2g} GB while {samples} samples pass the networks"
    held = f"{plan.held() / 1e9:.2g} GB of networks, gradients, optimisers and averages"
    return f"{held}{batch}; {available_memory(device):.1f} GB left"


# --- weights, data and disk -------------------------------------------------------------------------------------------


def _weights(experiment: Experiment) -> str:
    experiment.task.load()
    return "all that the networks start from can be read"


def _data(experiment: Experiment) -> str:
    """Finds every shard and decodes a first batch."""
    stream = experiment.data
    if stream is None:
        return "none is needed"
    warned = "; ".join(check_encoders(experiment))
    if isinstance(stream, SampleStream):
        if any(map(is_remote, stream.urls.split("::"))):
            return f"{stream.describe()}: fetched while training, not looked at"
        stream = copy.copy(stream)
        stream.shuffle_buffer, stream.workers, stream.prefetch = 0, 0, 1  # the first samples, and no more
    started, samples = time.monotonic(), max(experiment.batch_size, _LABELS)
    batches = stream.batches(samples, experiment.seed)
    batch = next(batches)
    batches.close()
    experiment.task.check_samples(batch)
    shape = "x".join(map(str, batch.images.shape[1:]))
    seconds = time.monotonic() - started
    return f"{warned and warned + '; '}{stream.describe()}; {samples} samples {shape} in {seconds:.1f} s"


def _existing(path: Path) -> Path:
    """``path``, or the nearest folder above it that exists."""
    return next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.exists())


def _workdir(workdir: Path, cfg: config.Config, steps: int, allowed: Sequence[str]) -> str:
    folder = _existing(workdir)
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose another --workdir")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}. Check its permissions, or choose another --workdir") from error
    if not workdir.is_dir():
        return f"{workdir} will be made"
    reached, changes = check_folder(workdir, cfg, allowed=allowed)
    with locked(workdir) if (workdir / ".lock").is_file() else nullcontext():  # none is left where there was none
        checkpoints.latest(workdir / "checkpoints")
    changed = f" with {len(changes)} changes" if changes else ""
    if reached == steps:
        return f"{workdir} holds this run, finished{changed}: the command makes its page anew and trains nothing"
    return f"{workdir}, to go on from step {reached}{changed}" if reached else f"{workdir}, to begin at step 0"


def _space(experiment: Experiment, workdir: Path) -> str:
    """Room for every checkpoint that is kept, the one in the making, and the final weights."""
    trained = sum(p.numel() * p.element_size() for p in experiment.task.parameters() if p.requires_grad)
    kept = experiment.steps // experiment.keep_every if experiment.keep_every else 0
    count = experiment.keep_last + 1 + kept + (experiment.best_metric is not None)
    wanted, free = _COPIES * trained * count + trained, shutil.disk_usage(_existing(workdir)).free
    needed = f"{count} checkpoints of {_COPIES * trained / 1e6:,.1f} MB"
    if wanted > free:
        raise ValueError(
            f"{needed} need {wanted / 1e9:.2f} GB, {free / 1e9:.2f} are free: free some, choose another --workdir, or "
            "raise Experiment.keep_every"
        )
    return f"{free / 1e9:,.1f} GB free, at most {needed}"
