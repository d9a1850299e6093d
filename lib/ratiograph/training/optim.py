"""Optimisers and exponential moving averages as components.

Half-lives of averages are counted in images, the generated or real samples of the updates, so that they mean the same
at every batch size.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated

import torch
from annotated_types import Len
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ratiograph.core.averaging import Averaging
from ratiograph.core.distributed import is_sharded, ranks
from ratiograph.core.domains import Fraction, NonNegative, NonNegativeInt, Positive
from ratiograph.training.parallel import spread

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
        lr: Positive = 2e-4,
        betas: Annotated[Sequence[Fraction], Len(2, 2)] = (0.0, 0.999),
        eps: Positive = 1e-8,
        weight_decay: NonNegative = 0.0,
        warmup_steps: NonNegativeInt = 0,
        cooldown: Annotated[Sequence[NonNegativeInt], Len(2, 2)] | None = None,
        clip_norm: Positive = 10.0,
    ):
        self.lr, self.betas, self.eps, self.weight_decay = lr, tuple(betas), eps, weight_decay
        if cooldown is not None and cooldown[0] >= cooldown[1]:
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
        learning = [p for p in parameters if p.requires_grad]
        return Updater(self, learning, AdamW(self, learning))

    def moment_bytes(self, parameter: Tensor) -> int:
        """Bytes of the moments of ``parameter``: two of its own type, one where beta_1 = 0."""
        return (2 if self.betas[0] else 1) * parameter.numel() * parameter.element_size()


class AdamW:
    """AdamW by torch's fused kernels: one pass over weights and moments.

    With beta_1 = 0 the first moment is the gradient itself and is not stored. (``torch.optim.AdamW`` stores it, and
    imports torch's compiler at its first use: two seconds and 150 MB.)

    Args:
        recipe: betas, eps, weight decay.
        parameters: all of them trainable.
    """

    def __init__(self, recipe: Adam, parameters: Sequence[nn.Parameter]):
        self.recipe, self.parameters = recipe, parameters
        self.state: dict[int, dict[str, Tensor]] = {}
        """By index of the parameter, from its first gradient on: "step" [], "exp_avg_sq", and "exp_avg" if held."""

    def step(self, rate: float, skip: Tensor) -> None:
        """Updates each parameter that has a gradient.

        Args:
            rate: the learning rate.
            skip: [] float32 on the device, not synchronised; where it is 1, weights and moments do not change.
        """
        moved = [(p, p.grad, self._state_of(k)) for k, p in enumerate(self.parameters) if p.grad is not None]
        adamw(
            [p for p, _, _ in moved],
            [gradient for _, gradient, _ in moved],
            # Without a stored first moment the gradient takes its place: 0 m + 1 g leaves it as it is.
            [state.get("exp_avg", gradient) for _, gradient, state in moved],
            [state["exp_avg_sq"] for _, _, state in moved],
            [],
            [state["step"] for _, _, state in moved],
            fused=True,
            found_inf=skip,
            amsgrad=False,
            beta1=self.recipe.betas[0],
            beta2=self.recipe.betas[1],
            lr=rate,
            weight_decay=self.recipe.weight_decay,
            eps=self.recipe.eps,
            maximize=False,
        )

    def _state_of(self, k: int) -> dict[str, Tensor]:
        if k not in self.state:
            parameter = self.parameters[k]
            names = ("exp_avg", "exp_avg_sq") if self.recipe.betas[0] else ("exp_avg_sq",)
            moments = {name: torch.zeros_like(parameter) for name in names}
            self.state[k] = {"step": torch.zeros((), device=parameter.device), **moments}
        return self.state[k]

    def state_dict(self) -> dict:
        """The moments by index of the parameter."""
        return {"state": self.state}

    def load_state_dict(self, saved: dict) -> None:
        """Inverse of ``state_dict``, on the parameters' devices and in their layout.

        Raises:
            ValueError: it holds no first moments and this optimiser needs them.
        """
        for k, held in saved["state"].items():
            for name, value in self._state_of(k).items():
                if name not in held:
                    raise ValueError("the checkpoint was made with Adam.betas = (0.0, ...): resume with the same betas")
                value.copy_(spread(held[name], self.parameters[k]))


class Updater:
    """The optimiser of one network: averages gradients, clips, steps, clears gradients. Made by a recipe's ``build``.

    Args:
        recipe: learning rates and clip.
        parameters: all of them trainable.
        rule: updates them.
    """

    def __init__(self, recipe: Adam, parameters: list[nn.Parameter], rule: AdamW):
        self.recipe, self.parameters, self.rule, self.updates = recipe, parameters, rule, 0
        self.watchers: list[Callable[[Tensor], None]] = []
        """Called before each update with a flag []: 1 where the update is skipped, else 0."""
        self._averaging: Averaging | None = None

    def begin(self) -> bool:
        """Begins to average the present gradients over the ranks, which ``step`` waits for.

        Returns:
            Whether there is anything to wait for: not on one process, nor with sharded weights.
        """
        self._averaging = Averaging(self.parameters)
        return bool(self._averaging)

    def step(self) -> Tensor:
        """One update from the present gradients, averaged over the ranks; returns their norm [] before clipping.

        Where the norm is not finite, weights and moments do not change.
        """
        if self._averaging is None:
            self.begin()
        self._averaging.finish()
        self._averaging = None
        norm = nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm, foreach=True)
        norm = norm.full_tensor() if is_sharded(norm) else norm
        skip = (~norm.isfinite()).float()
        for watcher in self.watchers:
            watcher(skip)
        self.updates += 1
        self.rule.step(self.recipe.rate(self.updates), skip)
        for parameter in self.parameters:
            parameter.grad = None
        return norm.detach()

    def state_dict(self) -> dict:
        return {"updates": self.updates, "optimizer": self.rule.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        self.rule.load_state_dict(state["optimizer"])


class EMA:
    """Exponential moving average of weights: beta = 2^(-batch / h), h = min(half_life, ramp_up * images seen).

    Args:
        half_life: images after which an old weight counts half.
        ramp_up: fraction of the images seen so far that bounds the half-life early on (EDM's 0.05).
    """

    def __init__(self, *, half_life: Positive = 500_000, ramp_up: Positive = 0.05):
        self.half_life, self.ramp_up = half_life, ramp_up

    def beta(self, batch_size: int, images: int) -> float:
        """Weight of the old average when ``images`` (this batch included) have been seen."""
        return 0.5 ** (batch_size / min(self.half_life, self.ramp_up * images))

    def copy_of(self, module: nn.Module) -> nn.Module:
        """A frozen copy that ``update`` moves."""
        return copy.deepcopy(module).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, average: nn.Module, module: nn.Module, batch_size: int, images: int) -> None:
        """average <- beta average + (1 - beta) module, for every trainable parameter; buffers are copied.

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
    """The further averages by name; ValueError for a name that modules or files cannot have, or for 'raw'."""
    for name in averages or {}:
        if not re.fullmatch(r"[a-z0-9_]+", name) or name == "raw" or hasattr(nn.ModuleDict, name):
            raise ValueError(f"averages={{{name!r}: ...}}: take a name of small letters and digits, such as 'short'")
    return dict(averages or {})
