"""Evaluation of students of an exact mixture.

Notation: the *target* is the teacher p, or its exact tilt p* where a term has a reward. A set is ``samples`` samples
of a sampler; energy distances are between empirical sets, so that even two sets of the target are at a distance of
about 2 E|X - X'| / samples. That distance of fresh sets is the yardstick the student's is divided by.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from ratiograph.core.domains import PositiveInt
from ratiograph.core.types import Condition, Noisy
from ratiograph.evaluation.candidates import marked_best, students_of
from ratiograph.evaluation.sample_distances import class_histogram, energy_distance
from ratiograph.networks.teachers.exact_tilting import tilt
from ratiograph.networks.teachers.mixture import GaussianMixture
from ratiograph.tasks.distillation import Distillation

__all__ = ["MixtureEvaluator"]

METRICS = {
    "energy_distance": {"label": "energy distance to the target", "better": "lower"},
    "relative_energy_distance": {"label": "relative to fresh target samples", "better": "lower"},
    "smallest_relative_mode": {"label": "smallest mode share / exact share", "better": "higher"},
    "largest_class_error": {"label": "largest error of a class share", "better": "lower"},
    "stray": {"label": "share further than 4 std from every mode", "better": "lower"},
}


class MixtureEvaluator:
    """Energy distance to the exact target, shares of modes and classes, and a picture of samples over its density.

    Args:
        samples: samples a set.
        repeats: pairs of sets that every distance is the mean of; shares are of all sets together.
    """

    def __init__(self, *, samples: Annotated[int, Ge(2)] = 1000, repeats: PositiveInt = 16):
        self.samples, self.repeats = samples, repeats

    def before(self, task: Distillation, device: torch.device, seed: int) -> list[dict]:
        target, draw = self._target(task), self._target(task).sample
        return [
            self.measure("fresh target samples", draw, target, device, seed, evaluations=0),
            self.measure("student before training", task.student_sampler, target, device, seed),
        ]

    def during(self, task: Distillation, device: torch.device, seed: int) -> dict[str, float]:
        """Energy distance and smallest relative mode of the student, over that of its target's own samples.

        Those of a further average are called ``<average>/...``, those of the last weights ``raw/...``.
        """
        target = self._target(task)
        own, found = self.measure("", target.sample, target, device, seed), {}
        for candidate in students_of(task):
            student = self.measure("", candidate.sampler(task), target, device, seed)
            found[f"{candidate.prefix}relative_energy_distance"] = student["energy_distance"] / own["energy_distance"]
            found[f"{candidate.prefix}smallest_relative_mode"] = student["smallest_relative_mode"]
        return found

    def after(self, task: Distillation, device: torch.device, seed: int, before: list[dict], workdir: Path) -> dict:
        target = self._target(task)
        candidates = students_of(task)
        names = ["student", *(candidate.name for candidate in candidates[1:])]
        students = [
            self.measure(name, candidate.sampler(task), target, device, seed)
            for name, candidate in zip(names, candidates, strict=True)
        ]
        students = marked_best(students, METRICS)
        rows = [*before, *students]
        for row in rows:
            row["relative_energy_distance"] = row["energy_distance"] / rows[0]["energy_distance"]
        figure = Path(workdir) / "figures" / "samples.png"
        captions = {}
        if target.shape == (2,):
            figure.parent.mkdir(parents=True, exist_ok=True)
            draw_samples(figure, self._sets(task.student_sampler, device, seed, 1)[0], target)
            captions = {"figures": [{"file": "figures/samples.png", "caption": "Student samples over the target."}]}
        exact = target.log_weights.exp().tolist()
        series = [{"name": "target, exact", "values": exact}, {"name": "student", "values": students[0]["mode_shares"]}]
        return {
            "title": "One-step student of an exact mixture",
            "rows": rows,
            "metrics": METRICS,
            "histograms": {"labels": [f"mode {k}" for k in range(len(exact))], "series": series},
            "class_shares": {"exact": target.class_masses().tolist(), "student": students[0]["class_shares"]},
            **captions,
            "notes": [
                f"Energy distances are means over {self.repeats} pairs of sets of {self.samples:,} samples. Two sets "
                "of the target itself are not at distance 0: the first row says how far they are."
            ],
        }

    def measure(
        self,
        name: str,
        sampler: Callable[[int, torch.Generator], Tensor],
        target: GaussianMixture,
        device: torch.device,
        seed: int,
        *,
        evaluations: int = 1,
    ) -> dict:
        """One row, from ``repeats`` sets of ``sampler(n, generator)`` -> [n, D]."""
        sets, references = (
            self._sets(sampler, device, seed, self.repeats),
            self._sets(target.sample, device, seed + 10_007, self.repeats),
        )
        together = torch.cat(sets)
        distance, mode = self._nearest(together, target)
        shares, exact = class_histogram(mode, len(target.means)), target.log_weights.exp().tolist()
        masses = target.class_masses().tolist()
        classes = class_histogram(target.classes[mode], len(masses))
        return {
            "name": name,
            "evaluations": evaluations,
            "samples": self.samples * self.repeats,
            "energy_distance": statistics.fmean(map(energy_distance, sets, references)),
            "smallest_relative_mode": min(s / e for s, e in zip(shares, exact, strict=True)),
            "largest_class_error": max(abs(s - m) for s, m in zip(classes, masses, strict=True)),
            "stray": float((distance > 4).double().mean()),
            "mode_shares": shares,
            "class_shares": classes,
        }

    def _sets(self, sampler: Callable, device: torch.device, seed: int, count: int) -> list[Tensor]:
        generators = (torch.Generator(device).manual_seed(1_000_003 * seed + k) for k in range(count))
        return [sampler(self.samples, generator).detach().double() for generator in generators]

    @staticmethod
    def _nearest(x: Tensor, target: GaussianMixture) -> tuple[Tensor, Tensor]:
        """(Mahalanobis distance to the nearest mode [N], that mode [N])."""
        rotated = torch.einsum("nkd,kde->nke", x[:, None] - target.means, target.basis)
        return (rotated.square() / target.variances).sum(2).sqrt().min(1)

    @staticmethod
    def _target(task: Distillation) -> GaussianMixture:
        if not isinstance(task.teacher, GaussianMixture):
            raise ValueError("MixtureEvaluator judges students of a GaussianMixture; for digits take DigitsEvaluator")
        for term in task.objective.terms.values():
            if hasattr(term.target, "reward"):
                return tilt(term.target.reward, task.teacher)[0]
        return task.teacher


def draw_samples(path: Path, x: Tensor, target: GaussianMixture) -> None:
    """Writes a picture of samples ``x`` [N, 2] over the density of ``target``."""
    from matplotlib.figure import Figure

    reach = 1.15 * float((target.means.abs() + 3 * target.variances.amax(1, keepdim=True).sqrt()).max())
    axis = torch.linspace(-reach, reach, 241, dtype=torch.float64, device=target.means.device)
    grid = torch.cartesian_prod(axis, axis)
    zero = torch.zeros_like(grid[:, 0])
    density = target.log_density(Noisy(grid, zero, zero + 1, zero), Condition()).exp().reshape(241, 241).T.sqrt()
    figure = Figure(figsize=(5, 5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    extent = (-reach, reach, -reach, reach)
    axes.imshow(density.cpu().numpy(), origin="lower", extent=extent, cmap="Blues", interpolation="bilinear")
    axes.plot(*x.T.cpu().numpy(), ".", color="#c2410c", markersize=2.5, alpha=0.5)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="x", ylabel="y")
    axes.set_title(f"{len(x):,} samples over the exact density (square root)", fontsize=10)
    figure.savefig(path)
