"""Wrappers of a denoiser, usually of the teacher: classifier-free guidance and clipping. Each is a denoiser itself.

Notation: mu(x_t, c) is the wrapped denoiser's estimate under the condition c, mu(x_t) the one without a class or
caption; an `Unconditional` gives the condition of the latter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ratiograph.core.contracts import Denoiser
from ratiograph.core.domains import Positive
from ratiograph.core.files import Missing, expanded, sampled_digest
from ratiograph.core.foreign import parse_json
from ratiograph.core.types import Condition, Encoding, Noisy
from ratiograph.data.latents import ENCODERS, shapes
from ratiograph.networks.weights.weight_files import read_tensors

__all__ = ["Clipped", "EmptyPrompt", "Guided", "NoCaption", "NoLabel", "Unconditional"]


class Unconditional(nn.Module):
    """Base class: the condition c without its class or caption."""

    def load(self) -> None:
        """Reads files, if it needs any. Never called in a dry run."""

    def forward(self, condition: Condition) -> Condition:
        """The unconditional counterpart of ``condition``, with as many samples.

        Raises:
            ValueError: ``condition`` has no class or caption to guide towards.
        """
        raise NotImplementedError


class NoLabel(Unconditional):
    """The label -1, "no class" to networks trained with ``label_dropout`` and to ``GaussianMixture``."""

    def forward(self, condition):
        if condition.labels is None:
            raise ValueError("Guided needs class labels: give the student's network classes, or drop the guidance")
        return replace(condition, labels=torch.full_like(condition.labels, -1))


class _NoText(Unconditional):
    def parts(self, condition: Condition) -> dict[str, Tensor]:
        """The caption's parts of ``condition``.

        Raises:
            ValueError: it has none.
        """
        if condition.text is None:
            raise ValueError("Guided needs captions: bind Distillation.conditions = @BatchConditions()")
        return {name: part for name, part in condition.parts().items() if name in ("text", "pooled")}


class NoCaption(_NoText):
    """Zeros in place of the caption's states, as SDXL base was trained."""

    def forward(self, condition):
        return replace(condition, **{name: torch.zeros_like(part) for name, part in self.parts(condition).items()})


class EmptyPrompt(_NoText):
    """The text encoder's states of the empty prompt, as Stable Diffusion 1.x was trained.

    Args:
        file: safetensors file with ``text`` [L, E] and, for a network that takes it, ``pooled`` [P].
    """

    def __init__(self, *, file: str):
        super().__init__()
        self.file = file
        self.register_buffer("text", None, persistent=False)
        self.register_buffer("pooled", None, persistent=False)

    @staticmethod
    def locate(*, file: str) -> None:
        """Raises a FileNotFoundError that says how to make the file if there is none."""
        if not expanded(file).is_file():
            raise Missing(
                file,
                f"no file at EmptyPrompt.file={file!r}: save the text encoder's states of the prompt '' there, "
                "with tools/cache_latents.py --empty_prompt=FILE ('text' [L, E], safetensors, 77 x 768 for SD 1.5)",
            )

    def load(self) -> None:
        """As ``Unconditional.load``.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it does not hold the states.
        """
        self.locate(file=self.file)
        tensors = read_tensors(expanded(self.file))[0]
        if "text" not in tensors or tensors["text"].ndim != 2:
            raise ValueError(f"EmptyPrompt.file={self.file!r} holds no tensor 'text' [L, E]: encode the prompt '' anew")
        self.text, self.pooled = tensors["text"].float(), tensors.get("pooled")

    def encoder_facts(self) -> dict[str, object]:
        """As of `contracts.Encoded`: the states' shapes, and the encoders that the file's header names."""
        tensors, header = read_tensors(expanded(self.file))
        named = parse_json(header.get(ENCODERS, "{}"), self.file)
        stated = named if isinstance(named, dict) else {}
        return stated | shapes({name: tensor.shape for name, tensor in tensors.items()})

    def file_facts(self) -> dict[str, object]:
        """As of `contracts.Identified`."""
        return {f"file {self.file}": sampled_digest([expanded(self.file)])}

    def forward(self, condition):
        return replace(condition, **{name: self._empty(name, part) for name, part in self.parts(condition).items()})

    def _empty(self, name: str, part: Tensor) -> Tensor:
        """The empty prompt's states ``name``, once for each sample of ``part`` [B, ...]."""
        empty = getattr(self, name)
        if empty is None or empty.shape != part.shape[1:]:
            found = "nothing" if empty is None else list(empty.shape)
            raise ValueError(f"EmptyPrompt.file={self.file!r} has {found} as {name}, captions {list(part.shape[1:])}")
        return empty.to(part.dtype).expand_as(part)


class _Wrapper(Denoiser):
    """Base class: has the weights, shape and features of the denoiser it wraps."""

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser

    def load(self) -> None:
        self.denoiser.load()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.denoiser.shape

    @property
    def class_count(self) -> int:
        """Number of classes that labels may name."""
        return self.denoiser.class_count

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of each feature map, finest first."""
        return self.denoiser.feature_channels


@dataclass(frozen=True)
class _GuidedEncoding(Encoding):
    """The ``conditional`` half's encoding, and the inputs of the unconditional half, which runs in ``decode``."""

    conditional: Encoding | None = None
    noisy: Noisy | None = None
    condition: Condition | None = None

    def detach(self) -> _GuidedEncoding:
        conditional = self.conditional.detach()
        return replace(self, features=conditional.features, embedding=conditional.embedding, conditional=conditional)


class Guided(_Wrapper):
    """mu = mu(x_t) + s (mu(x_t, c) - mu(x_t)): classifier-free guidance (Ho & Salimans 2022).

    Scores combine alike, s_guided = s(x_t) + s (s(x_t, c) - s(x_t)), the score of p_t(x_t) p_t(c | x_t)^s up to a
    constant; for s other than 0 and 1 these are not the noisy marginals of one distribution of x0, hence
    ``can_sample`` is False. The features are those of the conditional half. Guidance doubles the cost of a pass:
    ``denoise`` runs both halves as one batch of 2B samples; ``encode`` runs the conditional half alone, which is enough
    for features, and ``decode`` the unconditional one.

    Args:
        denoiser: a conditional denoiser that was trained without its condition too.
        guidance_scale: s; 1 is no guidance, 0 ignores the condition.
        unconditional: gives the condition of mu(x_t); the label -1 by default.
    """

    def __init__(self, *, denoiser: Denoiser, guidance_scale: float, unconditional: Unconditional | None = None):
        super().__init__(denoiser)
        self.guidance_scale = guidance_scale
        self.unconditional = NoLabel() if unconditional is None else unconditional

    def load(self) -> None:
        super().load()
        self.unconditional.load()

    def encode(self, noisy: Noisy, condition: Condition) -> Encoding:
        conditional = self.denoiser.encode(noisy, condition)
        return _GuidedEncoding(
            conditional.features, conditional.embedding, conditional=conditional, noisy=noisy, condition=condition
        )

    def decode(self, encoding: Encoding) -> Tensor:
        unconditional = self.denoiser.denoise(encoding.noisy, self.unconditional(encoding.condition))
        return torch.lerp(unconditional, self.denoiser.decode(encoding.conditional), self.guidance_scale)

    def denoise(self, noisy: Noisy, condition: Condition) -> Tensor:
        """mu(x_t) [B, ...], both halves in one pass of 2B samples."""
        twice = Noisy(*(torch.cat([v, v]) for v in (noisy.x_t, noisy.t, noisy.alpha, noisy.sigma)))
        both = self.denoiser.denoise(twice, condition.join(self.unconditional(condition)))
        conditional, unconditional = both.chunk(2)
        return torch.lerp(unconditional, conditional, self.guidance_scale)


class Clipped(_Wrapper):
    """mu clamped to [-limit, limit], the range of the data ("static thresholding").

    This clips the estimate, not the norm of the score: each coordinate of the score (alpha mu - x_t) / sigma^2 ends
    up between (-alpha limit - x_t) / sigma^2 and (alpha limit - x_t) / sigma^2, which still grows as the noise falls.
    An exact denoiser of data within the limits never leaves them, so only error and guidance are clipped, and where
    they are, the gradient with respect to x_t (``RewardTilted``'s) is 0. f-distill, Appendix D.5, reports that "clipped
    teacher score prevented divergence" under strong guidance without saying what was clipped; this is our reading.
    Wrap it round ``Guided``: clipping before guidance would not bound the result.

    Args:
        denoiser: the denoiser whose estimates are clipped.
        limit: bound of |mu|, > 0; 1 for images in [-1, 1].
    """

    def __init__(self, *, denoiser: Denoiser, limit: Positive = 1.0):
        super().__init__(denoiser)
        self.limit = limit

    @property
    def can_sample(self) -> bool:
        """Whether the wrapped denoiser can: clipping changes estimates, not the distribution they are of."""
        return self.denoiser.can_sample

    def sample(self, samples: int, generator: torch.Generator, condition: Condition | None = None) -> Tensor:
        """The wrapped denoiser's exact samples [samples, ...], where it has them."""
        return self.denoiser.sample(samples, generator, condition)

    def encode(self, noisy: Noisy, condition: Condition) -> Encoding:
        return self.denoiser.encode(noisy, condition)

    def decode(self, encoding: Encoding) -> Tensor:
        return self.denoiser.decode(encoding).clamp(-self.limit, self.limit)
