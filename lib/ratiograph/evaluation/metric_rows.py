"""The numbers of a row and their labels, from metrics on several extractors' features and from scores.

The first extractor's numbers have their plain names, those of a further one called ``dino`` are ``<number>_dino``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ratiograph.evaluation.alignment import ImageScore
from ratiograph.evaluation.feature_sets import FeatureSet
from ratiograph.evaluation.features import FeatureExtractor
from ratiograph.evaluation.metrics import FeatureMetric, with_errors

__all__ = ["MetricRows"]


class MetricRows:
    """Makes rows of numbers.

    Args:
        features: extractors by name.
        metrics: on every extractor's features.
        scores: of single images, by name.
    """

    def __init__(
        self,
        features: Mapping[str, FeatureExtractor],
        metrics: Sequence[FeatureMetric],
        scores: Mapping[str, ImageScore],
    ):
        self.features, self.metrics, self.scores = features, metrics, scores

    def row(
        self,
        name: str,
        sets: Mapping[str, FeatureSet],
        real: Mapping[str, FeatureSet],
        samples: int,
        scores: Mapping[str, Tensor],
        device: torch.device,
    ) -> dict:
        """One row.

        Args:
            name: of the row.
            sets: features of the samples, by extractor.
            real: features of the real images, by extractor.
            samples: N.
            scores: [N] each, by name.
            device: of heavy work.

        Returns:
            ``{"name", "samples"}`` and every number by name, None where it is not finite; ``"skipped"``: sentences on
            what could not be computed.
        """
        row, skipped = {"name": name, "samples": samples}, []
        for extractor, features in sets.items():
            for metric in self.metrics:
                reason = metric.lacks(features, real.get(extractor))
                if reason:
                    skipped.append(f"{type(metric).__name__} on {self.features[extractor].name}: {reason}.")
                else:
                    numbers = metric(features, real.get(extractor), device)
                    row |= {self._key_of(extractor, key): value for key, value in numbers.items()}
        for score, values in scores.items():
            row |= {score: float(values.double().mean()), f"{score}_error": float(values.double().std()) / samples**0.5}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        return {**finite, "skipped": skipped}

    def _key_of(self, extractor: str, number: str) -> str:
        return number if extractor == next(iter(self.features)) else f"{number}_{extractor}"

    def labels(self) -> dict[str, dict]:
        """Label and better direction of each number for ``evaluation.json``; a standard error is ``of`` a number."""
        labels = {}
        for extractor, network in self.features.items():
            for metric in self.metrics:
                for number, about in metric.labels.items():
                    label = {**about, "label": f"{about['label']} ({network.name})"}
                    if "of" in about:
                        label["of"] = self._key_of(extractor, about["of"])
                    labels[self._key_of(extractor, number)] = label
        for score, judge in self.scores.items():
            labels |= with_errors({score: {"label": judge.label, "better": "higher"}})
        return labels
