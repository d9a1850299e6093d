"""Leaves frozen weights out of a checkpoint: every run reads them from their own file."""

from __future__ import annotations

import functools

from torch import Tensor, nn

__all__ = ["save_only"]


def save_only(module: nn.Module, part: str | None = None) -> None:
    """Lets ``module.state_dict()`` hold only the tensors with ``part`` in their names, none of them by default.

    A strict load accepts such a state and does not change the other tensors.
    """
    module.register_state_dict_post_hook(functools.partial(_leave_out, part))
    module.register_load_state_dict_pre_hook(functools.partial(_put_back, part))


def _kept(part: str | None, name: str) -> bool:
    return part is not None and part in name


def _leave_out(part: str | None, module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    for name in [name for name in state if name.startswith(prefix) and not _kept(part, name)]:
        del state[name]


def _put_back(part: str | None, module: nn.Module, state: dict[str, Tensor], prefix: str, *_) -> None:
    named = [*module.named_parameters(), *module.named_buffers()]
    state |= {f"{prefix}{name}": tensor.detach() for name, tensor in named if not _kept(part, name)}
