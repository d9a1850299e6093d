"""Where a run's numbers and pictures go: its own files, TensorBoard, Weights & Biases, Trackio.

Notation: *values* are finite or infinite numbers or NaN under names ``<group>/<name>``, with ``seconds`` and ``images``
beside them as further axes; a *picture* is uint8 [H, W, 3].

A logger is called by the main process alone, with numbers that have been read off the device already. One that fails
does not end the run: `run_logger.RunLogger` says so once and asks it again the next time. A service's package is
imported when a run starts to log; its settings are its own environment variables, such as ``WANDB_MODE=offline``.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ratiograph.core.files import clear_storage_errors, write_atomically
from ratiograph.training.logs import read_metrics

__all__ = ["Logger", "TensorBoard", "Trackio", "WeightsAndBiases"]


@dataclass(frozen=True)
class Start:
    """What a logger is told of the run: its folder, the step it goes on from (0: a new run), its config.gin."""

    workdir: Path
    step: int = 0
    config: str = ""

    @property
    def title(self) -> str:
        """The folder's name."""
        return self.workdir.resolve().name


class Logger:
    """Base class; does nothing."""

    def check(self) -> None:
        """Called before anything is built.

        Raises:
            ValueError: a package is missing; says what to install.
        """

    def start(self, run: Start) -> str:
        """Opens what is written to; returns a line for people on where it is, or ''.

        Raises:
            ValueError: what only the user can mend. Any other error is taken for one that passes.
        """
        return ""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Takes down the values of one step. After a resume, steps that were logged before may come again."""

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Takes down a picture; ``name`` consists of letters, digits, ``_`` and ``-``."""

    def close(self) -> None:
        """Sends and closes what is open."""


class RunFiles(Logger):
    """``metrics.jsonl``, an object a logged step, and pictures as ``<name>/step_<8 digits>.png``.

    Every run has it: reports are made from these files, and a resumed run counts its time from them.
    """

    last: dict[str, Any] | None = None
    """The last line that a resumed run keeps; exists after ``start``."""

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
        """Keeps the lines up to ``step``, one a step, and returns them; a new run keeps none."""
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

        purge = run.step + 1 if run.step else None
        self._board = SummaryWriter(str(run.workdir / "tensorboard"), purge_step=purge)
        if run.config and not run.step:
            self._board.add_text("config.gin", "".join(f"    {line}\n" for line in run.config.splitlines()))
        return ""

    def scalars(self, step, values):
        for name, value in values.items():
            if "/" in name:  # the axes are TensorBoard's own
                self._board.add_scalar(name, value, step)

    def image(self, step, name, picture):
        self._board.add_image(name, picture, step, dataformats="HWC")

    def close(self):
        self._board.close()


class WeightsAndBiases(Logger):
    """A run of Weights & Biases, whose files lie in ``WORKDIR/wandb``.

    The run's id is kept in ``WORKDIR/wandb.id``, so that a resumed run goes on in the same one. Charts are over the
    training step: what a run that ended between two checkpoints had logged further comes again with the same values.
    ``WANDB_MODE=offline`` needs no network; ``wandb sync WORKDIR/wandb/offline-run-*`` sends it later.

    Args:
        project: that the run is listed in.
        entity: user or team; None takes the login's own.
        name: of the run; None takes the name of its folder.
        group: of runs that are shown together.
        tags: words to find the run by.
    """

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

    def check(self):
        needs("wandb", type(self).__name__)

    def start(self, run):
        self._wandb = needs("wandb", type(self).__name__)
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

    Its name ends in an id that is kept in ``WORKDIR/trackio.id``, so that a resumed run goes on in the same one.

    Args:
        project: that the run is listed in.
        name: of the run, before its id; None takes the name of its folder.
        group: of runs that are shown together.
    """

    def __init__(self, *, project: str = "ratiograph", name: str | None = None, group: str | None = None):
        self.project, self.name, self.group = project, name, group

    def check(self):
        needs("trackio", type(self).__name__)

    def start(self, run):
        self._trackio = needs("trackio", type(self).__name__)
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


def needs(package: str, component: str) -> ModuleType:
    """The package, imported.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{component} needs {package} ({error}): pip install {package}") from error


def kept_id(path: Path) -> str:
    """The id in the file ``path``; a new one of 8 letters and digits is written where there is none."""
    with suppress(FileNotFoundError):
        found = path.read_text(encoding="utf-8").strip()
        if re.fullmatch(r"\w+", found):
            return found
    made = secrets.token_hex(4)  # of the operating system: the run's own random numbers stay as they are
    write_atomically(path, f"{made}\n".encode())
    return made


def bindings(config: str) -> dict[str, str]:
    """The lines of a saved config.gin by name, values as they are written."""
    found: dict[str, str] = {}
    for line in config.splitlines():
        named = re.match(r"([A-Za-z_][\w./]*) = (.*)", line)
        if named:
            found[named[1]] = named[2]
        elif line and found:  # a long list or dict goes on
            found[next(reversed(found))] += line.strip()
    return found
