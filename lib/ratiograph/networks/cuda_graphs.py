"""CUDA graphs of passes without gradients: a pass is recorded once for its shapes, then replayed by one launch.

Networks for small images spend much of a pass launching hundreds of short kernels, on the CPU. The teacher, the student
score where a term asks about it, a student whose samples need no gradient, and averages run as recorded; passes that
autograd follows run as they are. Replays read the weights where they lie, so they follow every update of them.

Notation: a *tree* is what a pass takes or gives: a tensor, None, or a tuple or frozen dataclass of trees.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ratiograph.core.contracts import Denoiser, RatioEstimator
from ratiograph.core.types import Condition, Encoding

__all__ = ["Pool", "RecordedPass", "Recording", "record_passes"]

Tree = Any
Record = Callable[[Callable[[], Tree], "Pool", torch.device], "Recording"]
WARM = 2
"""Passes of a shape that run unrecorded: libraries choose their algorithms and take their workspaces then."""
MOST = 8
"""Recordings of a network's encoder, and of its decoder; further shapes run as they are."""


def record_passes(module: nn.Module, record: Record | None = None, device: str = "cuda") -> None:
    """Records the passes of every denoiser's and estimator's network in ``module`` on a GPU, and replays them.

    Call it once the weights lie where they stay: they may be changed in place afterwards; a network that was moved
    records again. All recordings share one pool of memory, as large as the largest pass and the inputs and results of
    each. On a CPU nothing changes.

    Args:
        module: holds the denoisers and estimators.
        record: what records a pass; a CUDA graph by default.
        device: type of the devices where it does.
    """
    owners = [each for each in module.modules() if isinstance(each, Denoiser | RatioEstimator)]
    networks = {id(each.network): each.network for each in owners if hasattr(each, "network")}
    pool = Pool()
    for network in networks.values():
        for name in ("encode", "decode"):
            setattr(network, name, RecordedPass(getattr(network, name), pool, record or Recording, device))


class Pool:
    """The memory that all recordings share: each one's results are copied before another is replayed."""

    def __init__(self):
        self._places: dict[torch.device, tuple[tuple[int, int], torch.cuda.Stream]] = {}

    def on(self, device: torch.device) -> tuple[tuple[int, int], torch.cuda.Stream]:
        """(torch's name of the pool, the stream to record on) of a GPU, made when it is first asked for."""
        if device not in self._places:
            self._places[device] = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        return self._places[device]


class Recording:
    """``work`` as a CUDA graph.

    Args:
        work: reads and writes memory that stays; what it returns is written anew by every ``replay``.
        pool: where the memory between comes from.
        device: a GPU, not always the process's current one.
    """

    def __init__(self, work: Callable[[], Tree], pool: Pool, device: torch.device):
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            handle, stream = pool.on(device)
            # Other threads may go on allocating pinned memory meanwhile, as the data's do.
            with torch.cuda.graph(self._graph, pool=handle, stream=stream, capture_error_mode="thread_local"):
                self.result = work()

    def replay(self) -> None:
        """Writes ``result`` once more."""
        self._graph.replay()


class RecordedPass:
    """A network's ``encode`` or ``decode``, replayed where no gradient is wanted.

    Args:
        function: the bound method.
        pool: of all recordings.
        record: what records.
        device: type of the devices where it does.
    """

    def __init__(self, function: Callable[..., Tree], pool: Pool, record: Record, device: str):
        self.function, self.pool, self.record, self.device = function, pool, record, device
        self._seen: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, tuple[Tree, Recording]] = {}

    def __deepcopy__(self, memo: dict) -> RecordedPass:
        """That of a copied network, which has recorded nothing yet."""
        return RecordedPass(copy.deepcopy(self.function, memo), self.pool, self.record, self.device)

    def __call__(self, *inputs: Tree) -> Tree:
        weight = next(self.function.__self__.parameters())
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or weight.device.type != self.device:
            return self.function(*inputs)
        inputs = tuple(_of_tensors(each) for each in inputs)
        key = self._key(inputs, weight)
        if key not in self._recorded:
            self._seen[key] += 1
            if self._seen[key] <= WARM or len(self._recorded) == MOST:
                return self.function(*inputs)
            self._recorded[key] = self._record(inputs, weight.device)
        held, recording = self._recorded[key]
        _map(lambda own, given: own.copy_(given, non_blocking=True), held, inputs)
        recording.replay()
        return _cloned(recording.result)

    def _key(self, inputs: Tree, weight: Tensor) -> Hashable:
        """All that a recording is for: shapes and types, precision, mode, and where the weights lie."""
        precision = torch.is_autocast_enabled(self.device), torch.get_autocast_dtype(self.device)
        shapes = _map(lambda tensor: (tensor.shape, tensor.dtype, tensor.device), inputs)
        return shapes, precision, self.function.__self__.training, weight.data_ptr()

    def _record(self, inputs: Tree, device: torch.device) -> tuple[Tree, Recording]:
        """(the inputs' own memory, the recording that reads it)."""
        held = _cloned(inputs)
        enabled, dtype = torch.is_autocast_enabled(self.device), torch.get_autocast_dtype(self.device)
        # A weight that autocast remembers in bf16 would be recorded as it is now, not as it will be after an update.
        with torch.autocast(self.device, dtype=dtype, enabled=enabled, cache_enabled=False):
            return held, self.record(lambda: self.function(*held), self.pool, device)


def _of_tensors(given: Tree) -> Tree:
    """``given`` without what no network reads: a caption, which stays on the CPU, and what a denoiser added."""
    if isinstance(given, Condition):
        return replace(given, caption=None)
    return replace(given, restore=None) if isinstance(given, Encoding) else given


def _map(change: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """``tree`` with ``change`` of each tensor, and of those at the same place in ``others``, instead of it."""
    if isinstance(tree, Tensor):
        return change(tree, *others)
    if isinstance(tree, tuple):
        return tuple(_map(change, *each) for each in zip(tree, *others, strict=True))
    if is_dataclass(tree):
        names = [field.name for field in fields(tree)]
        return replace(tree, **{n: _map(change, getattr(tree, n), *(getattr(o, n) for o in others)) for n in names})
    assert tree is None, f"a pass takes and gives tensors, not {type(tree).__name__}"
    return None


def _cloned(tree: Tree) -> Tree:
    """A copy in memory of its own; a tensor that is there twice is copied once."""
    copies: dict[int, Tensor] = {}

    def clone(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.clone()
        return copies[id(tensor)]

    return _map(clone, tree)
