"""Wrappers of a weighting: where l is clamped, and what omega is divided by.

Notation: l = ``log_ratio`` [B], rho = e^l = p/q, t the time with its quantile u in [0, 1] under p(t). f-distill §4
(arXiv 2502.15681) normalises twice: rho by its mean in bins over t, because E_q[rho_t] = 1 for the exact ratio at every
t, and then omega by its mean. Means are over the global batch (all ranks), in log space, and before any clamp: a
discriminator that is far ahead then still gives weights that differ. The usual order, outermost first:

    MeanNormalized(RatioNormalized(Clamped(JensenShannon())))

On several ranks the outermost wrapper gathers l, l* and t of all ranks in one exchange, the wrappers inside it compute
the weights of the whole batch, and the outermost returns those of its own rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ratiograph.algebra.noising import NoisingProcess
from ratiograph.algebra.times import TimeSampler
from ratiograph.algebra.weightings import Weighting
from ratiograph.core.distributed import gather_together, own_part
from ratiograph.core.domains import Depth, Fraction, Positive

__all__ = ["Clamped", "MeanNormalized", "RatioNormalized", "TimeNormalized"]


SMALLEST_GROUP = 4
"""Fewest samples whose mean `TimeNormalized` divides by."""


class _Wrapper(Weighting):
    """Base class of wrappers: forwards to the wrapped weighting what it does not change.

    ``forward`` and ``pair`` take and return this rank's samples. Where ``pools`` is true, ``log_weight`` and
    ``log_pair`` take and return the global batch.
    """

    def __init__(self, weighting: Weighting):
        super().__init__()
        self.weighting = weighting

    @property
    def pools(self) -> bool:
        """Whether a sample's weight depends on the other samples of the batch."""
        return isinstance(self.weighting, _Wrapper) and self.weighting.pools

    def forward(self, log_ratio: Tensor, t: Tensor) -> Tensor:
        """omega [B] >= 0 of this rank's samples."""
        if not self.pools:
            return super().forward(log_ratio, t)
        return own_part(super().forward(*gather_together(log_ratio, t)))

    def pair(self, log_ratio, target_log_ratio, t):
        if not self.pools:
            return super().pair(log_ratio, target_log_ratio, t)
        weight, target_weight = super().pair(*gather_together(log_ratio, target_log_ratio, t))
        return own_part(weight), own_part(target_weight)

    @property
    def needs_ratio(self):
        return self.weighting.needs_ratio

    @property
    def row(self):
        return self.weighting.row

    def connect(self, noising, times):
        self.weighting.connect(noising, times)


class Clamped(_Wrapper):
    """The wrapped weighting at l clamped to [-limit, limit], the only place where a ratio is clamped.

    Wrap it innermost, so that normalisers see l before the clamp.

    Args:
        weighting: the wrapped weighting.
        limit: bound on |l|, > 0; 5 lets rho range over [0.0067, 148].
    """

    def __init__(self, *, weighting: Weighting, limit: Positive = 5.0):
        super().__init__(weighting)
        self.limit = limit

    def log_weight(self, log_ratio, t):
        return self.weighting.log_weight(log_ratio.clamp(-self.limit, self.limit), t)


class RatioNormalized(_Wrapper):
    """The wrapped weighting at l - log E_q[rho_t], by a running mean in each bin of t (f-distill §4).

    The bins are equal in the quantile of the objective's p(t), so each gets as many samples whatever the schedule. A
    running mean is the decayed sum of rho over the decayed number of samples, which is exact from the first step on.
    A bin with fewer than two samples is filled up to two with the mean over the whole batch: a sample divided by itself
    alone would have the same weight whatever its ratio.

    The running sums are buffers of the objective: saved in checkpoints, not in the student's weights. They do not
    change in evaluation mode.

    Args:
        weighting: the wrapped weighting.
        bins: number of bins over t, at least 1; f-distill's code has 10.
        decay: factor on the sums at each step, in [0, 1); 0 uses the present batch alone: take many samples a bin.
    """

    pools = True

    def __init__(self, *, weighting: Weighting, bins: Depth = 10, decay: Fraction = 0.9):
        super().__init__(weighting)
        self.bins, self.decay = bins, decay
        self.noising: NoisingProcess | None = None
        self.times: TimeSampler | None = None
        self.register_buffer("log_sum", torch.full((bins,), -math.inf))
        self.register_buffer("count", torch.zeros(bins))

    def connect(self, noising, times):
        super().connect(noising, times)
        self.noising, self.times = noising, times

    def log_means(self, log_ratio: Tensor, t: Tensor) -> Tensor:
        """log E_q[rho_t] [B] of each sample's bin, after the bins were updated with this global batch."""
        if self.times is None:
            raise ValueError("RatioNormalized bins over p(t): call connect(noising, times) first, as Distillation does")
        bins = self._bin(t)
        if self.training:
            self._update_bins(log_ratio, bins)
        pooled = torch.logsumexp(log_ratio, 0) - math.log(len(log_ratio))
        missing = (2 - self.count).clamp_min(0)
        log_mean = torch.logaddexp(self.log_sum, missing.log() + pooled) - (self.count + missing).log()
        return log_mean[bins]

    def _bin(self, t: Tensor) -> Tensor:
        return (self.times.quantile(self.noising, t) * self.bins).long().clamp(0, self.bins - 1)

    def _update_bins(self, log_ratio: Tensor, bins: Tensor) -> None:
        inside = bins == torch.arange(self.bins, device=bins.device)[:, None]
        new = torch.where(inside, log_ratio.float(), -math.inf).logsumexp(1)
        kept = math.log(self.decay) if self.decay else -math.inf
        self.log_sum.copy_(torch.logaddexp(self.log_sum + kept, new))
        self.count.mul_(self.decay).add_(inside.sum(1))

    def log_weight(self, log_ratio, t):
        return self.weighting.log_weight(log_ratio - self.log_means(log_ratio, t), t)

    def log_pair(self, log_ratio, target_log_ratio, t):
        # r* is known, not estimated: only r is corrected.
        return self.weighting.log_pair(log_ratio - self.log_means(log_ratio, t), target_log_ratio, t)


class _Normalized(_Wrapper):
    """Divides omega(r), and omega(r*) with it, by a mean of omega(r) over the global batch."""

    pools = True

    def log_mean(self, log_weight: Tensor, t: Tensor) -> Tensor:
        """log of what each of the global batch's omega is divided by, [B] or []."""
        raise NotImplementedError

    def log_weight(self, log_ratio, t):
        log_weight = self.weighting.log_weight(log_ratio, t)
        return log_weight - self.log_mean(log_weight, t)

    def log_pair(self, log_ratio, target_log_ratio, t):
        log_weight, log_target_weight = self.weighting.log_pair(log_ratio, target_log_ratio, t)
        log_mean = self.log_mean(log_weight, t)
        return log_weight - log_mean, log_target_weight - log_mean


class MeanNormalized(_Normalized):
    """omega divided by its mean over the global batch (f-distill §4): changing the divergence keeps the step size.

    Args:
        weighting: the wrapped weighting.
    """

    def __init__(self, *, weighting: Weighting):
        super().__init__(weighting)

    def log_mean(self, log_weight, t):
        return torch.logsumexp(log_weight, 0) - math.log(len(log_weight))


class TimeNormalized(_Normalized):
    """omega divided by its mean over the samples of about the same time: w(t) alone weights the times.

    |l| grows as the noise falls, so a mean over all times hands the whole update to one end of the schedule. Dividing
    by a function of t only changes w(t), and leaves each divergence D_h(q_t || p_t) what it is.

    Args:
        weighting: the wrapped weighting.
        bins: groups of equal size that the global batch is sorted into by t, at least 1; fewer where a group would have
            less than four samples, as in groups of one every omega would be 1.
    """

    def __init__(self, *, weighting: Weighting, bins: Depth = 8):
        super().__init__(weighting)
        self.bins = bins

    def log_mean(self, log_weight, t):
        means = torch.empty_like(log_weight)
        for group in t.argsort().tensor_split(max(1, min(self.bins, len(t) // SMALLEST_GROUP))):
            means[group] = torch.logsumexp(log_weight[group], 0) - math.log(len(group))
        return means
