"""Evaluation of digit samplers on the features of a digit classifier.

Notation: a *sampler* is called as ``sampler(n, generator)`` and returns n images [n, 1, 28, 28] in [-1, 1]; all its
randomness comes from the generator. f(x) [D] are the classifier's features, c(x) its predicted class. A *row* is one
sampler's measurements.

Every batch gets a generator of its own, seeded from (seed, batch number), so that a row is a function of the
sampler, the seed and the batch size. Images are rounded to the 256 levels that an image file has, as the
reference digits are, before anything is measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ratiograph.data.embedded import resolve
from ratiograph.data.shards import count_samples
from ratiograph.data.stream import load_all
from ratiograph.evaluation.candidates import marked_best, students_of
from ratiograph.evaluation.collapse import Collapse, mean_pairwise_distance
from ratiograph.evaluation.frechet import FeatureStatistics, frechet_distance
from ratiograph.evaluation.inception_score import inception_score
from ratiograph.evaluation.manifold import Manifold, expected_coverage
from ratiograph.evaluation.result_cache import RowCache, file_identity
from ratiograph.evaluation.sample_distances import class_histogram
from ratiograph.evaluation.small_images import check_sizes, levels_of, tilted
from ratiograph.networks.architectures.classifier import SHIPPED_WEIGHTS, DigitClassifier, classify_all
from ratiograph.networks.weights.weight_files import locate_weights

if TYPE_CHECKING:
    from ratiograph.tasks.distillation import Distillation

__all__ = ["DigitsEvaluator"]

Sampler = Callable[[int, torch.Generator], Tensor]

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
DURING = ("frechet_distance", "inception_score", "coverage", "recall", "smallest_class_share", "collapsed")
PART = 500  # samples of one part of the inception score
PROTOCOL = 2  # of a row; a new number leaves rows measured by the old definition unread


def _batch_seed(seed: int, batch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"evaluation/{seed}/{batch}".encode()).digest()[:6], "big")


def _beginning(task: Distillation) -> str | None:
    """Says what the student of a run begins as, where that is the weights of a file; else None."""
    student = task.student
    if task.warm_start is not None or not getattr(student.denoiser, "weights", None):
        return None
    kinds = [type(each).__name__ for each in (student, student.denoiser, task.conditions)]
    settings = {"kinds": kinds, "sigma_init": student.sigma_init, "autocast": str(student.denoiser.autocast_dtype)}
    return file_identity(locate_weights(student.denoiser.weights), settings)


def _tilted_shares(task: Distillation, shares: Sequence[float]) -> dict[str, list[float]]:
    """p(y) and p*(y), proportional to R(y) p(y), for a task whose objective tilts by a class reward; else nothing."""
    for term in task.objective.terms.values():
        log_rewards = getattr(getattr(term.target, "reward", None), "log_rewards", None)
        if log_rewards is not None:
            return {"p(y), the teacher's": list(shares), "p*(y), tilted": tilted(shares, log_rewards)}
    return {}


def _last(series: Mapping[str, Sequence[float]]) -> Sequence[float] | None:
    """The last series of ``_tilted_shares``, p*(y), or None."""
    return list(series.values())[-1] if series else None


@dataclass(frozen=True)
class _Digits:
    """Images [N, 1, 28, 28] of 256 levels, with the classifier's features [N, D] and logits [N, 10]; on the CPU."""

    images: Tensor
    features: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> _Digits:
        return _Digits(self.images[index], self.features[index], self.logits[index])


class _Reference:
    """What rows need of the real digits."""

    def __init__(self, digits: _Digits):
        self.digits = digits
        self.statistics = FeatureStatistics(digits.features.shape[1]).update(digits.features)
        self.manifold = Manifold(digits.features)
        self.distance = mean_pairwise_distance(digits.images)


class DigitsEvaluator:
    """Measures any number of samplers against real digits.

    A row holds the Fréchet distance; precision, recall, density and coverage (``manifold``); the inception-style score
    of the digit classifier; class shares and confidence; and whether the sampler has collapsed (``collapse``).
    Nothing is read before ``prepare`` is called.

    Args:
        reference: shards or embedded data set of the real digits.
        classifier: gives features and predicted classes; its ``load`` reads the trained weights.
        samples: images a row.
        teacher_evaluations: numbers of network evaluations at which the teacher is measured.
        batch_size: images a call of a sampler.
        during_samples: images of an evaluation while training.
        least_coverage: while training, a coverage below this share of what as many real digits would have on average
            is called a collapse too, unless the student's distribution is tilted.

    Raises:
        ValueError: ``samples``, ``during_samples``, ``batch_size`` or a number of evaluations is too small.
    """

    def __init__(
        self,
        *,
        reference: str = "mnist",
        classifier: DigitClassifier | None = None,
        samples: int = 5000,
        teacher_evaluations: Sequence[int] = (1, 5, 35),
        batch_size: int = 500,
        during_samples: int = 1000,
        least_coverage: float = 0.1,
    ):
        check_sizes(self, samples, during_samples, batch_size, teacher_evaluations)
        self.reference, self.samples, self.batch_size = reference, samples, batch_size
        self.during_samples, self.least_coverage = during_samples, least_coverage
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
        if not hasattr(self, "real"):
            self.classifier.load()
            images, _ = load_all(self.reference, resolution=28)
            self.real = _Reference(_Digits(images, *classify_all(self.classifier, images, self.batch_size)))
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
        expected_shares: Sequence[float] | None = None,
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
            expected_shares: [10] class shares that are wanted, which ``class_coverage`` and ``collapsed`` are judged
                by; None is uniform.

        Returns:
            ``{"name", "evaluations", "samples", "class_shares": [10 floats]}`` and every key of ``METRICS``; a row
            from the cache also has ``"cached": True``.

        Raises:
            ValueError: the sampler's images have another shape, or are not finite.
        """
        samples = self.samples if samples is None else samples
        key = None if identity is None else self._key(identity, evaluations, samples, seed, expected_shares)
        kept = key and self._kept(name, key)
        if kept:
            return kept
        row = self._row(name, evaluations, self._sample(name, sampler, samples, seed), self.real, expected_shares)
        if key is not None:
            self.cache.put(key, row)
        return row

    def real_rows(self) -> list[dict]:
        """Real against real digits: one random half of the reference measured against the other half."""
        digits = self.real.digits
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
        half = len(order) // 2
        name = f"real digits (one half of {half:,} against the other)"
        return [self._row(name, 0, digits[order[:half]], _Reference(digits[order[half:]]))]

    def _sample(self, name: str, sampler: Sampler, samples: int, seed: int) -> _Digits:
        parts = []
        for batch, first in enumerate(range(0, samples, self.batch_size)):
            n = min(self.batch_size, samples - first)
            generator = torch.Generator(self.device).manual_seed(_batch_seed(seed, batch))
            with torch.no_grad():
                images = sampler(n, generator)
            images = levels_of(name, images, (n, 1, 28, 28))
            parts.append((images.cpu(), *classify_all(self.classifier, images, self.batch_size)))
        return _Digits(*(torch.cat(part) for part in zip(*parts, strict=True)))

    @staticmethod
    def _row(
        name: str,
        evaluations: int,
        digits: _Digits,
        reference: _Reference,
        expected_shares: Sequence[float] | None = None,
    ) -> dict:
        fitted = FeatureStatistics(digits.features.shape[1]).update(digits.features)
        shares = class_histogram(digits.logits.argmax(1), digits.logits.shape[1])
        distance = mean_pairwise_distance(digits.images) / reference.distance
        verdict = Collapse()(shares, distance, expected_shares)
        return {
            "name": name,
            "evaluations": evaluations,
            "samples": len(digits),
            "frechet_distance": frechet_distance(fitted, reference.statistics),
            "smallest_class_share": min(shares),
            "largest_class_share": max(shares),
            "confidence": digits.logits.softmax(1).amax(1).double().mean().item(),
            **reference.manifold.compare(digits.features),
            "inception_score": inception_score(digits.logits, splits=max(len(digits) // PART, 1))[0],
            **{key: verdict[key] for key in ("in_batch_distance", "class_coverage", "collapsed")},
            "class_shares": shares,
        }

    def _kept(self, name: str, key: str) -> dict | None:
        """The row measured earlier under ``key``."""
        row = self.cache.get(key)
        return None if row is None else {**row, "name": name, "cached": True}

    def _key(
        self, identity: str, evaluations: int, samples: int, seed: int, expected_shares: Sequence[float] | None
    ) -> str:
        """Hash of all that a row depends on."""
        protocol = {
            "protocol": PROTOCOL,
            "expected_shares": None if expected_shares is None else list(expected_shares),
            "evaluations": evaluations,
            "samples": samples,
            "seed": seed,
            "batch_size": self.batch_size,
            "reference": [self.reference, sum(map(count_samples, resolve(self.reference)))],
        }
        return file_identity(self.classifier.weights, {"sampler": identity, **protocol})

    # ------------------------------------------------------------------------------------- a run's evaluation

    def before(self, task: Distillation, device: torch.device, seed: int) -> list[dict]:
        """The row of the student before its first step."""
        name, identity = "student before training", _beginning(task)
        kept = identity and self._kept(name, self._key(identity, 1, self.samples, seed, None))
        if kept:  # then the real digits are not read before the first step either
            return [kept]
        self.prepare(device)
        return [self.measure(name, task.student_sampler, evaluations=1, seed=seed, identity=identity)]

    def after(self, task: Distillation, device: torch.device, seed: int, before: list[dict], workdir: Path) -> dict:
        """The document of ``evaluation.json``: real digits, teacher, and student before and after training.

        Where a run keeps several averages, each has a row, and so have the weights of the last step.
        """
        self.prepare(device)
        teacher = self.teacher_rows(task) if task.teacher is not None else []
        expected = _tilted_shares(task, (teacher or before)[-1]["class_shares"])
        students = [
            self.measure(maker.name, maker.sampler(task), evaluations=1, seed=seed, expected_shares=_last(expected))
            for maker in students_of(task)
        ]
        rows = [*self.real_rows(), *teacher, *before, *marked_best(students, METRICS)]
        return self.document(rows, expected_shares=expected)

    def during(self, task: Distillation, device: torch.device, seed: int) -> dict[str, float]:
        """A light evaluation of a student in training; draws from no generator but its own.

        Args:
            task: gives ``student_sampler`` and, if it tilts, the class shares that are wanted.
            device: where the student is.
            seed: of the noise; the same one in every call makes the calls comparable.

        Returns:
            The metrics of ``DURING`` by name, ``collapsed`` as 0 or 1. They come from ``during_samples`` images:
            Fréchet distance, recall and coverage compare among themselves, not with the larger rows of the table.
            Those of a further average are called ``<average>/...``, those of the weights as they are ``raw/...``.

        Raises:
            ValueError: the student's images are not finite.
        """
        self.prepare(device)
        shares = class_histogram(self.real.digits.logits.argmax(1), self.real.digits.logits.shape[1])
        wanted = _tilted_shares(task, shares)
        bound = 0 if wanted else self.least_coverage * expected_coverage(len(self.real.digits), self.during_samples)
        found = {}
        for maker in students_of(task):
            row = self.measure(
                "student in training",
                maker.sampler(task),
                evaluations=1,
                samples=self.during_samples,
                seed=seed,
                expected_shares=_last(wanted),
            )
            row["collapsed"] |= row["coverage"] < bound
            found |= {maker.prefix + name: float(row[name]) for name in DURING}
        return found

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
        count, size = self.real.digits.features.shape
        notes = [
            f"All distances are between {size} features of the package's own digit classifier, against the {count:,} "
            f"digits of '{self.reference}'; the Fréchet distance is between Gaussians fitted to them. It is not "
            "comparable with FID values, which use Inception features, nor is the digit inception score with theirs.",
            "The teacher was trained on the reference digits, and the distance falls with the number of samples; "
            "the row of real digits, made with half as many on either side, is therefore no lower bound.",
            "Precision is the share of samples among real digits, recall that of real digits among samples; density "
            "counts samples round real digits and is 1 on average for real ones, coverage is the share of real digits "
            "with a sample near by. Recall and coverage rise with the number of samples.",
            "Classes are the classifier's predictions; confidence is its mean largest class probability. Class "
            "coverage is the share of classes with a tenth of their expected share or more; in-batch distance is the "
            "mean distance of two images, relative to two real ones. A sampler is called collapsed if class coverage "
            "is below 0.8, in-batch distance below 0.5, or the entropy of its class shares below 0.7 of the "
            "expected one's.",
        ]
        cached = ", ".join(str(row["name"]) for row in rows if row.get("cached"))
        if cached:
            notes.append(f"Measured in an earlier run with the same weights and protocol: {cached}.")
        return notes
