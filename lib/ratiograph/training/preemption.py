"""Ends a run on a signal without loss: SIGTERM or SIGUSR1 from a scheduler, SIGINT from a person, SIGHUP from a
terminal that closes (not under nohup, which has it ignored).

During training the current step is finished and its checkpoint written; before the first and after the last step the
run ends at once. Either way `Preempted` is raised and the process ends with `EXIT_CODE`, which tells a scheduler to
start the same command again. Further signals change nothing, except that a second SIGINT ends the run at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["EXIT_CODE", "Preempted", "Preemption"]

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the run ended on a signal, and the same command continues it."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class Preempted(BaseException):
    """The run ends on a signal. As with KeyboardInterrupt, ``except Exception`` does not catch it."""


class Preemption:
    """A context manager that handles the signals; leaving it restores the earlier handlers.

    It does nothing outside the main thread, where Python receives no signals.
    """

    def __init__(self):
        self.received = ""
        """Name of the first signal received, or ''."""
        self._interrupts, self._waiting = 0, False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            taken = [number for number in _SIGNALS if not (nohup and number == signal.SIGHUP)]
            self._before = {number: signal.signal(number, self._receive) for number in taken}
            self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def join(self, others: bool) -> bool:
        """Ends this rank with the others: ``others`` says whether any rank had a signal when all were asked.

        Returns ``others``. A signal that came after that waits for the next step, so that all ranks end after the same
        one.
        """
        if others and not self.received:
            self.received = "another rank's signal"
        return others

    def _receive(self, number: int, _frame: object) -> None:
        if number == signal.SIGHUP:  # what is printed to a closed terminal would raise errors before the run is saved
            for descriptor in self._terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
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
        """Inside, a signal takes effect only when `end_if_received` is called, or at the end of the body."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False
        if self.received:
            self._end()

    def end_if_received(self, step: int, steps: int, saved: bool = True) -> None:
        """Call when the checkpoint of ``step`` is written, or ``saved`` says that none is due in a row of bad steps.

        Raises:
            Preempted: a signal was received.
        """
        if self.received:
            where, then = "and its checkpoint is written", "there"
            if not saved:
                where, then = "in a row of steps without a finite gradient", "the last checkpoint"
            after = f"stopped by {self.received} after step {step} of {steps}, {where}"
            raise Preempted(f"{after}. The same command goes on from {then}")
