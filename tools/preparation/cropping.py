"""Images prepared for shards: colours, crop, size and encoding.

Pixels are uint8; sizes are (width, height), as Pillow has them.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from preparation.image_bytes import Damaged
from ratiograph.data.images import FILE_FORMATS, PILLOW_MODES, on_white, read_image

__all__ = ["Preparation", "centre_crop", "plain", "upright"]

SUFFIXES = {"PNG": "png", "JPEG": "jpg"}
ENCODINGS = {"png": {"format": "PNG"}, "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0}}


def plain(image: Image.Image, mode: str) -> Image.Image:
    """The image in colour mode ``mode``, converted as Dhariwal & Nichol 2021 do: transparency is dropped."""
    return image if image.mode == mode else image.convert(mode)


def upright(image: Image.Image, mode: str) -> Image.Image:
    """The image as a viewer shows it: transparent parts on white."""
    return plain(on_white(image), mode)


def centre_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The centre square of ``image`` at ``resolution`` x ``resolution``, as Dhariwal & Nichol 2021 make it.

    The image is halved by box averages while its shorter side is at least twice the resolution, then scaled to it by
    bicubic interpolation, then cropped. An image that has the resolution is unchanged.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """An image as its source has it => the file that goes into a shard.

    A file that is a PNG or JPEG of the right size and colours already is kept byte for byte.

    Args:
        resolution: height and width in pixels of the result (``centre_crop``); None keeps every image's own.
        channels: 1 (grey) or 3 (RGB).
        format: png or jpg; None keeps files as they are where that is possible.
        new_format: png or jpg, of images that are not kept where ``format`` is None.
        normalize: (image, colour mode) -> image in that mode.
    """

    resolution: int | None
    channels: int
    format: str | None
    new_format: str
    normalize: Callable[[Image.Image, str], Image.Image]

    def __call__(self, data: bytes | np.ndarray) -> tuple[str, bytes, tuple[int, int]]:
        """(suffix, file, (width, height)) of an image file, or of pixels uint8 [H, W, 3].

        Raises:
            Damaged: the image cannot be decoded.
        """
        try:
            image = Image.fromarray(data) if isinstance(data, np.ndarray) else read_image(data, FILE_FORMATS)
            ready = self._ready(image)
        except Exception as error:  # damaged files raise whatever their bytes happen to mean
            raise Damaged(str(error) or type(error).__name__) from error
        suffix = SUFFIXES.get(image.format)
        if ready is image and suffix is not None and self.format in (None, suffix):
            return suffix, data, ready.size
        return self._encoded(ready)

    def _ready(self, image: Image.Image) -> Image.Image:
        image = self.normalize(image, PILLOW_MODES[self.channels])
        if self.resolution is None or image.size == (self.resolution, self.resolution):
            return image
        return centre_crop(image, self.resolution)

    def _encoded(self, image: Image.Image) -> tuple[str, bytes, tuple[int, int]]:
        suffix, buffer = self.format or self.new_format, io.BytesIO()
        image.info = {}  # pixels alone: no profile, no comment
        image.save(buffer, **ENCODINGS[suffix])
        return suffix, buffer.getvalue(), image.size
