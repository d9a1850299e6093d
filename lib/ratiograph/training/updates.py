"""The optimiser steps of a training step, each taken as late as possible: just before its network runs again.

With several processes that hold copies of the weights, the gradients of one network are averaged over the ranks while
other networks run, so the gradients of two networks may exist at the same time. With one process, or with sharded
weights, there is nothing to wait for: each update is taken at once, and only one network's gradients exist.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from torch import Tensor

from ratiograph.training.optim import Updater

__all__ = ["Updates"]


class Updates:
    """The updates begun and not yet taken, in the same order on every rank.

    Args:
        optimizers: the networks' optimisers, by name.
    """

    def __init__(self, optimizers: Mapping[str, Updater]):
        self._optimizers = optimizers
        self._waiting: dict[str, Callable[[], None]] = {}
        self.norms: dict[str, Tensor] = {}
        """Gradient norm [] of each network's last update, before clipping."""

    def begin(self, name: str, then: Callable[[], None] = lambda: None) -> None:
        """Begins an update of ``name`` from its present gradients; nothing may be added to them until it is taken.

        Args:
            name: name of the network.
            then: called after the update.
        """
        assert name not in self._waiting, name
        self._waiting[name] = then
        if not self._optimizers[name].begin():
            self.finish([name])

    def finish(self, names: Collection[str] | None = None) -> None:
        """Takes the updates of ``names`` that were begun; by default all."""
        for name in [each for each in self._waiting if names is None or each in names]:
            self.norms[name] = self._optimizers[name].step()
            self._waiting.pop(name)()
