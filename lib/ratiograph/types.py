"""Values that travel between components.

Notation (the same in every module): ``x0`` a clean sample [B, ...], ``x_t = alpha x0 + sigma noise`` its noisy
version, ``t`` [B] the process's own time, ``alpha`` and ``sigma`` [B] the signal and noise scales at ``t``.
p is the teacher (or the data), q the student; ``log_ratio`` l = log p_t(x_t) / q_t(x_t) [B].
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ratiograph.differentiation import twice_differentiable

if TYPE_CHECKING:
    from ratiograph.denoisers import Denoiser, Encoding
    from ratiograph.ratios import RatioEstimator

__all__ = ["Batch", "Condition", "Evaluation", "Needs", "Nodes", "Noisy", "NoisySamples", "expand"]


def expand(scale: Tensor, like: Tensor) -> Tensor:
    """Views a per-sample value [B] as [B, 1, ...] so that it broadcasts over ``like`` [B, ...]."""
    return scale.reshape(-1, *[1] * (like.ndim - 1))


def _pieces(values: Tensor, pieces: int) -> list[Tensor]:
    assert len(values) % pieces == 0, (len(values), pieces)
    return list(values.split(len(values) // pieces))


@dataclass(frozen=True)
class Condition:
    """What a conditional network is told; each part is None where it is not told.

    ``labels`` [B] int64: class indices. ``augment`` [B, 9]: how each image was augmented (EDM, Appendix F), None for
    images as they are; networks without augmentation labels ignore it. ``text`` [B, L, E]: the text encoder's states of
    each caption. ``pooled`` [B, P] and ``sizes`` [B, 6]: SDXL's pooled caption and its "time ids", the original size,
    the crop's corner and the target size as (height, width) pairs in pixels. ``caption`` [B, 1024] uint8: the caption
    itself (`captions.pack`), for rewards and evaluations with text encoders of their own; it stays on the CPU.
    """

    labels: Tensor | None = None
    augment: Tensor | None = None
    text: Tensor | None = None
    pooled: Tensor | None = None
    sizes: Tensor | None = None
    caption: Tensor | None = None

    def to(self, device: torch.device) -> Condition:
        """On ``device``, all but the caption, which tokenizers read on the CPU."""
        moved = {k: v if k == "caption" else v.to(device, non_blocking=True) for k, v in self.parts().items()}
        return Condition(**moved)

    def repeat(self, times: int) -> Condition:
        """The condition of a batch that holds this one's samples ``times`` over, one whole copy after another."""
        return self.map(lambda tensor: tensor.repeat(times, *[1] * (tensor.ndim - 1)))

    def join(self, other: Condition) -> Condition:
        """This one's samples followed by ``other``'s; a part that either lacks is left out."""
        theirs = other.parts()
        return Condition(**{k: torch.cat([v, theirs[k]]) for k, v in self.parts().items() if k in theirs})

    def split(self, pieces: int) -> list[Condition]:
        """The samples in ``pieces`` runs of equal length."""
        named = self.parts()
        cut = zip(*(_pieces(tensor, pieces) for tensor in named.values()), strict=True)
        return [Condition(**dict(zip(named, each, strict=True))) for each in cut] or [self] * pieces

    def parts(self) -> dict[str, Tensor]:
        """The parts that are there, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """The condition whose parts are ``change`` of this one's."""
        return Condition(**{name: change(tensor) for name, tensor in self.parts().items()})


@dataclass(frozen=True)
class Batch:
    """Real samples. ``images`` [B, C, H, W] in [-1, 1], or latents; ``condition`` holds their labels or captions."""

    images: Tensor
    condition: Condition

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device) -> Batch:
        return Batch(self.images.to(device, non_blocking=True), self.condition.to(device))

    def split(self, pieces: int) -> list[Batch]:
        """The samples in ``pieces`` runs of equal length."""
        return [Batch(*each) for each in zip(_pieces(self.images, pieces), self.condition.split(pieces), strict=True)]


@dataclass(frozen=True)
class Noisy:
    """A sample of the forward process: ``x_t`` [B, ...] with its ``t``, ``alpha`` and ``sigma`` [B]."""

    x_t: Tensor
    t: Tensor
    alpha: Tensor
    sigma: Tensor

    def join(self, other: Noisy) -> Noisy:
        """These samples followed by ``other``'s."""
        mine, theirs = ((each.x_t, each.t, each.alpha, each.sigma) for each in (self, other))
        return Noisy(*(torch.cat(pair) for pair in zip(mine, theirs, strict=True)))

    def split(self, pieces: int) -> list[Noisy]:
        """The samples in ``pieces`` runs of equal length."""
        cut = (_pieces(each, pieces) for each in (self.x_t, self.t, self.alpha, self.sigma))
        return [Noisy(*each) for each in zip(*cut, strict=True)]

    def rescaled(self) -> tuple[Tensor, Tensor]:
        """``(x_t / alpha, sigma / alpha)``: the variance-exploding view in which EDM networks are native."""
        return self.x_t / expand(self.alpha, self.x_t), self.sigma / self.alpha


class NoisySamples(NamedTuple):
    """Noisy samples, the clean ones [B, ...] they were made from, and their condition."""

    noisy: Noisy
    x0: Tensor
    condition: Condition

    def join(self, other: NoisySamples) -> NoisySamples:
        """These, followed by ``other``."""
        return NoisySamples(
            self.noisy.join(other.noisy), torch.cat([self.x0, other.x0]), self.condition.join(other.condition)
        )

    def split(self, pieces: int) -> list[NoisySamples]:
        """The samples in ``pieces`` runs of equal length."""
        cut = self.noisy.split(pieces), _pieces(self.x0, pieces), self.condition.split(pieces)
        return [NoisySamples(*each) for each in zip(*cut, strict=True)]


@dataclass(frozen=True)
class Nodes:
    """The networks a term may ask about a noisy sample. A graph leaves out (None) those it does not have."""

    teacher: Denoiser | None = None
    student_score: Denoiser | None = None
    ratio: RatioEstimator | None = None

    def require(self, name: str, asked_by: str):
        """The node ``name``, or a ValueError that says who needs it."""
        node = getattr(self, name)
        if node is None:
            raise ValueError(f"{asked_by} needs a {name}, and this graph has none: bind Distillation.{name}")
        return node


@dataclass(frozen=True)
class Needs:
    """What the terms of an objective will ask of an evaluation, known before any network runs.

    It decides which passes keep a graph: ``ratio_gradient`` the ratio estimator's to x_t (and of the network whose
    encoder it sits on), ``teacher_gradient`` the whole teacher's to x_t, ``training`` the critics' to their weights.
    ``curvature`` says that one of these gradients is differentiated again.
    """

    ratio_gradient: bool = False
    teacher_gradient: bool = False
    training: bool = False
    curvature: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            self.ratio_gradient or other.ratio_gradient,
            self.teacher_gradient or other.teacher_gradient,
            self.training or other.training,
            self.curvature or other.curvature,
        )


class Evaluation:
    """All that is known about a batch of noisy student samples, computed when first asked for and then kept.

    Each network runs at most once, whoever asks and in whatever order; no attribute carries a graph unless it says so.

    Args:
        noisy: the samples; ``x_t`` is detached here.
        x0: clean samples [B, ...] that ``noisy`` was made from, detached.
        condition: what conditional networks are told.
        nodes: the networks.
        needs: which gradients with respect to x_t will be asked for.
    """

    def __init__(self, noisy: Noisy, x0: Tensor, condition: Condition, nodes: Nodes, needs: Needs = Needs()):
        x_t = noisy.x_t.detach()
        if needs.ratio_gradient or needs.teacher_gradient:
            x_t.requires_grad_()
        self.noisy = Noisy(x_t, noisy.t, noisy.alpha, noisy.sigma)
        self.x0, self.condition, self.nodes, self.needs = x0.detach(), condition, nodes, needs

    @cached_property
    def teacher_encoding(self) -> Encoding:
        """The teacher's encoder output; carries a graph to x_t if a gradient through it is needed."""
        teacher = self.nodes.require("teacher", "this objective")
        keep = self.needs.ratio_gradient and self.nodes.ratio is not None and self.nodes.ratio.on_teacher
        with torch.set_grad_enabled(keep or self.needs.teacher_gradient), self._pass():
            return teacher.encode(self.noisy, self.condition)

    @cached_property
    def teacher_output(self) -> Tensor:
        """mu_p(x_t) [B, ...]; carries a graph to x_t if ``needs.teacher_gradient``."""
        keep = self.needs.teacher_gradient
        encoding = self.teacher_encoding if keep else self.teacher_encoding.detach()
        with torch.set_grad_enabled(keep), self._pass():
            return self.nodes.teacher.decode(encoding)

    def _pass(self) -> AbstractContextManager:
        """The context of a pass that keeps a graph."""
        return twice_differentiable() if self.needs.curvature else nullcontext()

    @property
    def teacher_denoised(self) -> Tensor:
        """mu_p(x_t) [B, ...] without a graph."""
        return self.teacher_output.detach()

    @cached_property
    def student_score_encoding(self) -> Encoding:
        """The student score's encoder output; carries a graph while it trains, or if the ratio's gradient needs one."""
        student_score = self.nodes.require("student_score", "this objective")
        on_it = self.nodes.ratio is not None and self.nodes.ratio.on_student_score
        keep = self.needs.training or (on_it and self.needs.ratio_gradient)
        with torch.set_grad_enabled(keep), self._pass():
            return student_score.encode(self.noisy, self.condition)

    @cached_property
    def student_score_output(self) -> Tensor:
        """mu_q(x_t) [B, ...]; carries a graph to the network's weights if ``needs.training``."""
        training = self.needs.training
        encoding = self.student_score_encoding if training else self.student_score_encoding.detach()
        with torch.set_grad_enabled(training):
            return self.nodes.student_score.decode(encoding)

    @property
    def student_score_denoised(self) -> Tensor:
        """mu_q(x_t) [B, ...] without a graph."""
        return self.student_score_output.detach()

    @cached_property
    def log_ratio_output(self) -> Tensor:
        """l [B]; carries a graph to x_t if ``needs.ratio_gradient`` and to the weights if ``needs.training``."""
        with torch.set_grad_enabled(self.needs.ratio_gradient or self.needs.training), self._pass():
            return self.nodes.require("ratio", "this objective").log_ratio(self)

    @property
    def log_ratio(self) -> Tensor:
        """l = log p_t/q_t at x_t [B]."""
        return self.log_ratio_output.detach()

    @cached_property
    def log_ratio_gradient(self) -> Tensor:
        """grad_x l at x_t [B, ...]; exists when ``needs.ratio_gradient``."""
        assert self.needs.ratio_gradient, "ask for it in needs before the networks run"
        total = self.log_ratio_output.sum()
        # The tilted target differentiates the same teacher pass a second time.
        (gradient,) = torch.autograd.grad(total, self.noisy.x_t, retain_graph=self.needs.teacher_gradient)
        return gradient
