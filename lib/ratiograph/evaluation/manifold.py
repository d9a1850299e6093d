"""Precision, recall, density and coverage: samples against the manifold of real samples, in feature space.

Notation: real features X [N, D], samples' features Y [M, D]; r_k(X_i) is the distance from X_i to its k-th nearest
neighbour among the other X, and B(X_i, r) the closed ball round X_i. With neighbourhoods of k = 3

    precision = share of Y_j in the union over i of B(X_i, r_k(X_i))        (Kynkäänniemi et al. 2019, Eq. 2)
    recall    = share of X_i in the union over j of B(Y_j, r_k(Y_j))

and of k = 5

    density   = number of pairs (i, j) with Y_j in B(X_i, r_k(X_i)) / (k M)  (Naeem et al. 2020, Eqs. 3 and 4)
    coverage  = share of X_i with at least one Y_j in B(X_i, r_k(X_i))

Distances are matrix products in float32 of centred features, tile by tile. Their rounding error is bounded by a margin,
and whatever it could change (which neighbour is the k-th, which side of a radius a pair is on) is decided by distances
in float64, so that the rates are those of exact arithmetic at the speed and memory of float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Manifold", "expected_coverage", "nearest_distances"]

TILE = 4096  # rows and columns of a tile of distances: 64 MB
MARGIN = 1e-5  # error of a float32 squared distance, in units of |x|^2 + |y|^2: some 10 times the largest
SPARE = 8  # neighbours kept beyond the k-th for float64 to choose from
PAIRS = 2**17  # numbers of a float64 batch of pairs: 1 MB, which stays in a core's cache


def _checked(features: Tensor) -> Tensor:
    """Features [N, D] as they are.

    Raises:
        ValueError: another number of dimensions, or numbers that are not finite.
    """
    if features.ndim != 2:
        raise ValueError(f"features must be [N, D], got {tuple(features.shape)}")
    bad = sum(int((~part.isfinite()).any(1).sum()) for part in features.split(TILE))
    if bad:
        raise ValueError(f"{bad} of {len(features)} feature vectors are not finite: check the samples for NaN")
    return features.detach()


class _Centred:
    """Features less a mean, in float32, for rough distances.

    Args:
        features: [N, D].
        mean: [D] float64; the nearer to the features, the smaller the rounding error.
    """

    def __init__(self, features: Tensor, mean: Tensor):
        self.parts = [(part.double() - mean).float() for part in features.split(TILE)]
        self.norms = [torch.linalg.vector_norm(part, dim=1).square() for part in self.parts]
        self.starts = range(0, len(features), TILE)

    def distances(self, a: int, other: _Centred, b: int) -> Tensor:
        """Squared distances [n, m] between the a-th part and the other's b-th."""
        product = torch.addmm(other.norms[b], self.parts[a], other.parts[b].T, alpha=-2)
        return product.add_(self.norms[a][:, None])


def _exact(x: Tensor, y: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Squared distances [P] between x[i] and y[j] in float64, without a product."""
    size = max(PAIRS // x.shape[1], 1)
    squares = torch.empty(len(i), dtype=torch.float64, device=x.device)
    for square, p, q in zip(squares.split(size), i.split(size), j.split(size), strict=True):
        difference = x[p].double().sub_(y[q])
        square.copy_(torch.linalg.vecdot(difference, difference))
    return squares


def _mean(features: Tensor) -> Tensor:
    return torch.stack([part.double().sum(0) for part in features.split(TILE)]).sum(0) / len(features)


class _Nearest:
    """The smallest distances seen so far from every row, and to whom."""

    def __init__(self, rows: int, count: int, device: torch.device):
        self.distances = torch.full((rows, count), torch.inf, device=device)
        self.indices = torch.zeros(rows, count, dtype=torch.long, device=device)

    def update(self, tile: Tensor, row: int, column: int) -> None:
        """Takes in distances [n, m] from the rows ``row`` + 0 .. n - 1 to ``column`` + 0 .. m - 1."""
        rows, count = slice(row, row + len(tile)), self.distances.shape[1]
        near = tile.topk(min(count, tile.shape[1]), dim=1, largest=False)
        distances = torch.cat([self.distances[rows], near.values], 1)
        indices = torch.cat([self.indices[rows], near.indices + column], 1)
        best = distances.topk(count, dim=1, largest=False)
        self.distances[rows], self.indices[rows] = best.values, indices.gather(1, best.indices)


def nearest_distances(features: Tensor, k: int) -> Tensor:
    """Squared distances from every vector to its k nearest neighbours among the others.

    Where more than ``SPARE`` vectors rival the k-th neighbour to within float32's error, as in a set of copies whose
    spread is a thousandth of that of all features, a distance may be too large by that error.

    Args:
        features: [N, D], N > k; vectors that occur twice are neighbours at distance 0.
        k: number of neighbours.

    Returns:
        [N, k] float64, ascending.

    Raises:
        ValueError: fewer than k + 1 vectors, another shape, or numbers that are not finite.
    """
    features, n = _checked(features), len(features)
    if not 1 <= k < n:
        raise ValueError(f"{k} neighbours need at least {max(k, 1) + 1} samples and k >= 1, got {n} samples")
    centred, nearest = _Centred(features, _mean(features)), _Nearest(n, min(k + SPARE, n - 1), features.device)
    for a, row in enumerate(centred.starts):
        for b, column in list(enumerate(centred.starts))[a:]:
            tile = centred.distances(a, centred, b)
            if a == b:
                tile.fill_diagonal_(torch.inf)  # nobody is a neighbour of itself
            else:
                nearest.update(tile.T.contiguous(), column, row)
            nearest.update(tile, row, column)
    rows = torch.arange(n, device=features.device)[:, None].expand_as(nearest.indices)
    exact = _exact(features, features, rows.flatten(), nearest.indices.flatten())
    return exact.view_as(nearest.indices).sort(1).values[:, :k]


def expected_coverage(real: int, samples: int, k: int = 5) -> float:
    """Mean coverage of M samples that have the distribution of the N real ones (Naeem et al. 2020).

    A ball up to the k-th of N - 1 neighbours holds a share of a continuous distribution that is Beta(k, N - k), so that
    the mean is 1 - (N - 1) ... (N - k) / ((M + N - 1) ... (M + N - k)), whatever the distribution.
    """
    return 1 - math.prod((real - j) / (samples + real - j) for j in range(1, k + 1))


class Manifold:
    """Real features, and the radii of their neighbourhoods, for any number of sets of samples to be held against.

    Args:
        features: X [N, D], N > the larger k.
        neighbours: k of precision and recall.
        density_neighbours: k of density and coverage.

    Raises:
        ValueError: too few features, another shape, or numbers that are not finite.
    """

    def __init__(self, features: Tensor, *, neighbours: int = 3, density_neighbours: int = 5):
        self.features, self.mean = _checked(features), _mean(features)
        self.neighbours, self.density_neighbours = neighbours, density_neighbours
        nearest = nearest_distances(features, max(neighbours, density_neighbours))
        self.radii, self.density_radii = nearest[:, neighbours - 1], nearest[:, density_neighbours - 1]

    def compare(self, samples: Tensor) -> dict[str, float]:
        """The four rates of samples against the real features.

        Args:
            samples: features Y [M, D], M > ``neighbours``, on any device; copied to that of the real features.

        Returns:
            ``precision``, ``recall`` and ``coverage`` in [0, 1] and ``density`` >= 0. Density has mean 1 for samples
            of the real distribution and exceeds 1 for those that crowd where real ones are dense; recall and coverage
            rise with M, so that only sets of equal size compare.

        Raises:
            ValueError: too few samples, another D, or numbers that are not finite.
        """
        samples = _checked(samples).to(self.features.device)
        if samples.shape[1] != self.features.shape[1]:
            raise ValueError(f"samples have {samples.shape[1]} features, the real ones {self.features.shape[1]}")
        sample_radii = nearest_distances(samples, self.neighbours)[:, -1]
        real, fake = _Centred(self.features, self.mean), _Centred(samples, self.mean)
        precise = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
        recalled, covered = torch.zeros(2, len(self.features), dtype=torch.bool, device=samples.device)
        pairs = 0
        for a, row in enumerate(real.starts):
            rows = slice(row, row + TILE)
            for b, column in enumerate(fake.starts):
                columns = slice(column, column + TILE)
                tile = _Tile(self.features[rows], samples[columns], real, a, fake, b)
                precise[columns] |= tile.within(self.radii[rows, None]).any(0)
                recalled[rows] |= tile.within(sample_radii[None, columns]).any(1)
                inside = tile.within(self.density_radii[rows, None])
                covered[rows] |= inside.any(1)
                pairs += int(inside.sum())
        precision, recall, coverage = (float(hit.double().mean()) for hit in (precise, recalled, covered))
        density = pairs / (self.density_neighbours * len(samples))
        return {"precision": precision, "recall": recall, "density": density, "coverage": coverage}


class _Tile:
    """Distances between a part of the real features x [n, D] and one of the samples y [m, D]."""

    def __init__(self, x: Tensor, y: Tensor, real: _Centred, a: int, fake: _Centred, b: int):
        self.x, self.y = x, y
        self.norms_x, self.norms_y = real.norms[a], fake.norms[b]
        self.distances = real.distances(a, fake, b)

    def within(self, radii: Tensor) -> Tensor:
        """Which pairs [n, m] are no further apart than ``radii`` (squared, float64, [n, 1] or [1, m])."""
        # The widest margin of a row (column) needs no tile of its own; few pairs lie within it, and are looked at.
        by_row = radii.shape[1] == 1
        own = self.norms_x[:, None] if by_row else self.norms_y[None]
        margin = MARGIN * (own + (self.norms_y if by_row else self.norms_x).max())
        inside = self.distances <= radii.float() - margin
        i, j = (self.distances <= radii.float() + margin).logical_xor_(inside).nonzero(as_tuple=True)
        radii = radii.expand_as(inside)[i, j]
        excess = self.distances[i, j] - radii.float()
        near = excess.abs() <= MARGIN * (self.norms_x[i] + self.norms_y[j])
        inside[i, j] = excess <= 0
        i, j = i[near], j[near]
        inside[i, j] = _exact(self.x, self.y, i, j) <= radii[near]
        return inside
