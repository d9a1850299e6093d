"""Evaluation of digit samplers on the features of a digit classifier.

Notation: a *sampler* is called as ``sampler(n, generator)`` and returns n images [n, 1, 28, 28] in [-1, 1]; all its
randomness comes from the generator. f(x) [D] are the classifier's features, c(x) its predicted class.

Every batch gets a generator of its own, seeded from (seed, batch number), so that a row is a function of the
sampler, the seed and the batch size. Images are rounded to the 256 levels that an image file has, as the
reference digits are, before anything is measured.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ratiograph.data.stream import load_all
from ratiograph.denoisers import locate_weights
from ratiograph.networks.classifier import SHIPPED_WEIGHTS, DigitClassifier, classify_all

from .frechet import FeatureStatistics, frechet_distance
from .rows import RowCache, file_identity
from .samples import class_histogram

if TYPE_CHECKING:
    from ratiograph.distillation import Distillation

__all__ = ["DigitsEvaluator"]

Sampler = Callable[[int, torch.Generator], Tensor]

METRICS = {
    "frechet_distance": {"label": "Fréchet distance (digit features)", "better": "lower"},
    "smallest_class_share": {"label": "smallest class share", "better": "higher"},
    "largest_class_share": {"label": "largest class share", "better": None},
    "confidence": {"label": "mean classifier confidence", "better": None},
}


def _batch_seed(seed: int, batch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"evaluation/{seed}/{batch}".encode()).digest()[:6], "big")


def _to_levels(images: Tensor) -> Tensor:
    """[-1, 1] => the nearest of the 256 values that uint8 pixels stand for."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().div(127.5).sub(1)


def _tilted_shares(task: Distillation, shares: Sequence[float]) -> dict[str, list[float]]:
    """p(y) and p*(y), proportional to R(y) p(y), for a task whose objective tilts by a class reward; else nothing."""
    for term in task.objective.terms.values():
        log_rewards = getattr(getattr(term.target, "reward", None), "log_rewards", None)
        if log_rewards is not None:
            tilted = [share * math.exp(b) for share, b in zip(shares, log_rewards, strict=True)]
            total = sum(tilted)
            return {"p(y), the teacher's": list(shares), "p*(y), tilted": [share / total for share in tilted]}
    return {}


class DigitsEvaluator:
    """Fréchet distance to real digits, class shares and classifier confidence of any number of samplers.

    Nothing is read before ``prepare`` is called.

    Args:
        reference: shards or embedded data set of the real digits.
        classifier: gives features and predicted classes; its ``load`` reads the trained weights.
        samples: images a row.
        teacher_evaluations: numbers of network evaluations at which the teacher is measured.
        batch_size: images a call of a sampler.

    Raises:
        ValueError: ``samples``, ``batch_size`` or a number of evaluations is too small.
    """

    def __init__(
        self,
        *,
        reference: str = "mnist",
        classifier: DigitClassifier | None = None,
        samples: int = 5000,
        teacher_evaluations: Sequence[int] = (1, 5, 35),
        batch_size: int = 500,
    ):
        if samples < 2 or batch_size < 1 or min(teacher_evaluations, default=1) < 1:
            raise ValueError(
                f"DigitsEvaluator needs samples >= 2, batch_size >= 1 and teacher_evaluations >= 1, got "
                f"{samples}, {batch_size} and {list(teacher_evaluations)}"
            )
        self.reference, self.samples, self.batch_size = reference, samples, batch_size
        self.teacher_evaluations = tuple(teacher_evaluations)
        self.classifier = DigitClassifier() if classifier is None else classifier
        self.cache = RowCache(SHIPPED_WEIGHTS.with_name("mnist_teacher.evaluations.json"))

    # ------------------------------------------------------------------------------------------- measuring

    def prepare(self, device: torch.device) -> None:
        """Loads classifier and reference; further calls only move the classifier.

        Raises:
            FileNotFoundError, ValueError: no or unfitting classifier weights; damaged or missing shards.
        """
        self.device = device
        if not hasattr(self, "real_features"):
            self.classifier.load()
            images, _ = load_all(self.reference, resolution=28)
            self.real_features, self.real_logits = classify_all(self.classifier, images, self.batch_size)
            self.real = FeatureStatistics(self.real_features.shape[1]).update(self.real_features)
        self.classifier.to(device)

    def measure(
        self,
        name: str,
        sampler: Sampler,
        *,
        evaluations: int,
        samples: int | None = None,
        seed: int = 0,
        identity: str | None = None,
    ) -> dict:
        """Samples and measures one row.

        Args:
            name: of the row.
            sampler: see the module's head.
            evaluations: network evaluations a sample costs; shown, not checked.
            samples: images; None takes the evaluator's own number.
            seed: fixes the sampler's randomness.
            identity: says what the sampler is (``rows.file_identity`` of its weights and settings). When
                given, a row measured earlier under the same identity and protocol is returned instead of a
                new one.

        Returns:
            ``{"name", "evaluations", "samples", "frechet_distance", "smallest_class_share",
            "largest_class_share", "confidence", "class_shares": [10 floats]}``; a row from the cache also has
            ``"cached": True``.

        Raises:
            ValueError: the sampler's images have another shape, or are not finite.
        """
        samples = self.samples if samples is None else samples
        if identity is None:
            return self._row(name, evaluations, *self._sample(name, sampler, samples, seed))
        key = self._key(identity, evaluations, samples, seed)
        row = self.cache.get(key)
        if row is not None:
            return {**row, "name": name, "cached": True}
        row = self._row(name, evaluations, *self._sample(name, sampler, samples, seed))
        self.cache.put(key, row)
        return row

    def real_rows(self) -> list[dict]:
        """Real against real digits: one random half of the reference measured against the other half."""
        order = torch.randperm(len(self.real_features), generator=torch.Generator().manual_seed(0))
        half = len(order) // 2
        a, b = order[:half], order[half:]
        other = FeatureStatistics(self.real_features.shape[1]).update(self.real_features[b])
        name = f"real digits (one half of {half:,} against the other)"
        return [self._row(name, 0, self.real_features[a], self.real_logits[a], other)]

    def _sample(self, name: str, sampler: Sampler, samples: int, seed: int) -> tuple[Tensor, Tensor]:
        features, logits = [], []
        for batch, first in enumerate(range(0, samples, self.batch_size)):
            n = min(self.batch_size, samples - first)
            generator = torch.Generator(self.device).manual_seed(_batch_seed(seed, batch))
            with torch.no_grad():
                images = sampler(n, generator)
            self._check(name, images, n)
            batch_features, batch_logits = classify_all(self.classifier, _to_levels(images), self.batch_size)
            features.append(batch_features)
            logits.append(batch_logits)
        return torch.cat(features), torch.cat(logits)

    @staticmethod
    def _check(name: str, images: Tensor, n: int) -> None:
        if images.shape != (n, 1, 28, 28):
            raise ValueError(f"'{name}' returned images {tuple(images.shape)}, expected {(n, 1, 28, 28)}")
        broken = int((~images.isfinite()).flatten(1).any(1).sum())
        if broken:
            raise ValueError(
                f"{broken} of {n} images of '{name}' hold NaN or infinity: its weights are broken. Resume "
                f"from an "
                "earlier checkpoint, and lower the learning rate or set precision = 'fp32'"
            )

    def _row(
        self,
        name: str,
        evaluations: int,
        features: Tensor,
        logits: Tensor,
        reference: FeatureStatistics | None = None,
    ) -> dict:
        fitted = FeatureStatistics(features.shape[1]).update(features)
        shares = class_histogram(logits.argmax(1), logits.shape[1])
        return {
            "name": name,
            "evaluations": evaluations,
            "samples": len(features),
            "frechet_distance": frechet_distance(fitted, reference or self.real),
            "smallest_class_share": min(shares),
            "largest_class_share": max(shares),
            "confidence": logits.softmax(1).amax(1).double().mean().item(),
            "class_shares": shares,
        }

    def _key(self, identity: str, evaluations: int, samples: int, seed: int) -> str:
        """Hash of all that a row depends on."""
        protocol = {
            "evaluations": evaluations,
            "samples": samples,
            "seed": seed,
            "batch_size": self.batch_size,
            "reference": [self.reference, self.real.count],
        }
        return file_identity(self.classifier.weights, {"sampler": identity, **protocol})

    # ------------------------------------------------------------------------------------- a run's evaluation

    def before(self, task: Distillation, device: torch.device, seed: int) -> list[dict]:
        """The row of the student before its first step."""
        self.prepare(device)
        return [self.measure("student before training", task.student_sampler, evaluations=1, seed=seed)]

    def after(self, task: Distillation, device: torch.device, seed: int, before: list[dict], workdir: Path) -> dict:
        """The document of ``evaluation.json``: real digits, teacher, and student before and after training."""
        self.prepare(device)
        student = self.measure("student, one evaluation", task.student_sampler, evaluations=1, seed=seed)
        student["highlight"] = True
        teacher = self.teacher_rows(task) if task.teacher is not None else []
        expected = _tilted_shares(task, (teacher or before)[-1]["class_shares"])
        return self.document([*self.real_rows(), *teacher, *before, student], expected_shares=expected)

    def teacher_rows(self, task: Distillation) -> list[dict]:
        """One row for each number of evaluations; kept for later runs, as 35 evaluations cost more than a training."""
        rows = []
        for n in self.teacher_evaluations:
            settings = {"sampler": "Heun", "autocast": str(task.teacher.autocast_dtype)}
            identity = file_identity(locate_weights(task.teacher.weights), settings) if task.teacher.weights else None
            name = f"teacher, {n} evaluation{'s' if n > 1 else ''}"
            rows.append(self.measure(name, task.teacher_sampler(n), evaluations=n, identity=identity))
        return rows

    # ------------------------------------------------------------------------------------------- reporting

    def document(
        self,
        rows: Sequence[Mapping[str, object]],
        notes: Sequence[str] = (),
        *,
        title: str = "One-step digits",
        expected_shares: Mapping[str, Sequence[float]] | None = None,
    ) -> dict:
        """What ``evaluation.json`` holds.

        Args:
            rows: from ``measure`` and ``real_rows``, in the table's order.
            notes: sentences about this run; those about the protocol are added.
            title: of the table.
            expected_shares: further series of class shares to show beside the measured ones, such as
                ``{"p*(y)": [...]}``.
        """
        series = [{"name": row["name"], "values": list(row["class_shares"])} for row in rows]
        for name, shares in (expected_shares or {}).items():
            series.append({"name": name, "values": list(shares)})
        hidden = ("class_shares", "cached")
        return {
            "title": title,
            "rows": [{k: v for k, v in row.items() if k not in hidden} for row in rows],
            "metrics": METRICS,
            "histograms": {"labels": [str(digit) for digit in range(10)], "series": series},
            "figures": [],
            "notes": [*notes, *self._protocol_notes(rows)],
        }

    def _protocol_notes(self, rows: Sequence[Mapping[str, object]]) -> list[str]:
        notes = [
            f"Fréchet distance: between Gaussians fitted to {self.real_features.shape[1]} features of the "
            f"package's "
            f"own digit classifier, against the {self.real.count:,} digits of '{self.reference}'. It is not "
            "comparable with FID values, which use Inception features.",
            "The teacher was trained on the reference digits, and the distance falls with the number of "
            "samples; "
            "the row of real digits, made with half as many on either side, is therefore no lower bound.",
            "Classes are the classifier's predictions; confidence is its mean largest class probability.",
        ]
        cached = ", ".join(str(row["name"]) for row in rows if row.get("cached"))
        if cached:
            notes.append(f"Measured in an earlier run with the same weights and protocol: {cached}.")
        return notes
