"""Compares what encoded the data with what a run's networks were trained on, before the first step."""

from __future__ import annotations

from ratiograph.core.contracts import Encoded
from ratiograph.core.foreign import shown
from ratiograph.training.experiment import Experiment

__all__ = ["check_encoders"]

UNKNOWN = (
    "their index.json does not say which autoencoder and text encoder made them, so that nobody has checked that they "
    "are this run's; shards by tools/cache_latents.py say it"
)


def check_encoders(experiment: Experiment) -> list[str]:
    """Compares the facts of the data with those of every component of the task.

    Returns:
        What the user should know, one sentence each.

    Raises:
        ValueError: two values of a fact; names both, and the remedy.
    """
    data = experiment.data
    if not isinstance(data, Encoded):
        return []
    stated = data.encoder_facts()
    for name, component in experiment.task.named_modules():
        for fact, theirs in component.encoder_facts().items() if isinstance(component, Encoded) else ():
            if fact in stated and stated[fact] != theirs:
                raise ValueError(
                    f"the data {data.describe()} were encoded with {fact} {shown(stated[fact])}, and {name} "
                    f"({type(component).__name__}) has {fact} {shown(theirs)}: run tools/cache_latents.py again with "
                    "this run's model, or give the data or the model that belongs to the other"
                )
    named = {"autoencoder", "text_encoder"} & stated.keys()
    return [] if named else [f"warning: {data.describe()}: {UNKNOWN}"]
