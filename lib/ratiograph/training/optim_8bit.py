"""Adam with moments of one byte each, for networks whose moments would fill most of a GPU.

The first and second moment, m and v, are stored in blocks of 256 values as x = s map(c): an 8-bit code c for each value
and one scale s for each block. ``map`` is finer near zero (Dettmers et al. 2022, arXiv 2110.02861). Updates
are computed in float32. Tensors of fewer than 4,096 values, or of a number not divisible by 256, keep float32 moments.
The package torchao does the arithmetic; it is imported when such an optimiser is built. On a GPU torch compiles it,
once for each shape, in the first update.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ratiograph.core.distributed import is_sharded
from ratiograph.training.optim import Adam, Updater

__all__ = ["Adam8bit"]

BLOCK = 256
LEAST = 4096
"""Number of values of the smallest tensor with 8-bit moments."""
MOMENTS = ("exp_avg", "exp_avg_sq")
PARTS = ("codes", "scale")
"""The tensors of an 8-bit moment; its map is a constant."""


class Adam8bit(Adam):
    """The optimiser of another recipe with 8-bit moments: 2 bytes for each weight instead of 8.

    Rates, decay, clip and skipped updates are those of ``adam``. After every update the moments are rounded, by at most
    0.7 % of the largest value in their block.

        Distillation.student_optimizer = @student/Adam8bit()
        Adam8bit.adam = @Adam()

    All bindings of ``Adam`` and ``student/Adam`` still hold. gin/base/adam_8bit.gin does this for student and student
    score. Weights must not be sharded: it does not work with --parallel=fsdp.

    Args:
        adam: the recipe.

    Raises:
        ValueError: the package torchao is not installed.
    """

    def __init__(self, *, adam: Adam):
        if importlib.util.find_spec("torchao") is None:
            raise _missing()
        vars(self).update(vars(adam))
        self.adam = adam

    def build(self, parameters: Iterable[nn.Parameter]) -> Updater:
        """The optimiser of ``parameters``; those that do not require gradients are left out.

        Raises:
            ValueError: the weights are sharded, or torchao cannot be imported.
        """
        learning = [p for p in parameters if p.requires_grad]
        if any(is_sharded(p) for p in learning):
            raise ValueError(
                "Adam8bit holds the moments of whole weights: use --parallel=ddp, or @Adam(), whose moments are shared "
                "out with the weights"
            )
        return Updater(self, learning, BlockwiseAdamW(self, learning))

    @staticmethod
    def moment_bytes(parameter: Tensor) -> int:
        """Bytes of the moments of ``parameter``: codes of a byte with their scales and maps."""
        count = parameter.numel()
        if count < LEAST or count % BLOCK:
            return len(MOMENTS) * count * parameter.element_size()
        return len(MOMENTS) * (count + 4 * (count // BLOCK) + 4 * 256)


def _missing(why: str = "") -> ValueError:
    return ValueError(f"Adam8bit needs the package torchao{why}: pip install 'torchao>=0.18'")


class BlockwiseAdamW:
    """AdamW by ``torchao.optim.AdamW8bit``: an optimiser for each parameter, so that one can be undone at a time.

    Args:
        recipe: betas, eps, weight decay.
        parameters: all of them trainable, none sharded.

    Raises:
        ValueError: torchao cannot be imported.
    """

    def __init__(self, recipe: Adam, parameters: Sequence[nn.Parameter]):
        try:
            from torchao.optim import AdamW8bit
        except ImportError as error:
            raise _missing(f" ({error})") from error
        settings = {"betas": recipe.betas, "eps": recipe.eps, "weight_decay": recipe.weight_decay}
        self.parameters = parameters
        self.optimizers = [AdamW8bit([p], lr=recipe.lr, block_size=BLOCK, **settings) for p in parameters]

    @torch.no_grad()
    def step(self, rate: float, skip: Tensor) -> None:
        """Updates each parameter that has a gradient.

        Args:
            rate: the learning rate.
            skip: [] float32 on the device, not synchronised; where it is 1, weights and moments do not change.
        """
        skipped = skip.bool()
        for k, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                self._move(k, rate, skipped)

    def _move(self, k: int, rate: float, skipped: Tensor) -> None:
        if not self.optimizers[k].state:
            self._start(k)
        changing = [self.parameters[k].detach(), *self._held(k).values()]
        before = [tensor.clone() for tensor in changing]
        self._update(k, rate, compiled=changing[0].is_cuda)
        for now, then in zip(changing, before, strict=True):
            now.copy_(torch.where(skipped, then, now))

    def _update(self, k: int, rate: float, compiled: bool) -> None:
        optimizer = self.optimizers[k]
        optimizer.param_groups[0]["lr"].fill_(rate)
        with nullcontext() if compiled else torch.compiler.set_stance("force_eager"):
            optimizer.step()

    def _start(self, k: int) -> None:
        """Creates a parameter's moments, zeros, by an update with a zero gradient that is then undone."""
        parameter, state = self.parameters[k], self.optimizers[k].state
        gradient, before = parameter.grad, parameter.detach().clone()
        parameter.grad = torch.zeros_like(parameter)
        self._update(k, 0.0, compiled=False)
        parameter.grad = gradient
        parameter.copy_(before)
        # The count lies on the parameter's device, so that skipping an update needs no synchronisation.
        state[parameter]["step"] = state[parameter]["step"].to(parameter.device)
        for tensor in self._held(k).values():
            tensor.zero_()

    def _held(self, k: int) -> dict[str, Tensor]:
        """The tensors of a parameter's state by name; {} before its first gradient."""
        state = self.optimizers[k].state.get(self.parameters[k], {})
        held = {}
        for name, value in state.items():
            coded = hasattr(value, PARTS[0])
            held |= {f"{name}.{part}": getattr(value, part) for part in PARTS} if coded else {name: value}
        return held

    @property
    def state(self) -> dict[int, dict[str, Tensor]]:
        """By index of the parameter, from its first gradient on: "step" [], and the moments or their codes."""
        return {k: self._held(k) for k, optimizer in enumerate(self.optimizers) if optimizer.state}

    def state_dict(self) -> dict:
        """The state by index of the parameter; plain tensors."""
        return {"state": self.state}

    @torch.no_grad()
    def load_state_dict(self, saved: dict) -> None:
        """Inverse of ``state_dict``, on the parameters' devices.

        Raises:
            ValueError: the moments are of another optimiser.
        """
        for k, theirs in saved["state"].items():
            self._start(k)
            ours = self._held(k)
            if ours.keys() != theirs.keys():
                raise ValueError(
                    f"the checkpoint holds {', '.join(theirs)} of a weight, and Adam8bit {', '.join(ours)}: resume "
                    "with the optimiser that it was made with"
                )
            for name, tensor in ours.items():
                tensor.copy_(theirs[name])
