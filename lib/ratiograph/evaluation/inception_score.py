"""Inception-style score: how sure a classifier is of each sample, and how varied it finds them.

Notation: p(y|x) [K] are a classifier's class probabilities at sample x, p(y) their mean over a set of samples. The
score (Salimans et al. 2016) is exp(E_x KL(p(y|x) || p(y))), between 1 and K; K needs every sample classified with
certainty and all classes equally frequent. It looks at no real sample, and at nothing within a class. Its name belongs
to the Inception network; with another classifier, values compare only among themselves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["inception_score"]


def inception_score(logits: Tensor, *, splits: int = 10) -> tuple[float, float]:
    """Mean of exp(E KL(p(y|x) || p(y))) over consecutive parts of the samples, and its standard error.

    The mean p(y) of n samples lies nearer to them than that of infinitely many, which lowers the score by a factor of
    down to 1 - (K - 1) / (2 n): compare scores of parts of equal size.

    Args:
        logits: [N, K], any real numbers; rows in random order.
        splits: parts, whose sizes differ by one at most.

    Returns:
        ``(mean, standard error)``; the error is that of the mean over parts, NaN for a single part.

    Raises:
        ValueError: another shape, fewer samples than parts, or logits that are not finite.
    """
    if logits.ndim != 2 or not 1 <= splits <= len(logits):
        raise ValueError(f"logits must be [N, K] with N >= splits >= 1, got {tuple(logits.shape)} and {splits} splits")
    if not logits.isfinite().all():
        raise ValueError("logits are not finite: check the samples for NaN")
    log_probabilities = logits.detach().double().log_softmax(1)
    scores = torch.stack([_score(part) for part in log_probabilities.tensor_split(splits)])
    error = float(scores.std()) / math.sqrt(splits) if splits > 1 else math.nan
    return float(scores.mean()), error


def _score(log_p: Tensor) -> Tensor:
    """exp(E KL) [] of log p(y|x) [n, K] in float64."""
    log_marginal = log_p.logsumexp(0) - math.log(len(log_p))
    return (log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp()
