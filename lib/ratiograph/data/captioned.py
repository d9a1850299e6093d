"""Images with captions from webdataset shards, as img2dataset writes them for LAION, COYO or COCO.

Members of a sample: ``<key>.jpg`` (or png, webp), ``<key>.txt`` the caption in UTF-8, ``<key>.json`` the image's other
fields. Without a ``.txt`` the caption is the ``caption`` of the ``.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Interval, Len

from ratiograph.core.domains import Fraction, NonNegativeInt, PositiveInt, UnitInterval
from ratiograph.core.foreign import parse_json, shown
from ratiograph.core.types import Batch, Condition
from ratiograph.data.captions import pack
from ratiograph.data.filters import Filters
from ratiograph.data.images import BadImage, fitted, to_tensor
from ratiograph.data.raw_samples import DamagedSample, RawSample, image_member
from ratiograph.data.stream import SampleStream

__all__ = ["CaptionStream", "CaptionedStream"]

LARGEST_JSON = 2**24
"""Bytes of a sample's ``.json``, which holds some fields; parsed, it takes many times as much memory."""


@dataclass
class RawCaptioned(RawSample):
    """An undecoded caption: the members ``.txt`` and ``.json``, and the image where the stream reads images."""

    txt: bytes | None
    json: bytes | None
    image: bytes | None = None

    @cached_property
    def fields(self) -> Mapping[str, object]:
        """The fields of the ``.json``, by names in lower case; empty without one."""
        if self.json and len(self.json) > LARGEST_JSON:
            raise self.damaged(f"is damaged: its .json has {len(self.json)} bytes, more than {LARGEST_JSON}")
        try:
            fields = parse_json(self.json or b"{}", "its .json")
        except ValueError as error:
            raise self.damaged(f"is damaged: {error}") from error
        if not isinstance(fields, dict):
            raise self.damaged("is damaged: its .json is no object with named fields")
        return {name.lower(): value for name, value in fields.items()}

    @cached_property
    def caption(self) -> str:
        """The caption without white space around it; DamagedSample where there is none."""
        if self.txt is None and not isinstance(self.fields.get("caption", 0), str | None):
            raise DamagedSample(
                f"{self.place} has no caption ('{shown(self.key)}.txt', or 'caption' in its .json): write the "
                "captions into the shards, or read the images alone with ShardStream"
            )
        text = (self.fields["caption"] or "") if self.txt is None else self.decoded_caption(self.txt)
        text = text.encode(errors="replace").decode()  # json can hold halves of characters
        return text.removeprefix("\ufeff").strip()


class CaptionStream(SampleStream):
    """Batches of captions alone, for a generator that needs no real images; shards may hold images too.

    ``Batch.images`` is empty [B, 0]. Arguments are those of `CaptionedStream`.

    Raises:
        ValueError: an argument outside its domain.
    """

    def __init__(
        self,
        *,
        urls: str,
        minimum_aesthetic: float | None = None,
        minimum_side: NonNegativeInt | None = None,
        maximum_watermark: UnitInterval | None = None,
        maximum_nsfw: str | UnitInterval | None = None,
        caption_length: Annotated[Sequence[NonNegativeInt], Len(2, 2)] | None = None,
        shuffle_buffer: NonNegativeInt = 5000,
        workers: Annotated[int, Interval(ge=0, le=1000)] = 0,
        prefetch: PositiveInt = 4,
        memory_megabytes: NonNegativeInt = 64,
        max_damaged: Fraction = 0.0,
    ) -> None:
        super().__init__(urls, shuffle_buffer, workers, prefetch, memory_megabytes, max_damaged)
        self.minimum_aesthetic, self.minimum_side = minimum_aesthetic, minimum_side
        self.maximum_watermark, self.maximum_nsfw = maximum_watermark, maximum_nsfw
        self.caption_length = caption_length
        self.filters = Filters(
            stream=type(self).__name__,
            minimum_aesthetic=minimum_aesthetic,
            minimum_side=minimum_side,
            maximum_watermark=maximum_watermark,
            maximum_nsfw=maximum_nsfw,
            caption_length=caption_length,
        )

    @property
    def filtered(self) -> bool:
        return bool(self.filters)

    def raw(self, path: Path, members: Mapping[str, bytes]) -> RawCaptioned:
        return RawCaptioned(str(path), members["__key__"], members.get("txt"), members.get("json"))

    def rejection(self, raw: RawCaptioned) -> str | None:
        return self.filters.rejects(raw.place, raw.caption, lambda: raw.fields)

    def empty_message(self) -> str:
        return f"the filters of {type(self).__name__} leave no sample of {self.urls}: loosen them"

    def prepared(self, raw: RawCaptioned) -> str:
        self.rejection(raw)  # its errors, which ``rejects`` does not raise if ``tolerant``
        return raw.caption

    def collated(self, raw, prepared, positions, seed) -> Batch:
        """``condition.caption`` uint8 [B, 1024], `captions.pack`."""
        return Batch(torch.zeros(len(prepared), 0), Condition(caption=pack(prepared)))

    def describe(self) -> str:
        """One line for people, from the arguments alone."""
        return f"{self.urls}: captions{', filtered' if self.filters else ''}"


class CaptionedStream(CaptionStream):
    """Batches of images with their captions, shuffled anew every epoch, without end.

    Images are resized until their shorter side is ``resolution``, antialiased, and cropped to the square in the middle.
    Nothing is read before ``batches`` is called. Arguments not listed are those of `ShardStream`.

    Args:
        urls: paths of tar files with braces ('data/laion-{00000..01023}.tar', several joined by '::'), also
            'https://...', 's3://...' and 'pipe:COMMAND'.
        resolution: height and width of the batches' images in pixels.
        sizes: whether to give SDXL's sizes, ``condition.sizes`` int64 [B, 6]: the original's height and
            width (``original_height`` and ``original_width`` in the .json, or the image file's own), the top and left
            of the crop in the resized image, and the target's height and width.
        minimum_aesthetic: least score of LAION's aesthetic predictor, about 0 to 10; None, here and below, is any.
        minimum_side: least pixels of the original's shorter side, by the .json.
        maximum_watermark: greatest probability of a watermark, in [0, 1].
        maximum_nsfw: greatest of 'UNLIKELY', 'UNSURE' and 'NSFW', or greatest probability of being unsafe, in [0, 1].
        caption_length: (least, most) characters of the caption. Captions may be empty; past 1,024 bytes they are cut.
        shuffle_buffer: undecoded samples held to draw from, of 0.05 to 0.1 MB each for JPEGs of 512 pixels, by each
            worker.

    Raises:
        ValueError: an argument outside its domain.
    """

    def __init__(
        self,
        *,
        urls: str,
        resolution: PositiveInt = 512,
        sizes: bool = False,
        minimum_aesthetic: float | None = None,
        minimum_side: NonNegativeInt | None = None,
        maximum_watermark: UnitInterval | None = None,
        maximum_nsfw: str | UnitInterval | None = None,
        caption_length: Annotated[Sequence[NonNegativeInt], Len(2, 2)] | None = None,
        shuffle_buffer: NonNegativeInt = 1000,
        workers: Annotated[int, Interval(ge=0, le=1000)] = 0,
        prefetch: PositiveInt = 4,
        memory_megabytes: NonNegativeInt = 64,
        max_damaged: Fraction = 0.0,
    ) -> None:
        if resolution < 1:
            raise ValueError(f"CaptionedStream.resolution is {resolution}: give pixels.")
        super().__init__(
            urls=urls,
            minimum_aesthetic=minimum_aesthetic,
            minimum_side=minimum_side,
            maximum_watermark=maximum_watermark,
            maximum_nsfw=maximum_nsfw,
            caption_length=caption_length,
            shuffle_buffer=shuffle_buffer,
            workers=workers,
            prefetch=prefetch,
            memory_megabytes=memory_megabytes,
            max_damaged=max_damaged,
        )
        self.resolution, self.sizes = resolution, sizes

    def raw(self, path: Path, members: Mapping[str, bytes]) -> RawCaptioned:
        raw = super().raw(path, members)
        raw.image = image_member(path, members)
        return raw

    def prepared(self, raw: RawCaptioned):
        """(pixels uint8 [3, resolution, resolution], the six numbers of SDXL, the caption)."""
        caption = super().prepared(raw)
        try:
            pixels, (height, width, top, left) = fitted(raw.image, self.resolution)
        except BadImage as error:
            raise raw.damaged(error) from error
        if self.sizes:
            original = raw.fields.get("original_height"), raw.fields.get("original_width")
            if all(isinstance(side, int) and 0 < side < 2**31 for side in original):
                height, width = original
        return pixels, (height, width, top, left, self.resolution, self.resolution), caption

    def collated(self, raw, prepared, positions, seed) -> Batch:
        """Images float32 [B, 3, resolution, resolution] in [-1, 1]; the condition holds caption and sizes."""
        pixels, sizes, captions = zip(*prepared, strict=True)
        condition = Condition(sizes=torch.tensor(sizes) if self.sizes else None, caption=pack(captions))
        return Batch(to_tensor(pixels), condition)

    def describe(self) -> str:
        """One line for people, from the arguments alone."""
        more = f"{', sizes' if self.sizes else ''}{', filtered' if self.filters else ''}"
        return f"{self.urls}: {self.resolution}x{self.resolution}, RGB, captions{more}"
