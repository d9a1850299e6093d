"""The checks of tools/doctor.py: one for each thing that a run will need.

Networks are built on the meta device, so that nothing takes memory. Of weight files only the headers are read: which
tensors there are, and their shapes.
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
from dataclasses import dataclass
from pathlib import Path

import torch

from ratiograph import config
from ratiograph.config import tree
from ratiograph.config.tree import Node
from ratiograph.core.contracts import Denoiser, RatioEstimator
from ratiograph.data.stream import SampleStream
from ratiograph.networks.weights.weight_files import locate_weights
from ratiograph.training import checkpoints
from ratiograph.training.devices import autocast_dtype, choose_device
from ratiograph.training.experiment import Experiment
from ratiograph.training.workdir import locked

__all__ = ["Finding", "examine", "findings"]

_COPIES = 4  # of a trained weight in a checkpoint: itself, its average, and Adam's two moments


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
) -> Iterator[Finding]:
    """What ``examine`` finds of the run that a configuration describes, after a finding about the configuration itself.

    Args:
        gin_files, bindings, overrides: as of ``config.parse``.
        workdir: folder of the run, which need not exist.
        device: as of ``train``.
    """
    try:
        cfg = config.parse(gin_files, bindings, overrides)
        with torch.device("meta"):
            experiment = config.build(cfg)
    except (ValueError, OSError) as error:
        yield Finding("configuration", False, str(error))
        return
    yield Finding("configuration", True, f"{', '.join(gin_files)}: {type(experiment.task).__name__}")
    yield from examine(experiment, workdir=workdir, device=device)


def examine(experiment: Experiment, *, workdir: Path, device: str = "auto") -> Iterator[Finding]:
    """Checks everything a run of ``experiment`` needs, one after another; raises nothing and leaves nothing behind.

    Args:
        experiment: built on the meta device.
        workdir: folder of the run, which need not exist.
        device: as of ``train``.
    """
    root = tree.describe(experiment)
    checks: list[tuple[str, Callable[[], str]]] = [
        ("environment", _environment),
        ("device", lambda: _device(device, experiment)),
    ]
    checks += [(f"weights of {where}", lambda name=name: _exists(name)) for where, name in _named_weights(root)]
    checks += [(f"fit of {where}", load) for where, load in _loads(experiment)]
    checks += [(f"warm start from {run}", lambda run=run: _warm_start(run)) for run in _warm_starts(root)]
    checks += [
        ("data", lambda: _data(experiment)),
        ("workdir", lambda: _workdir(workdir)),
        ("disk space", lambda: _space(experiment, workdir)),
    ]
    for subject, check in checks:
        try:
            with warnings.catch_warnings(action="ignore"):
                found, ok = check(), True
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            found, ok = str(error).strip().splitlines()[0], False
        yield Finding(subject, ok, found)


def _environment() -> str:
    return f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} processors"


def _device(name: str, experiment: Experiment) -> str:
    device = choose_device(name)
    precision = "bf16" if autocast_dtype(experiment.precision, device) else "fp32"
    if device.type != "cuda":
        return f"{device.type} in {precision}, {torch.get_num_threads()} threads; torch sees no GPU it should use"
    found = torch.cuda.get_device_properties(device)
    wanted = _resident_bytes(experiment)
    if wanted > found.total_memory:
        raise ValueError(
            f"{found.name} has {found.total_memory / 1e9:.1f} GB, and weights, gradients and moments alone take "
            f"{wanted / 1e9:.1f}: take a larger GPU, or train fewer weights"
        )
    if not bool(torch.ones(8, device=device).sum() == 8):
        raise ValueError(f"{found.name} adds wrongly: check its driver, or choose another --device")
    count = torch.cuda.device_count()
    nccl = f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if torch.distributed.is_nccl_available() else ""
    if count > 1 and not nccl:
        raise ValueError(f"{count} GPUs, but this torch has no NCCL: install a CUDA build of torch")
    return f"{count} x {found.name}, {found.total_memory / 1e9:.1f} GB, {precision}{nccl}"


def _resident_bytes(experiment: Experiment) -> int:
    """Bytes on the device at any batch size: weights, and for trained ones average, gradient and moments."""
    parameters = list(experiment.task.parameters())
    return sum(p.numel() * p.element_size() * (_COPIES + 1 if p.requires_grad else 1) for p in parameters)


# --- weights ----------------------------------------------------------------------------------------------------------


def _nodes(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    yield path or node.name, node
    for child in node.children:
        yield from _nodes(child, f"{path}.{child.name}" if path else child.name)


def _named_weights(root: Node) -> list[tuple[str, str]]:
    """(path of the first node that names it, name) of every weight file in the graph."""
    found: dict[str, str] = {}
    for path, node in _nodes(root):
        for parameter, value in node.params.items():
            if parameter.endswith("weights") and isinstance(value, str):
                found.setdefault(value, path)
    return [(path, name) for name, path in found.items()]


def _exists(name: str) -> str:
    if "://" in name:
        return f"{name}: fetched when the run starts, if this machine has no copy"
    path = locate_weights(name).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}: give the path of a file (--teacher for the teacher)")
    return f"{path}, {path.stat().st_size / 1e6:,.1f} MB" if path.is_file() else f"the folder {path}"


def _loads(experiment: Experiment) -> Iterator[tuple[str, Callable[[], str]]]:
    """A check for each module that loads weights: on the meta device only names and shapes are compared."""

    def load(module: Denoiser | RatioEstimator) -> str:
        module.load()
        return f"every tensor of {type(module).__name__} is there, with its shape"

    for path, module in experiment.task.named_modules():
        names = [getattr(module, name, None) for name in ("weights", "encoder_weights")]
        local = [name for name in names if isinstance(name, str) and "://" not in name]
        if isinstance(module, Denoiser | RatioEstimator) and local:
            yield path, lambda module=module: load(module)


def _warm_starts(root: Node) -> list[str]:
    return [str(node.params["run"]) for _, node in _nodes(root) if node.cls == "WarmStart"]


def _warm_start(run: str) -> str:
    found = checkpoints.steps(Path(run) / "checkpoints")
    if not found:
        raise ValueError(f"{run} holds no checkpoint: run what it is to start from first")
    return f"the checkpoint of step {found[-1]}"


# --- data and disk ----------------------------------------------------------------------------------------------------


def _data(experiment: Experiment) -> str:
    """Finds every shard and decodes one sample."""
    stream = experiment.data
    if stream is None:
        return "none is needed"
    if isinstance(stream, SampleStream):
        if "://" in stream.urls or stream.urls.startswith("pipe:"):
            return f"{stream.describe()}: fetched while training, not looked at"
        stream = copy.copy(stream)
        stream.shuffle_buffer, stream.workers, stream.prefetch = 0, 0, 1  # the first sample, and no more
    started = time.monotonic()
    batches = stream.batches(1, experiment.seed)
    batch = next(batches)
    batches.close()
    experiment.task.check_samples(batch)
    shape = "x".join(map(str, batch.images.shape[1:]))
    return f"{stream.describe()}; a sample {shape} after {time.monotonic() - started:.1f} s"


def _existing(path: Path) -> Path:
    """``path``, or the nearest folder above it that exists."""
    return next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.exists())


def _workdir(workdir: Path) -> str:
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
    with locked(workdir):
        found = checkpoints.latest(workdir / "checkpoints")
    return f"{workdir}, to go on from step {found[0]}" if found else f"{workdir}, to begin at step 0"


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
