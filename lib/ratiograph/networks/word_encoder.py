"""A text encoder without weights, for small experiments: every word has one fixed random vector.

Notation: a caption's words w_1, w_2, ... are its lower-case parts between white space; ``text`` [B, L, E] holds the
vectors e(w_k). Rows after the last word are 0, and so is all of an empty caption: guidance takes `NoCaption`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from ratiograph.core.contracts import DataStream, Identified
from ratiograph.core.domains import PositiveInt
from ratiograph.core.types import Batch, Condition
from ratiograph.data.captions import unpack
from ratiograph.networks.text_encoders import CaptionEncoder

__all__ = ["EncodedStream", "WordEncoder"]


@functools.lru_cache(maxsize=4096)
def _vector(word: str, width: int) -> np.ndarray:
    """e(word) [width] ~ N(0, I), the same in every process."""
    key = int.from_bytes(hashlib.sha256(word.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(width, dtype=np.float32)


class WordEncoder(CaptionEncoder):
    """``text`` [B, L, E]: the words' vectors e(w) ~ N(0, I_E), drawn from a generator seeded by a hash of the word.

    Args:
        width: E.
        length: L; words after the first L are cut.
    """

    def __init__(self, *, width: PositiveInt = 32, length: PositiveInt = 6):
        super().__init__(weights="")
        self.width, self.length = width, length

    def load(self) -> None:
        """Does nothing: there are no files."""

    def encode(self, captions: Sequence[str]) -> Condition:
        """As `CaptionEncoder.encode`, on the CPU."""
        text = np.zeros((len(captions), self.length, self.width), np.float32)
        for row, caption in zip(text, captions, strict=True):
            for state, word in zip(row, caption.lower().split(), strict=False):
                state[:] = _vector(word, self.width)
        return Condition(text=torch.from_numpy(text))


class EncodedStream:
    """The batches of a stream of captions, with the captions' encodings.

    For cheap encoders; tools/cache_latents.py writes the states of others into shards.

    Args:
        stream: its batches' conditions hold ``caption``.
        encoder: encodes the captions.
    """

    def __init__(self, *, stream: DataStream, encoder: CaptionEncoder):
        self.stream, self.encoder = stream, encoder

    @property
    def urls(self) -> str:
        """The shards of ``stream``, by which samples are counted."""
        return self.stream.urls

    def batches(self, batch_size: int, seed: int, start: int = 0, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """As ``stream.batches``, with the same errors; each ``condition`` has the encoder's parts too."""
        self.encoder.load()
        batches = self.stream.batches(batch_size, seed, start, rank, ranks)
        return (Batch(batch.images, self._encoded(batch.condition)) for batch in batches)

    def file_facts(self) -> dict[str, object]:
        """As of `contracts.Identified`: those of ``stream``."""
        return self.stream.file_facts() if isinstance(self.stream, Identified) else {}

    def _encoded(self, condition: Condition) -> Condition:
        if condition.caption is None:
            raise ValueError("EncodedStream.stream has no captions: give it a CaptionedStream")
        return replace(condition, **self.encoder.encode(unpack(condition.caption)).parts())

    def describe(self) -> str:
        """One line for people, from the arguments alone."""
        return f"{self.stream.describe()}, encoded by {type(self.encoder).__name__}"
