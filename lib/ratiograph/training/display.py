"""A run's display: live in a terminal; elsewhere one line of plain text for each logged step.

Metrics are as in `logs`. The *rate*, steps a second, is measured between logged steps.
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
_GROUPS_FIRST = ("loss", "field", "ratio")  # shown first, in this order; other groups follow in the order of arrival
_UNITS = {"field": "rms at the image", "memory": "GB"}
_TREND = 24  # number of logged values in a trend line


class Pace:
    """Measures how fast a run goes.

    Args:
        total_steps: number of the run's last step.
        step: step that this process starts after, 0 for a new run.
        seconds: training time of the steps before that.
    """

    def __init__(self, total_steps: int, step: int, seconds: float):
        self.total_steps, self.rate = total_steps, None
        self._before, self._first = seconds, step
        self._start = time.monotonic()
        self._mark = (step, self._start)  # (step, time) of the last measurement

    @property
    def seconds(self) -> float:
        """Training time since step 0, the sum over all processes that continued the run."""
        return self._before + time.monotonic() - self._start

    def measure(self, step: int) -> float | None:
        """Steps a second since the last call, None where no time has passed. ``rate`` keeps the last known value."""
        (before, then), now = self._mark, time.monotonic()
        self._mark = (step, now)
        if now <= then or step <= before:
            return None
        self.rate = (step - before) / (now - then)
        return self.rate

    @property
    def time_left(self) -> float | None:
        """Seconds to the last step at this process's mean rate, steadier than the latest one; None at first."""
        (step, then), now = self._mark, time.monotonic()
        if step <= self._first:
            return None
        each = (then - self._start) / (step - self._first)
        return max(each * (self.total_steps - step) - (now - then), 0.0)


class Display:
    """Shows metrics while a run trains.

    Args:
        title: heading of the live display.
        pace: the run's speed.
        step: steps done.
        live: whether to draw the live display; None: only in a terminal.
        console: where to print; None: standard output.
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
        """Ends the live display; later messages are printed as plain text."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, text: str) -> None:
        """Prints plain text. Where nobody reads any more (``| head``), the output ends and the run goes on."""
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
        speed = "" if rate is None else f"  {significant(rate, 3)} steps/s"
        head = f"step {self.step:>{len(str(total))}}/{total}{speed}  {duration(self.pace.time_left)} left"
        return "  ".join([head, *(f"{name} {significant(values[name])}" for name in _ordered(values))])

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        """The live display. rich draws it from a thread of its own, so this must change nothing."""
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
    """Metric names by group."""
    groups: dict[str, list[str]] = {}
    for name in _ordered(dict(metrics)):  # a copy: the run may add a metric while rich's thread draws
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
    """Metric names, those of ``_GROUPS_FIRST`` in front; without the rate, which is shown apart."""
    rank = {group: index for index, group in enumerate(_GROUPS_FIRST)}
    shown = (name for name in names if not name.startswith("rate/"))
    return sorted(shown, key=lambda name: rank.get(name.partition("/")[0], len(rank)))


def sparkline(values: list[float]) -> str:
    """Block characters from ▁, the lowest finite value, to █, the highest; a space for a value that is not finite."""
    finite = [value for value in values if math.isfinite(value)]
    low, spread = min(finite, default=0.0), max(finite, default=0.0) - min(finite, default=0.0)
    levels = len(_BARS) - 1

    def bar(value: float) -> str:
        if not math.isfinite(value):
            return " "
        return _BARS[round((value - low) / spread * levels) if spread else levels // 2]

    return "".join(map(bar, values))
