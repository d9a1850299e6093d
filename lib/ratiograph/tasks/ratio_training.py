"""Training a ratio estimator between two fixed distributions whose exact ratio is known.

Notation: p and q are Gaussian mixtures, l = log p_t/q_t their ratio, exact or learned, t the time with its quantile
under p(t). An estimator that does not learn here, where p and q are fixed, will not learn against a student.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from ratiograph.algebra.noising import NoisingProcess
from ratiograph.algebra.ratio_losses import LogisticLoss, RatioLoss
from ratiograph.algebra.times import TimeSampler
from ratiograph.core.contracts import Evaluation, Needs, Nodes, RatioEstimator
from ratiograph.core.domains import Depth
from ratiograph.core.randomness import normal
from ratiograph.core.types import Condition
from ratiograph.networks.teachers.mixture import GaussianMixture
from ratiograph.training.experiment import Task
from ratiograph.training.optim import Adam

__all__ = ["RatioEvaluator", "RatioTraining"]


class RatioTraining(Task):
    """Trains ``ratio`` to tell noisy samples of ``teacher`` from those of ``student``, both exact mixtures.

    Args:
        teacher: p.
        student: q.
        ratio: the estimator.
        noising: forward process.
        times: p(t).
        optimizer: recipe of the optimiser.
        loss: what trains it; the logistic loss by default.
    """

    needs_data = False

    def __init__(
        self,
        *,
        teacher: GaussianMixture,
        student: GaussianMixture,
        ratio: RatioEstimator,
        noising: NoisingProcess,
        times: TimeSampler,
        optimizer: Adam,
        loss: RatioLoss | None = None,
    ):
        super().__init__()
        self.teacher, self.student, self.ratio = teacher, student, ratio
        self.noising, self.times, self.optimizer = noising, times, optimizer
        self.loss = LogisticLoss() if loss is None else loss
        self.check_shapes()
        ratio.connect(teacher, None)

    def load(self) -> None:
        self.ratio.load()

    def prepare(self, device: torch.device, autocast_dtype: torch.dtype | None) -> None:
        self.load()
        self.to(device)
        self.optimizers = {"ratio": self.optimizer.build(self.ratio.parameters())}

    def trained(self) -> dict[str, nn.Module]:
        return {"ratio": self.ratio}

    def weights(self) -> dict[str, nn.Module]:
        return {"ratio": self.ratio}

    def evaluate(self, samples: int, generator: torch.Generator, needs: Needs) -> Evaluation:
        """``samples`` noisy samples of p followed by as many of q, at the same times."""
        both = torch.cat([mixture.sample(samples, generator) for mixture in (self.teacher, self.student)])
        t = self.times(self.noising, samples, generator).repeat(2)
        noise = torch.cat([normal(half.shape, generator, half.dtype) for half in both.chunk(2)])
        noisy = self.noising.add_noise(both, t, noise)
        return Evaluation(noisy, both, Condition(), Nodes(teacher=self.teacher, ratio=self.ratio), needs)

    def step(self, batch: None, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        penalized = self.loss.needs_gradient
        needs = Needs(training=True, ratio_gradient=penalized, curvature=penalized)
        evaluation = self.evaluate(batch_size, generator, needs)
        real, student = evaluation.log_ratio_output.tensor_split([batch_size])
        loss = self.loss(real, student, evaluation.noisy.x_t)
        loss.backward()
        norm = self.optimizers["ratio"].step()
        return {"loss/ratio": loss.detach(), "gradient/ratio": norm}

    @torch.no_grad()
    def exact_log_ratio(self, evaluation: Evaluation) -> Tensor:
        """l [B] in closed form."""
        noisy, condition = evaluation.noisy, evaluation.condition
        return self.teacher.log_density(noisy, condition) - self.student.log_density(noisy, condition)


METRICS = {
    "correlation": {"label": "correlation with the exact l", "better": "higher"},
    "rms_error": {"label": "RMS error of l", "better": "lower"},
    "exact_std": {"label": "spread of the exact l", "better": None},
    "mean_exp_student": {"label": "E_q[e^l], exactly 1", "better": None},
    "mean_exp_real": {"label": "E_p[e^-l], exactly 1", "better": None},
}


class RatioEvaluator:
    """Compares a learned ratio with the exact one, over all times and in bins equal in p(t)'s quantile.

    Args:
        samples: samples of p, and as many of q.
        bins: bins over t.
    """

    def __init__(self, *, samples: Annotated[int, Ge(100)] = 100_000, bins: Depth = 5):
        self.samples, self.bins = samples, bins

    def _compare(self, task: RatioTraining, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(learned l, exact l, quantile of t, whether the sample is of q), [2 samples] each."""
        generator = torch.Generator(device).manual_seed(seed + 10_007)
        evaluation = task.evaluate(self.samples, generator, Needs())
        quantile = task.times.quantile(task.noising, evaluation.noisy.t)
        of_q = torch.arange(2 * self.samples, device=device) >= self.samples
        return evaluation.log_ratio.double(), task.exact_log_ratio(evaluation).double(), quantile, of_q

    def before(self, task: RatioTraining, device: torch.device, seed: int) -> list[dict]:
        return []

    def during(self, task: RatioTraining, device: torch.device, seed: int) -> dict[str, float]:
        learned, exact, _, of_q = self._compare(task, device, seed)
        row = _row("", learned, exact, of_q)
        return {name: row[name] for name in ("correlation", "rms_error", "mean_exp_student")}

    def after(self, task: RatioTraining, device: torch.device, seed: int, before: list[dict], workdir: Path) -> dict:
        """The document of ``evaluation.json``: one row for each bin of times, and one for all of them."""
        learned, exact, quantile, of_q = self._compare(task, device, seed)
        rows = []
        for k in range(self.bins):
            inside = (quantile * self.bins).long().clamp(0, self.bins - 1) == k
            name = f"times from quantile {k / self.bins:g} to {(k + 1) / self.bins:g}"
            rows.append(_row(name, learned[inside], exact[inside], of_q[inside]))
        rows.append({**_row("all times", learned, exact, of_q), "highlight": True})
        figure = Path(workdir) / "figures" / "ratio.png"
        figure.parent.mkdir(parents=True, exist_ok=True)
        _draw(figure, learned[:: max(1, len(learned) // 4000)], exact[:: max(1, len(exact) // 4000)])
        return {
            "title": "Learned ratio against the exact one",
            "rows": rows,
            "metrics": METRICS,
            "figures": [
                {"file": "figures/ratio.png", "caption": "Learned against exact l at noisy samples of p and q."}
            ],
            "notes": [f"{self.samples:,} samples of p and of q, that training never saw, at times from p(t)."],
        }


def _row(name: str, learned: Tensor, exact: Tensor, of_q: Tensor) -> dict:
    return {
        "name": name,
        "samples": len(learned),
        "correlation": torch.corrcoef(torch.stack([learned, exact]))[0, 1].item() if learned.std() > 0 else 0.0,
        "rms_error": (learned - exact).square().mean().sqrt().item(),
        "exact_std": exact.std().item(),
        "mean_exp_student": learned[of_q].exp().mean().item(),
        "mean_exp_real": (-learned[~of_q]).exp().mean().item(),
    }


def _draw(path: Path, learned: Tensor, exact: Tensor) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    low, high = (float(f(torch.cat([learned, exact]))) for f in (torch.min, torch.max))
    axes.plot([low, high], [low, high], color="#94a3b8", linewidth=1)
    axes.plot(exact.cpu().numpy(), learned.cpu().numpy(), ".", color="#1d4ed8", markersize=2, alpha=0.4)
    axes.set(xlabel="exact l = log p/q", ylabel="learned l", aspect="equal")
    figure.savefig(path)
