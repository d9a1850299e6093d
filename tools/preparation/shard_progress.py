"""A progress bar for `make_shards`, or lines now and then where the output is a log file."""

from __future__ import annotations

import time

from rich.progress import TextColumn

from preparation.shard_maker import Watch
from preparation.tar_samples import Skipped
from ratiograph.command_line import progress_bar

__all__ = ["ShardProgress"]

LOG_SECONDS = 30  # between two lines of a log that is no terminal
UPDATE_IMAGES = 16  # between two updates of the bar


class ShardProgress(Watch):
    """Shows a bar with images/s and the time left, and names the images that are skipped."""

    def __init__(self):
        self.progress = progress_bar(TextColumn("{task.fields[speed]}"))
        self.pending = 0
        self.next_line = time.monotonic() + LOG_SECONDS

    def begin(self, total: int, done: int) -> None:
        if done:
            self.progress.console.print(f"{done:,} of {total:,} images lie in finished shards already")
        self.task = self.progress.add_task("images", total=total, completed=done, speed="")

    def advance(self) -> None:
        self.progress.start()  # only now: the worker processes, forked before, must not inherit its thread
        self.pending += 1
        if self.pending == UPDATE_IMAGES:
            self._update()

    def skip(self, skipped: Skipped) -> None:
        self.progress.console.print(f"skipped {skipped.name}: {skipped.reason}", markup=False, highlight=False)

    def stop(self) -> None:
        """Ends the bar, if there is one."""
        if self.progress.live.is_started:
            self._update()
            self.progress.stop()

    def _update(self) -> None:
        task = self.progress.tasks[self.task]
        speed = f"{task.speed:,.0f} images/s" if task.speed else ""
        self.progress.update(self.task, advance=self.pending, speed=speed)
        self.pending = 0
        if not self.progress.console.is_terminal and time.monotonic() > self.next_line:
            self.next_line = time.monotonic() + LOG_SECONDS
            left = f", {task.time_remaining:,.0f} s left" if task.time_remaining else ""
            self.progress.console.print(f"{task.completed:,.0f} of {task.total:,} images, {speed}{left}")
