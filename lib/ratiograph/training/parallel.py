"""Several processes for one graph: each holds a copy of every network, or a shard of every weight.

With copies (``ddp``) the gradients are averaged once for each update (`averaging.Averaging`). Shards are PyTorch's
``fully_shard`` (FSDP2): the weights of a block are gathered when it runs and freed after it, its gradients are averaged
and split during the backward pass, and optimisers and averages hold only their own shard. ``hsdp`` shards over the
processes of each machine and keeps a copy on each machine: weights never travel between machines, gradients do once.
All modes take the same steps as one process. Checkpoints hold whole tensors, so a run may continue in another mode or
with another number of processes.

No process ever holds all networks whole. `building` keeps a shard of each network as soon as it is built; weights from
files stay mapped pages of the file until a shard is copied from them, and averages start as the same pages.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ratiograph.core.contracts import Denoiser
from ratiograph.core.distributed import is_main, is_sharded, rank, ranks, ranks_here
from ratiograph.networks.denoisers import place, set_precision

__all__ = ["Gathered", "Parallel", "Replicated", "Sharded", "building", "choose", "full", "spread", "spread_like"]

MODES = ("auto", "none", "ddp", "fsdp", "hsdp")
METHODS = ("encode", "decode", "log_ratio")
"""Methods of a node, beside ``forward``, that need its weights gathered."""
BLOCKS = {"ResidualBlock", "ShiftBlock", "ScaleShiftBlock", "ResnetBlock2D", "BasicTransformerBlock"}
"""Classes whose weights are gathered one block at a time; all other weights are gathered with their node."""


class Parallel:
    """Base class; on its own, every process holds a copy of every network."""

    shards = False
    """Whether a process holds only a shard of each weight."""
    parts = 1
    """Number of processes that share one copy of the weights."""

    def place(
        self, task: nn.Module, nodes: Sequence[nn.Module], device: torch.device, dtype: torch.dtype | None
    ) -> None:
        """Moves ``task`` to ``device`` and shards it if need be; call after ``copy`` and before optimisers are built.

        Args:
            task: the task with all its networks.
            nodes: its denoisers and ratio estimators, whose weights may be sharded.
            device: the device of the run.
            dtype: the autocast type of its networks; None is their own.

        Raises:
            ValueError: two nodes to be sharded have weights in common, as adapters on one base do.
        """
        place(task, device, dtype)

    def copy(self, module: nn.Module) -> nn.Module:
        """A frozen copy of ``module`` for an average; call before ``place``."""
        return copy.deepcopy(module).requires_grad_(False).eval()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gathers the networks, so that inside each process can run them alone, without gradients. All must enter."""
        yield


class Replicated(Parallel):
    """Every process holds a copy of every network; also for a single process."""


class Sharded(Parallel):
    """FSDP2 over all processes, or inside each of several groups of neighbouring processes.

    Args:
        device: the networks' device.
        groups: number of groups, each with a copy of the weights; it divides the number of processes.
    """

    shards = True

    def __init__(self, device: torch.device, groups: int = 1):
        assert ranks() % groups == 0, (ranks(), groups)
        self.device, self.groups, self.parts = device, groups, ranks() // groups
        shape = (groups, ranks() // groups) if groups > 1 else (ranks(),)
        names = ("copies", "shards")[-len(shape) :]
        self.mesh = dist.device_mesh.init_device_mesh(device.type, shape, mesh_dim_names=names)
        self._units: list[nn.Module] = []  # each gathered and freed as a whole

    def place(self, task, nodes, device, dtype):
        self.shard(nodes, dtype)
        set_precision(task, dtype)
        task.to(device)

    def copy(self, module):
        # The copy has the same memory until ``place`` copies its shard out of it.
        same = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
        return copy.deepcopy(module, same).requires_grad_(False).eval()

    def shard(self, nodes: Sequence[nn.Module], dtype: torch.dtype | None) -> None:
        """Shards the nodes' weights block by block, so that no network is ever whole on a GPU."""
        owners: dict[int, nn.Module] = {}
        for node, parameter in [(each, parameter) for each in nodes for parameter in each.parameters()]:
            if owners.setdefault(id(parameter), node) is not node:
                raise ValueError(
                    f"{type(node).__name__} shares weights with another network, which cannot be sharded: use "
                    "--parallel=ddp, as only adapters are trained"
                )
        for node in nodes:
            if any(True for _ in node.parameters()):
                self._shard(node, dtype)

    def _shard(self, node: nn.Module, dtype: torch.dtype | None) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method

        plain = MixedPrecisionPolicy(cast_forward_inputs=False)
        in_blocks = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False) if dtype else plain
        built = [module for module in node.modules() if hasattr(module, "shares")]
        for network in built:
            _move_placeholders_to_meta(network)
        node.to(memory_format=torch.contiguous_format)
        for module in node.modules():
            if type(module).__name__ in BLOCKS:
                self._add(module, in_blocks)
        self._add(node, plain)
        for network in built:
            _fill_from_shares(network, self.device)
        for name in METHODS:
            if hasattr(node, name):
                register_fsdp_forward_method(node, name)

    def _add(self, module: nn.Module, policy: object) -> None:
        from torch.distributed.fsdp import fully_shard

        # Free gathered weights after every pass: without a backward pass they would be kept, and outdated by an update.
        unit = fully_shard(module, mesh=self.mesh, reshard_after_forward=True, mp_policy=policy)
        unit.set_force_sum_reduction_for_comms(self.device.type == "cpu")  # gloo has no mean
        self._units.append(unit)

    @contextmanager
    def whole(self):
        for unit in self._units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in self._units:
                unit.set_reshard_after_forward(True, recurse=False)
                unit.reshard()


@contextmanager
def building(mode: str) -> Iterator[None]:
    """Inside, a network that is built keeps only this process's share of its random weights, in ``network.shares``.

    The random numbers are the same as without. The network's weights are NaN, without memory, until ``Sharded.place``
    fills in the shares or weights are loaded.

    Args:
        mode: as in `choose`; does nothing unless it is "fsdp" or "hsdp". Call after `distributed.start`.
    """
    if mode not in ("fsdp", "hsdp") or ranks() == 1:
        yield
        return
    parts = ranks() if mode == "fsdp" else ranks_here()

    def keep(owner: nn.Module, name: str, network: nn.Module | None) -> None:
        # A network with the flag ``filled`` takes no memory before it has weights.
        node = isinstance(owner, Denoiser) or hasattr(owner, "log_ratio")
        if name == "network" and node and not any(hasattr(module, "filled") for module in network.modules()):
            _keep_share(network, rank() % parts, parts)

    hook = nn.modules.module.register_module_module_registration_hook(keep)
    try:
        yield
    finally:
        hook.remove()


def _keep_share(network: nn.Module, part: int, parts: int) -> None:
    """Moves this process's rows of each weight, the ones that ``fully_shard`` gives it, to ``network.shares``."""
    network.shares = {}
    for name, parameter in network.named_parameters():
        rows = parameter.detach().chunk(parts)
        network.shares[name] = (rows[part] if part < len(rows) else parameter.detach()[:0]).clone()
        parameter.data = torch.full((), torch.nan, dtype=parameter.dtype).expand(parameter.shape)


def _replace_parameters(network: nn.Module, new: Mapping[int, nn.Parameter]) -> None:
    """Replaces parameters in all modules by ``new``, whose keys are the ids of the old ones."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in new:
                module._parameters[name] = new[id(parameter)]


def _move_placeholders_to_meta(network: nn.Module) -> None:
    """Moves the parameters that are still NaN, as no weights have been loaded into them, to the meta device."""
    _replace_parameters(
        network,
        {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
            for p in network.parameters()
            if p.numel() and p.detach()[(0,) * p.ndim].isnan()
        },
    )


def _fill_from_shares(network: nn.Module, device: torch.device) -> None:
    """Replaces the sharded parameters on the meta device by ``network.shares``."""
    from torch.distributed.tensor import DTensor

    new = {}
    for name, parameter in network.named_parameters():
        if parameter.is_meta:
            part = DTensor.from_local(
                network.shares.pop(name).to(device, parameter.dtype),
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
            new[id(parameter)] = nn.Parameter(part, requires_grad=parameter.requires_grad)
    _replace_parameters(network, new)
    del network.shares


def choose(mode: str, task: nn.Module, device: torch.device, held: Callable[[int], float]) -> Parallel:
    """The `Parallel` of a run.

    Args:
        mode: "none" for one process; "ddp" for copies; "fsdp" for shards over all processes; "hsdp" for shards inside
            each machine and a copy on each machine; "auto" takes the first of ddp, hsdp and fsdp under which weights,
            gradients, moments and averages fill at most half of a GPU (fsdp in any case).
        task: the task before ``prepare``.
        device: the device of the run.
        held: number of processes that share a copy -> bytes of weights, gradients, moments and averages on each device
            (`MemoryPlan.held`); called under "auto" only.

    Raises:
        ValueError: the mode is unknown, or does not suit the number of processes and machines, or the task.
    """
    if mode not in MODES:
        raise ValueError(f"--parallel={mode}: choose one of {', '.join(MODES)}")
    if ranks() == 1:
        return Replicated()
    if mode == "none":
        raise ValueError(f"--parallel=none is for one process, and {ranks()} were started: use auto, ddp or fsdp")
    several = 1 < ranks_here() < ranks() and ranks() % ranks_here() == 0
    if mode == "hsdp" and not several:
        raise ValueError(
            "--parallel=hsdp shards inside each of several machines with as many processes each, more than one; here "
            f"{ranks_here()} of {ranks()} processes are on this machine: use --parallel=fsdp"
        )
    if mode == "ddp" or (mode == "auto" and _fits(held, device, 1)):
        return Replicated()
    if not task.shardable:
        if mode == "auto":
            return Replicated()
        raise ValueError(f"--parallel={mode}: a {type(task).__name__} is not sharded; use --parallel=ddp")
    inside = mode == "hsdp" or (mode == "auto" and several and _fits(held, device, ranks_here()))
    return Sharded(device, ranks() // ranks_here() if inside else 1)


def _fits(held: Callable[[int], float], device: torch.device, parts: int) -> bool:
    """Whether ``held(parts)`` bytes are at most half of the device's memory."""
    if device.type != "cuda":
        return True
    return held(parts) <= torch.cuda.get_device_properties(device).total_memory / 2


def full(state: Any) -> Any:
    """``state``, nested containers, with its sharded tensors whole on the main process's CPU.

    The other processes get empty tensors instead. All processes must call.
    """
    if is_sharded(state):
        whole = state.full_tensor()
        return whole.cpu() if is_main() else torch.empty(0)
    if isinstance(state, Mapping):
        return {key: full(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(full(value) for value in state)
    return state


def spread(value: Any, like: Tensor | None) -> Any:
    """The whole tensor ``value`` sharded as ``like`` is; ``value`` itself if there is nothing to shard."""
    if not (is_sharded(like) and isinstance(value, Tensor) and value.shape == like.shape):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every process has read the same file: take the shard from it instead of receiving it from rank 0.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def spread_like(module: nn.Module, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The whole tensors of a ``state_dict``, sharded as those of ``module`` are."""
    here = module.state_dict()
    return {name: spread(value, here.get(name)) for name, value in saved.items()}


class Gathered(nn.Module):
    """Stands for ``module``, sharded or not, when its weights are saved: ``state_dict`` has whole tensors.

    All processes must build it; on all but the main one, the sharded tensors are empty.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self._whole = full(module.state_dict())

    def state_dict(self, *_arguments: object, **_settings: object) -> dict[str, Tensor]:
        """The tensors by the module's own names."""
        return self._whole
