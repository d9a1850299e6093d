"""How several processes hold one graph: each a copy of every network, or each a shard of every weight.

Copies (``ddp``) average their gradients once an update (`distributed.average_gradients`). Shards are PyTorch's
``fully_shard`` (FSDP2): a block's weights are gathered when it runs and dropped after it, its gradients are averaged
and split as soon as they are known, and optimisers and averages hold their own share alone. ``hsdp`` shards over the
processes of one machine and holds the machines' copies equal, so that weights never travel between machines and
gradients do once. All take the steps of one process, and a checkpoint holds whole tensors, so a run may go on in
another mode or on another number of processes.

No process needs all networks whole to make its shards: one network at a time is built (`building`), weights from files
are the files' mapped pages until their shard is copied from them, and averages begin as the same pages.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ratiograph.core.contracts import Denoiser
from ratiograph.core.distributed import is_main, is_sharded, rank, ranks, ranks_here
from ratiograph.networks.denoisers import place, set_precision

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

__all__ = ["Gathered", "Parallel", "Replicated", "Sharded", "building", "choose", "full", "spread", "spread_like"]

MODES = ("auto", "none", "ddp", "fsdp", "hsdp")
METHODS = ("encode", "decode", "log_ratio")
"""What a node is called by, beside ``forward``."""
BLOCKS = {"ResidualBlock", "ShiftBlock", "ScaleShiftBlock", "ResnetBlock2D", "BasicTransformerBlock"}
"""Classes whose weights are gathered one block at a time; what lies between them is gathered with its node."""


class Parallel:
    """Base class."""

    shards = False
    """Whether a process holds only a share of each weight."""
    parts = 1
    """Processes that share one copy of the weights."""

    def place(
        self, task: nn.Module, nodes: Sequence[nn.Module], device: torch.device, dtype: torch.dtype | None
    ) -> None:
        """Brings ``task`` to ``device``; before optimisers are made, after copies of networks are.

        Args:
            task: with all its networks.
            nodes: its denoisers and ratio estimators, whose weights may be shared out.
            device: where it is to run.
            dtype: the autocast type of its networks; None is their own.

        Raises:
            ValueError: two nodes that are to be sharded share weights, as adapters on one base do.
        """
        place(task, device, dtype)

    def copy(self, module: nn.Module) -> nn.Module:
        """A frozen copy of ``module`` for an average, before ``place``."""
        return copy.deepcopy(module).requires_grad_(False).eval()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """While it lasts, a process runs the networks, without gradients, without the others. All must enter."""
        yield


class Replicated(Parallel):
    """Every process holds everything; so does the only one."""


class Sharded(Parallel):
    """FSDP2 over all processes, or over each of several groups of neighbouring ones.

    Args:
        device: of the networks.
        groups: number of groups, each with a copy of the weights; it divides the number of processes.
    """

    shards = True

    def __init__(self, device: torch.device, groups: int = 1):
        assert ranks() % groups == 0, (ranks(), groups)
        self.device, self.groups, self.parts = device, groups, ranks() // groups
        shape = (groups, ranks() // groups) if groups > 1 else (ranks(),)
        names = ("copies", "shards")[-len(shape) :]
        self.mesh = dist.device_mesh.init_device_mesh(device.type, shape, mesh_dim_names=names)
        self._units: list[FSDPModule] = []

    def place(self, task, nodes, device, dtype):
        self.shard(nodes, dtype)
        set_precision(task, dtype)
        task.to(device)

    def copy(self, module):
        # Of the same memory: sharding, which is next, copies each one's share out of it.
        same = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
        return copy.deepcopy(module, same).requires_grad_(False).eval()

    def shard(self, nodes: Sequence[nn.Module], dtype: torch.dtype | None) -> None:
        """Spreads the nodes' weights, block by block, so that no network is ever whole on a GPU."""
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
        travelling = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False) if dtype else plain
        built = [module for module in node.modules() if hasattr(module, "shares")]
        for network in built:
            _empty(network)
        node.to(memory_format=torch.contiguous_format)
        for module in node.modules():
            if type(module).__name__ in BLOCKS:
                self._add(module, travelling)
        self._add(node, plain)
        for network in built:
            _fill(network, self.device)
        for name in METHODS:
            if hasattr(node, name):
                register_fsdp_forward_method(node, name)

    def _add(self, module: nn.Module, policy: MixedPrecisionPolicy) -> None:
        from torch.distributed.fsdp import fully_shard

        # Gathered weights are always dropped: kept ones would be stale after a pass that no backward follows.
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
    """While it lasts, of each network that is built this process keeps its share of the random weights alone.

    The random numbers drawn are the same as without. Until ``Sharded.place`` puts the shares in their place, or weights
    are loaded, such a network's weights are NaN.

    Args:
        mode: as of `choose`; nothing is done unless it is "fsdp" or "hsdp". The processes have met.
    """
    if mode not in ("fsdp", "hsdp") or ranks() == 1:
        yield
        return
    parts = ranks() if mode == "fsdp" else ranks_here()

    def keep(owner: nn.Module, name: str, network: nn.Module | None) -> None:
        # A network that knows whether it is ``filled`` takes no memory before that.
        node = isinstance(owner, Denoiser) or hasattr(owner, "log_ratio")
        if name == "network" and node and not any(hasattr(module, "filled") for module in network.modules()):
            _keep_share(network, rank() % parts, parts)

    hook = nn.modules.module.register_module_module_registration_hook(keep)
    try:
        yield
    finally:
        hook.remove()


def _keep_share(network: nn.Module, part: int, parts: int) -> None:
    """Moves this process's rows of each weight, those that ``fully_shard`` gives it, to ``network.shares``."""
    network.shares = {}
    for name, parameter in network.named_parameters():
        rows = parameter.detach().chunk(parts)
        network.shares[name] = (rows[part] if part < len(rows) else parameter.detach()[:0]).clone()
        parameter.data = torch.full((), torch.nan, dtype=parameter.dtype).expand(parameter.shape)


def _is_placeholder(parameter: nn.Parameter) -> bool:
    return parameter.numel() > 0 and bool(parameter.detach()[(0,) * parameter.ndim].isnan())


def _exchange(network: nn.Module, made: Mapping[int, nn.Parameter]) -> None:
    """Puts ``made``, by the id of what it replaces, into all modules."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in made:
                module._parameters[name] = made[id(parameter)]


def _empty(network: nn.Module) -> None:
    """Moves the weights that have not been loaded since they were built to the meta device."""
    waiting = [p for p in network.parameters() if _is_placeholder(p)]
    meta = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad) for p in waiting}
    _exchange(network, meta)


def _fill(network: nn.Module, device: torch.device) -> None:
    """The process's shares into the sharded parameters that have only shapes."""
    from torch.distributed.tensor import DTensor

    made = {}
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
            made[id(parameter)] = nn.Parameter(part, requires_grad=parameter.requires_grad)
    _exchange(network, made)
    del network.shares


def choose(mode: str, task: nn.Module, device: torch.device, held: Callable[[int], float]) -> Parallel:
    """How the processes of this run hold ``task``.

    Args:
        mode: "none" for one process; "ddp" for copies; "fsdp" for shards over all processes; "hsdp" for shards inside
            each machine and copies between them; "auto" for copies where they take at most half of a GPU's memory, else
            shards inside each of several machines where these do, and shards over all processes elsewhere.
        task: built, not prepared.
        device: of the run.
        held: bytes of weights, gradients, moments and averages on a device when so many share them (`MemoryPlan.held`);
            asked only under "auto".

    Raises:
        ValueError: the mode is unknown, not for several processes or machines, or not for this task.
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
    """Whether what each of ``parts`` devices would hold takes at most half of its memory."""
    if device.type != "cuda":
        return True
    return held(parts) <= torch.cuda.get_device_properties(device).total_memory / 2


def full(state: Any) -> Any:
    """A state with its sharded tensors made whole on the main process's CPU; the others get empty ones. All must call.

    Args:
        state: containers of values and tensors.
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
    """The whole tensor ``value`` sharded as ``like`` is; anything else as it is."""
    if not (is_sharded(like) and isinstance(value, Tensor) and value.shape == like.shape):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every process has read the same file, so nothing need be sent.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def spread_like(module: nn.Module, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The whole tensors of a ``state_dict`` sharded as those of ``module`` are."""
    here = module.state_dict()
    return {name: spread(value, here.get(name)) for name, value in saved.items()}


class Gathered(nn.Module):
    """A module's whole tensors, to be written. All processes must make it; the main one has them.

    Args:
        module: sharded, or not.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self._whole = full(module.state_dict())

    def state_dict(self, *_arguments: object, **_settings: object) -> dict[str, Tensor]:
        """The tensors, under the module's own names."""
        return self._whole
