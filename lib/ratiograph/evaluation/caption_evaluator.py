"""Evaluation of samplers of coloured digits by their captions.

Notation: a *sampler* is called as ``sampler(draws, conditions)`` and returns x0 [n, 3, 28, 28] for the samples of
``draws``, told what ``conditions`` say. A *row* is one sampler's measurements. A caption names a digit, a colour, both
or neither; what it does not name is *open*.

Digits are read by the package's digit classifier, trained on real MNIST digits, off the grey image max_c x_c scaled to
full brightness; colours by `InkColour`. Sample i of a row has noise of its own and the prompt i mod P, so that a row
does not depend on the batch size. Images are rounded to the 256 levels of an image file before they are measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from ratiograph.algebra.rewards import ClassReward, Reward
from ratiograph.core.draws import SampleDraws
from ratiograph.core.files import write_atomically
from ratiograph.core.types import Condition
from ratiograph.data.captioned import CaptionedStream
from ratiograph.data.captions import unpack
from ratiograph.data.coloured_digits import COLOURS, DIGITS
from ratiograph.data.embedded import resolve
from ratiograph.evaluation.candidates import AveragedStudent, marked_best, students_of
from ratiograph.evaluation.frechet import FeatureStatistics, fit, frechet_distance
from ratiograph.evaluation.prompt_readings import Readings, prompts, to_grey
from ratiograph.evaluation.prompt_sheet import prompt_sheet
from ratiograph.evaluation.result_cache import RowCache, component_identity, weights_identity
from ratiograph.evaluation.sample_distances import class_histogram
from ratiograph.evaluation.small_images import check_sizes, gaussian_of, levels_of, spelt, tilted
from ratiograph.networks.architectures.classifier import DigitClassifier, classify_all
from ratiograph.networks.architectures.ink_colour import InkColour
from ratiograph.networks.conditions import Conditions, Prompts
from ratiograph.networks.guidance import Guided
from ratiograph.networks.samplers import HeunSampler
from ratiograph.networks.text_encoders import CaptionEncoder

if TYPE_CHECKING:
    from ratiograph.tasks.distillation import Distillation

__all__ = ["CaptionsEvaluator"]

Sampler = Callable[[SampleDraws, Conditions], Tensor]

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
    """Measures teacher and student of coloured digits: do they paint what the captions say, and what where open?

    Nothing is read before ``prepare`` is called.

    Args:
        encoder: of captions, as the data's.
        reference: shards or embedded data set of the real coloured digits.
        reward: whose mean log R is measured, also in runs that do not tilt; None measures none.
        classifier: reads digits; its ``load`` reads the trained weights.
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
        samples: int = 1000,
        teacher_evaluations: Sequence[int] = (25,),
        batch_size: int = 250,
        during_samples: int = 400,
    ):
        check_sizes(self, samples, during_samples, batch_size, teacher_evaluations)
        self.encoder, self.reference, self.reward = encoder, reference, reward
        self.samples, self.during_samples, self.batch_size = samples, during_samples, batch_size
        self.teacher_evaluations = tuple(teacher_evaluations)
        self.classifier = DigitClassifier() if classifier is None else classifier
        self.colour = InkColour()
        self.cache = RowCache(Path(__file__).parent.parent / "assets" / "captions_teacher.evaluations.json")

    # ------------------------------------------------------------------------------------------- measuring

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
        for module in (self.classifier, self.colour, self.reward):
            if module is not None:
                module.to(device)

    def _read_reference(self) -> Readings:
        stream = CaptionedStream(urls=self.reference, resolution=28)
        raw = [sample for path in resolve(self.reference) for sample in stream.read(path)]
        batch = stream.collated(raw, [stream.prepared(sample) for sample in raw], range(len(raw)), 0)
        for part in (self.classifier, self.colour, self.reward):
            if part is not None:
                part.to("cpu")
        return self._read(batch.images, batch.condition)

    def _read(self, images: Tensor, condition: Condition) -> Readings:
        """Everything measured of images [N, 3, 28, 28], which the captions of ``condition`` asked for."""
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
            sampler: see the module's head.
            evaluations: of the denoiser, a sample; shown, not checked.
            samples: images; None takes the evaluator's own number.
            seed: of the noise.

        Returns:
            ``{"name", "evaluations", "samples", "open_colours": [5 shares], "open_digits": [10 shares], "fitted": the
            features' Gaussian, ``spelt``}`` and the keys of ``METRICS``, those about log R only with a reward, but for
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
            "fitted": spelt(fitted),
        }

    def real_row(self) -> dict:
        """The real digits with their own captions; the Fréchet distance is of one random half to the other."""
        order = torch.randperm(len(self.real.captions), generator=torch.Generator().manual_seed(0))
        halves = [fit(self.real.features[half]) for half in order.tensor_split(2)]
        row = self._row("real digits", 0, self.real, self.statistics)
        return {**row, "frechet_distance": frechet_distance(*halves)}

    # ------------------------------------------------------------------------------------- a run's evaluation

    def before(self, task: Distillation, device: torch.device, seed: int) -> list[dict]:
        """The row of the student before its first step."""
        self.prepare(device)
        return [self.measure("student before training", student_of(task), evaluations=1, seed=seed)]

    def during(self, task: Distillation, device: torch.device, seed: int) -> dict[str, float]:
        """The metrics of ``DURING`` of a student in training, from ``during_samples`` images.

        Those of a further average are called ``<average>/...``, those of the weights as they are ``raw/...``.
        """
        self.prepare(device)
        found = {}
        for maker in students_of(task):
            sampler = student_of(task, maker)
            row = self.measure("student in training", sampler, evaluations=1, samples=self.during_samples, seed=seed)
            found |= {maker.prefix + name: float(row[name]) for name in DURING if name in row}
        return found

    def after(self, task: Distillation, device: torch.device, seed: int, before: list[dict], workdir: Path) -> dict:
        """The document of ``evaluation.json``: real digits, teacher, and student before and after training."""
        self.prepare(device)
        teacher = [self.teacher_row(task, n) for n in self.teacher_evaluations] if task.teacher is not None else []
        makers = students_of(task)
        students = [self.measure(each.name, student_of(task, each), evaluations=1, seed=seed) for each in makers]
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
        """A row of the many-step teacher, kept for later runs: it can cost as much as a training."""
        depends_on = {
            "protocol": PROTOCOL,
            "teacher": component_identity(task.teacher),
            "weights": weights_identity(task.teacher.state_dict()),
            "judges": [weights_identity(self.classifier.state_dict()), component_identity(self.encoder)],
            "reward": None if self.reward is None else component_identity(self.reward),
            "reference": [self.reference, len(self.real.captions)],
            "samples": [self.samples, evaluations],
        }
        key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
        row = self.cache.get(key)
        if row is None:
            row = self.measure(teacher_name(task, evaluations), teacher_of(task, evaluations), evaluations=evaluations)
            self.cache.put(key, row)
        return row

    # ------------------------------------------------------------------------------------------- reporting

    def picture(self, task: Distillation, seed: int, workdir: Path) -> dict:
        """Draws samples of the prompts ``SHOWN`` into the run's folder; the figure's entry in the document."""
        samplers = {"student, one evaluation": student_of(task)}
        if task.teacher is not None:
            evaluations = max(self.teacher_evaluations, default=25)
            samplers = {teacher_name(task, evaluations): teacher_of(task, evaluations), **samplers}
        sheet = sheet_of(samplers, SHOWN, COLUMNS, encoder=self.encoder, seed=seed, device=self.device)
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
        hidden = ("open_colours", "open_digits", "fitted")
        colours = [{"name": row["name"], "values": list(row["open_colours"])} for row in rows]
        colours += [{"name": name, "values": list(shares)} for name, shares in (expected or {}).items()]
        digits = [{"name": row["name"], "values": list(row["open_digits"])} for row in rows]
        return {
            "title": "One-step coloured digits from captions",
            "rows": [{key: value for key, value in row.items() if key not in hidden} for row in rows],
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


def sampled(name: str, sampler: Sampler, draws: SampleDraws, conditions: Conditions) -> Tensor:
    """Images [n, 3, 28, 28] of ``draws``, of 256 levels; errors as of ``levels_of``."""
    with torch.no_grad():
        return levels_of(name, sampler(draws, conditions), (len(draws), 3, 28, 28))


def sheet_of(
    samplers: Mapping[str, Sampler],
    shown: Sequence[str],
    columns: int,
    *,
    encoder: CaptionEncoder,
    seed: int,
    device: torch.device,
) -> Image.Image:
    """Samples of the prompts ``shown``, each with ``columns`` noises, which are the same for all ``samplers``."""
    conditions = Prompts(captions=[prompt for prompt in shown for _ in range(columns)], encoder=encoder)
    indices = range(len(conditions.captions))
    return prompt_sheet(
        {name: sampled(name, one, SampleDraws(seed, indices, device), conditions) for name, one in samplers.items()},
        shown,
    )


def student_of(task: Distillation, maker: AveragedStudent | None = None) -> Sampler:
    """The student of ``task`` by the weights of ``maker``, its main average by default."""
    network = (maker or AveragedStudent()).network(task)
    return lambda draws, conditions: network(network.noise_of(draws), conditions.sampled(draws, network))


def teacher_of(task: Distillation, evaluations: int) -> Sampler:
    """The teacher of ``task`` by Heun's method."""
    heun = HeunSampler.for_evaluations(evaluations)
    return lambda draws, conditions: heun.sample(
        task.teacher, task.average.noise_of(draws), conditions.sampled(draws, task.average), draws
    )


def teacher_name(task: Distillation, evaluations: int) -> str:
    """'teacher, 25 evaluations', or 'teacher at guidance 2, 25 evaluations'."""
    scales = [part.guidance_scale for part in task.teacher.modules() if isinstance(part, Guided)]
    told = "".join(f" at guidance {scale:g}" for scale in scales)
    return f"teacher{told}, {evaluations} evaluation{'s' if evaluations > 1 else ''}"


def tilted_shares(task: Distillation, shares: Sequence[float]) -> dict[str, list[float]]:
    """p*(c), proportional to R(c) p(c), where the objective tilts by colours; nothing where it does not.

    Args:
        task: whose objective.
        shares: p(c) of the five colours where they are open, over all captions: p* is that of one caption if no
            caption's shares differ.
    """
    for term in task.objective.terms.values():
        reward = getattr(term.target, "reward", None)
        if isinstance(reward, ClassReward) and isinstance(reward.classifier, InkColour):
            return {"p*(colour), tilted": tilted(shares, reward.log_rewards)}
    return {}
