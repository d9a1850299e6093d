"""Whether a generator has collapsed: to few classes of samples, or to nearly one sample.

Notation: s_c are the shares of K classes among the samples, e_c the expected ones (uniform unless given); H(s) is
-sum s log s. Of N samples x

    class coverage     share of classes with s_c >= e_c / 10
    class entropy      H(s) / H(e), 1 for uniform shares where uniform ones are expected
    in-batch distance  mean of |x_i - x_j| over i != j, divided by that of real samples
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ratiograph.core.domains import NonNegative, UnitInterval

__all__ = ["Collapse", "mean_pairwise_distance"]

BLOCK = 2048  # rows at a time: 16 MB of float64 distances for every 1,024 samples on the other side
PRESENT = 0.1  # a class is there if it has this much of its expected share


def mean_pairwise_distance(samples: Tensor) -> float:
    """Mean Euclidean distance between two different samples of a set; equal samples count, as distance 0.

    Args:
        samples: [N, ...], N >= 2. The cost is N^2: a thousand samples give the mean of images to half a percent.

    Raises:
        ValueError: fewer than two samples, or numbers that are not finite.
    """
    if len(samples) < 2:
        raise ValueError(f"a mean over pairs needs at least two samples, got {len(samples)}")
    if not samples.isfinite().all():
        raise ValueError("samples are not finite: check them for NaN")
    rows = samples.detach().flatten(1).double()
    rows = rows - rows.mean(0)  # equal samples become zeros, whose distances have no rounding error
    blocks, total = rows.split(BLOCK), 0.0
    for i, block in enumerate(blocks):
        for j in range(i, len(blocks)):
            squares = torch.addmm(blocks[j].square().sum(1), block, blocks[j].T, alpha=-2)
            distances = squares.add_(block.square().sum(1, keepdim=True)).clamp_(min=0).sqrt_()
            if i == j:
                distances.fill_diagonal_(0)
            total += float(distances.sum()) * (1 if i == j else 2)
    return total / (len(rows) * (len(rows) - 1))


class Collapse:
    """Calls a set of samples collapsed if any of three numbers falls below its threshold.

    The thresholds are far from every sound sampler, so that the verdict can end or flag a run automatically. One or two
    lost classes of ten are a defect that class shares show, not a collapse.

    - Coverage below 0.8: more than a fifth of the classes are gone. With a tenth of a share as the bar, a present
      class misses it by chance with a probability under 1e-20 at 100 expected samples a class.
    - Entropy below 0.7: of ten classes fewer than five in effect (10^0.7), by a lopsidedness that leaves a remnant of
      each and so passes the first test.
    - In-batch distance below 0.5: m images repeated equally often are at 1 - 1/m of the distance of m real ones, so
      this is two images at most; and real handwritten digits of the most uniform class alone, the ones, are at 0.63.

    A generator of one image, or a few, for each class passes all three; its recall and coverage (`Manifold`) are near
    0.

    Args:
        least_coverage: threshold of class coverage, in [0, 1].
        least_entropy: threshold of class entropy.
        least_distance: threshold of in-batch distance.
    """

    def __init__(
        self, *, least_coverage: UnitInterval = 0.8, least_entropy: NonNegative = 0.7, least_distance: NonNegative = 0.5
    ):
        self.least_coverage, self.least_entropy, self.least_distance = least_coverage, least_entropy, least_distance

    def __call__(
        self, shares: Sequence[float], in_batch_distance: float, expected: Sequence[float] | None = None
    ) -> dict[str, float | bool]:
        """The three numbers and the verdict.

        Args:
            shares: s [K], the classes of the samples (``class_histogram``).
            in_batch_distance: ``mean_pairwise_distance`` of the samples over that of real ones.
            expected: e [K] where some classes are meant to be rare, as under a reward; None is uniform.

        Returns:
            ``{"class_coverage", "class_entropy", "in_batch_distance", "collapsed": bool}``. An entropy is 1 where a
            single class is expected.

        Raises:
            ValueError: shares that are no distribution, or two that differ in length.
        """
        expected = [1 / len(shares)] * len(shares) if expected is None else expected
        if len(shares) != len(expected):
            raise ValueError(f"{len(shares)} class shares and {len(expected)} expected ones: give one for each class")
        for values in (shares, expected):
            if min(values) < 0 or abs(math.fsum(values) - 1) > 1e-4:
                raise ValueError(f"class shares must be >= 0 and sum to 1, got {list(values)}")
        present = [share >= PRESENT * wanted * (1 - 1e-9) for share, wanted in zip(shares, expected, strict=True)]
        coverage, attainable = sum(present) / len(present), _entropy(expected)
        entropy = _entropy(shares) / attainable if attainable > 0 else 1.0
        low = coverage < self.least_coverage, entropy < self.least_entropy, in_batch_distance < self.least_distance
        return {
            "class_coverage": coverage,
            "class_entropy": entropy,
            "in_batch_distance": in_batch_distance,
            "collapsed": any(low),
        }


def _entropy(shares: Sequence[float]) -> float:
    return -math.fsum(share * math.log(share) for share in shares if share > 0)
