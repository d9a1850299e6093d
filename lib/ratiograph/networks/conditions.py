"""What the student's samples are conditioned on: p(c).

Notation: c is a ``Condition`` of B samples. Training draws one for every batch of z; previews show the same ones every
time; in an evaluation the condition of a sample depends on its index alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import torch
from annotated_types import MinLen
from torch import Tensor

from ratiograph.core.domains import NonNegativeInt, PositiveInt
from ratiograph.core.draws import SampleDraws
from ratiograph.core.types import Batch, Condition
from ratiograph.data.captions import pack
from ratiograph.networks.students import OneStep
from ratiograph.networks.text_encoders import CaptionEncoder

__all__ = ["BatchConditions", "Conditions", "UniformLabels"]


class Conditions:
    """Base class."""

    needs_data = False
    """Whether ``draw`` needs a batch of real samples."""

    def check(self, student: OneStep) -> None:
        """Raises a ValueError if ``student`` cannot be sampled under these conditions."""

    def draw(self, batch: Batch | None, samples: int, student: OneStep, generator: torch.Generator) -> Condition:
        """Conditions of ``samples`` samples to train on; ``batch`` holds the step's real samples, if there are any."""
        raise NotImplementedError

    def remember(self, batches: Iterator[Batch] | None) -> None:
        """Called once before step 1: keeps the conditions of the data that ``preview`` will need."""

    def preview(self, samples: int, student: OneStep, generator: torch.Generator) -> Condition:
        """Conditions of ``samples`` samples to show or to judge, the same at every call for a generator of one seed."""
        raise NotImplementedError

    def sampled(self, draws: SampleDraws, student: OneStep) -> Condition:
        """Conditions of the samples of ``draws``, on its device; each depends on the sample's index and draws alone."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """What ``remember`` kept, for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of ``state_dict``."""


class UniformLabels(Conditions):
    """Classes drawn uniformly for a class-conditional student, and nothing for an unconditional one."""

    def check(self, student):
        if getattr(student, "captioned", False):
            raise ValueError(
                "the student's network is conditioned on captions: bind Distillation.conditions = @BatchConditions()"
            )

    def draw(self, batch, samples, student, generator):
        return student.condition(samples, generator)

    def preview(self, samples, student, generator):
        return student.condition(samples, generator)

    def sampled(self, draws, student):
        classes = student.denoiser.network.classes
        return Condition(draws.integers(classes)) if classes else Condition()


class _Cycle(Conditions):
    """Base class: sample k has the condition k mod n of n given ones."""

    def preview(self, samples, student, generator):
        return self._take(range(samples), generator.device)

    def sampled(self, draws, student):
        return self._take(draws.indices, draws.device)

    def _take(self, indices: Sequence[int], device: torch.device) -> Condition:
        """The conditions of the samples ``indices``."""
        raise NotImplementedError


class FixedLabels(_Cycle):
    """Classes in turn: sample k has the label labels[k mod n]. To sample a finished student, not to train one.

    Args:
        labels: the n classes, at least one.
    """

    def __init__(self, *, labels: Annotated[Sequence[NonNegativeInt], MinLen(1)]):
        assert labels, "list at least one class"
        self.labels = labels

    def check(self, student):
        classes = getattr(student.denoiser.network, "classes", 0)
        unknown = [label for label in self.labels if not 0 <= label < classes]
        if unknown:
            known = f"classes 0 to {classes - 1}" if classes else "no classes"
            raise ValueError(f"class {unknown[0]} was asked for, but the student's network has {known}")

    def _take(self, indices, device):
        return Condition(torch.tensor([self.labels[k % len(self.labels)] for k in indices], device=device))


class Prompts(_Cycle):
    """Captions in turn: sample k has the caption k mod n. To sample a finished student, not to train one.

    Args:
        captions: the n captions, at least one.
        encoder: of captions, loaded, on the device of the samples.
    """

    def __init__(self, *, captions: Sequence[str], encoder: CaptionEncoder):
        assert captions, "list at least one caption"
        self.captions, self.encoder = captions, encoder

    def check(self, student):
        if not student.captioned:
            raise ValueError("captions were given, but the student's network is not told captions")

    def _take(self, indices, device):
        captions = [self.captions[k % len(self.captions)] for k in indices]
        return replace(self.encoder.encode(captions), caption=pack(captions)).to(device)


class BatchConditions(_Cycle):
    """The conditions of the step's own real batch, such as captions: the student's sample k goes with real sample k.

    All updates of a step see the same conditions with fresh noise. Previews and evaluations cycle through the first
    conditions of the data; a checkpoint holds them, so that a resumed run shows the same ones.

    Args:
        kept: number of conditions kept for previews, at least 1; a batch gives no more than it has.
    """

    needs_data = True

    def __init__(self, *, kept: PositiveInt = 64):
        self.kept, self.remembered = kept, Condition()

    def draw(self, batch, samples, student, generator):
        assert batch is not None, "the task needs data"
        assert len(batch) == samples, (len(batch), samples)
        if not batch.condition.parts():
            raise ValueError("BatchConditions: the data has neither labels nor captions, nothing to condition on")
        return batch.condition

    def remember(self, batches):
        assert batches is not None, "the task needs data"
        self.remembered = next(batches).condition.map(lambda part: part[: self.kept].clone())

    def _take(self, indices, device):
        parts = self.remembered.parts()
        if not parts:
            raise ValueError("BatchConditions has no conditions to show: call Distillation.fit with the data first")
        kept = min(len(part) for part in parts.values())
        rows = torch.tensor([index % kept for index in indices])
        return self.remembered.map(lambda part: part[rows.to(part.device)]).to(device)

    def state_dict(self):
        return self.remembered.parts()

    def load_state_dict(self, state):
        self.remembered = Condition(**state)
