"""Metrics of a set of samples against a set of real images, by their features.

Each is called as ``metric(samples, real, device)`` on two ``FeatureSet`` and returns numbers by name; ``<name>_error``
is the standard error of ``<name>``. ``lacks`` says in one line why a metric cannot be computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn import functional

from ratiograph.core.domains import NonNegativeInt, PositiveInt
from ratiograph.evaluation.feature_sets import FeatureSet
from ratiograph.evaluation.frechet import frechet_with_error
from ratiograph.evaluation.inception_score import inception_score
from ratiograph.evaluation.kid import kernel_distance, unbiased_distance
from ratiograph.evaluation.manifold import Manifold

__all__ = [
    "ExactKernelDistance",
    "FeatureMetric",
    "Frechet",
    "InBatchSimilarity",
    "InceptionScore",
    "KernelDistance",
    "NearestNeighbours",
]


def with_errors(labels: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str | None]]:
    """``labels`` of numbers, each followed by that of its standard error, ``<name>_error``."""
    both = {}
    for name, label in labels.items():
        both[name] = dict(label)
        both[f"{name}_error"] = {"label": f"± {label['label']}", "better": None, "of": name}
    return both


class FeatureMetric:
    """Base class.

    ``labels`` describes each number for ``evaluation.json``: ``{name: {"label": ..., "better": ...}}``; a standard
    error also names the number that it is ``of``.
    """

    labels: ClassVar[Mapping[str, Mapping[str, str | None]]]
    needs_real_features = False
    """Whether mean and covariance of the real images are not enough."""

    def __call__(self, samples: FeatureSet, real: FeatureSet | None, device: torch.device) -> dict[str, float]:
        """The numbers.

        Args:
            samples: with features.
            real: what to compare with; None where there is none.
            device: where heavy work is done.
        """
        raise NotImplementedError

    def lacks(self, samples: FeatureSet, real: FeatureSet | None) -> str:
        """Why the metric cannot be computed, or ""."""
        if real is None:
            return "no real images to compare with: give data or statistics"
        if self.needs_real_features and real.features is None:
            return "the file of statistics keeps no features, only their mean and covariance"
        return ""


class Frechet(FeatureMetric):
    """Fréchet distance, FID on Inception's features, with its jackknife standard error.

    Args:
        groups: parts of the samples that the jackknife leaves out in turn.
    """

    labels = with_errors({"frechet": {"label": "Fréchet distance", "better": "lower"}})

    def __init__(self, *, groups: Annotated[int, Ge(2)] = 10):
        self.groups = groups

    def __call__(self, samples, real, device):
        distance, error = frechet_with_error(samples.features, real.gaussian, groups=self.groups)
        return {"frechet": distance, "frechet_error": error}


class KernelDistance(FeatureMetric):
    """KID on subsets, as it is published: mean and standard error over them.

    Args:
        subsets: how many.
        size: samples a side of each.
    """

    labels = with_errors({"kid": {"label": "kernel distance (KID)", "better": "lower"}})
    needs_real_features = True

    def __init__(self, *, subsets: PositiveInt = 100, size: Annotated[int, Ge(2)] = 1000):
        self.subsets, self.size = subsets, size

    def __call__(self, samples, real, device):
        x, y = real.features.to(device), samples.features.to(device)
        kid, error = kernel_distance(x, y, subsets=self.subsets, size=self.size)
        return {"kid": kid, "kid_error": error}


class ExactKernelDistance(FeatureMetric):
    """The unbiased estimate of the squared kernel distance from all pairs, without the noise of subsets."""

    labels: ClassVar = {"kid_exact": {"label": "kernel distance, all pairs", "better": "lower"}}
    needs_real_features = True

    def __call__(self, samples, real, device):
        return {"kid_exact": unbiased_distance(real.features.to(device), samples.features.to(device))}


class InceptionScore(FeatureMetric):
    """exp(E KL(p(y|x) || p(y))) of the network's own classes, mean and standard error over parts.

    Args:
        splits: consecutive parts; 10 where it is published.
    """

    labels = with_errors({"inception_score": {"label": "Inception Score", "better": "higher"}})

    def __init__(self, *, splits: PositiveInt = 10):
        self.splits = splits

    def __call__(self, samples, real, device):
        score, error = inception_score(samples.logits, splits=min(self.splits, len(samples)))
        return {"inception_score": score, "inception_score_error": error}

    def lacks(self, samples, real):
        return "" if samples.logits is not None else "the network has no classifier"


class NearestNeighbours(FeatureMetric):
    """Precision and recall (k = 3), density and coverage (k = 5), as in ``manifold``.

    Standard errors come from ``splits`` disjoint parts of both sets, as the standard deviation of a rate over the parts
    divided by sqrt(splits). Parts are smaller than the sets and their rates differ in mean, but not much in spread.

    Args:
        neighbours: k of precision and recall.
        density_neighbours: k of density and coverage.
        splits: parts, 0 for no errors.
    """

    names = ("precision", "recall", "density", "coverage")
    labels = with_errors({name: {"label": name, "better": "higher"} for name in names})
    needs_real_features = True

    def __init__(self, *, neighbours: PositiveInt = 3, density_neighbours: PositiveInt = 5, splits: NonNegativeInt = 5):
        self.neighbours, self.density_neighbours, self.splits = neighbours, density_neighbours, splits

    def __call__(self, samples, real, device):
        rates = real.manifold(self.neighbours, self.density_neighbours, device).compare(samples.features)
        smallest = min(len(samples), len(real)) // max(self.splits, 1)
        if self.splits < 2 or smallest <= max(self.neighbours, self.density_neighbours):
            return rates
        errors = self._errors(samples.features.tensor_split(self.splits), real.features.tensor_split(self.splits))
        return rates | {f"{name}_error": errors[name] for name in self.names}

    def _errors(self, samples: tuple[Tensor, ...], real: tuple[Tensor, ...]) -> dict[str, float]:
        arguments = {"neighbours": self.neighbours, "density_neighbours": self.density_neighbours}
        found = [Manifold(x, **arguments).compare(y) for x, y in zip(real, samples, strict=True)]
        spread = {
            name: torch.tensor([rates[name] for rates in found], dtype=torch.float64).std() for name in self.names
        }
        return {name: float(std) / math.sqrt(len(found)) for name, std in spread.items()}


def in_batch_similarity(features: Tensor, groups: Tensor) -> tuple[float, float]:
    """Mean cosine of the features of two samples of one group, averaged over groups (f-distill, App. D.2).

    Args:
        features: [N, D].
        groups: [N] int; groups of a single sample are left out.

    Returns:
        ``(mean, standard error over groups)``; the error is NaN for one group.

    Raises:
        ValueError: no group has two samples.
    """
    unit = functional.normalize(features.double(), dim=1)
    means = []
    for members in (unit[groups == group] for group in groups.unique()):
        n = len(members)
        if n > 1:  # sum over pairs of u_i . u_j = |sum u|^2 - n
            means.append((members.sum(0).square().sum() - members.square().sum()) / (n * (n - 1)))
    if not means:
        raise ValueError("in-batch similarity needs at least two samples of one caption: make several of each")
    found = torch.stack(means)
    return float(found.mean()), float(found.std()) / math.sqrt(len(found)) if len(found) > 1 else math.nan


class InBatchSimilarity(FeatureMetric):
    """How alike the samples of one caption are, by DINO's features in f-distill; 1 where all are the same image."""

    labels = with_errors({"in_batch_similarity": {"label": "in-batch similarity", "better": "lower"}})

    def __call__(self, samples, real, device):
        similarity, error = in_batch_similarity(samples.features, samples.groups)
        return {"in_batch_similarity": similarity, "in_batch_similarity_error": error}

    def lacks(self, samples, real):
        if samples.groups is None or samples.groups.bincount().max() < 2:
            return "no caption has two samples"
        return ""
