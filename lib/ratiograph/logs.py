"""What a run says while it trains: metrics.jsonl, TensorBoard, sample grids and a live display.

A *metric* is a number under a name ``<group>/<name>``: ``loss/ratio``, ``field/distribution`` (rms norm of a
term's field at the image), ``ratio/accuracy``. ``metrics.jsonl`` holds one JSON object a logged step::

    {"step": 400, "seconds": 31.2, "images": 51200, "loss/ratio": 0.61, ...}

``seconds`` is time spent training since step 0, added up over resumes; ``images`` the training samples seen.
JSON has no NaN or infinity: such a value is written as null. Importing this module is quick: torch and
TensorBoard are imported when a run starts to log.
"""

from __future__ import annotations

import json
import math
import re
import time
import warnings
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat

import numpy as np
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ratiograph.files import clear_storage_errors, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RunLogger", "duration", "make_grid", "read_metrics", "significant"]

_BARS = "▁▂▃▄▅▆▇█"
_GROUPS_FIRST = ("loss", "field", "ratio")  # the order people look in; other groups follow as they come
_UNITS = {"field": "rms at the image", "memory": "GB"}
_TREND = 24  # logged values a trend line shows


def significant(value: float | None, digits: int = 4) -> str:
    """``value`` rounded to ``digits`` significant digits: 0.6931, 1.2e-05, 51,200; "nan" for None or NaN."""
    if value is None or not math.isfinite(value):
        return "nan" if value is None or math.isnan(value) else ("inf" if value > 0 else "-inf")
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 10 ** (digits + 3) or size < 1e-4:
        return f"{value:.{max(digits - 2, 1)}e}"
    decimals = max(digits - 1 - math.floor(math.log10(size)), 0)
    return f"{value:,.{decimals}f}"


def duration(seconds: float | None) -> str:
    """``seconds`` as ``m:ss`` or ``h:mm:ss``; ``-:--`` where it is not known."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def make_grid(images: Tensor, columns: int = 8, *, min_side: int = 56) -> np.ndarray:
    """Lays images out in rows, each pixel enlarged so that small ones are readable.

    Args:
        images: [N, C, H, W] in [-1, 1], N >= 1, C = 1 (grey) or 3 (colour); values outside are clamped, NaN
            is grey.
        columns: images a row; the last row may be shorter.
        min_side: pixels are repeated a whole number of times until an image's longer side reaches this.

    Returns:
        uint8 [rows, width, 3], images on a white ground with gaps of 2 pixels.

    Raises:
        ValueError: the shape is not that of grey or colour images.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.shape[0]:
        raise ValueError(f"a grid shows images [N, 1 or 3, H, W]; got shape {list(images.shape)}")
    values = np.nan_to_num(images.detach().float().cpu().numpy(), nan=0.0)
    tiles = np.rint((values.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    repeat = max(1, math.ceil(min_side / max(tiles.shape[1:3])))
    tiles = tiles.repeat(repeat, axis=1).repeat(repeat, axis=2)
    count, height, width, _ = tiles.shape
    columns, gap = min(columns, count), 2
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = gap + index // columns * (height + gap), gap + index % columns * (width + gap)
        grid[top : top + height, left : left + width] = tile  # a grey tile's one channel spreads over three
    return grid


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects in a metrics.jsonl, in file order; [] if there is no file.

    A last line that an interrupted write left torn is skipped in silence; a broken line before it, with a
    warning.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines, records = path.read_text(encoding="utf-8", errors="replace").splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                warnings.warn(f"{path}:{number} is not an object with a step: skipped", stacklevel=2)
        else:
            records.append(record)
    return records


class SilentLogger:
    """Takes what a `RunLogger` takes and says nothing: of all processes of a run one speaks."""

    def __enter__(self) -> SilentLogger:
        return self

    def __exit__(self, *_exception: object) -> None:
        """There is nothing to close."""

    def advance(self, step: int) -> None:
        """Nothing."""

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Nothing."""

    def image(self, step: int, tag: str, grid: np.ndarray) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""


class RunLogger:
    """Writes down and shows a run's metrics. A context manager: leaving it closes the files and the display.

    In a terminal the display is live (bar, rate, time left, latest metrics with their trend); elsewhere every
    logged step is one line of plain text.

    Args:
        workdir: the run's folder; made if missing.
        total_steps: steps the run ends at.
        resume_step: step of the checkpoint the run goes on from, 0 for a new run. Lines of metrics.jsonl
            after it are dropped, so that the file has every step once.
        images_per_step: training samples a step takes; ``images`` in metrics.jsonl is step times this, and
            left out when None.
        title: heading of the display; the name of ``workdir`` when None.
        live: whether to draw the live display; None asks the terminal.
        console: where to show; a new console on standard output when None.

    Raises:
        ValueError: ``workdir`` cannot be written; so do its methods when the disk fills up later.
    """

    def __init__(
        self,
        workdir: Path,
        total_steps: int,
        *,
        resume_step: int = 0,
        images_per_step: int | None = None,
        title: str | None = None,
        live: bool | None = None,
        console: Console | None = None,
    ):
        self.workdir, self.total_steps, self.step = Path(workdir), total_steps, resume_step
        self.title = title or self.workdir.resolve().name
        self._images_per_step, self._resume_step = images_per_step, resume_step
        self._path = self.workdir / "metrics.jsonl"
        with clear_storage_errors(self.workdir):
            self.workdir.mkdir(parents=True, exist_ok=True)
            kept = self._drop_after(resume_step)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
            from torch.utils.tensorboard import SummaryWriter

            purge = resume_step + 1 if resume_step else None
            self._board = SummaryWriter(str(self.workdir / "tensorboard"), purge_step=purge)
        self._seconds_before = float(kept[-1].get("seconds") or 0) if kept else 0.0
        self._logged_step = kept[-1]["step"] if kept else -1
        self._start = time.monotonic()
        self._mark = (resume_step, self._start)  # where the rate is measured from: the last logged step
        self._trends: dict[str, deque[float]] = {}
        self._rate: float | None = None
        self._closed, self._mute = False, False
        self._console = console or Console()
        terminal = self._console.is_interactive and getattr(self._console.file, "isatty", lambda: False)()
        self._live = None
        if terminal if live is None else live:
            self._live = Live(self, console=self._console, refresh_per_second=4, transient=False)
            self._live.start()

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _drop_after(self, step: int) -> list[dict[str, Any]]:
        """Keeps metrics.jsonl's lines up to ``step``, one a step, and returns them; a new run keeps none."""
        by_step: dict[int, dict[str, Any]] = {}
        for record in read_metrics(self._path) if step else []:
            if record["step"] <= step:
                by_step.setdefault(record["step"], record)
        kept = [by_step[logged] for logged in sorted(by_step)]
        if self._path.exists():
            write_atomically(self._path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        return kept

    @property
    def seconds(self) -> float:
        """Training time since step 0, added up over resumes."""
        return self._seconds_before + time.monotonic() - self._start

    def advance(self, step: int) -> None:
        """Moves the live bar to ``step`` between two logged steps; costs nothing."""
        self.step = step

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Records the metrics of one step and shows them.

        Args:
            step: steps done, greater than every step logged before.
            metrics: numbers or 0-d tensors by ``<group>/<name>``. ``rate/steps_per_second`` is measured
                between logged steps and added unless it is given, ``rate/images_per_second`` from it.

        Raises:
            ValueError: the disk is full.
        """
        assert step > self._logged_step, f"step {step} logged after step {self._logged_step}: log each step once"
        values = {name: float(value) for name, value in metrics.items()}
        now, seconds = time.monotonic(), self.seconds
        if now > self._mark[1] and step > self._mark[0]:
            measured = (step - self._mark[0]) / (now - self._mark[1])
            values.setdefault("rate/steps_per_second", measured)
            self._rate = values["rate/steps_per_second"]
            if self._images_per_step is not None:
                values["rate/images_per_second"] = self._rate * self._images_per_step
        self.step = self._logged_step = step
        self._mark = (step, now)
        record: dict[str, Any] = {"step": step, "seconds": round(seconds, 3)}
        if self._images_per_step is not None:
            record["images"] = step * self._images_per_step
        record |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        with clear_storage_errors(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        for name, value in values.items():
            self._trends.setdefault(name, deque(maxlen=_TREND)).append(value)
        if self._live is None:
            self._print(self._line(values))

    def image(self, step: int, tag: str, grid: np.ndarray) -> Path:
        """Writes a picture to ``WORKDIR/<tag>/step_<8 digits>.png`` and to TensorBoard.

        The grids of samples at fixed noise have the tag ``samples``.

        Args:
            step: steps done.
            tag: folder and TensorBoard name: letters, digits, ``_`` and ``-``.
            grid: uint8 [H, W, 3], as :func:`make_grid` returns.

        Returns:
            The path written.

        Raises:
            ValueError: the tag is not a folder name, or the disk is full.
        """
        from PIL import Image

        if not re.fullmatch(r"[\w-]+", tag):
            raise ValueError(f"image tag {tag!r} names a folder: use letters, digits, _ and - only")
        path = self.workdir / tag / f"step_{step:08d}.png"
        write_atomically(path, lambda file: Image.fromarray(grid).save(file, format="PNG"))
        with clear_storage_errors(path):
            self._board.add_image(tag, grid, step, dataformats="HWC")
        return path

    def message(self, text: str) -> None:
        """Shows a line of text, above the display where it is live."""
        if self._live is None:
            self._print(text)
        else:
            self._console.print(Text(text))

    def close(self) -> None:
        """Ends the display and closes the files; later calls do nothing, and messages still show."""
        if self._closed:
            return
        self._closed = True
        if self._live is not None:
            self._live.stop()
            self._live = None
        with clear_storage_errors(self.workdir):
            self._file.close()
            self._board.close()

    def _print(self, text: str) -> None:
        """Plain text to the console's file. A reader that left (``| head``) ends the output, not the run."""
        if self._mute:
            return
        file = self._console.file
        encoding = getattr(file, "encoding", None) or "utf-8"
        try:
            print(text.encode(encoding, "replace").decode(encoding), file=file, flush=True)
        except (BrokenPipeError, ValueError):  # ValueError: the file was closed
            self._mute = True

    def _time_left(self) -> float | None:
        """Seconds to the last step, at the mean rate of this process: steadier than the latest rate."""
        logged = self._mark[0] - self._resume_step
        if logged <= 0:
            return None
        per_step = (self._mark[1] - self._start) / logged
        return max(per_step * (self.total_steps - self._mark[0]) - (time.monotonic() - self._mark[1]), 0.0)

    def _line(self, values: Mapping[str, float]) -> str:
        width = len(str(self.total_steps))
        rate = "" if self._rate is None else f"  {significant(self._rate, 3)} steps/s"
        head = f"step {self.step:>{width}}/{self.total_steps}{rate}  {duration(self._time_left())} left"
        names = (name for name in _ordered(values) if not name.startswith("rate/"))
        return "  ".join([head, *(f"{name} {significant(values[name])}" for name in names)])

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        """The live display; drawn again by rich's thread, so it only reads."""
        share = self.step / self.total_steps if self.total_steps else 1.0
        rate = "measuring" if self._rate is None else f"{significant(self._rate, 3)} steps/s"
        progress = Table.grid(expand=True)
        progress.add_column(no_wrap=True)
        steps = f"step {self.step:,} of {self.total_steps:,}  {share:4.0%}"
        progress.add_row(_both_ends(Text(self.title, style="bold"), Text(steps)))
        progress.add_row(ProgressBar(max(self.total_steps, 1), self.step, complete_style="cyan"))
        times = f"{duration(self.seconds)} elapsed  {duration(self._time_left())} left"
        progress.add_row(_both_ends(Text(rate, style="dim"), Text(times, style="dim")))
        yield progress
        columns = 2 if options.max_width >= 100 else 1
        tables = [self._table(groups) for groups in _halves(_groups(self._trends), columns)]
        yield Columns([Padding(table, (1, 4, 0, 0)) for table in tables], padding=(0, 0))

    def _table(self, groups: Mapping[str, list[str]]) -> Table:
        """Name, latest value and trend of each metric, under the headings of their groups."""
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True, min_width=9)
        table.add_column(style="dim", no_wrap=True, overflow="crop")
        for group, names in groups.items():
            table.add_row(Text(group, style="cyan"), "", _UNITS.get(group, ""))
            for name in names:
                trend = list(self._trends[name])
                style = "bold" if math.isfinite(trend[-1]) else "bold red"
                latest = Text(significant(trend[-1]), style=style)
                table.add_row("  " + (name.partition("/")[2] or name), latest, sparkline(trend))
        return table


def _both_ends(left: Text, right: Text) -> Table:
    row = Table.grid(expand=True)
    row.add_column(ratio=1, no_wrap=True)
    row.add_column(justify="right", no_wrap=True)
    row.add_row(left, right)
    return row


def _groups(metrics: Mapping[str, object]) -> dict[str, list[str]]:
    """Metric names by group. The rate has its own place in the display."""
    groups: dict[str, list[str]] = {}
    for name in _ordered(dict(metrics)):
        if not name.startswith("rate/"):
            groups.setdefault(name.partition("/")[0], []).append(name)
    return groups


def _halves(groups: dict[str, list[str]], columns: int) -> list[dict[str, list[str]]]:
    """The groups in one column, or in two of about the same height."""
    height, total = 0, sum(len(names) + 1 for names in groups.values())
    halves: list[dict[str, list[str]]] = [{} for _ in range(columns)]
    for group, names in groups.items():
        halves[min(2 * height // max(total, 1), columns - 1)][group] = names
        height += len(names) + 1
    return [half for half in halves if half]


def _ordered(names: Mapping[str, object]) -> list[str]:
    """Metric names with the groups people look at first in front, otherwise as they came."""
    rank = {group: index for index, group in enumerate(_GROUPS_FIRST)}
    return sorted(names, key=lambda name: rank.get(name.partition("/")[0], len(rank)))


def sparkline(values: list[float]) -> str:
    """Block characters from ▁, the lowest finite value, to █, the highest; a gap for what is not finite."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return " " * len(values)
    low, spread = min(finite), max(finite) - min(finite)
    levels = len(_BARS) - 1
    return "".join(
        (_BARS[round((value - low) / spread * levels)] if spread else _BARS[levels // 2])
        if math.isfinite(value)
        else " "
        for value in values
    )
