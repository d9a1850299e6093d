"""One sample as it lies in a shard, undecoded: the error that names it, and the decoding of labelled images."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ratiograph.core.foreign import shown, text_of
from ratiograph.data.images import IMAGE_SUFFIXES, PILLOW_MODES, BadImage, pixels_of
from ratiograph.data.tars import REMEDY

__all__ = ["DamagedSample", "RawImage", "RawSample", "decode", "decode_label", "image_member", "raw_image"]


class DamagedSample(ValueError):
    """A sample or a shard that cannot be used; the message names it and the remedy.

    Args:
        message: one line.
        shard: the shard's path where a sample's bytes are damaged; None where they are sound, but not what is needed.
    """

    def __init__(self, message: str, shard: str | None = None):
        super().__init__(message)
        self.shard = shard


@dataclass
class RawSample:
    """An undecoded sample: the path of its shard, and its key in the shard."""

    shard: str
    key: str

    @property
    def place(self) -> str:
        """How messages name the sample."""
        return f"sample '{shown(self.key)}' of shard {self.shard}"

    def damaged(self, problem: object) -> DamagedSample:
        """The error for this sample; ``problem`` is a phrase to be put after the sample's name."""
        return DamagedSample(f"{self.place} {problem}. {REMEDY}", self.shard)

    def decoded_caption(self, caption: bytes) -> str:
        """``caption`` as text; DamagedSample where it is not UTF-8."""
        try:
            return text_of(caption, "its caption")
        except ValueError as error:
            raise self.damaged(f"is damaged: {error}") from error


@dataclass
class RawImage(RawSample):
    """An undecoded image with its class; ``pixels`` uint8 [C, H, W] exists after the first ``decode``."""

    image: bytes
    label: bytes | None
    pixels: np.ndarray | None = None


def raw_image(path: Path, members: Mapping[str, object]) -> RawImage:
    """The sample made of its members in the shard ``path`` by suffix; DamagedSample where none is an image."""
    return RawImage(str(path), members["__key__"], image_member(path, members), members.get("cls"))


def image_member(path: Path, members: Mapping[str, object]) -> bytes:
    """The bytes of the member that is an image; DamagedSample where none is."""
    for suffix in IMAGE_SUFFIXES:
        if suffix in members:
            return members[suffix]
    raise DamagedSample(
        f"Sample '{shown(members['__key__'])}' of shard {path} has no image: its files end in "
        f"{sorted(shown(k) for k in members if not k.startswith('__'))}, an image must end in one of "
        f"{list(IMAGE_SUFFIXES)}."
    )


def decode(sample: RawImage, *, channels: int, resolution: int | None, labels: bool) -> tuple[np.ndarray, int]:
    """Decodes a sample.

    Args:
        sample: from ``shards.read_shard``.
        channels: 1 (grey) or 3 (RGB); the file must hold exactly these.
        resolution: height and width that the image must have, or None for any.
        labels: whether the sample must have a class label.

    Returns:
        ``(pixels, label)``: uint8 [channels, H, W] and the class index (-1 without ``labels``).

    Raises:
        DamagedSample: damaged image, other size or channels, missing or unreadable label; names shard and sample.
    """
    if sample.pixels is None:
        sample.pixels = _decode_image(sample, channels)
    height, width = sample.pixels.shape[1:]
    if resolution is not None and (height, width) != (resolution, resolution):
        raise DamagedSample(
            f"{sample.place} is {height}x{width} (height x width), resolution={resolution} was asked for. "
            f"Set ShardStream.resolution, or write the shards anew at {resolution}x{resolution}."
        )
    return sample.pixels, decode_label(sample) if labels else -1


def _decode_image(sample: RawImage, channels: int) -> np.ndarray:
    try:
        mode, pixels = pixels_of(sample.image)
    except BadImage as error:
        raise sample.damaged(error) from error
    if mode != PILLOW_MODES[channels]:
        raise DamagedSample(
            f"{sample.place} has colour mode {mode}, channels={channels} needs {PILLOW_MODES[channels]}. "
            "Set ShardStream.channels (1 for grey, 3 for RGB), or convert the images."
        )
    return pixels


def decode_label(sample: RawImage) -> int:
    """The sample's class index; DamagedSample where there is none, or no number."""
    if sample.label is None:
        raise DamagedSample(
            f"{sample.place} has no class label ('{shown(sample.key)}.cls'). Add the labels to the shards, or set "
            "ShardStream.labels = False to train without classes."
        )
    digits = sample.label.removeprefix(codecs.BOM_UTF8).strip()
    if not digits.isdigit() or len(digits) > 18:  # what an int64 holds
        raise DamagedSample(
            f"The class label of {sample.place} is {sample.label[:40]!r}, a whole number from 0 on was expected."
        )
    return int(digits)
