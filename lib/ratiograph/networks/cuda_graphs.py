"""CUDA graphs of passes without gradients: a pass is recorded once for its shapes, then replayed by one launch.

Networks for small images spend much of a pass on the CPU, launching hundreds of short kernels. Passes without gradients
are replayed: the teacher's, the student score's where a term evaluates it, those of a student whose samples need no
gradient, and of averages. Replays read the weights from their own memory, so they follow every update of them.

Notation: a *tree* is an argument or result of a pass: a tensor, None, or a tuple or frozen dataclass of trees.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ratiograph.core.contracts import Denoiser, RatioEstimator
from ratiograph.core.types import Condition, Encoding

__all__ = ["RecordedPass", "Recording", "record_passes"]

Tree = Any
Memory = Callable[[torch.device], tuple[tuple[int, int], torch.cuda.Stream]]
"""A GPU => (the memory pool that its recordings share, the stream they are recorded on)."""
Record = Callable[[Callable[[], Tree], Memory, torch.device], "Recording"]
WARM = 2
"""Unrecorded passes of each shape before the recording: libraries choose algorithms and allocate workspaces then."""
MOST = 8
"""Recordings of a network's encoder, and of its decoder; further shapes run unrecorded."""


def record_passes(module: nn.Module, record: Record | None = None, device: str = "cuda") -> None:
    """Records the passes of every denoiser's and estimator's network in ``module`` on a GPU, and replays them.

    Call it once the weights are on their device: they may be changed in place afterwards; a network that was moved
    records again. All recordings share one memory pool, as large as the largest pass and the inputs and results of
    each: a result is copied before another recording is replayed. On a CPU nothing changes.

    Args:
        module: holds the denoisers and estimators.
        record: records a pass; as a CUDA graph by default.
        device: type of the devices whose passes are recorded.
    """
    owners = [each for each in module.modules() if isinstance(each, Denoiser | RatioEstimator)]
    networks = {id(each.network): each.network for each in owners if hasattr(each, "network")}
    memory = cache(lambda device: (torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)))
    for network in networks.values():
        for name in ("encode", "decode"):
            setattr(network, name, RecordedPass(getattr(network, name), memory, record or Recording, device))


class Recording:
    """``work`` as a CUDA graph.

    Args:
        work: reads and writes memory that stays allocated; every ``replay`` overwrites its result.
        memory: gives the pool for the memory in between.
        device: a GPU, not always the process's current one.
    """

    def __init__(self, work: Callable[[], Tree], memory: Memory, device: torch.device):
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            handle, stream = memory(device)
            # Other threads, such as those that read data, may allocate pinned memory meanwhile.
            with torch.cuda.graph(self._graph, pool=handle, stream=stream, capture_error_mode="thread_local"):
                self.result = work()

    def replay(self) -> None:
        """Runs the pass, which overwrites ``result``."""
        self._graph.replay()


class RecordedPass:
    """A network's ``encode`` or ``decode``, replayed where gradients are disabled.

    Args:
        function: the bound method.
        memory: shared by all recordings.
        record: records a pass.
        device: type of the devices whose passes are recorded.
    """

    def __init__(self, function: Callable[..., Tree], memory: Memory, record: Record, device: str):
        self.function, self.memory, self.record, self.device = function, memory, record, device
        self._seen: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, tuple[Tree, Recording]] = {}

    def __deepcopy__(self, memo: dict) -> RecordedPass:
        """The pass of a copied network, which has no recordings yet."""
        return RecordedPass(copy.deepcopy(self.function, memo), self.memory, self.record, self.device)

    def __call__(self, *inputs: Tree) -> Tree:
        weight = next(self.function.__self__.parameters())
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or weight.device.type != self.device:
            return self.function(*inputs)
        inputs = tuple(_without_extras(each) for each in inputs)
        key = self._key(inputs, weight)
        if key not in self._recorded:
            self._seen[key] += 1
            if self._seen[key] <= WARM or len(self._recorded) == MOST:
                return self.function(*inputs)
            self._recorded[key] = self._record(inputs, weight.device)
        held, recording = self._recorded[key]
        _map(lambda own, new: own.copy_(new, non_blocking=True), held, inputs)
        recording.replay()
        return _cloned(recording.result)

    def _key(self, inputs: Tree, weight: Tensor) -> Hashable:
        """All that a recording depends on: shapes and dtypes, precision, mode, and the weights' address."""
        precision = torch.is_autocast_enabled(self.device), torch.get_autocast_dtype(self.device)
        shapes = _map(lambda tensor: (tensor.shape, tensor.dtype, tensor.device), inputs)
        return shapes, precision, self.function.__self__.training, weight.data_ptr()

    def _record(self, inputs: Tree, device: torch.device) -> tuple[Tree, Recording]:
        """(the tree that inputs are copied to, the recording that reads it)."""
        held = _cloned(inputs)
        enabled, dtype = torch.is_autocast_enabled(self.device), torch.get_autocast_dtype(self.device)
        # A weight in autocast's cache of bf16 copies would be recorded as it is now, and not follow updates.
        with torch.autocast(self.device, dtype=dtype, enabled=enabled, cache_enabled=False):
            return held, self.record(lambda: self.function(*held), self.memory, device)


def _without_extras(tree: Tree) -> Tree:
    """``tree`` without what no network reads: a caption, which stays on the CPU, and the denoiser's ``restore``."""
    if isinstance(tree, Condition):
        return replace(tree, caption=None)
    return replace(tree, restore=None) if isinstance(tree, Encoding) else tree


def _map(change: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """``tree`` with each tensor replaced by ``change`` of it and of those at the same position in ``others``."""
    if isinstance(tree, Tensor):
        return change(tree, *others)
    if isinstance(tree, tuple):
        return tuple(_map(change, *each) for each in zip(tree, *others, strict=True))
    if is_dataclass(tree):
        names = [field.name for field in fields(tree)]
        return replace(tree, **{n: _map(change, getattr(tree, n), *(getattr(o, n) for o in others)) for n in names})
    assert tree is None, f"passes take and return tensors, not {type(tree).__name__}"
    return None


def _cloned(tree: Tree) -> Tree:
    """A copy in memory of its own; a tensor that occurs twice is copied once."""
    copies: dict[int, Tensor] = {}

    def clone(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.clone()
        return copies[id(tensor)]

    return _map(clone, tree)
