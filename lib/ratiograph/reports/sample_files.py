"""The files of generated samples: a grid, a sheet with captions, an array, a folder of images or of shards.

Notation: sample i has the index i, whichever batch or rank generates it. x0 [n, ...] are samples; images are x0
[n, C, H, W] in [-1, 1], C = 1 or 3, and pixels are uint8 rint((x0 + 1) 127.5).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from ratiograph.core import distributed
from ratiograph.core.files import clear_storage_errors, write_atomically
from ratiograph.core.foreign import shown
from ratiograph.data.images import encode_png
from ratiograph.data.latents import picture
from ratiograph.data.shards import write_shards
from ratiograph.reports.caption_sheet import caption_sheet
from ratiograph.reports.evaluation_file import read_object
from ratiograph.training.logs import make_grid

__all__ = [
    "ArrayFile",
    "CaptionSheet",
    "GridFile",
    "ImageFolder",
    "SampleFiles",
    "ShardFolder",
    "batches",
    "fill",
    "pixels",
]

SETTINGS = "samples.json"
MOST_BATCHES = 10**6


def batches(first: int, samples: int, size: int) -> list[range]:
    """Indices ``first``, ..., ``first`` + ``samples`` - 1 in consecutive batches of ``size``, the last may be less.

    Raises:
        ValueError: there would be millions of batches.
    """
    stop = first + samples
    if samples > MOST_BATCHES * size:
        raise ValueError(f"{samples:,} samples in batches of {size} are more than {MOST_BATCHES:,} batches: take fewer")
    return [range(start, min(start + size, stop)) for start in range(first, stop, size)]


def pixels(images: Tensor) -> np.ndarray:
    """Images [n, C, H, W] as uint8 [n, H, W, C].

    Raises:
        ValueError: they are no grey or colour images.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"samples of shape {list(images.shape[1:])} are no images: give --out=NAME.npz, or decode them"
        )
    levels = (images.float().clamp(-1, 1) + 1) * 127.5
    return levels.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _png(image: np.ndarray) -> bytes:
    return encode_png(image[..., 0] if image.shape[2] == 1 else image)


class SampleFiles:
    """Base class of the kinds of files; receives every batch once, in the order of the indices."""

    shared = False
    """Whether every rank writes its own batches; otherwise the first rank writes all of them."""

    def begin(self) -> None:
        """Called once, on the first rank, before any batch."""

    def lacks(self, indices: range) -> bool:
        """Whether any of these samples is not in the file yet."""
        return True

    def add(self, indices: range, x0: Tensor, labels: Tensor | None) -> None:
        """Takes the samples ``indices``, x0 [n, ...] float32 on the CPU, with their labels [n] where they have any."""
        raise NotImplementedError

    def finish(self) -> None:
        """Called once, on the first rank, after the last batch."""


class GridFile(SampleFiles):
    """One picture of all images; latents are shown as their channels side by side.

    Args:
        path: a ``.png``.
        columns: images a row.
    """

    def __init__(self, path: Path, columns: int = 8):
        self.path, self.columns = path, columns
        self.parts: list[Tensor] = []

    def add(self, indices, x0, labels):
        shown = picture(x0)
        pixels(shown[:0])  # an error at the first batch where samples are no images
        self.parts.append(shown)

    def finish(self):
        grid = Image.fromarray(make_grid(torch.cat(self.parts), self.columns))
        write_atomically(self.path, lambda file: grid.save(file, "PNG"))


class CaptionSheet(SampleFiles):
    """One picture of all samples with their captions, the images of several samplers one under another.

    Takes x0 [n, R, ...], R images of each sample.

    Args:
        path: a ``.png``.
        rows: names of the R samplers, such as teacher and student.
        captions: of the samples, in turn by their indices; without any, a sample's class or its index is written.
    """

    def __init__(self, path: Path, rows: Sequence[str], captions: Sequence[str] = ()):
        self.path, self.rows, self.captions = path, list(rows), list(captions)
        self.cells: list[np.ndarray] = []
        self.texts: list[str] = []

    def add(self, indices, x0, labels):
        shown = pixels(picture(x0.flatten(0, 1)))
        self.cells.append(shown.reshape(len(indices), len(self.rows), *shown.shape[1:]))
        classes = [None] * len(indices) if labels is None else labels.tolist()
        self.texts += [self._text(index, label) for index, label in zip(indices, classes, strict=True)]

    def _text(self, index: int, label: int | None) -> str:
        if self.captions:
            return self.captions[index % len(self.captions)]
        return f"sample {index}" if label is None else f"class {label}"

    def finish(self):
        sheet = caption_sheet(np.concatenate(self.cells), self.rows, self.texts)
        write_atomically(self.path, lambda file: sheet.save(file, "PNG"))


class ArrayFile(SampleFiles):
    """An ``.npz``: ``x0`` float32 [N, ...] or ``images`` uint8 [N, H, W, C], then ``indices`` and ``labels`` [N].

    Args:
        path: the file.
        uint8: pixels instead of the samples as they are.
    """

    def __init__(self, path: Path, uint8: bool = False):
        self.path, self.uint8 = path, uint8
        self.parts: list[np.ndarray] = []
        self.indices: list[int] = []
        self.labels: list[np.ndarray] = []

    def add(self, indices, x0, labels):
        self.parts.append(pixels(x0) if self.uint8 else x0.numpy())
        self.indices += indices
        if labels is not None:
            self.labels.append(labels.numpy())

    def finish(self):
        arrays = {"images" if self.uint8 else "x0": np.concatenate(self.parts), "indices": np.array(self.indices)}
        if self.labels:
            arrays["labels"] = np.concatenate(self.labels)
        write_atomically(self.path, lambda file: np.savez(file, **arrays))


class ImageFolder(SampleFiles):
    """``000000.png``, ... in a folder; after an interruption the next call generates only the images that are missing.

    Args:
        path: the folder.
        settings: all that the images depend on, as JSON values; written to ``samples.json``.
    """

    shared = True

    def __init__(self, path: Path, settings: Mapping[str, object]):
        self.path, self.settings = path, dict(settings)

    def begin(self):
        """Claims the folder.

        Raises:
            ValueError: it holds samples of other settings, or it cannot be written.
        """
        note = self.path / SETTINGS
        if note.is_file():
            found = read_object(note)
            differing = [key for key in found | self.settings if found.get(key) != self.settings.get(key)]
            if differing:
                pairs = {key: (shown(found.get(key)), shown(self.settings.get(key))) for key in differing}
                changes = ", ".join(f"{shown(key)}={there} (now {here})" for key, (there, here) in pairs.items())
                raise ValueError(
                    f"{self.path} holds samples of other settings: {changes}. Give another --out, or delete it"
                )
        elif next(self.path.glob("*.png"), None) is not None:
            raise ValueError(f"{self.path} holds images of unknown settings (no {SETTINGS}): give another --out")
        write_atomically(note, (json.dumps(self.settings, indent=1) + "\n").encode())

    def file(self, index: int) -> Path:
        return self.path / f"{index:06d}.png"

    def lacks(self, indices):
        return not all(self.file(index).is_file() for index in indices)

    def add(self, indices, x0, labels):
        for index, image in zip(indices, pixels(x0), strict=True):
            path = self.file(index)
            aside = path.with_name(f".{path.name}.tmp")
            with clear_storage_errors(path):
                aside.write_bytes(_png(image))
                os.replace(aside, path)


class ShardFolder(SampleFiles):
    """Webdataset shards with an index, as `data.stream.ShardStream` reads them; the key of sample i is i.

    Args:
        path: the folder; shards are named after it.
        shards: number of files.
    """

    def __init__(self, path: Path, shards: int):
        self.path, self.shards, self.samples = path, shards, []

    def begin(self):
        if self.path.exists() and (not self.path.is_dir() or next(self.path.iterdir(), None) is not None):
            raise ValueError(f"{self.path} exists already: give another --out, or delete it")

    def add(self, indices, x0, labels):
        classes = [None] * len(indices) if labels is None else labels.tolist()
        for index, image, label in zip(indices, pixels(x0), classes, strict=True):
            parts = {} if label is None else {"cls": str(label).encode()}
            self.samples.append({"__key__": f"{index:09d}", "png": _png(image), **parts})

    def finish(self):
        write_shards(self.path, self.path.name, self.samples, min(self.shards, len(self.samples)))


def fill(
    files: SampleFiles,
    parts: Sequence[range],
    make: Callable[[range], Tensor],
    labels_of: Callable[[range], Tensor | None],
    advance: Callable[[int], None] = lambda samples: None,
) -> None:
    """Generates the batches of indices ``parts``, on the ranks in turn, and writes them to ``files``.

    The content of a batch does not depend on the number of ranks, so the files are equal to the bit for any number.
    Ranks exchange tensors on the CPU, in a group of the gloo backend.

    Args:
        files: where to write; begun and finished here.
        parts: as of ``batches``.
        make: indices -> x0 [n, ...] float32 on the CPU.
        labels_of: indices -> labels [n] on the CPU, or None.
        advance: called on every rank with the number of samples that were added.
    """
    rank, ranks = distributed.rank(), distributed.ranks()
    if rank == 0:
        files.begin()
    distributed.wait_for_all()
    for start in range(0, len(parts), ranks):
        together = parts[start : start + ranks]
        if rank < len(together) and files.lacks(together[rank]):
            x0 = make(together[rank])
            if files.shared:
                files.add(together[rank], x0, labels_of(together[rank]))
            elif rank:
                dist.send(x0.contiguous(), 0)
            else:
                for indices, part in zip(together, [x0, *_others(x0, together)], strict=True):
                    files.add(indices, part, labels_of(indices))
        advance(sum(map(len, together)))
    distributed.wait_for_all()
    if rank == 0:
        files.finish()


def _others(x0: Tensor, together: Sequence[range]) -> list[Tensor]:
    """The batches of the other ranks, received by the first; ``x0`` is its own."""
    received = [torch.empty((len(indices), *x0.shape[1:])) for indices in together[1:]]
    for rank, part in enumerate(received, 1):
        dist.recv(part, rank)
    return received
