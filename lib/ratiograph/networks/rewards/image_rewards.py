"""What pretrained rewards of images share: preprocessing, cached captions, reading of files, decoding of latents.

Notation: images [B, 3, H, W] in [-1, 1], clamped to that range as in a saved image; a *tower* is the
network of one modality, its *embedding* a vector [E] for each image or caption.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ratiograph.algebra.rewards import Reward
from ratiograph.core.domains import PositiveInt
from ratiograph.core.files import Missing, expanded
from ratiograph.core.types import Condition
from ratiograph.data import captions
from ratiograph.networks.autoencoder import Autoencoder
from ratiograph.networks.checkpointing import directly, recomputed
from ratiograph.networks.weights.pipeline_files import HUB, gated, missing_package
from ratiograph.networks.weights.weight_files import differences, listed, plain_names

__all__ = ["DecodedReward"]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of pixels in [0, 1] by channel: OpenAI's CLIP's, with which every reward was trained."""


# --- pixels -----------------------------------------------------------------------------------------------------------


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    if pixels.shape[2:] == (height, width):
        return pixels
    return F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)


def cropped(images: Tensor, size: int) -> Tensor:
    """Pixels [B, 3, size, size] in [0, 1]: the shorter side resized to ``size`` (bicubic), the middle cut out."""
    pixels = (images.clamp(-1, 1) + 1) / 2
    height, width = pixels.shape[2:]
    short = min(height, width)
    pixels = _resize(pixels, height * size // short, width * size // short)
    top, left = ((side - size) // 2 for side in pixels.shape[2:])
    return pixels[:, :, top : top + size, left : left + size]


def padded(images: Tensor, size: int) -> Tensor:
    """Pixels [B, 3, size, size] in [0, 1]: the longer side resized to ``size`` (bicubic), the rest black."""
    pixels = (images.clamp(-1, 1) + 1) / 2
    height, width = pixels.shape[2:]
    long = max(height, width)
    pixels = _resize(pixels, round(height * size / long), round(width * size / long))
    rows, columns = (size - side for side in pixels.shape[2:])
    return F.pad(pixels, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def normalised(pixels: Tensor) -> Tensor:
    """``pixels`` in [0, 1] less their mean, in units of their standard deviation, by channel."""
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std


# --- captions ---------------------------------------------------------------------------------------------------------


class CaptionCache:
    """A least-recently-used cache of the embeddings of batches of captions, so that none is embedded twice in a step.

    Whole batches are kept and not single captions, because the last bit of an embedding may depend on the others in its
    batch, and a resumed run, whose cache is empty, must see the same.

    Args:
        compute: N captions => their tensors [N, ...].
        capacity: number of batches kept.
    """

    def __init__(self, compute: Callable[[list[str]], Tensor], capacity: int = 8):
        self.compute, self.capacity = compute, capacity
        self.batches: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """The tensors [B, ...] of ``texts``."""
        batch = tuple(texts)
        if batch not in self.batches:
            distinct = list(dict.fromkeys(batch))
            self.batches[batch] = self.compute(distinct)[[distinct.index(text) for text in batch]]
            if len(self.batches) > self.capacity:
                self.batches.popitem(last=False)
        self.batches.move_to_end(batch)
        return self.batches[batch]


# --- files ------------------------------------------------------------------------------------------------------------


def path_of(source: str, argument: str, hint: str, patterns: Sequence[str]) -> Path:
    """The file or folder that ``source`` names; files of the hub are downloaded to huggingface_hub's cache.

    Args:
        source: a path, or ``hf://OWNER/NAME``.
        argument: the argument that ``source`` was given as, such as ``CLIPReward.weights``, for errors.
        hint: the command that downloads the files and their size, for errors.
        patterns: the files to download from the hub.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the hub does not give it.
    """
    if not source.startswith(HUB):
        path = expanded(source)
        if not path.exists():
            raise Missing(source, f"nothing at {argument}={source!r}: {hint}")
        return path
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise missing_package("huggingface_hub", argument) from error
    try:
        return Path(snapshot_download(source.removeprefix(HUB), allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise gated(source, f"rerun, or {hint}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"cannot fetch {argument}={source!r} ({type(error).__name__}): check the name and the connection, or on a "
            f"machine that is online {hint}"
        ) from error


def fill(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copies ``tensors`` into those of ``module``, which keep their dtype and device.

    Raises:
        ValueError: a tensor is missing, left over or of another shape; then ``module`` is unchanged.
    """
    tensors = plain_names(tensors, module.state_dict())
    found = list(differences("", module.state_dict(), tensors))
    if found:
        raise ValueError(f"{path} is not the model it should be: {listed(found)}. Give the published file")
    module.load_state_dict(tensors, strict=True)


# --- rewards ----------------------------------------------------------------------------------------------------------


class PretrainedReward(Reward):
    """Base class: a frozen reward of images, always in evaluation mode and outside autocast.

    A subclass gives ``score``, log R of images, and ``load``, before which the networks have no weights.
    """

    loaded = False

    def train(self, mode: bool = True) -> PretrainedReward:
        """Stays in evaluation mode: it is frozen."""
        return super().train(False)

    def score(self, images: Tensor, condition: Condition) -> Tensor:
        """log R [B] of ``images`` [B, 3, H, W] in the networks' own dtype."""
        raise NotImplementedError

    def log_reward(self, x0, condition):
        name = type(self).__name__
        if not self.loaded:
            raise ValueError(f"{name} has no weights yet: call load() first")
        if x0.ndim != 4 or x0.shape[1] != 3:
            raise ValueError(
                f"{name} judges RGB images [B, 3, H, W], not samples {list(x0.shape[1:])}: for latents put it into a "
                "DecodedReward"
            )
        dtype = next(self.parameters()).dtype
        with torch.autocast(x0.device.type, enabled=False):
            return self.score(x0.to(dtype), condition)

    def captions_of(self, condition: Condition) -> list[str]:
        """The captions of ``condition``.

        Raises:
            ValueError: it has none.
        """
        if condition.caption is None:
            raise ValueError(
                f"{type(self).__name__} needs captions: shards with captions, and Distillation.conditions = "
                "@BatchConditions()"
            )
        return captions.unpack(condition.caption)


def empty(build: Callable[[], nn.Module]) -> nn.Module:
    """``build()``, frozen and with uninitialised weights: drawing them would take longer than reading the files."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        return build().requires_grad_(False).eval()


class DecodedReward(Reward):
    """log R of latents: a reward of the images they decode to, differentiable through the decoder.

    For several rewards of the same images give a ``SumReward``, so that a latent is decoded once. Decoder and reward
    run again in the backward pass, so that their activations are kept for a few samples at a time.

    Args:
        reward: the reward of images [B, 3, H, W] in [-1, 1].
        autoencoder: decodes latents, in chunks of its own, with its own checkpointing.
        chunk: images judged at a time, at least 1.
        checkpointing: where gradients are needed, keep only the images and judge each chunk again in the backward pass.
    """

    def __init__(self, *, reward: Reward, autoencoder: Autoencoder, chunk: PositiveInt = 8, checkpointing: bool = True):
        super().__init__()
        self.reward, self.autoencoder = reward, autoencoder.requires_grad_(False)
        self.chunk, self.checkpointing = chunk, checkpointing

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    def load(self) -> None:
        self.autoencoder.load()
        self.reward.load()

    def log_reward(self, x0, condition):
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiable):
            images = self.autoencoder.decode(x0)
            judge = partial(recomputed if self.checkpointing and images.requires_grad else directly, self.reward)
            chunks = [itemgetter(slice(k, k + self.chunk)) for k in range(0, len(images), self.chunk)]
            return torch.cat([judge(rows(images), condition.map(rows)) for rows in chunks])
