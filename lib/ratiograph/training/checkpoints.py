"""Checkpoint files. A crash or an interruption while one is written leaves the earlier ones intact.

A *state* is a nested dict, list or tuple of tensors, numbers, strings and None:
``torch.load(weights_only=True)`` reads it back, nothing in it can run code. ``folder/step_00000400.pt`` holds
the state after 400 steps, and beside it ``step_00000400.pt.sha256`` the digest of its bytes in the format of
``sha256sum -c``. Final weights of a run are written by `weight_files` instead.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ratiograph.core.files import clear_storage_errors, remove_temporaries, write_atomically
from ratiograph.networks.weights.weight_files import differences, listed

__all__ = ["check_plain", "entry", "latest", "load_strict", "save", "steps"]

_NAME = re.compile(r"step_(\d+)\.pt")
_SIDECAR_NAME = re.compile(r"step_(\d+)\.pt\.sha256")
_SCALARS = (bool, int, float, str, bytes, type(None))


class _HashingFile:
    """Writes to ``file`` and hashes the bytes on their way, so that the digest needs no second reading.

    torch reports a failed write as a RuntimeError; ``error`` keeps the OSError that caused it.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.sha256, self.error = file, hashlib.sha256(), None

    def write(self, data) -> int:
        self.sha256.update(data)
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        return memoryview(data).nbytes

    def flush(self) -> None:
        self.file.flush()


def _path(folder: Path, step: int) -> Path:
    return Path(folder) / f"step_{step:08d}.pt"


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def check_plain(value: Any, where: str) -> None:
    """Raises ValueError for a value that ``weights_only=True`` would refuse to read back."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            check_plain(key, f"a key of {where}")
            check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            check_plain(item, f"{where}[{index}]")
    elif not (isinstance(value, Tensor) or type(value) in _SCALARS):
        raise ValueError(
            f"{where} is a {type(value).__module__}.{type(value).__name__}; a checkpoint holds tensors, "
            "numbers, strings, None and containers of these: convert it before saving"
        )


def _numbers(folder: Path, pattern: re.Pattern) -> list[int]:
    """The steps in the names of ``folder`` that match ``pattern``, ascending; [] without a folder."""
    names = os.listdir(folder) if Path(folder).is_dir() else ()
    return sorted(int(match[1]) for match in map(pattern.fullmatch, names) if match)


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in ``folder``, ascending, damaged ones included; [] without a folder."""
    return _numbers(folder, _NAME)


def save(
    folder: Path, step: int, state: Mapping[str, Any], keep: int = 2, also: Callable[[int], bool] = lambda step: False
) -> Path:
    """Writes the checkpoint of ``step`` atomically, then removes all but the ``keep`` last.

    Args:
        folder: where checkpoints lie; made if missing.
        step: optimisation steps done, >= 0.
        state: nested containers of tensors (any device) and plain values.
        keep: checkpoints to keep, this one included, >= 1; with 2 a damaged one still has a predecessor.
        also: says whether to keep the older checkpoint of a step too.

    Returns:
        The path written.

    Raises:
        ValueError: the state holds something else than plain values, or the file cannot be written (disk
            full, read-only); earlier checkpoints are intact and nothing half-written is left.
    """
    assert keep >= 1, "keep=0 would remove the checkpoint just written"
    assert step >= 0, step
    folder, path = Path(folder), _path(folder, step)
    check_plain(state, "state")
    remove_temporaries(folder)  # what an earlier process left when it was killed while saving

    def write(file: BinaryIO) -> None:
        hashing = _HashingFile(file)
        try:
            torch.save(state, hashing)
        except RuntimeError as error:
            raise (hashing.error or error) from None
        # The digest is written before the checkpoint: a crash between the two leaves a digest without a file, which
        # `latest` warns about, and never a file without a digest.
        write_atomically(_sidecar(path), f"{hashing.sha256.hexdigest()}  {path.name}\n".encode())

    write_atomically(path, write)
    passed = [s for s in steps(folder) if s <= step]
    kept = {s for s in passed[:-keep] if also(s)}.union(passed[-keep:])
    # A digest may have been left without its checkpoint.
    for old in {*passed, *(s for s in _numbers(folder, _SIDECAR_NAME) if s <= step)} - kept:
        with clear_storage_errors(_path(folder, old)):
            _path(folder, old).unlink(missing_ok=True)
            _sidecar(_path(folder, old)).unlink(missing_ok=True)
    return path


def _read(path: Path) -> dict[str, Any]:
    """The state in ``path``; ValueError with the reason if the file is damaged."""
    sidecar = _sidecar(path)
    if sidecar.exists():
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sidecar.read_text(errors="replace").split()[:1] != [digest]:
            raise ValueError(f"its bytes do not have the digest in {sidecar.name}")
    else:
        warnings.warn(f"{path} has no {sidecar.name} beside it: read without verification", stacklevel=4)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, EOFError, UnpicklingError, ... for damaged files
        raise ValueError(str(error).strip().splitlines()[0] if str(error).strip() else repr(error)) from error


def latest(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """The newest undamaged checkpoint.

    Args:
        folder: where checkpoints lie; it need not exist.

    Returns:
        ``(step, state)`` with every tensor on the CPU, or None if there are no checkpoints. For a damaged or missing
        one there is a warning, and the one before it is used.

    Raises:
        ValueError: there are checkpoints and every one is damaged.
    """
    damaged, found = [], steps(folder)
    for step in _numbers(folder, _SIDECAR_NAME):
        if step > max(found, default=-1):
            warnings.warn(
                f"checkpoint {_path(folder, step)} is missing, its digest is there: it was deleted, or the run was "
                "ended while writing it; trying the one before it",
                stacklevel=2,
            )
    for step in reversed(found):
        path = _path(folder, step)
        try:
            state = _read(path)
        except (ValueError, OSError) as error:
            damaged.append(f"{path.name}: {error}")
            warnings.warn(f"checkpoint {path} is damaged ({error}); trying the one before it", stacklevel=2)
        else:
            return step, state
    if damaged:
        raise ValueError(
            f"every checkpoint in {folder} is damaged ({'; '.join(damaged)}). Remove the folder to start "
            "this run from step 0, or copy an undamaged step_*.pt with its .sha256 into it"
        )
    return None


def entry(state: object, *names: str, source: Path | str) -> Mapping[str, Any]:
    """``state[name][name] ...`` of a state that was read from ``source``.

    Raises:
        ValueError: there is none, or it is no mapping: the state of another version, or of another program.
    """
    found = state
    for depth, name in enumerate(names, 1):
        found = found.get(name) if isinstance(found, Mapping) else None
        if not isinstance(found, Mapping):
            raise ValueError(
                f"{source} holds a checkpoint of another version of ratiograph: it has no {'.'.join(names[:depth])}. "
                "Use the version that made it, or give this run another --workdir"
            )
    return found


def load_strict(
    modules: Mapping[str, nn.Module],
    state: Mapping[str, Mapping[str, Tensor]],
    *,
    source: Path | str = "checkpoint",
) -> None:
    """Loads the weights of several nodes: all of them, or none if one does not fit.

    Args:
        modules: the graph's nodes by name, e.g. ``{"student": ..., "ratio": ...}``.
        state: for each of the same names the node's ``state_dict()``.
        source: file the state came from; named in the error.

    Raises:
        ValueError: a node or tensor is missing, left over or of another shape: the checkpoint is of another graph. The
            message names the first differences; no module has been changed.
    """
    found = [f"node {name} is not in the file" for name in modules if name not in state]
    found += [f"node {name} is in the file and not here" for name in state if name not in modules]
    for name in (name for name in modules if name in state):
        found += differences(f"{name}.", modules[name].state_dict(), state[name])
    if found:
        raise ValueError(
            f"{source} is a checkpoint of another graph: {listed(found)}. Run the "
            "config.gin that made it, or give this run another --workdir"
        )
    for name, module in modules.items():
        module.load_state_dict(state[name], strict=True)
