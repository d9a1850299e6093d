"""Optimisers and exponential moving averages as components.

Notation: one ``image`` is one generated (or real) sample used by an update, so that averages with a half-life in
images mean the same at every batch size.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ratiograph.distributed import average_gradients, is_sharded, ranks
from ratiograph.parallel import spread

__all__ = ["EMA", "Adam"]


class Adam:
    """Recipe for AdamW (Loshchilov & Hutter 2019) with a warm-up, a cool-down and a clip on the gradient's norm.

    Args:
        lr: learning rate after the warm-up, > 0.
        betas: decay rates of the first and second moment; the one-step literature uses (0, 0.999).
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        warmup_steps: updates over which the rate rises linearly from lr / warmup_steps.
        cooldown: (first, last) updates between which the rate falls linearly to 0; None keeps it.
        clip_norm: largest norm of the gradient over all parameters, > 0.
    """

    def __init__(
        self,
        *,
        lr: float = 2e-4,
        betas: Sequence[float] = (0.0, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        cooldown: Sequence[int] | None = None,
        clip_norm: float = 10.0,
    ):
        if lr <= 0 or clip_norm <= 0:
            raise ValueError(f"Adam.lr={lr} and Adam.clip_norm={clip_norm} must be positive")
        self.lr, self.betas, self.eps, self.weight_decay = lr, tuple(betas), eps, weight_decay
        if cooldown is not None and (len(cooldown) != 2 or not 0 <= cooldown[0] < cooldown[1]):
            raise ValueError(f"Adam.cooldown={cooldown} must be two numbers of updates, 0 <= first < last")
        self.warmup_steps, self.cooldown, self.clip_norm = warmup_steps, cooldown, clip_norm

    def rate(self, update: int) -> float:
        """The learning rate of update number ``update`` = 1, 2, ..."""
        rate = self.lr * min(1.0, update / max(self.warmup_steps, 1))
        if self.cooldown is None:
            return rate
        first, last = self.cooldown
        return rate * min(1.0, max(0.0, (last - update) / (last - first)))

    def build(self, parameters: Iterable[nn.Parameter]) -> Updater:
        """The optimiser of ``parameters``; those that do not require gradients are left out."""
        return Updater(self, [p for p in parameters if p.requires_grad])


class Updater:
    """An optimiser in use: clips, steps, warms up, clears gradients. Made by ``Adam.build``."""

    def __init__(self, recipe: Adam, parameters: list[nn.Parameter]):
        self.recipe, self.parameters, self.updates = recipe, parameters, 0
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=recipe.lr,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            fused=True,
        )

    def step(self) -> Tensor:
        """One update from the gradients now held, averaged over the ranks; returns their norm [] before clipping.

        A norm that is not finite changes nothing.
        """
        average_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm, foreach=True)
        norm = norm.full_tensor() if is_sharded(norm) else norm
        # The fused update leaves weights and moments as they are where this is 1; nothing waits for the answer.
        self.optimizer.found_inf = (~norm.isfinite()).float()
        self.updates += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.updates)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.detach()

    def state_dict(self) -> dict:
        return {"updates": self.updates, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        saved = state["optimizer"]
        moments = {
            k: {name: spread(value, self.parameters[k]) for name, value in held.items()}
            for k, held in saved["state"].items()
        }
        self.optimizer.load_state_dict({**saved, "state": moments})


class EMA:
    """Exponential moving average of weights: beta = 2^(-batch / h), h = min(half_life, ramp_up * images seen).

    Args:
        half_life: images after which an old weight counts half.
        ramp_up: fraction of the images seen so far that bounds the half-life early on (EDM's 0.05).
    """

    def __init__(self, *, half_life: float = 500_000, ramp_up: float = 0.05):
        if half_life <= 0 or ramp_up <= 0:
            raise ValueError(f"EMA.half_life={half_life} and EMA.ramp_up={ramp_up} must be positive")
        self.half_life, self.ramp_up = half_life, ramp_up

    def beta(self, batch_size: int, images: int) -> float:
        """Weight of the old average when ``images`` (this batch included) have been seen."""
        return 0.5 ** (batch_size / min(self.half_life, self.ramp_up * images))

    def copy_of(self, module: nn.Module) -> nn.Module:
        """A frozen copy that ``update`` moves."""
        return copy.deepcopy(module).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, average: nn.Module, module: nn.Module, batch_size: int, images: int) -> None:
        """average <- beta average + (1 - beta) module, for every parameter that learns; buffers are copied.

        Args:
            average: made by ``copy_of``.
            module: after its update.
            batch_size: samples of the update on this process; all processes have as many.
            images: of this process so far, this update's included.
        """
        weight = 1 - self.beta(batch_size * ranks(), images * ranks())
        pairs = zip(average.parameters(), module.parameters(), strict=True)
        olds, news = zip(*((old, new) for old, new in pairs if new.requires_grad), strict=True)
        torch._foreach_lerp_(olds, news, weight)
        for old, new in zip(average.buffers(), module.buffers(), strict=True):
            old.copy_(new)


def named_averages(averages: Mapping[str, EMA] | None) -> dict[str, EMA]:
    """Recipes of further averages by name.

    Raises:
        ValueError: a name that no module and no file can have, or that stands for the weights themselves.
    """
    for name in averages or {}:
        if not re.fullmatch(r"[a-z0-9_]+", name) or name == "raw" or hasattr(nn.ModuleDict, name):
            raise ValueError(f"averages={{{name!r}: ...}}: take a name of small letters and digits, such as 'short'")
    return dict(averages or {})
