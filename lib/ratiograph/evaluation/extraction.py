"""Features and scores of many images, spread over the ranks of a distributed run.

Notation: N samples of indices 0 .. N - 1. Each of R ranks makes ceil(N / R) consecutive ones; results are gathered in
the order of the indices, so that neither R nor the batch size changes what a metric sees.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ratiograph.core.distributed import gather, is_main, rank, ranks
from ratiograph.data import captions as captions_format
from ratiograph.evaluation.alignment import ImageScore
from ratiograph.evaluation.features import FeatureExtractor
from ratiograph.evaluation.image_sources import Images, Made

__all__ = ["Extracted", "extract", "from_main"]


@dataclass(frozen=True)
class Extracted:
    """What was seen of N images, on the CPU: features [N, D] and scores [N] by name, captions [N, 1024] or None."""

    features: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]
    captions: Tensor | None


def from_main(value: object, device: torch.device) -> object:
    """The JSON value that rank 0 holds, on every rank."""
    if ranks() == 1:
        return value
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    size = torch.tensor([len(data)], device=device)
    dist.broadcast(size, 0)
    if not is_main():
        data = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(data, 0)
    return json.loads(bytes(data.tolist()))


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
        device: where images are looked at.
        progress: is told how many images each batch had, on this rank.

    Raises:
        ValueError: images that are not finite, or scores that need captions where there are none.
    """
    share = -(-samples // ranks())
    own = range(min(rank() * share, samples), min((rank() + 1) * share, samples))
    features, judged, captions = ({name: [] for name in part} for part in (extractors, scores, ("",)))
    for made in images(own) if len(own) else ():
        pictures = made.images.to(device)
        for name, extractor in extractors.items():
            features[name].append(extractor(pictures).cpu())
        for name, score in scores.items():
            judged[name].append(_judged(name, score, pictures, made))
        if made.captions is not None:
            captions[""].append(made.captions)
        progress(len(pictures))

    def whole(parts: list[Tensor]) -> Tensor:
        return _gathered(torch.cat(parts), share, device)[:samples]

    found = {name: whole(parts or [torch.zeros(0, extractors[name].size)]) for name, parts in features.items()}
    told = {name: whole(parts or [torch.zeros(0)]) for name, parts in judged.items()}
    return Extracted(found, told, _captions(captions[""], whole, device))


def _judged(name: str, score: ImageScore, images: Tensor, made: Made) -> Tensor:
    if score.needs_captions and made.captions is None:
        raise ValueError(f"'{name}' needs captions, and the samples were made without any: leave it out")
    return score(images, None if made.captions is None else captions_format.unpack(made.captions)).cpu()


def _gathered(values: Tensor, share: int, device: torch.device) -> Tensor:
    """[n, ...] of this rank, n <= share => [ranks * share, ...] of all, on the CPU; padding only at the end."""
    if ranks() == 1:
        return values
    padded = values.new_zeros((share, *values.shape[1:]))
    padded[: len(values)] = values
    return gather(padded.to(device)).cpu()


def _captions(parts: list[Tensor], whole: Callable[[list[Tensor]], Tensor], device: torch.device) -> Tensor | None:
    """The captions of all, where rank 0 has any; a rank without samples has none of its own."""
    if not from_main(bool(parts), device):
        return None
    return whole(parts or [torch.zeros(0, captions_format.LENGTH, dtype=torch.uint8)])
