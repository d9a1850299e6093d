"""Sources of an evaluation's images: a student, a data stream, a folder or an array.

A source gives images [B, 1 or 3, H, W] in [-1, 1] by their indices, with their captions. Image i is the same in every
batch, on every rank and device.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ratiograph.core.contracts import DataStream
from ratiograph.core.domains import PositiveInt
from ratiograph.core.draws import SampleDraws
from ratiograph.core.files import Missing, expanded
from ratiograph.core.foreign import lines_of, parse_json, read_text, shown
from ratiograph.core.types import Batch, Condition
from ratiograph.data import captions as captions_format
from ratiograph.data.embedded import resolve
from ratiograph.data.images import FILE_FORMATS, BadImage, is_hidden, read_image
from ratiograph.data.stream import SampleStream
from ratiograph.evaluation.candidates import Candidate
from ratiograph.evaluation.features import resized, to_pixels
from ratiograph.networks.autoencoder import Autoencoder
from ratiograph.networks.text_encoders import CaptionEncoder
from ratiograph.tasks.distillation import Distillation

__all__ = ["CaptionedSamples", "FolderStream", "StudentSamples"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


OVERSHOOT = 8
"""Greatest absolute value of a float that can be a sample's: networks leave [-1, 1] a little, and are clipped."""


@dataclass(frozen=True)
class ImageBatch:
    """Images [B, 1 or 3, H, W] in [-1, 1] and, if they were made from captions, these [B, 1024] uint8."""

    images: Tensor
    captions: Tensor | None = None


Images = Callable[[range], Iterator[ImageBatch]]
"""Batches of the samples of a range of indices, in their order."""


class StudentSamples:
    """Samples under the task's own conditions, each from draws of its own.

    Args:
        autoencoder: decodes the samples of a student of latents.
    """

    def __init__(self, *, autoencoder: Autoencoder | None = None):
        self.autoencoder = autoencoder

    def load(self, device: torch.device) -> None:
        """Reads the networks that are needed besides the task's."""
        if self.autoencoder is not None:
            self.autoencoder.load()
            self.autoencoder.to(device)

    @torch.no_grad()
    def make(self, task: Distillation, draws: SampleDraws, candidate: Candidate) -> ImageBatch:
        """The candidate's images of ``draws``."""
        conditions = task.conditions.sampled(SampleDraws(draws.seed, draws.indices), task.student)
        return ImageBatch(self.decoded(candidate.samples(task, draws)), conditions.caption)

    def decoded(self, x0: Tensor) -> Tensor:
        """Samples => images."""
        return x0.float() if self.autoencoder is None else self.autoencoder.decode(x0.float())

    def settings(self) -> dict[str, object]:
        """What the images depend on besides the candidate, as JSON values."""
        return {"autoencoder": None if self.autoencoder is None else str(self.autoencoder.weights)}

    def notes(self) -> list[str]:
        """Sentences for ``evaluation.json`` about the samples' conditions."""
        return []


class CaptionedSamples(StudentSamples):
    """Samples under the captions of a fixed list: zero-shot COCO-30k and the like.

    Sample i has caption i // ``repeats`` and its own noise, that of (seed of the evaluation, i); images of another size
    are resized as clean-fid does, in floating point from 256 levels, and rounded to 256 levels again.

    Args:
        captions: COCO's ``captions_val2014.json``, or a text file in UTF-8 with a caption a line, whose first lines are
            the list. ``notes`` give the list's SHA-256, which shows whether two evaluations used the same list.
        encoder: of captions.
        autoencoder: decodes the samples.
        prompts: length of the list; 30,000 of COCO's 202,654 captions are drawn by ``seed``.
        repeats: samples of each caption; several are needed for in-batch similarity.
        seed: of the list.
        size: pixels a side of the evaluated images.
    """

    def __init__(
        self,
        *,
        captions: str,
        encoder: CaptionEncoder,
        autoencoder: Autoencoder | None = None,
        prompts: PositiveInt = 30_000,
        repeats: PositiveInt = 1,
        seed: int = 0,
        size: PositiveInt = 256,
    ):
        super().__init__(autoencoder=autoencoder)
        self.list, self.encoder, self.prompts, self.repeats = captions, encoder, prompts, repeats
        self.seed, self.size = seed, size

    def load(self, device):
        super().load(device)
        self.texts = coco_captions(Path(self.list), self.prompts, self.seed)
        self.encoder.load()
        self.encoder.to(device)

    @torch.no_grad()
    def make(self, task, draws, candidate):
        captions = [self.texts[index // self.repeats % len(self.texts)] for index in draws.indices]
        x0 = candidate.samples_under(task, self.encoder.encode(captions), draws)
        pixels = resized(to_pixels(self.decoded(x0)), (self.size, self.size))
        return ImageBatch(pixels.round() / 127.5 - 1, captions_format.pack(captions))

    @property
    def digest(self) -> str:
        """SHA-256 of the list, a caption a line; known after ``load``."""
        return hashlib.sha256("".join(f"{text}\n" for text in self.texts).encode()).hexdigest()

    def settings(self):
        own = {"captions": self.digest, "repeats": self.repeats, "size": self.size}
        return {**super().settings(), **own, "encoder": str(self.encoder.weights)}

    def notes(self):
        each = "a sample" if self.repeats == 1 else f"{self.repeats} samples"
        return [
            f"Samples are of {len(self.texts):,} captions of '{self.list}' (SHA-256 of the list: {self.digest}), "
            f"{each} each, judged at {self.size} x {self.size}."
        ]


def coco_captions(path: Path, prompts: int, seed: int = 0) -> list[str]:
    """A fixed list of ``prompts`` captions: the first ones of a shuffle, fixed by ``seed``, of the captions by id.

    Args:
        path: COCO's captions file, or a text file with a caption a line, whose lines are taken in order.
        prompts: length of the list.
        seed: of the shuffle.

    Raises:
        ValueError: there is no such file, it is of another kind, or it has fewer captions.
    """
    try:
        text = read_text(path)
    except ValueError as error:
        raise ValueError(f"no captions at {path}: {error}") from error
    except Missing as error:
        raise ValueError(
            f"no captions at {path}. COCO's are annotations/captions_val2014.json (39 MB) in "
            "http://images.cocodataset.org/annotations/annotations_trainval2014.zip (253 MB)"
        ) from error
    if path.suffix == ".json":
        document = parse_json(text, path)
        try:
            annotations = sorted(document["annotations"], key=lambda annotation: annotation["id"])
            found = [annotation["caption"].strip() for annotation in annotations]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no captions file of COCO ({type(error).__name__}: {error})") from error
        random.Random(seed).shuffle(found)
    else:
        found = [line.strip() for line in lines_of(text) if line.strip()]
    if len(found) < prompts:
        raise ValueError(f"{path} has {len(found):,} captions, fewer than prompts={prompts:,}")
    return found[:prompts]


def stream_images(stream: DataStream, batch_size: int) -> Images:
    """Real images in the order of the stream's first epoch of seed 0, as they are, not flipped."""
    if getattr(stream, "flip", False):
        stream = copy.copy(stream)
        stream.flip = False

    def images(indices: range) -> Iterator[ImageBatch]:
        left, batches = len(indices), stream.batches(batch_size, 0, indices.start)
        while left > 0:
            batch = next(batches).images[:left]
            left -= len(batch)
            yield ImageBatch(batch)
        close = getattr(batches, "close", None)
        if close is not None:
            close()

    return images


def stream_size(stream: DataStream) -> int | None:
    """Samples of an epoch, or None where they could only be counted by reading all of them."""
    if isinstance(stream, FolderStream):
        return len(stream)
    if isinstance(stream, SampleStream) and not stream.filtered:
        return sum(stream.count(path) for path in resolve(stream.urls))
    return None


class FolderStream:
    """The images of a folder and its subfolders, by name, or of an ``.npz``; endlessly, without hidden files.

    Args:
        path: of image files; or an ``.npz`` whose first array is uint8 [N, H, W, C] or float in [-1, 1] [N, C, H, W].
        size: crops the middle square of image files and resizes it to so many pixels a side.
    """

    def __init__(self, *, path: str, size: PositiveInt | None = None):
        self.path, self.size = path, size

    @cached_property
    def images(self) -> np.ndarray | Sequence[Path]:
        """The array, or the files.

        Raises:
            ValueError: nothing is there, or it is of another kind.
        """
        path = expanded(self.path)
        if path.suffix == ".npz":
            return _array(path)
        found = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES) if path.is_dir() else []
        files = [file for file in found if not is_hidden(file.relative_to(path).as_posix())]
        if not files:
            raise ValueError(f"{path} is neither a folder of images ({', '.join(SUFFIXES)}) nor an .npz of them")
        return files

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Endless batches from image ``start`` on, in the same order for every seed.

        Raises:
            ValueError: as ``images``; a file that cannot be decoded, or images of several sizes without ``size``.
        """
        for first in itertools.count(start, batch_size):
            indices = [index % len(self) for index in range(first, first + batch_size)]
            yield Batch(self._read(indices), Condition())

    def describe(self) -> str:
        """One line for people, from the arguments alone."""
        return f"{self.path}{f', {self.size}x{self.size}' if self.size else ''}"

    def _read(self, indices: Sequence[int]) -> Tensor:
        if isinstance(self.images, np.ndarray):
            part = torch.from_numpy(self.images[indices])
            return part.permute(0, 3, 1, 2) / 127.5 - 1 if part.dtype == torch.uint8 else part.float()
        files = [self.images[index] for index in indices]
        parts = [_image(file, self.size) for file in files]
        for file, part in zip(files, parts, strict=True):
            if part.shape != parts[0].shape:
                raise ValueError(
                    f"{file} is {part.shape[1]}x{part.shape[2]}, {files[0]} {parts[0].shape[1]}x{parts[0].shape[2]}: "
                    "give size to crop and resize all to one"
                )
        return torch.stack(parts)


def _array(path: Path) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as file:
            array = file[file.files[0]]
    except Exception as error:  # damaged archives raise zlib.error, MemoryError, NotImplementedError, ...
        raise ValueError(f"{path} is no .npz of images ({shown(error)})") from error
    pixels, floats = array.dtype == np.uint8, array.dtype.kind == "f"
    if not (pixels or floats) or array.ndim != 4 or array.shape[-1 if pixels else 1] not in (1, 3) or not array.size:
        raise ValueError(f"{path} holds {array.dtype} {array.shape}, not uint8 [N, H, W, C] or float [N, C, H, W]")
    least, most = (None, None) if pixels else (float(array.min()), float(array.max()))
    if floats and (least >= 0 or max(-least, most) > OVERSHOOT):
        raise ValueError(
            f"{path} holds floats from {least:.4g} to {most:.4g}, and images of floats are expected in [-1, 1], black "
            "at -1: scale them, or save uint8 [N, H, W, C] from 0 to 255"
        )
    return array


def _image(file: Path, size: int | None) -> Tensor:
    """One image file, [3, H, W] in [-1, 1]."""
    try:
        array = np.asarray(read_image(file, FILE_FORMATS).convert("RGB"))
    except BadImage as error:
        raise ValueError(f"{file} {error}. Leave it out, or save it anew") from error
    pixels = torch.from_numpy(array.copy()).permute(2, 0, 1).float()  # HWC => CHW
    if size is not None:
        side = min(pixels.shape[1:])
        top, left = ((length - side) // 2 for length in pixels.shape[1:])
        pixels = resized(pixels[None, :, top : top + side, left : left + side], (size, size))[0].round()
    return pixels / 127.5 - 1
