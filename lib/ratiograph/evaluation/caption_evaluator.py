"""Evaluation of samplers of coloured digits by their captions.

Notation: a *sampler* is called as ``sampler(draws, conditions)`` and returns x0 [n, 3, 28, 28] for the samples of
``draws`` under ``conditions``. A *row* holds one sampler's measurements. A caption names a digit, a colour, both or
neither; what it does not name is *open*.

Digits are classified by the package's digit classifier, trained on real MNIST digits, from the grey image max_c x_c
scaled to full brightness; colours by `InkColour`. Sample i of a row has its own noise and the prompt i mod P, so that a
row does not depend on the batch size. Images are rounded to the 256 levels of an image file before they are measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from ratiograph.algebra.rewards import ClassReward, Reward
from ratiograph.core.domains import PositiveInt
from ratiograph.core.draws import SampleDraws
from ratiograph.core.files import write_atomically
from ratiograph.core.types import Condition
from ratiograph.data.captioned import CaptionedStream
from ratiograph.data.captions import unpack
from ratiograph.data.coloured_digits import COLOURS, DIGITS
from ratiograph.data.embedded import resolve
from ratiograph.evaluation.candidates import AveragedStudent, marked_best, students_of
from ratiograph.evaluation.documents import shares_series, without
from ratiograph.evaluation.frechet import FeatureStatistics, fit, frechet_distance
from ratiograph.evaluation.prompt_readings import Readings, prompts, to_grey
from ratiograph.evaluation.prompt_sheet import Sampler, draw_sheet, sampled, sampler_of, teacher_name, teacher_of
from ratiograph.evaluation.result_cache import ResultCache, component_identity, settings_identity, weights_identity
from ratiograph.evaluation.sample_distances import class_histogram
from ratiograph.evaluation.small_images import check_sizes, gaussian_of, gaussian_text, tilted
from ratiograph.networks.architectures.classifier import DigitClassifier, classify_all
from ratiograph.networks.architectures.ink_colour import InkColour
from ratiograph.networks.conditions import Prompts
from ratiograph.networks.text_encoders import CaptionEncoder
from ratiograph.tasks.distillation import Distillation

__all__ = ["CaptionsEvaluator"]

METRICS = {
    "prompt_accuracy": {"label": "prompt accuracy: all that is named is right", "better": "higher"},
    "digit_accuracy": {"label": "digit right where named", "better": "higher"},
    "colour_accuracy": {"label": "colour right where named", "better": "higher"},
    "log_reward": {"label": "mean log R", "better": None},
    "open_log_reward": {"label": "mean log R where the colour is open", "better": None},
    "frechet_distance": {"label": "Fréchet distance (digit features)", "better": "lower"},
    "teacher_distance": {"label": "Fréchet distance to the teacher's samples", "better": "lower"},
    "diversity": {"label": "feature distance within a caption / that of real digits", "better": None},
    "red_share": {"label": "red where the colour is open", "better": None},
    "smallest_digit_share": {"label": "smallest share of a digit where open", "better": "higher"},
}
DURING = ("prompt_accuracy", "log_reward", "frechet_distance")
PROTOCOL = 2  # of a row; a new number leaves rows measured by the old definition unread
SHOWN = (
    *("a red seven", "a blue three", "a green zero", "a yellow five", "a purple two"),
    *("an eight", "a four", "a seven", "a blue digit", "a yellow digit"),
)
COLUMNS = 6


class CaptionsEvaluator:
    """Measures whether teacher and student of coloured digits follow the captions, and what they make where open.

    Nothing is read before ``prepare``.

    Args:
        encoder: of captions, the same as for training.
        reference: shards or embedded data set of the real coloured digits.
        reward: R whose mean log R is measured, in runs without a tilted target too; None measures none.
        classifier: of digits; the package's by default.
        samples: images a row.
        teacher_evaluations: odd numbers of the denoiser's evaluations at which the teacher is measured.
        batch_size: images a call of a sampler.
        during_samples: images of an evaluation while training.

    Raises:
        ValueError: ``samples``, ``during_samples``, ``batch_size`` or a number of evaluations is too small.
    """

    def __init__(
        self,
        *,
        encoder: CaptionEncoder,
        reference: str = "coloured-digits",
        reward: Reward | None = None,
        classifier: DigitClassifier | None = None,
        samples: Annotated[int, Ge(4)] = 1000,
        teacher_evaluations: Sequence[PositiveInt] = (25,),
        batch_size: PositiveInt = 250,
        during_samples: Annotated[int, Ge(4)] = 400,
    ):
        check_sizes(self, samples, during_samples, batch_size, teacher_evaluations)
        self.encoder, self.reference, self.reward = encoder, reference, reward
        self.samples, self.during_samples, self.batch_size = samples, during_samples, batch_size
        self.teacher_evaluations = tuple(teacher_evaluations)
        self.classifier = DigitClassifier() if classifier is None else classifier
        self.colour = InkColour()
        self.cache = ResultCache(Path(__file__).parent.parent / "assets" / "captions_teacher.evaluations.json")

    def prepare(self, device: torch.device) -> None:
        """Loads classifier, encoder, reward and reference; further calls only move the networks.

        Raises:
            FileNotFoundError, ValueError: no or unfitting classifier weights; damaged or missing shards.
        """
        self.device = device
        if not hasattr(self, "real"):
            for part in (self.classifier, self.encoder, self.reward):
                if part is not None:
                    part.load()
            self.real = self._read_reference()
            self.statistics, self.spreads = fit(self.real.features), self.real.spreads()
        self._move(device)

    def _move(self, device: torch.device) -> None:
        for network in (self.classifier, self.colour, self.reward):
            if network is not None:
                network.to(device)

    def _read_reference(self) -> Readings:
        stream = CaptionedStream(urls=self.reference, resolution=28)
        raw = [sample for path in resolve(self.reference) for sample in stream.read(path)]
        batch = stream.collated(raw, [stream.prepared(sample) for sample in raw], range(len(raw)), 0)
        self._move(torch.device("cpu"))
        return self._read(batch.images, batch.condition)

    def _read(self, images: Tensor, condition: Condition) -> Readings:
        """What is measured of images [N, 3, 28, 28] of the captions of ``condition``."""
        features, logits = classify_all(self.classifier, to_grey(images), self.batch_size)
        log_rewards = None
        with torch.no_grad():
            colours = self.colour(images).argmax(1).cpu()
            if self.reward is not None:
                log_rewards = self.reward.log_reward(images, condition).double().cpu()
        return Readings(unpack(condition.caption), features, logits.argmax(1), colours, log_rewards)

    def measure(
        self, name: str, sampler: Sampler, *, evaluations: int, samples: int | None = None, seed: int = 0
    ) -> dict:
        """Samples and measures one row.

        Args:
            name: of the row.
            sampler: of the images.
            evaluations: network evaluations a sample, for the table.
            samples: images; None takes the evaluator's own number.
            seed: of the noise.

        Returns:
            ``{"name", "evaluations", "samples", "open_colours": [5 shares], "open_digits": [10 shares], "fitted": the
            features' Gaussian as text}`` and the keys of ``METRICS``, those about log R only with a reward, except for
            "teacher_distance", which ``after`` adds.

        Raises:
            ValueError: the sampler's images have another shape, or are not finite.
        """
        samples = self.samples if samples is None else samples
        conditions = Prompts(captions=prompts(), encoder=self.encoder)
        parts = []
        for first in range(0, samples, self.batch_size):
            draws = SampleDraws(seed, range(first, min(first + self.batch_size, samples)), self.device)
            images = sampled(name, sampler, draws, conditions)
            parts.append(self._read(images, conditions.sampled(draws, None)))
        readings = Readings(
            [caption for part in parts for caption in part.captions],
            *(torch.cat([getattr(part, field) for part in parts]) for field in ("features", "digits", "colours")),
            None if self.reward is None else torch.cat([part.log_rewards for part in parts]),
        )
        return self._row(name, evaluations, readings, self.statistics)

    def _row(self, name: str, evaluations: int, readings: Readings, reference: FeatureStatistics) -> dict:
        fitted = fit(readings.features)
        digits = class_histogram(readings.digits[readings.where_open(0)], len(DIGITS))
        open_colour = readings.where_open(1)
        colours = class_histogram(readings.colours[open_colour], len(COLOURS))
        rewards = {}
        if readings.log_rewards is not None:
            rewards = {
                "log_reward": readings.log_rewards.mean().item(),
                "open_log_reward": readings.log_rewards[open_colour].mean().item(),
            }
        return {
            "name": name,
            "evaluations": evaluations,
            "samples": len(readings.captions),
            **readings.accuracies(),
            **rewards,
            "frechet_distance": frechet_distance(fitted, reference),
            "diversity": readings.diversity(self.spreads),
            "smallest_digit_share": min(digits),
            "red_share": colours[list(COLOURS).index("red")],
            "open_digits": digits,
            "open_colours": colours,
            "fitted": gaussian_text(fitted),
        }

    def real_row(self) -> dict:
        """The real digits with their own captions; the Fréchet distance is of one random half to the other."""
        order = torch.randperm(len(self.real.captions), generator=torch.Generator().manual_seed(0))
        halves = [fit(self.real.features[half]) for half in order.tensor_split(2)]
        row = self._row("real digits", 0, self.real, self.statistics)
        return {**row, "frechet_distance": frechet_distance(*halves)}

    def before(self, task: Distillation, device: torch.device, seed: int) -> list[dict]:
        """The row of the student before its first step."""
        self.prepare(device)
        return [self.measure("student before training", sampler_of(task, AveragedStudent()), evaluations=1, seed=seed)]

    def during(self, task: Distillation, device: torch.device, seed: int) -> dict[str, float]:
        """The metrics of ``DURING`` of a student in training, from ``during_samples`` images.

        Those of a further average are called ``<average>/...``, those of the last weights ``raw/...``.
        """
        self.prepare(device)
        found = {}
        for student in students_of(task):
            sampler = sampler_of(task, student)
            row = self.measure("student in training", sampler, evaluations=1, samples=self.during_samples, seed=seed)
            found |= {student.prefix + name: float(row[name]) for name in DURING if name in row}
        return found

    def after(self, task: Distillation, device: torch.device, seed: int, before: list[dict], workdir: Path) -> dict:
        """The document of ``evaluation.json``: real digits, teacher, and student before and after training."""
        self.prepare(device)
        teacher = [self.teacher_row(task, n) for n in self.teacher_evaluations] if task.teacher is not None else []
        students = [
            self.measure(each.name, sampler_of(task, each), evaluations=1, seed=seed) for each in students_of(task)
        ]
        students = marked_best(students, METRICS)
        real, figures = self.real_row(), [self.picture(task, seed, Path(workdir))]
        if teacher:
            fitted = gaussian_of(teacher[-1]["fitted"])
            for row in (real, *before, *students):
                if "fitted" in row:  # a resumed run may have begun with rows that lack it
                    row["teacher_distance"] = frechet_distance(gaussian_of(row["fitted"]), fitted)
        p = (teacher or before)[-1]["open_colours"]
        return self.document([real, *teacher, *before, *students], figures, tilted_shares(task, p))

    def teacher_row(self, task: Distillation, evaluations: int) -> dict:
        """A row of the many-step teacher, cached, as it can cost as much as a training."""
        depends_on = {
            "protocol": PROTOCOL,
            "teacher": component_identity(task.teacher),
            "weights": weights_identity(task.teacher.state_dict()),
            "judges": [weights_identity(self.classifier.state_dict()), component_identity(self.encoder)],
            "reward": None if self.reward is None else component_identity(self.reward),
            "reference": [self.reference, len(self.real.captions)],
            "samples": [self.samples, evaluations],
        }
        key = settings_identity(depends_on)
        row = self.cache.get(key)
        if row is None:
            sampler = sampler_of(task, teacher_of(evaluations))
            row = self.measure(teacher_name(task, evaluations), sampler, evaluations=evaluations)
            self.cache.put(key, row)
        return row

    def picture(self, task: Distillation, seed: int, workdir: Path) -> dict:
        """Draws samples of the prompts ``SHOWN`` into the run's folder; returns the figure's entry in the document."""
        samplers = {"student, one evaluation": sampler_of(task, AveragedStudent())}
        if task.teacher is not None:
            evaluations = max(self.teacher_evaluations, default=25)
            samplers = {teacher_name(task, evaluations): sampler_of(task, teacher_of(evaluations)), **samplers}
        sheet = draw_sheet(samplers, SHOWN, COLUMNS, encoder=self.encoder, seed=seed, device=self.device)
        path = workdir / "figures" / "captions.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: sheet.save(file, "PNG"))
        return {
            "file": str(path.relative_to(workdir)),
            "caption": f"{' and '.join(samplers)}: each prompt with {COLUMNS} noises, the same on both sides.",
        }

    def document(
        self,
        rows: Sequence[Mapping[str, object]],
        figures: Sequence[Mapping[str, str]] = (),
        expected: Mapping[str, Sequence[float]] | None = None,
    ) -> dict:
        """What ``evaluation.json`` holds.

        Args:
            rows: of ``measure``, in the table's order.
            figures: as `picture` gives them.
            expected: further series of colour shares to show, such as ``{"p*(colour)": [...]}``.
        """
        colours = shares_series(rows, "open_colours", expected or {})
        digits = shares_series(rows, "open_digits", {})
        return {
            "title": "One-step coloured digits from captions",
            "rows": without(rows, ("open_colours", "open_digits", "fitted")),
            "metrics": {key: about for key, about in METRICS.items() if any(key in row for row in rows)},
            "histograms": [
                {"title": "Colours, where the caption leaves them open", "labels": list(COLOURS), "series": colours},
                {"title": "Digits, where the caption leaves them open", "labels": list(DIGITS), "series": digits},
            ],
            "figures": list(figures),
            "notes": [
                "Prompts come in the data's proportions: half name digit and colour, a quarter the digit alone, a "
                "quarter the colour alone. Digits are read by the package's classifier of real MNIST digits, colours "
                "by the direction of the summed light.",
                "An evaluation of a guided teacher is two passes of its network. The Fréchet distance is between "
                f"{self.real.features.shape[1]} digit features and not comparable with FID values; that of the real "
                "digits is of one half to the other.",
                "Feature distances within a caption are below 1 where samples are more alike than real digits, above 1 "
                "where digits are wrong or badly drawn.",
            ],
        }


def tilted_shares(task: Distillation, shares: Sequence[float]) -> dict[str, list[float]]:
    """p*(c), proportional to R(c) p(c), if the objective has a reward of colours; otherwise nothing.

    Args:
        task: with the objective.
        shares: p(c) of the five colours where they are open, over all captions; p* is exact if all captions have the
            same shares.
    """
    for term in task.objective.terms.values():
        reward = getattr(term.target, "reward", None)
        if isinstance(reward, ClassReward) and isinstance(reward.classifier, InkColour):
            return {"p*(colour), tilted": tilted(shares, reward.log_rewards)}
    return {}
