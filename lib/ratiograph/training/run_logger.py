"""Sends a run's metrics, pictures and messages to its loggers and to the terminal. Metrics are as in `logs`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import SupportsFloat

import numpy as np
from rich.console import Console

from ratiograph.training.display import Display, Pace
from ratiograph.training.loggers import Logger, RunFiles, Start

__all__ = ["RunLogger", "SilentLogger"]


class SilentLogger(AbstractContextManager):
    """The logger of all processes but the main one: it has the methods of `RunLogger` and does nothing."""

    def _ignore(self, *_arguments: object) -> None:
        """Does nothing."""

    __exit__ = advance = log = image = message = _ignore


class RunLogger(AbstractContextManager):
    """Records and shows a run's metrics. A context manager: leaving it closes the files and the display.

    In a terminal the display is live (bar, rate, time left, latest metrics with their trend); elsewhere every
    logged step is one line of plain text. Metrics and pictures go to the run's folder (`loggers.RunFiles`) and to
    ``loggers``. If a logger fails, a message says so once; training goes on, and the logger gets the next values too.

    Args:
        workdir: the run's folder; made if missing.
        total_steps: number of the run's last step.
        resume_step: step of the checkpoint the run goes on from, 0 for a new run. Lines of metrics.jsonl
            after it are dropped, so that the file has every step once.
        images_per_step: training samples a step takes; ``images`` in metrics.jsonl is step times this, and
            left out when None.
        loggers: where else metrics and pictures go.
        config: text of config.gin, for loggers that keep it.
        title: heading of the display; the name of ``workdir`` when None.
        live: whether to draw the live display; None: only in a terminal.
        console: where to print; None: standard output.

    Raises:
        ValueError: ``workdir`` cannot be written; a logger cannot start, and only the user can mend it.
    """

    def __init__(
        self,
        workdir: Path,
        total_steps: int,
        *,
        resume_step: int = 0,
        images_per_step: int | None = None,
        loggers: Sequence[Logger] = (),
        config: str = "",
        title: str | None = None,
        live: bool | None = None,
        console: Console | None = None,
    ):
        self._images_per_step = images_per_step
        self._failed: set[Logger] = set()
        files, run = RunFiles(), Start(Path(workdir), resume_step, config)
        files.start(run)
        self._loggers: list[Logger] = [files]
        last = files.last or {}
        self._logged_step = last.get("step", -1)
        self._pace = Pace(total_steps, resume_step, float(last.get("seconds") or 0))
        # The live display begins after the loggers have started, as services print lines of their own.
        messages = [self._start(logger, run) for logger in loggers]
        self._display = Display(title or run.title, self._pace, step=resume_step, live=live, console=console)
        for message in filter(None, messages):
            self.message(message)

    def _start(self, logger: Logger, run: Start) -> str:
        """Starts ``logger``; returns its message for people."""
        try:
            message = logger.start(run)
        except ValueError:
            for opened in self._loggers:
                opened.close()
            raise
        except Exception as error:  # of a service or a disk; the run does not need it
            return _failure(logger, error, "left out of this run")
        self._loggers.append(logger)
        return message

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _each(self, call: Callable[[Logger], None]) -> None:
        for logger in self._loggers:
            try:
                call(logger)
            except Exception as error:  # whatever a library raises
                if logger not in self._failed:
                    self._failed.add(logger)
                    self.message(_failure(logger, error, "the run goes on, and asks it again the next time"))

    def advance(self, step: int) -> None:
        """Moves the live progress bar to ``step``; costs nothing."""
        self._display.step = step

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Records the metrics of one step and shows them.

        Args:
            step: steps done, greater than every step logged before.
            metrics: numbers or 0-d tensors by ``<group>/<name>``. ``rate/steps_per_second`` is measured
                between logged steps and added unless it is given, ``rate/images_per_second`` from it.
        """
        assert step > self._logged_step, f"step {step} logged after step {self._logged_step}: log each step once"
        values = {name: float(value) for name, value in metrics.items()}
        axes: dict[str, float] = {"seconds": round(self._pace.seconds, 3)}
        measured = self._pace.measure(step)
        if measured is not None:
            self._pace.rate = values.setdefault("rate/steps_per_second", measured)
            if self._images_per_step is not None:
                values["rate/images_per_second"] = self._pace.rate * self._images_per_step
        if self._images_per_step is not None:
            axes["images"] = step * self._images_per_step
        self._logged_step = step
        self._each(lambda logger: logger.scalars(step, axes | values))
        self._display.show(step, values)

    def image(self, step: int, tag: str, grid: np.ndarray) -> None:
        """Writes a picture to ``WORKDIR/<tag>/step_<8 digits>.png`` and to the loggers.

        The grids of samples at fixed noise have the tag ``samples``.

        Args:
            step: steps done.
            tag: folder and name: letters, digits, ``_`` and ``-``.
            grid: uint8 [H, W, 3], as `make_grid` returns.

        Raises:
            ValueError: the tag is not a folder name.
        """
        if not re.fullmatch(r"[\w-]+", tag):
            raise ValueError(f"image tag {tag!r} names a folder: use letters, digits, _ and - only")
        self._each(lambda logger: logger.image(step, tag, grid))

    def message(self, text: str) -> None:
        """Shows a line of text, above the display where it is live."""
        self._display.message(text)

    def close(self) -> None:
        """Ends the display and closes the loggers; later calls do nothing, and messages still show."""
        self._display.close()
        self._each(lambda logger: logger.close())
        self._loggers = []


def _failure(logger: Logger, error: Exception, then: str) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(logger).__name__} does not log: {text}; {then}"
