"""Writes a run's checkpoints while it trains, and decides which ones are kept.

A checkpoint's state is {"step", "task": `Task.training_state`, "run": the state of the run itself}. ``run`` holds
``samples`` (read from the stream), ``config`` (digest of the configuration), ``graph`` (class and own weights of every
node, by path), ``files`` (see `run_facts`) and ``best`` ([step, value] of the best evaluation so far, or None).

The run waits only until the state is copied to the CPU; a thread writes the copy. The next save waits for that thread,
and the next `CheckpointManager.poll` raises its error in the run.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from ratiograph.config.tree import Node
from ratiograph.core.files import write_atomically
from ratiograph.networks.weights.weight_files import listed
from ratiograph.training import checkpoints
from ratiograph.training.experiment import Task
from ratiograph.training.run_facts import Facts, check_facts

__all__ = ["CheckpointManager", "check_graph", "config_digest", "graph_nodes", "load_state"]


def graph_nodes(node: Node, path: str = "") -> dict[str, str]:
    """Class and number of own weights of ``node`` and all nodes below it, by path, parents first.

    Weights of children are not counted, so that two graphs differ at the node that differs and not at its parents.
    """
    own = node.parameters - sum(child.parameters for child in node.children)
    nodes = {path: f"{node.cls} with {own} weights of its own" if own > 0 else node.cls} if path else {}
    for child in node.children:
        nodes |= graph_nodes(child, f"{path}.{child.name}" if path else child.name)
    return nodes


def check_graph(here: Mapping[str, str], there: Mapping[str, str], source: Path | str) -> None:
    """Raises a ValueError, which names the first differences, unless two results of `graph_nodes` are equal."""
    paths = [path for path in {**here, **there} if here.get(path) != there.get(path)]
    if paths:
        found = [f"{path} is {here.get(path, 'absent')} here and {there.get(path, 'absent')} there" for path in paths]
        raise ValueError(
            f"{source} is a checkpoint of another graph: {listed(found)}. Run the config.gin that made it, or give "
            "this run another --workdir"
        )


def load_state(
    task: Task, nodes: Mapping[str, str], files: Facts, state: Mapping[str, Any], source: Path
) -> Mapping[str, Any]:
    """Loads a checkpoint's state into ``task``; returns the state of the run itself.

    ``nodes`` are the task's `graph_nodes`, ``files`` the `run_facts` of its experiment.

    Raises:
        ValueError: the checkpoint is of another graph, of other files or of another version of this program.
    """
    run, held = (checkpoints.entry(state, name, source=source) for name in ("run", "task"))
    check_facts(files, run.get("files"), source, "give this run another --workdir")
    check_graph(nodes, run.get("graph", nodes), source)
    try:
        task.load_training_state(held)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"{source} holds a checkpoint of another version of ratiograph ({error!r}). Use the version that made it, "
            "or give this run another --workdir"
        ) from error
    return run


def config_digest(text: str) -> str:
    """SHA-256 of the text of a saved configuration without the run-level lines of ``Experiment``; '' of no text."""
    if not text:
        return ""
    lines = [line for line in text.splitlines() if not line.startswith("Experiment.")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class CheckpointManager(AbstractContextManager):
    """The checkpoints of one run. A context manager: leaving it waits until the last one is written.

    Args:
        folder: folder of the checkpoints.
        keep_last: how many of the last ones are kept, >= 1.
        keep_every: checkpoints at multiples of this step are never removed; 0 for none.
        best_metric: name of a metric; the checkpoint with its smallest value is never removed. None for none.
        check_held: called before each save, as of `workdir.locked`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int = 2,
        keep_every: int = 0,
        best_metric: str | None = None,
        check_held: Callable[[], None] = lambda: None,
    ):
        self.check_held = check_held
        self.folder, self.keep_last, self.keep_every = Path(folder), keep_last, keep_every
        self.best_metric = best_metric
        self.best: tuple[int, float] | None = None
        """(step, value) of the best evaluation so far."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __exit__(self, kind: type[BaseException] | None, *_exception: object) -> None:
        # A second Ctrl-C ends the run at once; the unfinished file is a temporary, which the next save removes.
        if self._thread is not None and not (kind and issubclass(kind, KeyboardInterrupt)):
            self._thread.join()
            if kind is None:
                self.poll()

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """`checkpoints.latest`; also restores ``best`` from it."""
        found = checkpoints.latest(self.folder)
        best = checkpoints.entry(found[1], "run", source=self.folder).get("best") if found else None
        self.best = tuple(best) if best else None
        return found

    def improves(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether ``metrics`` (empty: no evaluation) hold the smallest ``best_metric`` so far, which ``best`` keeps.

        Raises:
            ValueError: the evaluation lacks the metric.
        """
        if self.best_metric is None or not metrics:
            return False
        if self.best_metric not in metrics:
            raise ValueError(f"Experiment.best_metric={self.best_metric!r}: the evaluator gives {', '.join(metrics)}")
        value = metrics[self.best_metric]
        if not math.isfinite(value) or (self.best is not None and value >= self.best[1]):
            return False
        self.best = (step, value)
        return True

    def save(self, step: int, task: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        """Copies the state and starts to write it.

        Raises:
            ValueError: the state holds something else than plain values, the previous checkpoint was not written, or
                ``check_held`` raised.
        """
        self.check_held()
        self.wait()
        state = {"step": step, "task": task, "run": {**run, "best": list(self.best) if self.best else None}}
        checkpoints.check_plain(state, "state")
        copied, best = _on_cpu(state, {}), self.best

        def write() -> None:
            try:
                checkpoints.save(self.folder, step, copied, self.keep_last, lambda old: self._kept(old, best))
                if best is not None:
                    record = {"step": best[0], self.best_metric: best[1]}
                    write_atomically(self.folder / "best.json", json.dumps(record).encode())
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def newest(self) -> str:
        """Which checkpoint the run would go on from."""
        self.wait()
        saved = checkpoints.steps(self.folder)
        return f"the checkpoint of step {saved[-1]} is intact" if saved else "no checkpoint was due yet"

    def _kept(self, step: int, best: tuple[int, float] | None) -> bool:
        every = self.keep_every > 0 and step % self.keep_every == 0
        return every or (best is not None and step == best[0])

    def poll(self) -> None:
        """Raises the error of the last write, if there was one; costs nothing.

        Raises:
            ValueError: the checkpoint could not be written (disk full, read-only); earlier ones are intact.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Waits until the last checkpoint is on the disk; raises as `poll`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.poll()


def _on_cpu(value: Any, copied: dict[tuple, Tensor]) -> Any:
    """A copy of a state on the CPU. ``copied`` holds the tensors so far: one that occurs several times stays one."""
    if isinstance(value, Tensor):
        key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if key not in copied or not value.numel():
            copied[key] = value.detach().to("cpu", copy=True)
        return copied[key]
    if isinstance(value, Mapping):
        return {key: _on_cpu(item, copied) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(item, copied) for item in value)
    return value
