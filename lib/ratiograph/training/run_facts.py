"""Facts of the files that a run reads, by which one that goes on, or its student, is refused other files.

Notation: facts are plain values by name, those of a run by component: ``data``, ``teacher (StableDiffusion)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from torch import nn

from ratiograph.core.contracts import Denoiser, Identified
from ratiograph.core.foreign import shown
from ratiograph.training.experiment import Experiment

__all__ = ["NETWORK", "Facts", "check_facts", "network_facts", "run_facts"]

NETWORK = "network"
"""The key of `network_facts` in the header of final weights."""

Facts = Mapping[str, Mapping[str, object]]


def _named(name: str, component: object) -> str:
    return f"{name} ({type(component).__name__})" if name else type(component).__name__


def run_facts(experiment: Experiment) -> dict[str, dict[str, object]]:
    """The facts of the data and of every component of the task; of those without any, and of missing files, none."""
    found: dict[str, dict[str, object]] = {}
    for name, component in (("data", experiment.data), *experiment.task.named_modules()):
        if isinstance(component, Identified):
            with suppress(OSError, ValueError):  # who reads the file will say what is wrong
                found[_named(name, component)] = component.file_facts()
    return {name: facts for name, facts in found.items() if facts}


def network_facts(module: nn.Module) -> dict[str, dict[str, object]]:
    """`Denoiser.network_facts` of every denoiser in ``module`` that has some."""
    parts = [(name, part) for name, part in module.named_modules() if isinstance(part, Denoiser)]
    return {_named(name, part): part.network_facts() for name, part in parts if part.network_facts()}


def check_facts(here: Facts, there: object, source: object, remedy: str) -> None:
    """Raises a ValueError, with the remedy, if a fact ``here`` is another than that stored in ``source``.

    Args:
        here: the facts of this run's components.
        there: the stored ones, of any version; a component or fact that only one side has is not compared.
        source: what holds them, for the message.
        remedy: what to do, after "Put back the file that was there, or".
    """
    for component, facts in here.items():
        stored = there.get(component) if isinstance(there, Mapping) else None
        for name, value in facts.items() if isinstance(stored, Mapping) else ():
            if stored.get(name, value) != value:
                raise ValueError(
                    f"{shown(source)}: {shown(name)} of {component} was {shown(stored[name])} and is {shown(value)}. "
                    f"Put back the file that was there, or {remedy}"
                )
