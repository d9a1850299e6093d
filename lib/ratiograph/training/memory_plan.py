"""Predicts the memory of a distillation from its graph alone: without weights, data or a GPU.

A *trained* parameter costs its weight, its gradient, its optimiser's moments (two float32 for Adam, one where
beta_1 = 0, two bytes for Adam8bit) and, in the student, a copy in each average. A *frozen* one costs its weight, which
is half as large in the teacher's convolutions and linear layers under bf16. The *activations*, what a forward pass
keeps for the backward, are counted by a pass on the meta device, where tensors have shapes and no contents. A GPU's
context, workspaces and fragmentation come on top of these numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ratiograph.core.tracebacks import described, out_of_memory
from ratiograph.core.types import Condition
from ratiograph.networks.guidance import Guided
from ratiograph.training.memory import available_memory, require_memory
from ratiograph.training.optim import Adam

__all__ = [
    "Activations",
    "MemoryPlan",
    "NodeMemory",
    "activations",
    "explained",
    "memory_plan",
    "render",
    "require_batch",
    "shortage",
]

NODES = ("teacher", "student", "student_score", "ratio", "objective", "denoiser")
AVERAGED = ("student", "denoiser")
FROZEN = ("teacher", "objective")
SINGLE = 4  # bytes of a float32
HALVED = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class NodeMemory:
    """Numbers of parameters, and bytes, of one node. Parameters shared with an earlier node cost nothing here."""

    name: str
    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    average: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average


@dataclass(frozen=True)
class Activations:
    """Bytes of activations of one sample in one pass of a U-Net.

    ``kept``: as the network is configured; ``whole``: without gradient checkpointing; ``block``: the maximum over
    checkpointed blocks of what a block keeps while it runs again.
    """

    kept: int
    whole: int
    block: int


@dataclass(frozen=True)
class MemoryPlan:
    """The nodes' bytes, and one sample's activations by precision (None for networks other than U-Nets of latents).

    ``passes``: number of such passes in memory at the same time: the student's and, where the target is differentiated
    through the teacher, the teacher's, of which there are two under guidance.
    """

    nodes: tuple[NodeMemory, ...]
    activations: dict[str, Activations] | None
    precision: str
    passes: int = 1

    def held_by(self, samples: int, precision: str) -> int:
        """Peak bytes of a batch's activations."""
        each = self.activations[precision]
        return samples * (self.passes * each.kept + each.block)

    def held(self, ranks: int = 1) -> float:
        """Bytes on each GPU of everything but activations, sharded over ``ranks`` processes."""
        return sum(node.total for node in self.nodes) / ranks


def _node(
    name: str, module: nn.Module, seen: set[int], precision: str, averages: int, recipe: Adam | None
) -> NodeMemory:
    weights = trained = moments = parameters = 0
    bf16_teacher = precision == "bf16" and name == "teacher"
    for owner in module.modules():
        for parameter in owner.parameters(recurse=False):
            parameters += parameter.numel()
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            half = bf16_teacher and isinstance(owner, HALVED) and parameter.dtype == torch.float32
            weights += parameter.numel() * (2 if half else parameter.element_size())
            if parameter.requires_grad and name not in FROZEN:
                trained += parameter.numel()
                moments += 0 if recipe is None else recipe.moment_bytes(parameter)
    gradients = SINGLE * trained
    return NodeMemory(name, parameters, trained, weights, gradients, moments, averages * gradients)


class _FusedAttention(torch.autograd.Function):
    """Keeps what a GPU's fused attention keeps: arguments, result, and one number for each row."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return result


class _OnGPU(TorchFunctionMode):
    """Replaces attention by `_FusedAttention`: the meta device's own would keep the whole attention map."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3])
        return function(*args, **(kwargs or {}))


class _Saved:
    """Counts the bytes of the distinct tensors that autograd keeps, without ``parameters``."""

    def __init__(self, parameters: Iterable[Tensor]):
        self.known = {parameter.untyped_storage()._cdata for parameter in parameters}
        self.kept: list[Tensor] = []
        self.total = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.kept.append(tensor)  # alive, so that no later storage gets the same address
            self.total += storage.nbytes()
        return tensor


def _condition(network: nn.Module) -> Condition:
    """A condition of one sample on the meta device."""
    text = torch.empty(1, 77, network.text_width, device="meta")
    if not getattr(network, "sized", False):
        return Condition(text=text)
    unet = network.unet.config
    pooled = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
    return Condition(text=text, pooled=torch.empty(1, pooled, device="meta"), sizes=torch.empty(1, 6, device="meta"))


def _pass(network: nn.Module) -> tuple[int, int]:
    """(bytes that a pass keeps, the maximum that one residual block or transformer keeps)."""
    saved, before, sizes = _Saved(network.parameters()), {}, [0]
    hooks = []
    for block in network.unet.modules():
        if type(block).__name__ in ("ResnetBlock2D", "Transformer2DModel"):
            hooks += [
                block.register_forward_pre_hook(lambda module, _: before.update({module: saved.total})),
                block.register_forward_hook(lambda module, *_: sizes.append(saved.total - before[module])),
            ]
    x, index = torch.empty(1, *network.shape, device="meta"), torch.empty(1, device="meta")
    saving = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor)
    with torch.enable_grad(), _OnGPU(), saving:
        network.decode(network.encode(x, index, _condition(network)))
    for hook in hooks:
        hook.remove()
    return saved.total, max(sizes)


def activations(network: nn.Module) -> dict[str, Activations]:
    """Activations by precision of ``network``, a U-Net of captioned latents on the meta device.

    For bf16 every tensor counts half, although autocast keeps some tensors of the normalisations in float32.
    """
    copied = copy.deepcopy(network)
    kept, _ = _pass(copied)
    copied.unet.disable_gradient_checkpointing()
    whole, block = _pass(copied)
    sizes = kept, whole, block if kept < whole else 0
    return {"fp32": Activations(*sizes), "bf16": Activations(*(size // 2 for size in sizes))}


def memory_plan(task: nn.Module, precision: str = "bf16") -> MemoryPlan:
    """The plan of a task built on the meta device: a `Distillation`, or the training of one denoiser.

    Args:
        task: the task; for other tasks the plan has no nodes.
        precision: "fp32" or "bf16" ("auto" counts as bf16, as on a GPU).
    """
    precision = "fp32" if precision == "fp32" else "bf16"
    averages = 1 + len(getattr(task, "averages", ()))
    seen: set[int] = set()
    nodes = []
    for name in NODES:
        module = getattr(task, name, None)
        recipe = getattr(task, "optimizer" if name == "denoiser" else f"{name}_optimizer", None)
        if isinstance(module, nn.Module):
            nodes.append(_node(name, module, seen, precision, averages if name in AVERAGED else 0, recipe))
    network = getattr(getattr(getattr(task, "student", None), "denoiser", None), "network", None)
    known = hasattr(network, "unet") and all(p.is_meta for p in network.parameters())
    counted = tuple(node for node in nodes if node.parameters)
    return MemoryPlan(counted, activations(network) if known else None, precision, _passes(task))


def _passes(task: nn.Module) -> int:
    """``MemoryPlan.passes`` of a task."""
    needs = getattr(getattr(task, "objective", None), "needs", None)
    if needs is None or not needs.teacher_gradient:
        return 1
    return 1 + (2 if any(isinstance(module, Guided) for module in task.teacher.modules()) else 1)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f}" if count >= 5e6 else "0" if not count else "<0.01"


def shortage(task: nn.Module, precision: str, device: torch.device, parts: int = 1) -> str:
    """A warning if weights, gradients, moments and averages alone will not fit, else ''.

    Args:
        task: the task; memory that its parameters take on ``device`` already counts as free.
        precision: "bf16" or "fp32".
        device: the device of the training.
        parts: number of processes that share one copy of the weights.
    """
    held = sum(parameter.nbytes for parameter in task.parameters() if parameter.device.type == device.type) / 1e9
    needed, left = memory_plan(task, precision).held(parts) / 1e9, available_memory(device) + held
    if needed <= left:
        return ""
    return (
        f"warning: the networks, gradients, optimisers and averages take about {needed:.1f} GB and {device} has "
        f"{left:.1f} GB left: shard over several GPUs (--parallel=fsdp), train adapters (gin/base/sd15_lora.gin, "
        "sdxl_lora.gin), or hold moments in 8 bits (gin/base/adam_8bit.gin)"
    )


def require_batch(shape: Sequence[int], samples: int) -> None:
    """Raises a ValueError if a step's samples alone do not fit into memory: the system would kill the process.

    Args:
        shape: of one sample.
        samples: of a step, on this process.
    """
    gigabytes = SINGLE * samples * math.prod(shape) / 1e9
    require_memory(gigabytes, torch.device("cpu"), "take a smaller --batch_size, or more processes")


@contextmanager
def explained(task: nn.Module, precision: str, batch_size: int, accumulation: int) -> Iterator[None]:
    """Turns an error of the body that says that memory does not suffice into one line with the plan and remedies.

    Args:
        task: the task that the body trains.
        precision: "bf16" or "fp32".
        batch_size: samples of a step.
        accumulation: pieces in which a step's samples pass the networks.

    Raises:
        ValueError: the body had no memory left.
    """
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        finer = next((n for n in range(2 * accumulation, batch_size + 1) if batch_size % n == 0), None)
        pieces = f"more pieces (--gin_param=Experiment.accumulation={finer}), " if finer else ""
        held = memory_plan(task, precision).held() / 1e9
        raise ValueError(
            f"memory does not suffice for {batch_size} samples a step ({described(error)}); networks, gradients, "
            f"optimisers and averages take {held:.2g} GB of it. Take {pieces}a smaller --batch_size, gradient "
            "checkpointing, or moments in 8 bits (gin/base/adam_8bit.gin)"
        ) from error


def render(plan: MemoryPlan, batch_size: int, ranks: Sequence[int] = (1, 8)) -> str:
    """The plan as a table in GB: the nodes, their sum by number of GPUs, and the activations; '' without nodes."""
    if not plan.nodes:
        return ""
    columns = ("weights", "gradients", "optimizer", "average", "total")
    names = "".join(f"{column:>11}" for column in columns)
    lines = [f"{'memory in GB, ' + plan.precision:<22}{'parameters':>14}{'trained':>14}{names}"]
    for node in plan.nodes:
        sizes = "".join(f"{_gigabytes(getattr(node, column)):>11}" for column in columns)
        lines.append(f"{node.name:<22}{node.parameters:>14,}{node.trained:>14,}{sizes}")
    for count in ranks:
        place = "on one GPU" if count == 1 else f"each, sharded over {count}"
        lines.append(f"{place:<22}{'':>72}{_gigabytes(plan.held(count)):>11}")
    for precision, each in (plan.activations or {}).items():
        again = f" + {_gigabytes(each.block)} while a block runs again" if each.block else ""
        whole = f" ({_gigabytes(each.whole)} without checkpointing)" if each.block else ""
        lines.append(f"a sample's backward, {precision}: {_gigabytes(each.kept)}{again}{whole}")
        passes = f"{plan.passes} passes" if plan.passes > 1 else "one pass"
        total = _gigabytes(plan.held_by(batch_size, precision))
        lines.append(f"a batch of {batch_size}, {passes} held at once, {precision}: {total}")
    return "\n".join(lines)
