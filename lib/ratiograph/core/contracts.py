"""What the parts of a graph ask of each other: the base classes of networks, and what is known about a noisy sample.

Notation as in `types`: x_t = alpha x0 + sigma noise, p the teacher (or the data), q the student.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ratiograph.core.differentiation import twice_differentiable
from ratiograph.core.types import Batch, Condition, Encoding, Noisy

__all__ = ["DataStream", "Denoiser", "Encoded", "Evaluation", "Identified", "Needs", "Nodes", "RatioEstimator"]


class Denoiser(nn.Module):
    """Base class of mu(x_t) = E[x0 | x_t]: teacher, student score and the network inside a student.

    A subclass defines ``encode`` and ``decode``, so that features and the denoised sample come from one pass, and who
    needs only features stops at the encoder. It works under any noising process by ``noisy.rescaled()``.
    """

    shape: tuple[int, ...] | None = None
    """Shape of one sample; None where any will do."""
    class_count = 0
    """Number of classes that labels may name, 0 for a network without labels."""
    can_sample = False
    """Whether ``sample(n, generator)`` gives exact samples of the denoiser's own distribution."""

    def load(self) -> None:
        """Loads pretrained weights, if the denoiser has any. Never called in a dry run."""

    def network_facts(self) -> dict[str, str]:
        """What small files beside the weights say of the network's output, by name; without it weights mean nothing."""
        return {}

    def encode(self, noisy: Noisy, condition: Condition) -> Encoding:
        """Features of ``noisy``, and all that ``decode`` needs."""
        raise NotImplementedError

    def decode(self, encoding: Encoding) -> Tensor:
        """mu [B, ...] float32 from an encoding."""
        raise NotImplementedError

    def denoise(self, noisy: Noisy, condition: Condition) -> Tensor:
        """mu(x_t) = E[x0 | x_t] [B, ...], in the dtype of ``noisy.x_t``."""
        return self.decode(self.encode(noisy, condition))

    def forward(self, noisy: Noisy, condition: Condition) -> Tensor:
        return self.denoise(noisy, condition)


class RatioEstimator(nn.Module):
    """Base class of l = log p_t(x_t) / q_t(x_t), the logit of a real-against-student classifier of noisy samples.

    A subclass defines ``log_ratio``. What trains it is a `ratio_losses.RatioLoss`.
    """

    shape: tuple[int, ...] | None = None
    """Shape of one sample; None where it reads another node's features."""
    class_count = 0
    """Number of classes that labels may name, 0 for an estimator without labels."""
    on_teacher = False
    """Whether ``log_ratio`` reads the teacher's features."""
    on_student_score = False
    """Whether ``log_ratio`` reads the student score's features, whose encoder then learns from the ratio's loss too."""

    learns = True
    """Whether it is trained at all; an exact ratio is not."""

    @property
    def has_weights(self) -> bool:
        """Whether it has weights of its own to optimise."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def connect(self, teacher: Denoiser | None, student_score: Denoiser | None) -> None:
        """Called once by the root, before anything runs, for estimators whose sizes depend on another node."""

    def load(self) -> None:
        """Loads trained weights, if it has any to start from. Never called in a dry run."""

    def log_ratio(self, evaluation: Evaluation) -> Tensor:
        """l [B] float32 at ``evaluation.noisy``, differentiable with respect to x_t if the evaluation asks for it."""
        raise NotImplementedError


@runtime_checkable
class DataStream(Protocol):
    """Where real samples come from: `ShardStream` for images, `LatentStream` for captioned latents."""

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Endless batches in an order fixed by ``seed``, without the first ``start`` samples."""

    def describe(self) -> str:
        """One line for people, from the arguments alone."""


@runtime_checkable
class Encoded(Protocol):
    """What knows by which autoencoder and text encoders latents and captions' states are made.

    Caches of latents, networks of latents and the encoders themselves; a run needs all of them to agree.
    """

    def encoder_facts(self) -> dict[str, object]:
        """Plain values by name, as far as they are known: those of `encoder_files`, and the captions' shapes.

        ``text_tokens`` L and ``text_width`` E of ``text`` [B, L, E], ``pooled_width`` P of ``pooled`` [B, P].
        """


@runtime_checkable
class Identified(Protocol):
    """What reads files on which every step of a run depends; a run that goes on needs the same ones."""

    def file_facts(self) -> dict[str, object]:
        """Plain values that differ between different files; cheap, no large file is read whole.

        Their names hold the argument that gives the file, so that files of two paths are not compared.

        Raises:
            OSError, ValueError: a file is missing or damaged, as who reads it will say.
        """


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
    """The networks' outputs at a batch of noisy student samples, each computed at its first use and then kept.

    Each network runs at most once, whoever asks and in whatever order; no attribute carries a graph unless it says so.

    Args:
        noisy: the samples; ``x_t`` is detached here.
        x0: clean samples [B, ...] that ``noisy`` was made from, detached.
        condition: of the samples, for conditional networks.
        nodes: the networks.
        needs: which gradients with respect to x_t will be used.
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
