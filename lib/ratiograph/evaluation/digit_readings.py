"""What the digit classifier reads from images of digits, and the comparison of samples with real digits by it.

Notation: images [N, 1, 28, 28] of 256 levels in [-1, 1]; the classifier's features [N, D] and logits [N, 10].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ratiograph.evaluation.collapse import Collapse, mean_pairwise_distance
from ratiograph.evaluation.frechet import FeatureStatistics, frechet_distance
from ratiograph.evaluation.inception_score import inception_score
from ratiograph.evaluation.manifold import Manifold
from ratiograph.evaluation.sample_distances import class_histogram

__all__ = ["METRICS", "DigitReadings", "DigitReference"]

METRICS = {
    "frechet_distance": {"label": "Fréchet distance (digit features)", "better": "lower"},
    "smallest_class_share": {"label": "smallest class share", "better": "higher"},
    "largest_class_share": {"label": "largest class share", "better": None},
    "confidence": {"label": "mean classifier confidence", "better": None},
    "precision": {"label": "precision (k = 3)", "better": "higher"},
    "recall": {"label": "recall (k = 3)", "better": "higher"},
    "density": {"label": "density (k = 5)", "better": "higher"},
    "coverage": {"label": "coverage (k = 5)", "better": "higher"},
    "inception_score": {"label": "digit inception score", "better": "higher"},
    "in_batch_distance": {"label": "in-batch distance / that of real digits", "better": None},
    "class_coverage": {"label": "class coverage", "better": "higher"},
    "collapsed": {"label": "collapsed", "better": None},
}
PART = 500  # samples of one part of the inception score


@dataclass(frozen=True)
class DigitReadings:
    """Images with the classifier's features and logits, on the CPU."""

    images: Tensor
    features: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> DigitReadings:
        return DigitReadings(self.images[index], self.features[index], self.logits[index])


class DigitReference:
    """Real digits, to compare samples with."""

    def __init__(self, digits: DigitReadings):
        self.digits = digits
        self.statistics = FeatureStatistics(digits.features.shape[1]).update(digits.features)
        self.manifold = Manifold(digits.features)
        self.distance = mean_pairwise_distance(digits.images)

    def compare(self, digits: DigitReadings, expected_shares: Sequence[float] | None = None) -> dict:
        """``{"samples", "class_shares": [10 floats]}`` and every key of ``METRICS`` for the samples ``digits``.

        Args:
            digits: the samples.
            expected_shares: [10] class shares for ``class_coverage`` and ``collapsed``; None is uniform.
        """
        fitted = FeatureStatistics(digits.features.shape[1]).update(digits.features)
        shares = class_histogram(digits.logits.argmax(1), digits.logits.shape[1])
        verdict = Collapse()(shares, mean_pairwise_distance(digits.images) / self.distance, expected_shares)
        return {
            "samples": len(digits),
            "frechet_distance": frechet_distance(fitted, self.statistics),
            "smallest_class_share": min(shares),
            "largest_class_share": max(shares),
            "confidence": digits.logits.softmax(1).amax(1).double().mean().item(),
            **self.manifold.compare(digits.features),
            "inception_score": inception_score(digits.logits, splits=max(len(digits) // PART, 1))[0],
            **{key: verdict[key] for key in ("in_batch_distance", "class_coverage", "collapsed")},
            "class_shares": shares,
        }
