"""Starts a run from the networks of another run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from ratiograph.core.files import Missing
from ratiograph.training.checkpoints import entry, latest, load_strict, steps
from ratiograph.training.parallel import spread_like

__all__ = ["WarmStart"]


class WarmStart:
    """Initialises networks from an earlier run's newest checkpoint; optimisers and step count start anew.

    f-distill starts its text-to-image runs from a reverse-KL run, so that its weighting has a trained ratio at once.

    Args:
        run: workdir of the earlier run.
        nodes: the networks to take, from ``student``, ``student_average``, ``student_score`` and ``ratio``; by default
            all that both runs have.
    """

    def __init__(self, *, run: str, nodes: Sequence[str] | None = None):
        self.run, self.nodes = run, None if nodes is None else tuple(nodes)

    @staticmethod
    def locate(*, run: str) -> None:
        """Raises a Missing that says what to do if ``run`` holds no checkpoint."""
        if not steps(Path(run) / "checkpoints"):
            raise Missing(run, f"{run} holds no checkpoint: run what it is to start from first")

    def load(self, networks: Mapping[str, nn.Module]) -> list[str]:
        """Loads the nodes into ``networks`` (by name); returns their names.

        Raises:
            ValueError: the earlier run has no checkpoint, or one of ``nodes`` is missing there or has another shape.
        """
        folder = Path(self.run) / "checkpoints"
        found = latest(folder)
        if found is None:
            raise ValueError(f"WarmStart.run={self.run!r}: {folder} holds no checkpoint; give the workdir of a run")
        saved = entry(found[1], "task", "networks", source=folder)
        taken = [n for n in networks if n in saved] if self.nodes is None else list(self.nodes)
        unknown = [name for name in taken if name not in networks]
        if unknown or not taken:
            raise ValueError(
                f"WarmStart.nodes: this graph has {', '.join(networks)}, that run {', '.join(saved)}; "
                + (f"{unknown[0]!r} is not in this graph" if unknown else "they share none")
            )
        kept = {name: spread_like(networks[name], saved[name]) for name in taken if name in saved}
        load_strict({name: networks[name] for name in taken}, kept, source=f"{self.run}'s checkpoint")
        return taken
