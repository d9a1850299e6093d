"""The updates of a step, each taken when its network is needed next.

On several processes with copies of the weights, the gradients of a network travel to their means over the ranks while
other networks run. Those of two networks then exist at the same time, which one process, or one with shards, never
holds: there each update is taken at once, as no gradient travels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from torch import Tensor

from ratiograph.training.optim import Updater

__all__ = ["Updates"]


class Updates:
    """Updates that were begun, in order, the same on every rank.

    Args:
        optimizers: of the networks, by name.
    """

    def __init__(self, optimizers: Mapping[str, Updater]):
        self._optimizers = optimizers
        self._waiting: dict[str, Callable[[], None]] = {}
        self.norms: dict[str, Tensor] = {}
        """Of the gradient of each network's last update, [] before clipping."""

    def begin(self, name: str, then: Callable[[], None] = lambda: None) -> None:
        """An update of ``name`` from the gradients now held, to which nothing may be added before it is taken.

        Args:
            name: of the network.
            then: called after the update.
        """
        assert name not in self._waiting, name
        self._waiting[name] = then
        if not self._optimizers[name].begin():
            self.finish([name])

    def finish(self, names: Collection[str] | None = None) -> None:
        """Takes the updates of ``names`` that were begun; all of them by default."""
        for name in [each for each in self._waiting if names is None or each in names]:
            self.norms[name] = self._optimizers[name].step()
            self._waiting.pop(name)()
