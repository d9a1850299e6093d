"""Operations and memory of a training step, from shapes alone: without weights, data or a GPU.

Notation: *operations* are those of matrix products, convolutions and attention, two for a multiplication and an
addition; the *peak* is the most bytes of tensors that exist at once. The step runs on fake tensors: every line of it is
executed, with shapes and types and no contents. Memory that a device's libraries use beside tensors comes on top:
workspaces, fragmentation, and on a CPU the process itself.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter

from benchmarks.inputs import made_up_batch, without_files
from benchmarks.timing import count_flops, request
from ratiograph import config
from ratiograph.networks.denoisers import set_precision
from ratiograph.tasks.distillation import Distillation
from ratiograph.training.optim import Adam
from ratiograph.training.parallel import Replicated

__all__ = ["Plan", "bench_plan", "planned"]

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Plan:
    """``parameters`` of each node, ``flops`` of a step, GB ``held_gb`` between steps and ``peak_gb`` in one."""

    parameters: dict[str, int]
    flops: int
    held_gb: float
    peak_gb: float


class _Fake(FakeTensorMode):
    """Fake tensors whose copies belong to the same mode."""

    def __deepcopy__(self, memo: dict) -> _Fake:
        return self


class _Bytes(TorchDispatchMode):
    """Counts the bytes of all storages that live at once."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            # What wraps other tensors has no bytes; its parts were counted when they were made.
            if isinstance(value, Tensor) and not is_traceable_wrapper_subclass(value):
                self._add(value.untyped_storage())
        return result

    def begin(self) -> None:
        """The peak from here on."""
        self.peak = self.live

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size).atexit = False

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _FusedAttention(TorchFunctionMode):
    """Attention that holds no map, as a device's fused kernel: fake tensors would take the two products instead.

    The operations of these two are the ones to count, so a step that counts them runs without.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        fused = torch.backends.cuda.flash_sdp_enabled()  # not in a pass that is differentiated twice
        if function is F.scaled_dot_product_attention and fused and (kwargs or {}).get("attn_mask") is None:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3])[0]
        return function(*args, **(kwargs or {}))


class _Unmoved(Replicated):
    """Leaves fake tensors where they are: torch cannot convert modules of them."""

    def place(self, task, nodes, device, dtype):
        set_precision(task, dtype)


def _materialise(task: nn.Module) -> None:
    """Fake tensors on the CPU for all that were built, on the meta device or not; what is shared stays shared."""
    fakes: dict[int, Tensor] = {}  # by the address of the tensor that they replace
    kept = []
    for module in task.modules():
        tables = [vars(each) for each in vars(module).values() if hasattr(each, "__dict__")]  # as of a noising process
        for held in (module._parameters, module._buffers, *tables):
            for name, tensor in held.items():
                if isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor):
                    kept.append(tensor)  # so that no other takes its address
                    if id(tensor) not in fakes:
                        fresh = torch.empty_like(tensor, device=CPU)
                        learns = isinstance(tensor, nn.Parameter)
                        fakes[id(tensor)] = nn.Parameter(fresh, tensor.requires_grad) if learns else fresh
                    held[name] = fakes[id(tensor)]


def _used_once(recipe: Adam) -> None:
    """One update of real numbers: a library makes constants at its first use, and these cannot be fake."""
    parameter = nn.Parameter(torch.zeros(4096))
    parameter.grad = torch.zeros(4096)
    recipe.build([parameter]).step()


def _halve(task: Distillation, dtype: torch.dtype) -> None:
    """The teacher's weights as `denoisers.freeze` holds them, for adapters on them too."""
    layers = [layer for layer in task.teacher.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    whole = {id(p): p for layer in layers for p in layer.parameters(recurse=False)}
    halves = {key: nn.Parameter(p.detach().to(dtype), requires_grad=False) for key, p in whole.items()}
    for module in task.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = halves.get(id(parameter), parameter)


def planned(
    gin_file: Sequence[str], gin_param: Sequence[str] = (), *, precision: str = "bf16", batch_size: int | None = None
) -> Plan:
    """The plan of the distillation that gin files describe, on one device.

    Args:
        gin_file: files.
        gin_param: further lines.
        precision: "fp32", "bf16", or "auto", which counts as bf16.
        batch_size: samples a step; the run's own by default.

    Raises:
        ValueError: it is not a distillation.
    """
    with torch.device("meta"):
        experiment = config.build(config.parse(gin_file, gin_param, {}))
    task, samples = experiment.task, batch_size or experiment.batch_size
    if not isinstance(task, Distillation):
        raise ValueError(f"{gin_file[-1]} trains a {type(task).__name__}: give the gin file of a distillation")
    task.critic_steps = 0  # a step of the student too
    for recipe in [each for each in vars(task).values() if isinstance(each, Adam)]:
        _used_once(recipe)
    counter = _Bytes()
    with warnings.catch_warnings(), _Fake(allow_non_fake_inputs=True), counter:
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        _materialise(task)
        _prepare(without_files(task), None if precision == "fp32" else torch.bfloat16)
        counter.begin()  # building, where a frozen network is there in float32 too, is no step
        generator = torch.Generator()
        batch = made_up_batch(task.student.denoiser.network, samples, generator)
        with _FusedAttention():
            task.step(batch, samples, generator)  # after which the optimisers hold their moments
            held = counter.live
            task.step(batch, samples, generator)
        peak = counter.peak
        flops = count_flops(lambda: task.step(batch, samples, generator))
    nodes = {name: getattr(task, name) for name in ("teacher", "student", "student_score", "ratio")}
    parameters = {name: sum(p.numel() for p in node.parameters()) for name, node in nodes.items() if node is not None}
    return Plan(parameters, flops, held / 1e9, peak / 1e9)


def bench_plan(
    gin_file: Sequence[str], gin_param: Sequence[str], *, precision: str, batch_size: int
) -> dict[str, object]:
    """The record of a plan; arguments as of ``planned``."""
    plan = planned(gin_file, gin_param, precision=precision, batch_size=batch_size)
    return {
        "bench": "plan",
        **request(gin_file, gin_param, batch_size=batch_size),
        "precision": precision,
        "parameters": plan.parameters,
        "flops": plan.flops,
        "held_gb": plan.held_gb,
        "planned_memory_gb": plan.peak_gb,
    }


def _prepare(task: Distillation, dtype: torch.dtype | None) -> None:
    task.parallel = _Unmoved()
    task.prepare(CPU, None)
    set_precision(task, dtype)
    if dtype is not None and task.teacher is not None:
        _halve(task, dtype)
