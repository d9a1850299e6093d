"""Features of a set of images, which metrics compare, and files of statistics of real images.

Notation: features [N, D] float32 and logits [N, K] on the CPU, rows in the order of the samples' indices; ``gaussian``
is their mean and covariance; ``groups`` [N] numbers the captions, so that samples of one caption have one number.

A file of statistics is an ``.npz`` with ``mu`` [D], ``sigma`` [D, D] and, where sets are to be compared sample by
sample, ``feats`` [N, D]; ours adds ``count``, ``name`` and ``identity`` of the features. clean-fid's custom statistics
are such files, with ``feats`` apart in ``*_kid.npz``. Nothing in them is executed.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ratiograph.core.files import write_atomically
from ratiograph.core.foreign import shown
from ratiograph.evaluation.features import FeatureExtractor
from ratiograph.evaluation.frechet import Fitted, Gaussian, fit
from ratiograph.evaluation.manifold import Manifold

__all__ = ["FeatureSet", "array_names", "read_statistics", "write_statistics"]


class FeatureSet:
    """Features of N images, or only their statistics.

    Args:
        features: [N, D] float32, or None.
        logits: [N, K], or None where the network is no classifier.
        gaussian: mean and covariance, where there are no features to fit.
        groups: [N] int64, or None without captions.
    """

    def __init__(
        self,
        features: Tensor | None,
        *,
        logits: Tensor | None = None,
        gaussian: Fitted | None = None,
        groups: Tensor | None = None,
    ):
        assert features is not None or gaussian is not None, "neither features nor their statistics"
        self.features, self.logits, self.groups = features, logits, groups
        self._given = gaussian
        self._manifolds: dict[tuple[int, int, str], Manifold] = {}

    def __len__(self) -> int:
        return 0 if self.features is None else len(self.features)

    @cached_property
    def gaussian(self) -> Fitted:
        return fit(self.features) if self._given is None else self._given

    def manifold(self, neighbours: int, density_neighbours: int, device: torch.device) -> Manifold:
        """Neighbourhoods of the features, computed once."""
        key = neighbours, density_neighbours, str(device)
        if key not in self._manifolds:
            features = self.features.to(device)
            self._manifolds[key] = Manifold(features, neighbours=neighbours, density_neighbours=density_neighbours)
        return self._manifolds[key]


def write_statistics(path: Path, real: FeatureSet, extractor: FeatureExtractor, *, features: bool = True) -> None:
    """Writes a file of statistics, whole or not at all.

    Args:
        path: ``*.npz``; an earlier file is replaced.
        real: with features.
        extractor: of the features.
        features: whether to write the features too, 4 N D bytes before compression; without them only Fréchet distances
            can be computed.
    """
    kept = {"feats": real.features.numpy()} if features else {}
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        mu=real.gaussian.mean.numpy(),
        sigma=real.gaussian.covariance.numpy(),
        count=np.int64(len(real)),
        name=np.str_(extractor.name),
        identity=np.str_(extractor.identity()),
        **kept,
    )
    write_atomically(Path(path), buffer.getvalue())


def read_statistics(path: Path, extractor: FeatureExtractor) -> FeatureSet:
    """The real set that a file of statistics describes.

    Args:
        path: ours, or clean-fid's custom statistics, whose ``<stem>_kid.npz`` beside it is read if it is there.
        extractor: of the samples' features. A file that does not name its extractor is accepted if the sizes agree.

    Raises:
        ValueError: there is no such file, it is damaged, or it is of other features.
    """
    path = Path(path)
    found = _arrays(path)
    beside = path.with_name(f"{path.stem}_kid.npz")
    if "feats" not in found and beside.is_file():
        found |= _arrays(beside)
    if not {"mu", "sigma"} <= found.keys():
        raise ValueError(f"{path} holds {sorted(found)}, a file of statistics holds mu and sigma")
    if "identity" in found and str(found["identity"]) != extractor.identity():
        raise ValueError(
            f"{path} was made by other features ('{shown(found.get('name'))}'), the evaluation uses '{extractor.name}' "
            "or other weights of it: make it anew with tools/evaluate.py stats"
        )
    mean, covariance = (torch.from_numpy(_numbers(path, found[key], np.float64)) for key in ("mu", "sigma"))
    if mean.shape != (extractor.size,) or covariance.shape != (extractor.size, extractor.size):
        raise ValueError(f"{path} has statistics of {mean.numel()} features, '{extractor.name}' has {extractor.size}")
    features = torch.from_numpy(_numbers(path, found["feats"], np.float32)) if "feats" in found else None
    if features is not None and (features.ndim != 2 or features.shape[1] != extractor.size):
        raise ValueError(f"{path} has features {tuple(features.shape)}, '{extractor.name}' has {extractor.size}")
    return FeatureSet(features, gaussian=Gaussian(mean, covariance))


def _numbers(path: Path, values: np.ndarray, kind: type) -> np.ndarray:
    if values.dtype.kind not in "fiu":
        raise ValueError(f"{shown(path)} holds an array of {values.dtype}, numbers are expected")
    return np.asarray(values, kind)


def array_names(path: Path) -> list[str]:
    """The names of the arrays in an ``.npz``; ValueError if it is damaged."""
    with _opened(path) as file:
        return list(file.files)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with _opened(path) as file:
        return {key: file[key] for key in file.files}


@contextmanager
def _opened(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    """The file; any error in the body becomes a ValueError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except Exception as error:  # on damaged bytes zip and zlib raise anything
        raise ValueError(f"{shown(path)} is no whole .npz file of arrays ({shown(error)})") from error
