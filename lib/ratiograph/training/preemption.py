"""Ending a run on request so that nothing is lost: SIGTERM and SIGUSR1 from a scheduler, SIGINT from a person.

While steps are taken a request waits for the step in hand, its due files and its checkpoint; before the first and after
the last step there is nothing of that kind to finish, and it ends the run at once. Either way `Preempted` is raised and
the process ends with `EXIT_CODE`, which tells a scheduler to start the same command again. Further requests change
nothing, except that a second SIGINT ends the run where it stands.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["EXIT_CODE", "Preempted", "Preemption"]

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the run has been asked to end, and the same command continues it."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preempted(BaseException):
    """The run ends on request. Like KeyboardInterrupt no ``except Exception`` catches it."""


class Preemption:
    """A context manager that turns signals into requests to end; the handlers from before return when it is left.

    Outside the main thread, where Python receives no signals, it does nothing.
    """

    def __init__(self):
        self.received = ""
        """Name of the first signal, or ''."""
        self._interrupts, self._waiting = 0, False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def join(self, others: bool) -> bool:
        """``others``, whether some rank was to end when all were asked: this one then ends with it.

        A signal that came after that question waits for the next one, so that all ranks end after the same step.
        """
        if others and not self.received:
            self.received = "another rank's signal"
        return others

    def _receive(self, number: int, _frame: object) -> None:
        first = not self.received
        self.received = self.received or signal.Signals(number).name
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if first and not self._waiting:
            self._end()

    def _end(self) -> None:
        raise Preempted(f"stopped by {self.received}. The same command goes on from the last checkpoint")

    @contextmanager
    def at_step_ends(self) -> Iterator[None]:
        """In the body a request waits until `end_if_received` is called, or to the body's end."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False
        if self.received:
            self._end()

    def end_if_received(self, step: int, steps: int) -> None:
        """Ends the run if that was asked for, with the checkpoint of ``step`` written.

        Raises:
            Preempted: a signal came.
        """
        if self.received:
            where = f"after step {step} of {steps}, and its checkpoint is written"
            raise Preempted(f"stopped by {self.received} {where}. The same command goes on from there")
