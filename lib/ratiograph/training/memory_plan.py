"""How much memory a distillation will take, from its graph alone: no weights, no data, no GPU.

Notation: a *trained* parameter costs its weight, its gradient, its optimiser's moments (two float32 of Adam, one where
beta_1 = 0, two bytes of Adam8bit), and for the student a copy in the average; a *frozen* one its weight, in the teacher
half as large under bf16 in convolutions and linear layers. What a pass keeps for its backward, the *activations*, is
counted by running it on the meta device, where tensors have shapes and no contents. Bytes are what tensors hold: a
GPU's own context, workspaces and fragmentation come on top.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ratiograph.core.types import Condition
from ratiograph.networks.guidance import Guided
from ratiograph.training.memory import available_memory
from ratiograph.training.optim import Adam

__all__ = ["Activations", "MemoryPlan", "NodeMemory", "activations", "memory_plan", "render", "shortage"]

NODES = ("teacher", "student", "student_score", "ratio", "objective", "denoiser")
AVERAGED = ("student", "denoiser")
FROZEN = ("teacher", "objective")
SINGLE = 4
HALVED = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class NodeMemory:
    """Bytes of one node; parameters that an earlier node holds already are not counted again."""

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
    """Bytes of one sample that one pass of a U-Net keeps for its backward.

    ``kept``: as the network is configured; ``whole``: without gradient checkpointing; ``block``: the most that one
    checkpointed block keeps while it runs again.
    """

    kept: int
    whole: int
    block: int


@dataclass(frozen=True)
class MemoryPlan:
    """The nodes' bytes, and a sample's activations by precision; None for networks that are no U-Nets of latents.

    ``passes`` of that size are held at once: the student's, and with a tilt by an exact Jacobian the teacher's, which
    are two where it is guided.
    """

    nodes: tuple[NodeMemory, ...]
    activations: dict[str, Activations] | None
    precision: str
    passes: int = 1

    def held_by(self, samples: int, precision: str) -> int:
        """Bytes of the activations of a batch at their peak."""
        each = self.activations[precision]
        return samples * (self.passes * each.kept + each.block)

    def held(self, ranks: int = 1) -> float:
        """Bytes on each GPU for everything but activations, all of it sharded over ``ranks``."""
        return sum(node.total for node in self.nodes) / ranks


def _bytes(owner: nn.Module, parameter: nn.Parameter, halved: bool) -> int:
    half = halved and isinstance(owner, HALVED) and parameter.dtype == torch.float32
    return parameter.numel() * (2 if half else parameter.element_size())


def _node(
    name: str, module: nn.Module, seen: set[int], precision: str, averages: int, recipe: Adam | None
) -> NodeMemory:
    weights = trained = moments = parameters = 0
    for owner in module.modules():
        for parameter in owner.parameters(recurse=False):
            parameters += parameter.numel()
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            weights += _bytes(owner, parameter, precision == "bf16" and name == "teacher")
            if parameter.requires_grad and name not in FROZEN:
                trained += parameter.numel()
                moments += 0 if recipe is None else recipe.moment_bytes(parameter)
    moved = SINGLE * trained
    return NodeMemory(name, parameters, trained, weights, moved, moments, averages * moved)


class _FusedAttention(torch.autograd.Function):
    """Keeps what a GPU's fused attention keeps: its arguments, its result, and a number a row."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError


class _OnGPU(TorchFunctionMode):
    """Attention as on a GPU: on the meta device it would be two products with the whole map between them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3])
        return function(*args, **(kwargs or {}))


class _Saved:
    """Counts the bytes of distinct tensors that autograd keeps, parameters left out."""

    def __init__(self, parameters: Iterable[Tensor]):
        self.known = {parameter.untyped_storage()._cdata for parameter in parameters}
        self.kept: list[Tensor] = []
        self.total = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.kept.append(tensor)  # so that no later storage takes its place
            self.total += storage.nbytes()
        return tensor


def _told(network: nn.Module) -> Condition:
    text = torch.empty(1, 77, network.text_width, device="meta")
    if not getattr(network, "sized", False):
        return Condition(text=text)
    unet = network.unet.config
    pooled = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
    return Condition(text=text, pooled=torch.empty(1, pooled, device="meta"), sizes=torch.empty(1, 6, device="meta"))


def _pass(network: nn.Module) -> tuple[int, int]:
    """(bytes that a pass keeps, the most that one residual block or transformer keeps)."""
    saved, largest, before = _Saved(network.parameters()), [0], {}
    blocks = [block for holder in network.unet.modules() if isinstance(holder, nn.ModuleList) for block in holder]
    inner = [block for block in blocks if type(block).__name__ in ("ResnetBlock2D", "Transformer2DModel")]
    hooks = []
    for block in inner:
        hooks.append(block.register_forward_pre_hook(lambda module, _: before.update({id(module): saved.total})))
        hooks.append(
            block.register_forward_hook(
                lambda module, *_: largest.__setitem__(0, max(largest[0], saved.total - before[id(module)]))
            )
        )
    x, index = torch.empty(1, *network.shape, device="meta"), torch.empty(1, device="meta")
    hooks_of_autograd = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor)
    with torch.enable_grad(), _OnGPU(), hooks_of_autograd:
        network.decode(network.encode(x, index, _told(network)))
    for hook in hooks:
        hook.remove()
    return saved.total, largest[0]


def activations(network: nn.Module) -> dict[str, Activations]:
    """What one sample's pass through ``network``, a U-Net of captioned latents on the meta device, keeps by precision.

    In bf16 every tensor is taken for half as large; autocast keeps some of the norms' in float32 too.
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
        task: the task; of others nothing is known, and the plan has no nodes.
        precision: "fp32" or "bf16" ("auto" counts as bf16, as on a GPU).
    """
    precision = "fp32" if precision == "fp32" else "bf16"
    named = {name: getattr(task, name, None) for name in NODES}
    named = {name: node for name, node in named.items() if isinstance(node, nn.Module)}
    seen: set[int] = set()
    kept = 1 + len(getattr(task, "averages", ()))
    nodes = tuple(
        _node(name, node, seen, precision, kept if name in AVERAGED else 0, _recipe(task, name))
        for name, node in named.items()
    )
    network = getattr(getattr(named.get("student"), "denoiser", None), "network", None)
    known = hasattr(network, "unet") and all(p.is_meta for p in network.parameters())
    counted = tuple(node for node in nodes if node.parameters)
    return MemoryPlan(counted, activations(network) if known else None, precision, _passes(task))


def _recipe(task: nn.Module, name: str) -> Adam | None:
    """The optimiser's of one node, where it has one."""
    return getattr(task, "optimizer" if name == "denoiser" else f"{name}_optimizer", None)


def _passes(task: nn.Module) -> int:
    needs = getattr(getattr(task, "objective", None), "needs", None)
    if needs is None or not needs.teacher_gradient:
        return 1
    return 1 + (2 if any(isinstance(module, Guided) for module in task.teacher.modules()) else 1)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f}" if count >= 5e6 else "0" if not count else "<0.01"


def shortage(task: nn.Module, precision: str, device: torch.device, parts: int = 1) -> str:
    """A warning where weights, gradients, moments and averages alone will not fit; '' where they will.

    Args:
        task: built; what it holds already counts as free.
        precision: "bf16" or "fp32".
        device: where it will train.
        parts: processes that share one copy of the weights.
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


def render(plan: MemoryPlan, batch_size: int, ranks: Sequence[int] = (1, 8)) -> str:
    """The plan as a table in GB: a line a node, their sum by number of GPUs, and the activations; '' without nodes."""
    if not plan.nodes:
        return ""
    columns = ("weights", "gradients", "optimizer", "average", "total")
    head = f"{'memory in GB, ' + plan.precision:<22}{'parameters':>14}{'trained':>14}" + "".join(
        f"{c:>11}" for c in columns
    )
    lines = [head]
    for node in plan.nodes:
        sizes = "".join(f"{_gigabytes(getattr(node, column)):>11}" for column in columns)
        lines.append(f"{node.name:<22}{node.parameters:>14,}{node.trained:>14,}{sizes}")
    for count in ranks:
        told = "on one GPU" if count == 1 else f"each, sharded over {count}"
        lines.append(f"{told:<22}{'':>72}{_gigabytes(plan.held(count)):>11}")
    for precision, each in (plan.activations or {}).items():
        again = f" + {_gigabytes(each.block)} while a block runs again" if each.block else ""
        whole = f" ({_gigabytes(each.whole)} without checkpointing)" if each.block else ""
        lines.append(f"a sample's backward, {precision}: {_gigabytes(each.kept)}{again}{whole}")
        passes = f"{plan.passes} passes" if plan.passes > 1 else "one pass"
        total = _gigabytes(plan.held_by(batch_size, precision))
        lines.append(f"a batch of {batch_size}, {passes} held at once, {precision}: {total}")
    return "\n".join(lines)
