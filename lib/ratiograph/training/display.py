"""A run's display: live in a terminal, one line of plain text a logged step elsewhere.

Notation as in `logs`. Steps are counted from the run's first, seconds too; the *rate* is measured between logged steps.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping

from rich.columns import Columns
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ratiograph.training.logs import duration, significant

__all__ = ["Display", "Pace", "sparkline"]

_BARS = "▁▂▃▄▅▆▇█"
_GROUPS_FIRST = ("loss", "field", "ratio")  # the order people look in; other groups follow as they come
_UNITS = {"field": "rms at the image", "memory": "GB"}
_TREND = 24  # logged values a trend line shows


class Pace:
    """How fast a run goes.

    Args:
        total_steps: steps the run ends at.
        step: that this process goes on from.
        seconds: spent on the steps before.
    """

    def __init__(self, total_steps: int, step: int, seconds: float):
        self.total_steps, self.rate = total_steps, None
        self._before, self._first = seconds, step
        self._start = time.monotonic()
        self._mark = (step, self._start)  # where the rate is measured from: the last logged step

    @property
    def seconds(self) -> float:
        """Training time since step 0, added up over resumes."""
        return self._before + time.monotonic() - self._start

    def measure(self, step: int) -> float | None:
        """Steps a second since the last call, None where no time has passed; ``rate`` keeps the last one known."""
        (before, then), now = self._mark, time.monotonic()
        self._mark = (step, now)
        if now <= then or step <= before:
            return None
        self.rate = (step - before) / (now - then)
        return self.rate

    @property
    def time_left(self) -> float | None:
        """Seconds to the last step, at the mean rate of this process: steadier than the latest rate."""
        (step, then), now = self._mark, time.monotonic()
        if step <= self._first:
            return None
        each = (then - self._start) / (step - self._first)
        return max(each * (self.total_steps - step) - (now - then), 0.0)


class Display:
    """Shows metrics as they come.

    Args:
        title: heading of the live display.
        pace: of the run.
        step: that the run goes on from.
        live: whether to draw the live display; None asks the terminal.
        console: where to show; a new console on standard output when None.
    """

    def __init__(
        self, title: str, pace: Pace, *, step: int = 0, live: bool | None = None, console: Console | None = None
    ):
        self.title, self.pace, self.step = title, pace, step
        self._trends: dict[str, deque[float]] = {}
        self._mute = False
        self._console = console or Console()
        terminal = self._console.is_interactive and getattr(self._console.file, "isatty", lambda: False)()
        self._live = None
        if terminal if live is None else live:
            self._live = Live(self, console=self._console, refresh_per_second=4, transient=False)
            self._live.start()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the metrics of a logged step."""
        self.step = step
        for name, value in values.items():
            self._trends.setdefault(name, deque(maxlen=_TREND)).append(value)
        if self._live is None:
            self._print(self._line(values))

    def message(self, text: str) -> None:
        """Shows a line of text, above the display where it is live."""
        if self._live is None:
            self._print(text)
        else:
            self._console.print(Text(text))

    def close(self) -> None:
        """Ends the live display; messages still show."""
        if self._live is not None:
            self._live.stop()
            self._live = None

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

    def _line(self, values: Mapping[str, float]) -> str:
        total, rate = self.pace.total_steps, self.pace.rate
        told = "" if rate is None else f"  {significant(rate, 3)} steps/s"
        head = f"step {self.step:>{len(str(total))}}/{total}{told}  {duration(self.pace.time_left)} left"
        names = (name for name in _ordered(values) if not name.startswith("rate/"))
        return "  ".join([head, *(f"{name} {significant(values[name])}" for name in names)])

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        """The live display; drawn again by rich's thread, so it only reads."""
        total, pace = self.pace.total_steps, self.pace
        share = self.step / total if total else 1.0
        rate = "measuring" if pace.rate is None else f"{significant(pace.rate, 3)} steps/s"
        progress = Table.grid(expand=True)
        progress.add_column(no_wrap=True)
        steps = f"step {self.step:,} of {total:,}  {share:4.0%}"
        progress.add_row(_both_ends(Text(self.title, style="bold"), Text(steps)))
        progress.add_row(ProgressBar(max(total, 1), self.step, complete_style="cyan"))
        times = f"{duration(pace.seconds)} elapsed  {duration(pace.time_left)} left"
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
