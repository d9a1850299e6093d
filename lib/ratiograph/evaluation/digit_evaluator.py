"""Evaluation of digit samplers on the features of a digit classifier.

Notation: a *sampler* is called as ``sampler(n, generator)`` and returns n images [n, 1, 28, 28] in [-1, 1]; all its
randomness comes from the generator. A *row* holds one sampler's measurements.

Every batch has its own generator, seeded from (seed, batch number), so that a row depends on the sampler, the seed and
the batch size alone. Images are rounded to the 256 levels of an image file, as the reference digits are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from ratiograph.core.domains import PositiveInt, UnitInterval
from ratiograph.data.embedded import resolve
from ratiograph.data.shards import count_samples
from ratiograph.data.stream import load_all
from ratiograph.evaluation.candidates import marked_best, students_of
from ratiograph.evaluation.digit_readings import METRICS, DigitReadings, DigitReference
from ratiograph.evaluation.documents import cached_notes, shares_series, without
from ratiograph.evaluation.manifold import expected_coverage
from ratiograph.evaluation.result_cache import ResultCache, file_identity
from ratiograph.evaluation.sample_distances import class_histogram
from ratiograph.evaluation.small_images import check_sizes, levels_of, tilted
from ratiograph.networks.architectures.classifier import SHIPPED_WEIGHTS, DigitClassifier, classify_all
from ratiograph.networks.weights.weight_files import locate_weights
from ratiograph.tasks.distillation import Distillation

__all__ = ["DigitsEvaluator"]

Sampler = Callable[[int, torch.Generator], Tensor]

DURING = ("frechet_distance", "inception_score", "coverage", "recall", "smallest_class_share", "collapsed")
TILTED = "p*(y), tilted"
PROTOCOL = 2  # of a row; a new number leaves rows measured by the old definition unread


def _batch_seed(seed: int, batch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"evaluation/{seed}/{batch}".encode()).digest()[:6], "big")


def _initial_identity(task: Distillation) -> str | None:
    """Identity of the student before its first step if its weights come from a file; otherwise None."""
    student = task.student
    if task.warm_start is not None or not getattr(student.denoiser, "weights", None):
        return None
    kinds = [type(each).__name__ for each in (student, student.denoiser, task.conditions)]
    settings = {"kinds": kinds, "sigma_init": student.sigma_init, "autocast": str(student.denoiser.autocast_dtype)}
    return file_identity(locate_weights(student.denoiser.weights), settings)


def _tilted_shares(task: Distillation, shares: Sequence[float]) -> dict[str, list[float]]:
    """p(y) and p*(y), proportional to R(y) p(y), if the objective has a class reward; otherwise nothing."""
    for term in task.objective.terms.values():
        log_rewards = getattr(getattr(term.target, "reward", None), "log_rewards", None)
        if log_rewards is not None:
            return {"p(y), the teacher's": list(shares), TILTED: tilted(shares, log_rewards)}
    return {}


class DigitsEvaluator:
    """Measures samplers against real digits.

    A row holds the Fréchet distance; precision, recall, density and coverage (`manifold`); the inception-style score of
    the digit classifier; class shares and confidence; and whether the sampler has collapsed (`collapse`). Nothing is
    read before ``prepare``.

    Args:
        reference: shards or embedded data set of the real digits.
        classifier: gives features and predicted classes; the package's by default.
        samples: images a row.
        teacher_evaluations: numbers of network evaluations at which the teacher is measured.
        batch_size: images a call of a sampler.
        during_samples: images of an evaluation while training.
        least_coverage: while training, a coverage below this share of what as many real digits would have on average
            counts as a collapse too, unless the objective has a class reward.

    Raises:
        ValueError: ``samples``, ``during_samples``, ``batch_size`` or a number of evaluations is too small.
    """

    def __init__(
        self,
        *,
        reference: str = "mnist",
        classifier: DigitClassifier | None = None,
        samples: Annotated[int, Ge(4)] = 5000,
        teacher_evaluations: Sequence[PositiveInt] = (1, 5, 35),
        batch_size: PositiveInt = 500,
        during_samples: Annotated[int, Ge(4)] = 1000,
        least_coverage: UnitInterval = 0.1,
    ):
        check_sizes(self, samples, during_samples, batch_size, teacher_evaluations)
        self.reference, self.samples, self.batch_size = reference, samples, batch_size
        self.during_samples, self.least_coverage = during_samples, least_coverage
        self.teacher_evaluations = tuple(teacher_evaluations)
        self.classifier = DigitClassifier() if classifier is None else classifier
        self.cache = ResultCache(SHIPPED_WEIGHTS.with_name("mnist_teacher.evaluations.json"))

    def prepare(self, device: torch.device) -> None:
        """Loads classifier and reference; further calls only move the classifier.

        Raises:
            FileNotFoundError, ValueError: no or unfitting classifier weights; damaged or missing shards.
        """
        self.device = device
        if not hasattr(self, "real"):
            self.classifier.load()
            images, _ = load_all(self.reference, resolution=28)
            self.real = DigitReference(DigitReadings(images, *classify_all(self.classifier, images, self.batch_size)))
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
            sampler: of the images.
            evaluations: network evaluations a sample, for the table.
            samples: images; None takes the evaluator's own number.
            seed: of the sampler's generators.
            identity: what the sampler depends on, such as ``file_identity`` of its weights and settings; where it is
                given, the row is cached under it and the protocol.
            expected_shares: [10] class shares for ``class_coverage`` and ``collapsed``; None is uniform.

        Returns:
            ``{"name", "evaluations", "samples", "class_shares": [10 floats]}`` and every key of ``METRICS``; a row
            from the cache also has ``"cached": True``.

        Raises:
            ValueError: the sampler's images have another shape, or are not finite.
        """
        samples = self.samples if samples is None else samples
        key = None if identity is None else self._key(identity, evaluations, samples, seed, expected_shares)
        cached = key and self._cached(name, key)
        if cached:
            return cached
        numbers = self.real.compare(self._sample(name, sampler, samples, seed), expected_shares)
        row = {"name": name, "evaluations": evaluations, **numbers}
        if key is not None:
            self.cache.put(key, row)
        return row

    def real_rows(self) -> list[dict]:
        """Real against real digits: one random half of the reference measured against the other half."""
        digits = self.real.digits
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
        half = len(order) // 2
        name = f"real digits (one half of {half:,} against the other)"
        return [{"name": name, "evaluations": 0, **DigitReference(digits[order[half:]]).compare(digits[order[:half]])}]

    def _sample(self, name: str, sampler: Sampler, samples: int, seed: int) -> DigitReadings:
        parts = []
        for batch, first in enumerate(range(0, samples, self.batch_size)):
            n = min(self.batch_size, samples - first)
            generator = torch.Generator(self.device).manual_seed(_batch_seed(seed, batch))
            with torch.no_grad():
                images = sampler(n, generator)
            images = levels_of(name, images, (n, 1, 28, 28))
            parts.append((images.cpu(), *classify_all(self.classifier, images, self.batch_size)))
        return DigitReadings(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _cached(self, name: str, key: str) -> dict | None:
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

    def before(self, task: Distillation, device: torch.device, seed: int) -> list[dict]:
        """The row of the student before its first step."""
        name, identity = "student before training", _initial_identity(task)
        cached = identity and self._cached(name, self._key(identity, 1, self.samples, seed, None))
        if cached:  # without reading the real digits
            return [cached]
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
            self.measure(each.name, each.sampler(task), evaluations=1, seed=seed, expected_shares=expected.get(TILTED))
            for each in students_of(task)
        ]
        rows = [*self.real_rows(), *teacher, *before, *marked_best(students, METRICS)]
        return self.document(rows, expected)

    def during(self, task: Distillation, device: torch.device, seed: int) -> dict[str, float]:
        """The metrics of ``DURING`` of a student in training, from ``during_samples`` images; ``collapsed`` is 0 or 1.

        Fréchet distance, recall and coverage compare among themselves, not with the larger rows of the table. Metrics
        of a further average are called ``<average>/...``, those of the last weights ``raw/...``.

        Raises:
            ValueError: the student's images are not finite.
        """
        self.prepare(device)
        shares = class_histogram(self.real.digits.logits.argmax(1), self.real.digits.logits.shape[1])
        wanted = _tilted_shares(task, shares)
        bound = 0 if wanted else self.least_coverage * expected_coverage(len(self.real.digits), self.during_samples)
        found = {}
        for student in students_of(task):
            row = self.measure(
                "student in training",
                student.sampler(task),
                evaluations=1,
                samples=self.during_samples,
                seed=seed,
                expected_shares=wanted.get(TILTED),
            )
            row["collapsed"] |= row["coverage"] < bound
            found |= {student.prefix + name: float(row[name]) for name in DURING}
        return found

    def teacher_rows(self, task: Distillation) -> list[dict]:
        """A row for each number of evaluations; cached, as 35 evaluations cost more than a training."""
        rows = []
        for n in self.teacher_evaluations:
            settings = {"sampler": "Heun", "autocast": str(task.teacher.autocast_dtype)}
            identity = file_identity(locate_weights(task.teacher.weights), settings) if task.teacher.weights else None
            name = f"teacher, {n} evaluation{'s' if n > 1 else ''}"
            rows.append(self.measure(name, task.teacher_sampler(n), evaluations=n, identity=identity))
        return rows

    def document(
        self, rows: Sequence[Mapping[str, object]], expected_shares: Mapping[str, Sequence[float]] | None = None
    ) -> dict:
        """What ``evaluation.json`` holds.

        Args:
            rows: from ``measure`` and ``real_rows``, in the table's order.
            expected_shares: further class shares to show beside the measured ones, such as ``{"p*(y)": [...]}``.
        """
        series = shares_series(rows, "class_shares", expected_shares or {})
        return {
            "title": "One-step digits",
            "rows": without(rows, ("class_shares", "cached")),
            "metrics": METRICS,
            "histograms": {"labels": [str(digit) for digit in range(10)], "series": series},
            "figures": [],
            "notes": [*self._protocol_notes(), *cached_notes(rows)],
        }

    def _protocol_notes(self) -> list[str]:
        count, size = self.real.digits.features.shape
        return [
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
