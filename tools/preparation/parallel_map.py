"""A parallel map that keeps its order, runs little ahead of its consumer, and leaves no process behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

__all__ = ["in_order"]

AHEAD = 4  # tasks waiting for each worker


def _start_worker() -> None:
    """Leaves Ctrl-C to the parent, and ends this process when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow(parent: multiprocessing.process.BaseProcess) -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, args=(multiprocessing.parent_process(),), daemon=True).start()


def in_order(call: Callable, tasks: Iterable, workers: int) -> Iterator:
    """``map(call, tasks)`` by ``workers`` processes; 1 works in this process. Closing the iterator ends them.

    Raises:
        ValueError: a process was killed.
    """
    if workers == 1:
        yield from map(call, tasks)
        return
    pool, waiting = ProcessPoolExecutor(workers, initializer=_start_worker), deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(call, task))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process was killed, perhaps for want of memory: try fewer --workers; the same command continues"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
