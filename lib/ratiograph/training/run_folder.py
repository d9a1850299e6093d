"""Takes a folder for a run: no other run's results, and no stranger's files, are written over.

``history.jsonl`` has a line for each start of the run: the step that it went on from, the time, the versions, and which
bindings of the configuration were changed on request, with both values.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

import ratiograph
from ratiograph import config
from ratiograph.config.differences import Change
from ratiograph.core.files import Missing, remove_temporaries, write_atomically
from ratiograph.core.foreign import read_json, read_text
from ratiograph.training import checkpoints
from ratiograph.training.checkpoint_manager import config_digest
from ratiograph.training.logs import HISTORY, read_history
from ratiograph.training.workdir import locked

__all__ = ["check_folder", "claimed"]

WRITTEN = (
    *("config.gin", "graph.svg", "metrics.jsonl", HISTORY, "before.json", "diagnostics.json", "evaluation.json"),
    *("report.html", "student*.safetensors", "ratio.safetensors", "samples/step_*.png", "samples/teacher.png"),
)
"""Patterns of the files that a run writes and that somebody else's folder may hold."""


@contextmanager
def claimed(
    workdir: Path, cfg: config.Config, *, resume: bool = True, allowed: Sequence[str] = ()
) -> Iterator[Callable[[], None]]:
    """Holds ``workdir`` for a run of ``cfg``, which it writes there as config.gin; yields what `workdir.locked` does.

    Args:
        workdir: made if missing.
        cfg: the run's configuration.
        resume: whether the folder may hold results of the same run.
        allowed: bindings that may differ from those of the results: 'student/Adam.lr', 'Adam.lr' in any scope, or
            'student' and 'Adam' for all of a scope or component.

    Raises:
        ConfigError, ValueError: as `check_folder`; another process holds the folder, or it cannot be written.
    """
    _check_own(workdir)  # before the lock, which ends when its file is read and closed
    with locked(workdir) as check_held, _undone_without_checkpoint(workdir, check_held) as check_and_keep:
        remove_temporaries(workdir)
        reached, found = _check_run(workdir, cfg, resume, allowed)
        _note(workdir / HISTORY, reached, found)
        config.save(cfg, workdir / "config.gin")
        yield check_and_keep


@contextmanager
def _undone_without_checkpoint(workdir: Path, check_held: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Puts config.gin and history.jsonl back if the body ends with an error before it asks to save a checkpoint.

    Yields ``check_held``, which is called before each save. Without it a change that does not fit the checkpoint, and
    is refused when that is loaded, would stay in the folder.
    """
    paths = [path for path in (workdir / "config.gin", workdir / HISTORY) if path.is_file()]
    before, saved = {path: path.read_bytes() for path in paths if _results(workdir)}, []

    def check_and_keep() -> None:
        check_held()
        saved.append(True)

    try:
        yield check_and_keep
    except BaseException:
        for path, data in before.items() if not saved else ():
            write_atomically(path, data)
        raise


def check_folder(
    workdir: Path, cfg: config.Config, *, resume: bool = True, allowed: Sequence[str] = ()
) -> tuple[int, list[Change]]:
    """(step that a run of ``cfg`` goes on from, how its configuration differs); arguments as of `claimed`.

    Do not call it while this process holds the folder.

    Raises:
        ConfigError: the folder holds results of another run, of a longer one, or files that no run has written.
    """
    _check_own(workdir)
    return _check_run(workdir, cfg, resume, allowed)


def _check_run(workdir: Path, cfg: config.Config, resume: bool, allowed: Sequence[str]) -> tuple[int, list[Change]]:
    values = config.to_dict(cfg)
    reached = _check_results(workdir, values["Experiment.steps"], resume)
    found = _changes(cfg, workdir) if _results(workdir) else []
    for each in allowed:
        if not any(_covers(each, name) for name in (*values, *(change.name for change in found))):
            raise config.ConfigError(
                f"--allow_change={each}: neither this configuration nor the run's has such a binding"
            )
    refused = [change for change in found if not any(_covers(each, change.name) for each in allowed)]
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise config.ConfigError(
            f"{workdir / 'config.gin'}: the folder holds a run of another configuration: {refused[0]}{more}. Give "
            "another --workdir, delete the folder to start over, or go on with the change: "
            + " ".join(f"--allow_change={change.name}" for change in refused[:3])
        )
    return reached, found


def _note(path: Path, step: int, changes: Sequence[Change]) -> None:
    entry = {
        "step": step,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "ratiograph": ratiograph.__version__,
        "torch": torch.__version__,
        "changes": {change.name: [change.there, change.here] for change in changes},
    }
    lines = [json.dumps(each) + "\n" for each in (*read_history(path.parent), entry)]
    write_atomically(path, "".join(lines).encode())


def _covers(allowed: str, name: str) -> bool:
    """Whether ``allowed`` names the binding ``name``, whose scopes may be left out, or a beginning of it."""
    parts = name.split("/")
    ends = ["/".join(parts[k:]) for k in range(len(parts))]
    return any(end == allowed or end.startswith((f"{allowed}.", f"{allowed}/")) for end in ends)


def _results(workdir: Path) -> list[Path]:
    """Checkpoints and final weights."""
    return [*sorted(workdir.glob("checkpoints/*.pt")), *workdir.glob("*.safetensors")]


def _check_own(workdir: Path) -> None:
    """Raises a ConfigError if a run would write over a file that no run has written."""
    lock: object = None
    with suppress(Missing, ValueError):
        lock = read_json(workdir / ".lock")
    locked_once = isinstance(lock, dict) and {"pid", "host"} <= lock.keys()
    if locked_once or checkpoints.steps(workdir / "checkpoints") or read_history(workdir):
        return
    for strange in (path for pattern in WRITTEN for path in workdir.glob(pattern)):
        raise config.ConfigError(
            f"{strange} is there already, and {workdir} is no run's folder: move the file, or give another --workdir"
        )


def _check_results(workdir: Path, steps: int, resume: bool) -> int:
    """The step of the newest checkpoint, 0 without any; a ConfigError if the run may not go on from there."""
    results = _results(workdir)
    if results and not resume:
        raise config.ConfigError(
            f"--noresume: {workdir} already holds {results[0].relative_to(workdir)}. Give another --workdir, "
            "delete the folder, or drop --noresume to continue its run."
        )
    reached = max(checkpoints.steps(workdir / "checkpoints"), default=0)
    if reached > steps:
        raise config.ConfigError(
            f"{workdir} is at step {reached} already, beyond the {steps} asked for: ask for --steps={reached} or more, "
            "or give another --workdir."
        )
    return reached


def _changes(cfg: config.Config, workdir: Path) -> list[Change]:
    """Where ``cfg`` and the saved configuration differ; [] without a whole one, if the checkpoint is of ``cfg``.

    Raises:
        ConfigError: config.gin is lost or torn, and the checkpoint was made with another configuration.
    """
    saved = workdir / "config.gin"
    with suppress(Missing, ValueError):
        if read_text(saved).endswith("\n"):
            return config.changes(cfg, saved)
    found = checkpoints.latest(workdir / "checkpoints")
    ours = config_digest(config.text(cfg))
    if found and checkpoints.entry(found[1], "run", source=workdir / "checkpoints").get("config", ours) != ours:
        raise config.ConfigError(
            f"{saved} is lost or torn, and the checkpoint of step {found[0]} was made with another configuration than "
            "this one: repeat the command that began the run, with the same flags, or give another --workdir"
        )
    return []
