"""Evaluation of image generators: a student's samples against real images, by the field's metrics.

Notation: a *row* holds one candidate's numbers. Those of the first extractor have their plain names (``frechet``,
``kid``, ``precision``), those of a further one called ``dino`` are ``frechet_dino``; a name that holds ``_error`` is a
standard error. Images are rounded to 256 levels first, so that image files would give the same numbers.

Published protocols as arguments:

    CIFAR-10, ImageNet-64   samples=50_000, real_samples=None (all training images), InceptionFeatures or, as EDM and
                            f-distill, TensorFlowInceptionFeatures
    COCO-30k, zero-shot     samples=30_000, source=CaptionedSamples(captions="captions_val2014.json", ...), statistics
                            of val2014 at 256 x 256 by ``tools/evaluate.py stats``, scores={"clip": ClipScore(...)}
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from ratiograph.core.contracts import DataStream
from ratiograph.core.distributed import from_main, is_main
from ratiograph.core.domains import PositiveInt, UnitInterval
from ratiograph.core.draws import SampleDraws
from ratiograph.evaluation.alignment import ImageScore
from ratiograph.evaluation.candidates import AveragedStudent, Candidate, Teacher, marked_best, students_of
from ratiograph.evaluation.documents import cached_notes, without
from ratiograph.evaluation.extraction import Extracted, extract
from ratiograph.evaluation.feature_sets import FeatureSet, read_statistics
from ratiograph.evaluation.features import EfficientNetLite0Features, FeatureExtractor
from ratiograph.evaluation.image_sources import ImageBatch, Images, StudentSamples, stream_images, stream_size
from ratiograph.evaluation.manifold import expected_coverage
from ratiograph.evaluation.metric_rows import MetricRows
from ratiograph.evaluation.metrics import FeatureMetric, Frechet, InceptionScore, KernelDistance, NearestNeighbours
from ratiograph.evaluation.result_cache import (
    ResultCache,
    component_identity,
    file_identity,
    settings_identity,
    weights_identity,
)
from ratiograph.networks.samplers import ManyStepSampler
from ratiograph.tasks.distillation import Distillation

__all__ = ["ImageEvaluator"]

log = logging.getLogger(__name__)

VERSION = 1  # of a row; a new number leaves rows measured by the old definition unread
LOGITS = 4096  # feature vectors classified at a time

Progress = Callable[[str, int, int], None]
"""(what, images done by this rank, images this evaluation has in all)."""


class ImageEvaluator:
    """Fréchet distance, KID, Inception Score, precision, recall, density, coverage and scores of a student's images.

    An extractor or score without its weights is left out, with a line that says how to fetch them. Rows of finished
    runs are cached under a hash of weights and protocol. Samples are spread over the ranks of a distributed run, each
    from its own random numbers, so that the results depend on neither ranks nor batch size. Nothing is read before
    ``prepare``.

    Args:
        data: stream of real images, taken in the order of the first epoch of seed 0.
        statistics: ``.npz`` files of real images in place of ``data``, by name of the extractor, from
            ``tools/evaluate.py stats`` or clean-fid.
        features: extractors by name, {} for scores alone; EfficientNet-Lite0 by default.
        metrics: on every extractor's features; ``Frechet``, ``KernelDistance``, ``InceptionScore`` and
            ``NearestNeighbours`` by default.
        scores: of single images with their captions, by name.
        source: makes the images; ``StudentSamples`` by default.
        teacher_samplers: after training, the teacher is evaluated with each of these too.
        samples: images a row.
        real_samples: real images; None takes an epoch of the stream, or ``samples`` if its length is unknown.
        during_samples: images of an evaluation while training, and of the student before it.
        batch_size: images at a time.
        raw: also evaluate the student's weights of the last step; always done where a run keeps several averages, each
            of which is evaluated.
        least_coverage: while training, a coverage below this share of what as many real images would have on average
            is called a collapse.

    Raises:
        ValueError: numbers out of range; features, and both or neither of ``data`` and ``statistics``.
    """

    def __init__(
        self,
        *,
        data: DataStream | None = None,
        statistics: Mapping[str, str] | None = None,
        features: Mapping[str, FeatureExtractor] | None = None,
        metrics: Sequence[FeatureMetric] | None = None,
        scores: Mapping[str, ImageScore] | None = None,
        source: StudentSamples | None = None,
        teacher_samplers: Sequence[ManyStepSampler] = (),
        samples: Annotated[int, Ge(4)] = 50_000,
        real_samples: Annotated[int, Ge(4)] | None = None,
        during_samples: Annotated[int, Ge(4)] = 2_000,
        batch_size: PositiveInt = 64,
        raw: bool = False,
        least_coverage: UnitInterval = 0.1,
    ):
        if min(samples, during_samples, real_samples or 4) < 4 or batch_size < 1:
            raise ValueError(
                "ImageEvaluator needs samples, real_samples and during_samples >= 4 and batch_size >= 1, got "
                f"{samples}, {real_samples}, {during_samples} and {batch_size}"
            )
        self.features = {"lite0": EfficientNetLite0Features()} if features is None else dict(features)
        if self.features and (data is None) == (not statistics):
            raise ValueError(
                "ImageEvaluator compares with real images: give either data = @ShardStream() or statistics"
            )
        self.data, self.statistics = data, dict(statistics or {})
        default = (Frechet(), KernelDistance(), InceptionScore(), NearestNeighbours())
        self.metrics = tuple(default if metrics is None else metrics)
        self.scores, self.source = dict(scores or {}), StudentSamples() if source is None else source
        self.samples, self.real_samples, self.during_samples = samples, real_samples, during_samples
        self.teacher_samplers = tuple(teacher_samplers)
        self.batch_size, self.raw, self.least_coverage = batch_size, raw, least_coverage
        self.cache = ResultCache(Path("image_evaluations.json"))
        self.rows = MetricRows(self.features, self.metrics, self.scores)
        self.progress: Progress = lambda what, done, samples: None

    def prepare(self, device: torch.device) -> None:
        """Loads networks and real features; further calls only move the networks.

        Raises:
            FileNotFoundError: no extractor and no score has its weights.
            ValueError: damaged weights, statistics or shards.
        """
        self.device = device
        if not hasattr(self, "real"):
            self.missing: list[str] = []
            self.extractors = self._loaded(self.features)
            self.judges = self._loaded(self.scores)
            if not self.extractors and not self.judges:
                raise FileNotFoundError("; ".join(self.missing))
            self.source.load(device)
        for network in (*self.extractors.values(), *self.judges.values()):
            network.to(device)
        if not hasattr(self, "real"):
            self.real = self._read_statistics() if self.data is None else self._read_real()

    def _loaded(self, parts: Mapping[str, FeatureExtractor | ImageScore]) -> dict:
        """Those of the parts that have their weights, loaded."""
        loaded = {}
        for name, part in parts.items():
            try:
                loaded[name] = part.load()
            except FileNotFoundError as error:
                self.missing.append(str(error))
                log.warning("Left out: %s", error)
        return loaded

    def _read_statistics(self) -> dict[str, FeatureSet]:
        return {
            name: read_statistics(Path(self.statistics[name]), extractor)
            for name, extractor in self.extractors.items()
            if name in self.statistics
        }

    def _read_real(self) -> dict[str, FeatureSet]:
        if not self.extractors:
            return {}
        images = stream_images(self.data, self.batch_size)
        return self._sets(self._extract("real images", images, self._real_count(), {}))

    def _real_count(self) -> int:
        available = stream_size(self.data)
        wanted = self.real_samples or available or self.samples
        return wanted if available is None else min(wanted, available)

    def measure(self, name: str, images: Images, *, samples: int, identity: str | None = None) -> dict:
        """One row.

        Args:
            name: of the row.
            images: gives the batches of a range of indices.
            samples: how many.
            identity: what the images depend on; where it is given, the row is cached under it and the protocol.

        Returns:
            ``{"name", "samples"}`` and every number by name, None where it is not finite; ``"skipped"``: sentences on
            what could not be computed. A row from the cache also has ``"cached": True``. The same on every rank.

        Raises:
            ValueError: images that are not finite, or of a shape no extractor takes.
        """
        key = None if identity is None else self._key(identity, samples)
        row = from_main(self.cache.get(key) if key is not None and is_main() else None)
        if row is not None:
            return {**row, "name": name, "cached": True}
        found = self._extract(name, images, samples, self.judges)
        sets = self._sets(found)
        row = from_main(self.rows.row(name, sets, self.real, samples, found.scores, self.device) if is_main() else None)
        if key is not None and is_main():
            self.cache.put(key, row)
        return row

    def real_rows(self) -> list[dict]:
        """Real against real images: every second one against the others, for extractors whose features are known."""
        sets = {name: real for name, real in self.real.items() if real.features is not None}
        if not sets or not is_main():
            return []
        real, samples = ({k: self._part(k, s, odd) for k, s in sets.items()} for odd in (0, 1))
        half = min(len(part) for part in samples.values())
        name = f"real images (one half of {half:,} against the other)"
        return [self.rows.row(name, samples, real, half, {}, self.device)]

    def _part(self, name: str, real: FeatureSet, odd: int) -> FeatureSet:
        features = real.features[odd::2]
        return FeatureSet(features, logits=self._logits(name, features))

    def _extract(self, what: str, images: Images, samples: int, judges: Mapping[str, ImageScore]) -> Extracted:
        return extract(
            images, samples, self.extractors, judges, self.device, lambda done: self.progress(what, done, samples)
        )

    def _sets(self, found: Extracted) -> dict[str, FeatureSet]:
        groups = None if found.captions is None else found.captions.unique(dim=0, return_inverse=True)[1]
        return {
            name: FeatureSet(features, logits=self._logits(name, features) if is_main() else None, groups=groups)
            for name, features in found.features.items()
        }

    @torch.no_grad()
    def _logits(self, name: str, features: Tensor) -> Tensor | None:
        parts = [self.extractors[name].logits(part) for part in features.split(LOGITS)]
        return None if parts[0] is None else torch.cat([part.cpu() for part in parts])

    def _key(self, identity: str, samples: int) -> str:
        """Hash of all that a row depends on."""
        protocol = {
            "version": VERSION,
            "identity": identity,
            "samples": samples,
            "features": {name: extractor.identity() for name, extractor in self.extractors.items()},
            "scores": {name: judge.identity() for name, judge in self.judges.items()},
            "metrics": [[type(metric).__name__, vars(metric)] for metric in self.metrics],
            "statistics": {name: file_identity(path, {}) for name, path in self.statistics.items()},
            "real": None if self.data is None else [self.data.describe(), self._real_count()],
        }
        return settings_identity(protocol)

    def images_of(self, task: Distillation, candidate: Candidate, seed: int) -> Images:
        """The candidate's images."""

        def images(indices: range) -> Iterator[ImageBatch]:
            for start in range(indices.start, indices.stop, self.batch_size):
                batch = range(start, min(start + self.batch_size, indices.stop))
                yield self.source.make(task, SampleDraws(seed, batch, self.device), candidate)

        return images

    def finished_row(self, task: Distillation, candidate: Candidate, seed: int) -> dict:
        """The row of ``samples`` images of a candidate that is no longer trained; cached."""
        conditions = [component_identity(task.conditions), weights_identity(task.conditions.state_dict())]
        source = [type(self.source).__name__, self.source.settings()]
        identity = [candidate.identity(task), conditions, source, seed]
        images, identity = self.images_of(task, candidate, seed), json.dumps(identity, sort_keys=True)
        row = self.measure(candidate.name, images, samples=self.samples, identity=identity)
        return {**row, "evaluations": candidate.evaluations}

    def student_rows(self, task: Distillation, seed: int) -> list[dict]:
        """The rows of the finished student, the main average's first."""
        rows = [self.finished_row(task, student, seed) for student in students_of(task, raw=self.raw)]
        return marked_best(rows, self.rows.labels())

    def before(self, task: Distillation, device: torch.device, seed: int) -> list[dict]:
        """The row of the student before its first step, from ``during_samples`` images."""
        self.prepare(device)
        images = self.images_of(task, AveragedStudent(), seed)
        return [{**self.measure("student before training", images, samples=self.during_samples), "evaluations": 1}]

    def during(self, task: Distillation, device: torch.device, seed: int) -> dict[str, float]:
        """Numbers of ``during_samples`` images of the averaged student, without errors.

        Those of a further average are called ``<average>/...``, those of the last weights ``raw/...``. Where coverage
        is measured, ``collapsed`` is 1 if it is too low. Compare the numbers only with those of as many samples.

        Raises:
            ValueError: the student's images are not finite.
        """
        self.prepare(device)
        found, labels = {}, self.rows.labels()
        for student in students_of(task, raw=self.raw):
            row = self.measure("", self.images_of(task, student, seed), samples=self.during_samples)
            found |= {student.prefix + k: v for k, v in row.items() if isinstance(v, float) and "of" not in labels[k]}
        if "coverage" in found:
            k = next(metric.density_neighbours for metric in self.metrics if isinstance(metric, NearestNeighbours))
            attainable = expected_coverage(len(next(iter(self.real.values()))), self.during_samples, k)
            found["collapsed"] = float(found["coverage"] < self.least_coverage * attainable)
        return found

    def after(self, task: Distillation, device: torch.device, seed: int, before: list[dict], workdir: Path) -> dict:
        """The document of ``evaluation.json``: real images, teacher, and student before and after training."""
        self.prepare(device)
        teacher = [self.finished_row(task, Teacher(sampler), seed) for sampler in self.teacher_samplers]
        return self.document([*self.real_rows(), *teacher, *before, *self.student_rows(task, seed)])

    def document(self, rows: Sequence[Mapping[str, object]], *, title: str = "One-step samples") -> dict:
        """What ``evaluation.json`` holds of ``rows``."""
        shown = without(rows, ("skipped", "cached"))
        present = {key for row in shown for key, value in row.items() if value is not None}
        skipped = dict.fromkeys(sentence for row in rows for sentence in row.get("skipped", ()))
        left_out = [f"Left out: {line}" for line in (*self.missing, *skipped)]
        return {
            "title": title,
            "rows": shown,
            "metrics": {key: label for key, label in self.rows.labels().items() if key in present},
            "figures": [],
            "notes": [*self._notes(), *self.source.notes(), *left_out, *cached_notes(rows)],
        }

    def _notes(self) -> list[str]:
        reference = (
            "files of statistics" if self.data is None else f"{self._real_count():,} images of '{self.data.describe()}'"
        )
        return [
            f"Samples are compared with {reference}, rounded to 256 levels first. A number compares only with those of "
            "as many samples on the same features: Fréchet distances fall with the number of samples, recall and "
            "coverage rise.",
            "± is a standard error: by the jackknife over tenths of the samples (Fréchet distance), over subsets "
            "(KID), over parts (Inception Score, precision, recall, density, coverage), over samples (scores).",
        ]
