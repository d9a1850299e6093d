"""Decodes PNG, JPEG and WebP files to pixels, within limits on size and formats.

Pixels are uint8 v in 0..255 here and v / 127.5 - 1 in [-1, 1] outside this package's ``data`` folder.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ratiograph.core.foreign import shown

__all__ = [
    "FILE_FORMATS",
    "IMAGE_SUFFIXES",
    "PILLOW_MODES",
    "BadImage",
    "encode_png",
    "fitted",
    "on_white",
    "pixels_of",
    "read_image",
    "to_tensor",
]

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
PILLOW_MODES = {1: "L", 3: "RGB"}
FORMATS = ("PNG", "JPEG", "WEBP")  # the only decoders that bytes from elsewhere ever reach
FILE_FORMATS = (*FORMATS, "BMP", "GIF", "TIFF", "PPM")
DEEP = re.compile(r";16[BLN]")  # in Pillow's names of the bytes in a file: 16 bits a channel
MOST_PIXELS = 2**26  # 8192 x 8192: a small file can claim, and cost, any number
ORIENTATION = 0x0112  # EXIF tag


class BadImage(ValueError):
    """An image that cannot be decoded or used; the message is a phrase, to be put after the sample's name."""


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG file of ``pixels`` uint8, [H, W] (grey) or [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def _opened(source: bytes | Path, formats: Sequence[str]) -> Iterator[Image.Image]:
    """The image, undecoded; any error in the body becomes a BadImage."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as image:
            if image.width * image.height > MOST_PIXELS:
                raise BadImage(f"claims {image.width}x{image.height} pixels, more than the {MOST_PIXELS} allowed")
            if image.mode[0] in "IF" or DEEP.search(str(image.tile)):  # Pillow cuts them to 8 bits in several ways
                raise BadImage(f"has more than 8 bits a channel (colour mode {image.mode}): save it with 8")
            yield image
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage("cannot be decoded (not an image file)") from error
    except Exception as error:  # on hostile bytes a decoder raises anything: IndexError, zlib.error, MemoryError, ...
        raise BadImage(f"cannot be decoded ({shown(error)})") from error


def read_image(source: bytes | Path, formats: Sequence[str] = FORMATS) -> Image.Image:
    """An image file, decoded and turned as its EXIF data say; with ``info`` and, unless turned, ``format``.

    Args:
        source: the file, or its bytes.
        formats: Pillow's names of the formats that are allowed; `FILE_FORMATS` for files that a user names.

    Raises:
        BadImage: not an image of these formats, damaged, too large, or of more than 8 bits a channel.
    """
    with _opened(source, formats) as image:
        image.load()
        return _upright(image)


def _upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image


def pixels_of(data: bytes) -> tuple[str, np.ndarray]:
    """``(mode, pixels)``: Pillow's name of the file's colour mode, and the pixels as they are in it.

    Pixels are uint8 [1, H, W] for 'L' and [3, H, W] for 'RGB'.

    Raises:
        BadImage: as `read_image`.
    """
    image = read_image(data)
    return image.mode, _channels_first(image)


def _channels_first(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)  # a view: batching copies anyway


def fitted(data: bytes, side: int) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """The image resized until its shorter side is ``side``, antialiased, and cropped to the square in its middle.

    JPEGs at least twice too large are decoded at 1/2, 1/4 or 1/8 of their size, which their format does in a fraction
    of the time. Transparent images are put on white, grey ones and palettes become RGB, EXIF's orientation is applied.

    Args:
        data: an image file.
        side: height and width of the result in pixels.

    Returns:
        ``(pixels, geometry)``: uint8 [3, side, side], and (height, width) of the file's image with the (top, left)
        corner of the crop in the resized one.

    Raises:
        BadImage: as `read_image`.
    """
    with _opened(data, FORMATS) as image:
        width, height = image.size
        on_its_side = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
        image.draft("RGB", _scaled(width, height, side))
        image = on_white(_upright(image)).convert("RGB")
        height, width = (width, height) if on_its_side else (height, width)
        resized = _scaled(width, height, side)
        left, top = (resized[0] - side) // 2, (resized[1] - side) // 2
        return _channels_first(_part(image, resized, (left, top, left + side, top + side))), (height, width, top, left)


def _part(image: Image.Image, resized: tuple[int, int], crop: tuple[int, int, int, int]) -> Image.Image:
    """The part ``crop`` (left, top, right, bottom) of the image resized to ``resized``; no other pixel is computed."""
    if image.size == resized:
        return image if crop == (0, 0, *resized) else image.crop(crop)
    scales = image.width / resized[0], image.height / resized[1]
    box = [min(edge * scale, limit) for edge, scale, limit in zip(crop, scales * 2, image.size * 2, strict=True)]
    return image.resize((crop[2] - crop[0], crop[3] - crop[1]), Image.Resampling.BICUBIC, tuple(box))


def _scaled(width: int, height: int, side: int) -> tuple[int, int]:
    """(width, height) scaled until the shorter is ``side``."""
    shorter = min(width, height)
    return max(side, round(width * side / shorter)), max(side, round(height * side / shorter))


def on_white(image: Image.Image) -> Image.Image:
    """The image without transparency: what shows through is white."""
    if not image.has_transparency_data:
        return image
    clear = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)


def to_tensor(pixels: Sequence[np.ndarray]) -> Tensor:
    """Images uint8 [C, H, W] of one shape as float32 [B, C, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack(pixels)).float().div_(127.5).sub_(1)
