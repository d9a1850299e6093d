"""Features and scores of many images, spread over the ranks of a distributed run.

Notation: N samples of indices 0 .. N - 1. Each of R ranks takes ceil(N / R) consecutive ones; results are gathered in
the order of the indices, so that they depend neither on R nor on the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ratiograph.core.distributed import from_main, gather, rank, ranks
from ratiograph.data import captions as captions_format
from ratiograph.evaluation.alignment import ImageScore
from ratiograph.evaluation.features import FeatureExtractor
from ratiograph.evaluation.image_sources import Images

__all__ = ["Extracted", "extract"]


@dataclass(frozen=True)
class Extracted:
    """Results of N images, on the CPU: features [N, D] and scores [N] by name, captions [N, 1024] or None."""

    features: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]
    captions: Tensor | None


def extract(
    images: Images,
    samples: int,
    extractors: Mapping[str, FeatureExtractor],
    scores: Mapping[str, ImageScore],
    device: torch.device,
    progress: Callable[[int], None] = lambda done: None,
) -> Extracted:
    """Features and scores of ``samples`` images.

    Args:
        images: makes the batches of a range of indices.
        samples: N.
        extractors: loaded and on ``device``.
        scores: loaded and on ``device``.
        device: of the extractors and scores.
        progress: called after every batch with the number of images that this rank has done.

    Raises:
        ValueError: images that are not finite, or scores that need captions where there are none.
    """
    share = -(-samples // ranks())
    own = range(min(rank() * share, samples), min((rank() + 1) * share, samples))
    features, values = ({name: [] for name in part} for part in (extractors, scores))
    captions, done = [], 0
    for batch in images(own) if len(own) else ():
        pictures = batch.images.to(device)
        for name, extractor in extractors.items():
            features[name].append(extractor(pictures).cpu())
        for name, score in scores.items():
            values[name].append(_scored(name, score, pictures, batch.captions))
        if batch.captions is not None:
            captions.append(batch.captions)
        done += len(pictures)
        progress(done)

    def whole(parts: list[Tensor]) -> Tensor:
        return _gathered(torch.cat(parts), share, device)[:samples]

    all_features = {name: whole(parts or [torch.zeros(0, extractors[name].size)]) for name, parts in features.items()}
    all_scores = {name: whole(parts or [torch.zeros(0)]) for name, parts in values.items()}
    all_captions = None
    if from_main(bool(captions)):  # a rank without samples has no captions of its own
        all_captions = whole(captions or [torch.zeros(0, captions_format.LENGTH, dtype=torch.uint8)])
    return Extracted(all_features, all_scores, all_captions)


def _scored(name: str, score: ImageScore, images: Tensor, captions: Tensor | None) -> Tensor:
    if score.needs_captions and captions is None:
        raise ValueError(f"'{name}' needs captions, and the samples were made without any: leave it out")
    return score(images, None if captions is None else captions_format.unpack(captions)).cpu()


def _gathered(values: Tensor, share: int, device: torch.device) -> Tensor:
    """[n, ...] of this rank, n <= share => [ranks * share, ...] of all, on the CPU; padding only at the end."""
    if ranks() == 1:
        return values
    padded = values.new_zeros((share, *values.shape[1:]))
    padded[: len(values)] = values
    return gather(padded.to(device)).cpu()
