"""What pretrained rewards of images share: pixels as a vision tower expects them, captions, files, decoding of latents.

Notation: images [B, 3, H, W] in [-1, 1], whatever lies outside clamped as a saved image would be; a *tower* is the
network of one modality, its *embedding* a vector [E] for each image or caption.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ratiograph.algebra.rewards import Reward
from ratiograph.core.differentiation import recomputed_alike
from ratiograph.core.files import Missing
from ratiograph.core.types import Condition
from ratiograph.data import captions
from ratiograph.networks.autoencoder import Autoencoder
from ratiograph.networks.weights.pipeline_files import HUB, gated, missing_package
from ratiograph.networks.weights.weight_files import differences, listed

__all__ = ["DecodedReward"]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels in [0, 1], by channel: those of OpenAI's CLIP, which every reward here was trained with."""


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


class Remembered:
    """A least-recently-used store of what batches of captions give, so that none is embedded twice in a step.

    Batches, not captions: an embedding may differ in its last bit with those beside it, and a resumed run, whose store
    is empty, is to see the same.

    Args:
        compute: the tensors [N, ...] of N captions.
        capacity: batches kept.
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
            rows = self.compute(distinct)
            self.batches[batch] = rows[[distinct.index(text) for text in batch]]
            while len(self.batches) > self.capacity:
                self.batches.popitem(last=False)
        self.batches.move_to_end(batch)
        return self.batches[batch]


# --- files ------------------------------------------------------------------------------------------------------------


def place_of(source: str, asked_by: str, hint: str, patterns: Sequence[str]) -> Path:
    """The file or folder that ``source`` is; files of the hub are downloaded to huggingface_hub's cache.

    Args:
        source: a path, or ``hf://OWNER/NAME``.
        asked_by: what names the source, for errors.
        hint: how large the files are and which command fetches them.
        patterns: the files wanted of the hub.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the hub does not give it.
    """
    if not source.startswith(HUB):
        path = Path(source).expanduser()
        if not path.exists():
            raise Missing(source, f"nothing at {asked_by}={source!r}: {hint}")
        return path
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise missing_package("huggingface_hub", asked_by) from error
    try:
        return Path(snapshot_download(source.removeprefix(HUB), allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise gated(source, f"rerun, or {hint}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"cannot fetch {asked_by}={source!r} ({type(error).__name__}): check the name and the connection, or on a "
            f"machine that is online {hint}"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of a state dict saved by torch, of which no code is run.

    Raises:
        ValueError: the file is torn, or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, RuntimeError, UnpicklingError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is no file of tensors, whole and with nothing else in it ({type(error).__name__}): fetch it again"
        ) from error
    state = state.get("state_dict", state)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def fill(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copies ``tensors`` into those of ``module``, which keep their dtype and device: each with its shape, or nothing.

    Raises:
        ValueError: a tensor is missing, left over or of another shape.
    """
    found = list(differences("", module.state_dict(), tensors))
    if found:
        raise ValueError(f"{path} is not the model it should be: {listed(found)}. Give the published file")
    module.load_state_dict(tensors, strict=True)


# --- rewards ----------------------------------------------------------------------------------------------------------


class PretrainedReward(Reward):
    """Base class: a frozen reward of images, always in evaluation mode and outside autocast.

    ``score`` says log R of images; ``load`` fills the networks, which have no weights before.
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
                f"{name} judges RGB images [B, 3, H, W], not samples {list(x0.shape[1:])}: hold it in a DecodedReward, "
                "if these are latents"
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
    """``build()``, frozen, its weights as they lie in memory: drawing them would take longer than reading them."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        return build().requires_grad_(False).eval()


class DecodedReward(Reward):
    """log R of latents: the held reward of the images they decode to, differentiable through the decoder.

    Several rewards of the same images are one ``SumReward`` in here, so that a latent is decoded once. In the backward
    neither the decoder's activations nor the reward's are held for more than a few samples: both run again there.

    Args:
        reward: the reward of images [B, 3, H, W] in [-1, 1].
        autoencoder: decodes latents; it runs and is checkpointed in chunks of its own.
        chunk: images judged at a time, at least 1.
        checkpointing: where gradients are needed, keep only the images and judge each chunk again in the backward.

    Raises:
        ValueError: for a chunk of less than one sample.
    """

    def __init__(self, *, reward: Reward, autoencoder: Autoencoder, chunk: int = 8, checkpointing: bool = True):
        super().__init__()
        if chunk < 1:
            raise ValueError(f"DecodedReward.chunk={chunk} must be at least 1")
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
            again = self.checkpointing and images.requires_grad
            judge = self._judge_again if again else self.reward
            starts = range(0, len(images), self.chunk)
            return torch.cat([judge(*self._rows(images, condition, slice(k, k + self.chunk))) for k in starts])

    @staticmethod
    def _rows(images: Tensor, condition: Condition, rows: slice) -> tuple[Tensor, Condition]:
        return images[rows], condition.map(lambda part: part[rows])

    def _judge_again(self, images: Tensor, condition: Condition) -> Tensor:
        again = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": recomputed_alike}
        return checkpoint(self.reward, images, condition, **again)
