"""Loggers, which keep a run's metrics and pictures: its own files, TensorBoard, Weights & Biases, Trackio.

Notation: *values* are finite or infinite numbers or NaN under names ``<group>/<name>``, with ``seconds`` and ``images``
beside them as further axes; a *picture* is uint8 [H, W, 3].

Only the main process calls loggers, with numbers that have already left the device. A logger that fails does not end
the run: `run_logger.RunLogger` says so once and calls it again the next time. A service's package is imported when a
run starts to log; it is configured by its own environment variables, such as ``WANDB_MODE=offline``.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import secrets
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ratiograph.core.files import Missing, clear_storage_errors, write_atomically
from ratiograph.core.foreign import read_text
from ratiograph.training.logs import read_metrics

__all__ = ["Logger", "TensorBoard", "Trackio", "WeightsAndBiases"]


@dataclass(frozen=True)
class Start:
    """What a logger gets at its start: the run's folder, the steps done (0: a new run), the text of config.gin."""

    workdir: Path
    step: int = 0
    config: str = ""

    @property
    def title(self) -> str:
        """The folder's name."""
        return self.workdir.resolve().name


class Logger:
    """Base class; does nothing."""

    package = ""
    """The package that the logger needs, if it is an optional one."""

    def check(self) -> ModuleType | None:
        """Imports ``package``; called before anything is built.

        Raises:
            ValueError: it is not installed; says how to install it.
        """
        if not self.package:
            return None
        try:
            return importlib.import_module(self.package)
        except ImportError as error:
            message = f"{type(self).__name__} needs {self.package} ({error}): pip install {self.package}"
            raise ValueError(message) from error

    def start(self, run: Start) -> str:
        """Opens files or connections; returns a message that says where the run is logged, or ''.

        Raises:
            ValueError: the user must mend something. After any other error the run goes on without this logger.
        """
        return ""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records the values of one step. After a resume, steps that were logged before may come again."""

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Records a picture; ``name`` consists of letters, digits, ``_`` and ``-``."""

    def close(self) -> None:
        """Sends what is left and closes everything."""


class RunFiles(Logger):
    """``metrics.jsonl``, one JSON object for each logged step, and pictures as ``<name>/step_<8 digits>.png``.

    Every run writes these: reports read them, and a resumed run reads its training time so far from them.
    """

    last: dict[str, Any] | None = None
    """The last line from before a resume, None for a new run; exists after ``start``."""

    def start(self, run):
        self.workdir, self.path = run.workdir, run.workdir / "metrics.jsonl"
        with clear_storage_errors(run.workdir):
            run.workdir.mkdir(parents=True, exist_ok=True)
            kept = self._drop_after(run.step)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
            self._end = self._file.seek(0, os.SEEK_END)
        self.last = kept[-1] if kept else None
        return ""

    def _drop_after(self, step: int) -> list[dict[str, Any]]:
        """Drops the lines after ``step``, and all lines for a new run; returns the others, one for each step."""
        by_step: dict[int, dict[str, Any]] = {}
        for record in read_metrics(self.path) if step else []:
            if record["step"] <= step:
                by_step.setdefault(record["step"], record)
        kept = [by_step[logged] for logged in sorted(by_step)]
        if self.path.exists():
            write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        return kept

    def scalars(self, step, values):
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({"step": step, **finite}).encode() + b"\n"
        with clear_storage_errors(self.path):
            try:
                if self._file.write(line) != len(line):
                    raise OSError("only part of a line was written")
            except OSError:
                with suppress(OSError):  # no torn line before the next one
                    self._file.truncate(self._end)
                raise
        self._end += len(line)

    def image(self, step, name, picture):
        from PIL import Image

        path = self.workdir / name / f"step_{step:08d}.png"
        write_atomically(path, lambda file: Image.fromarray(picture).save(file, format="PNG"))

    def close(self):
        self._file.close()


class TensorBoard(Logger):
    """Event files in ``WORKDIR/tensorboard``: ``tensorboard --logdir runs`` shows all runs below ``runs``."""

    def start(self, run):
        from torch.utils.tensorboard import SummaryWriter

        self._hook, threading.excepthook = threading.excepthook, self._thread_failed
        purge = run.step + 1 if run.step else None
        self._board = SummaryWriter(str(run.workdir / "tensorboard"), purge_step=purge)
        if run.config and not run.step:
            self._board.add_text("config.gin", "".join(f"    {line}\n" for line in run.config.splitlines()))
        return ""

    def _thread_failed(self, failure):
        """Keeps TensorBoard's own thread from printing a traceback: the next call here raises the same error."""
        if not type(failure.thread).__module__.startswith("tensorboard."):
            self._hook(failure)

    def scalars(self, step, values):
        for name, value in values.items():
            if "/" in name:  # the axes are TensorBoard's own
                self._board.add_scalar(name, value, step)

    def image(self, step, name, picture):
        self._board.add_image(name, picture, step, dataformats="HWC")

    def close(self):
        try:
            self._board.close()
        finally:
            threading.excepthook = self._hook


class WeightsAndBiases(Logger):
    """A run of Weights & Biases, whose files lie in ``WORKDIR/wandb``.

    The run's id is kept in ``WORKDIR/wandb.id``, so that a resumed run continues the same one. Charts are over the
    training step: steps after the checkpoint that a run resumes from are logged twice, with the same values.
    ``WANDB_MODE=offline`` needs no network; ``wandb sync WORKDIR/wandb/offline-run-*`` sends the run later.

    Args:
        project: project of the run.
        entity: user or team; None is the login's own.
        name: name of the run; None is the name of its folder.
        group: name of a group of runs that are shown together.
        tags: words to find the run by.
    """

    package = "wandb"
    harmless = frozenset({"project", "entity", "name", "group", "tags"})

    def __init__(
        self,
        *,
        project: str = "ratiograph",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
    ):
        self.project, self.entity, self.name, self.group, self.tags = project, entity, name, group, tuple(tags)

    def start(self, run):
        self._wandb = self.check()
        try:
            self._run = self._wandb.init(
                project=self.project,
                entity=self.entity,
                name=self.name or run.title,
                group=self.group,
                tags=list(self.tags) or None,
                id=kept_id(run.workdir / "wandb.id"),
                resume="allow",
                allow_val_change=True,  # --steps of a resumed run may have grown
                dir=str(run.workdir),
                config=bindings(run.config),
                settings=self._wandb.Settings(console="off", silent=True),
            )
        except self._wandb.errors.UsageError as error:
            raise ValueError(
                f"WeightsAndBiases: {error}. Log in once by 'wandb login', or set WANDB_MODE=offline"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if self._run.offline:
            return f"Weights & Biases, offline: wandb sync {Path(self._run.dir).parent} sends the run"
        return f"Weights & Biases: {self._run.url}"

    def scalars(self, step, values):
        self._run.log({"step": step, **values})

    def image(self, step, name, picture):
        self._run.log({"step": step, name: self._wandb.Image(picture)})

    def close(self):
        self._run.finish()


class Trackio(Logger):
    """A run of Trackio, local unless ``TRACKIO_SPACE_ID`` says otherwise; ``trackio show`` draws it.

    Its name ends in an id that is kept in ``WORKDIR/trackio.id``, so that a resumed run continues the same one.

    Args:
        project: project of the run.
        name: name of the run, before its id; None is the name of its folder.
        group: name of a group of runs that are shown together.
    """

    package = "trackio"
    harmless = frozenset({"project", "name", "group"})

    def __init__(self, *, project: str = "ratiograph", name: str | None = None, group: str | None = None):
        self.project, self.name, self.group = project, name, group

    def start(self, run):
        self._trackio = self.check()
        self._run = self._trackio.init(
            project=self.project,
            name=f"{self.name or run.title}-{kept_id(run.workdir / 'trackio.id')}",
            group=self.group,
            config=bindings(run.config),
            resume="allow",
            embed=False,
        )
        return f"Trackio: {self._run.name} in {self.project}"

    def scalars(self, step, values):
        self._run.log(dict(values), step=step)

    def image(self, step, name, picture):
        self._run.log({name: self._trackio.Image(picture)}, step=step)

    def close(self):
        self._run.finish()


def checked(loggers: Sequence[Logger] | None) -> tuple[Logger, ...]:
    """The loggers of a run, TensorBoard for None, each after its ``check``."""
    found = (TensorBoard(),) if loggers is None else tuple(loggers)
    for logger in found:
        logger.check()
    return found


def kept_id(path: Path) -> str:
    """The id in the file ``path``; where there is none, a new one of 8 hexadecimal digits, which is written there."""
    with suppress(Missing, ValueError):
        found = read_text(path).strip()
        if re.fullmatch(r"\w+", found):
            return found
    new = secrets.token_hex(4)  # from the operating system, which leaves the run's random numbers as they are
    write_atomically(path, f"{new}\n".encode())
    return new


def bindings(config: str) -> dict[str, str]:
    """The bindings of a saved config.gin: values, as they are written there, by name."""
    found: dict[str, str] = {}
    for line in config.splitlines():
        named = re.match(r"([A-Za-z_][\w./]*) = (.*)", line)
        if named:
            found[named[1]] = named[2]
        elif line and found:  # a further line of a list or dict
            found[next(reversed(found))] += line.strip()
    return found
