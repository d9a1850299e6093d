"""Can the ratio be trusted? Identities, calibration and divergences that follow from l alone.

Notation: l = ``log_ratio`` [B] at noisy real samples (from p_t) and at noisy student samples (from q_t),
D = sigmoid(l). For the exact l = log p_t/q_t

    E_q[e^l] = 1,  E_p[e^-l] = 1,  P(real | D = d) = d,  KL(q_t || p_t) = E_q[-l],
    D_h(q_t || p_t) = E_p[h(r) - h(1) - h'(1) (r - 1)] with r = e^-l.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ratiograph.algebra.weightings import Weighting
from ratiograph.core.distributed import Gathering
from ratiograph.core.domains import Depth, Fraction

__all__ = ["RatioDiagnostics", "bregman_divergence", "field_metrics", "ratio_metrics"]


def ratio_metrics(real: Tensor, student: Tensor) -> dict[str, Tensor]:
    """Metrics of one critic update, from l [B] of both classes: accuracy, both identities and KL(q||p)."""
    real, student = real.detach().float(), student.detach().float()
    return {
        "ratio/accuracy": ((real > 0).float().mean() + (student <= 0).float().mean()) / 2,
        "ratio/mean_exp_student": student.exp().mean(),
        "ratio/mean_exp_real": (-real).exp().mean(),
        "divergence/KL(q||p)": -student.mean(),
    }


@torch.no_grad()
def bregman_divergence(weighting: Weighting, real: Tensor) -> Tensor:
    """The estimate of D_h(q_t||p_t) [] from l [B] at real samples, >= 0 for every batch as h is convex.

    Raises:
        ValueError: the weighting has no closed form of h.
    """
    r = torch.exp(-real.detach().float())
    with torch.enable_grad():
        one = torch.ones_like(r[:1]).requires_grad_()
        h_one = weighting.h(one).sum()
        (slope,) = torch.autograd.grad(h_one, one)
    return (weighting.h(r) - h_one.detach() - slope * (r - 1)).mean()


def field_metrics(fields: dict[str, Tensor]) -> dict[str, Tensor]:
    """Root mean square of each term's field [B, ...] at the image, and the mean cosine between each two of them."""
    flat = {name: field.float().flatten(1) for name, field in fields.items()}
    metrics = {f"field/{name}": field.square().mean().sqrt() for name, field in flat.items()}
    names = list(flat)
    for k, a in enumerate(names):
        for b in names[k + 1 :]:
            metrics[f"cosine/{a}, {b}"] = F.cosine_similarity(flat[a], flat[b]).mean()
    return metrics


class RatioDiagnostics(nn.Module):
    """Running statistics of a ratio estimator by time and by confidence, with exponential forgetting.

    Buffers: ``by_time`` [bins, 6] sums over student count, real count, correct answers, e^l of students, e^-l of real
    samples, -l of students; ``calibration`` [levels, 3] sums of count, of D and of real samples. Bins are equal in the
    quantile of the estimator's p(t), levels equal in D.

    Args:
        bins: of time.
        levels: of D.
        decay: factor on the sums at each update.
    """

    def __init__(self, *, bins: Depth = 8, levels: Depth = 10, decay: Fraction = 0.98):
        super().__init__()
        self.decay = decay
        # Statistics, not weights: on the CPU even when the graph is built on the meta device.
        self.register_buffer("by_time", torch.zeros(bins, 6, device="cpu"))
        self.register_buffer("calibration", torch.zeros(levels, 3, device="cpu"))
        self._pending: list[Gathering] = []

    def begin(self, real: Tensor, student: Tensor, real_quantile: Tensor, student_quantile: Tensor) -> None:
        """Starts gathering, from all ranks, the arguments of ``update`` for this rank's samples."""
        self._pending.append(Gathering(real, student, real_quantile, student_quantile))

    def finish(self) -> None:
        """Waits for everything that ``begin`` started, and updates the statistics with it."""
        for values in self._pending:
            self.update(*values.finish())
        self._pending.clear()

    @torch.no_grad()
    def update(self, real: Tensor, student: Tensor, real_quantile: Tensor, student_quantile: Tensor) -> None:
        """Adds l [B] of both classes of the global batch, with the quantiles [B] in [0, 1] of their times."""
        real, student = real.detach().float(), student.detach().float()
        zero, one = torch.zeros_like, torch.ones_like
        columns = [
            (zero(real), one(student)),
            (one(real), zero(student)),
            ((real > 0).float(), (student <= 0).float()),
            (zero(real), student.exp()),
            ((-real).exp(), zero(student)),
            (zero(real), -student),
        ]
        values = torch.stack([torch.cat(pair) for pair in columns], 1)
        self._add(self.by_time, torch.cat([real_quantile, student_quantile]), values)
        d = torch.cat([real, student]).sigmoid()
        is_real = torch.cat([one(real), zero(student)])
        self._add(self.calibration, d, torch.stack([one(d), d, is_real], 1))

    def _add(self, table: Tensor, position: Tensor, values: Tensor) -> None:
        row = (position * len(table)).long().clamp(0, len(table) - 1)
        table.mul_(self.decay).index_add_(0, row, values.to(table.dtype))

    def summary(self) -> dict:
        """JSON values: a list for each time bin (increasing noise) and each level of D; None where nothing fell."""
        students, reals, correct, exp_student, exp_real, negative = self.by_time.double().cpu().unbind(1)
        count, total, real = self.calibration.double().cpu().unbind(1)
        return {
            "by_time": {
                "accuracy": _ratio(correct, students + reals),
                "mean_exp_student": _ratio(exp_student, students),
                "mean_exp_real": _ratio(exp_real, reals),
                "kl": _ratio(negative, students),
            },
            "calibration": {
                "predicted": _ratio(total, count),
                "observed": _ratio(real, count),
                "share": _ratio(count, count.sum().expand_as(count)),
            },
        }


def _ratio(numerator: Tensor, denominator: Tensor) -> list[float | None]:
    values = (numerator / denominator).tolist()
    return [value if math.isfinite(value) else None for value in values]
