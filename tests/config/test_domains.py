"""Domains beside annotations: which numbers a parameter takes, and what a refusal says."""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated

import pytest
import torch
from annotated_types import Gt, Interval, Len, Lt, MinLen, MultipleOf, Predicate

from ratiograph import config
from ratiograph.config.components import components, load_components
from ratiograph.config.signatures import accepts, describe_type
from ratiograph.config.values import Reference
from ratiograph.core.domains import (
    Exponent,
    Fraction,
    NonNegative,
    NonNegativeInt,
    OrInfinite,
    Positive,
    PositiveInt,
    Scale,
    UnitInterval,
)

INF = math.inf
ANY_NUMBER = {
    *("AbsorbedTerm.coefficient", "RewardAscent.coefficient", "Term.coefficient", "SumReward.weights", "SBA.lam"),
    *("LinearReward.slope", "QuadraticReward.curvature", "QuadraticReward.slope", "ClassReward.log_rewards"),
    *("RewardTilted.log_normalizer", "RewardTiltedCumulant.log_normalizer", "RewardTiltedNoJacobian.log_normalizer"),
    *("RewardTiltedSecondOrder.log_normalizer", "RewardWeighted.log_normalizer", "CustomWeighting.log_ratios"),
    *("LogNormalSigma.mean", "LogitNormal.mean", "GaussianMixture.means", "GaussianMixture.covariances"),
    *("CaptionStream.minimum_aesthetic", "CaptionedStream.minimum_aesthetic", "Filters.minimum_aesthetic"),
    *("Guided.guidance_scale", "Experiment.seed", "CaptionedSamples.seed"),
    # counted from the end where negative
    *("StudentScoreHeadRatio.feature_maps", "StudentScoreMeanRatio.feature_map", "TeacherFeatureRatio.feature_maps"),
}
"""Parameters of which every number has a meaning."""


def plain_numbers(annotation: object) -> Iterator[object]:
    """Every int or float in an annotation that has no marker."""
    if annotation in (int, float):
        yield annotation
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        inner = () if inner[0] in (int, float) else inner[:1]
    for each in inner:
        yield from plain_numbers(each)


def test_parameters_without_a_domain_are_those_that_need_none():
    load_components()
    found = {
        f"{name}.{parameter}"
        for name, component in components.items()
        if component.make.__module__.startswith("ratiograph.")
        for parameter, p in component.parameters.items()
        if any(plain_numbers(p.annotation))
    }
    assert found == ANY_NUMBER


def test_every_default_is_in_its_domain():
    load_components()
    for name, component in components.items():
        for parameter, p in component.parameters.items():
            assert p.required or p.default is None or accepts(p.annotation, p.default, {}), f"{name}.{parameter}"


def is_odd(value):
    return value % 2 == 1


def is_sorted(values):
    return list(values) == sorted(values)


@pytest.mark.parametrize(
    ("annotation", "inside", "outside"),
    [
        (float, [0, -1.5, 3e38, 2], [INF, -INF, math.nan, 1e39, 1e-40, True, "1"]),
        (int, [0, -(2**63), 2**63 - 1], [2**63, 1.0, True]),
        (Positive, [1e-30, 5], [0, -1e-30, INF]),
        (NonNegative, [0, 0.0], [-1e-9]),
        (Fraction, [0, 0.999], [1, 1.5]),
        (UnitInterval, [0, 1], [1.01, -0.1]),
        (Scale, [1e-15, 80], [0, 1e16]),
        (Exponent, [7], [0.0, -7.0]),
        (PositiveInt, [1], [0, 0.5]),
        (NonNegativeInt, [0], [-1]),
        (Annotated[float, Interval(gt=0), OrInfinite()], [1, INF], [-INF, 0, math.nan]),
        (Annotated[int, MultipleOf(8)], [16], [12]),
        (Annotated[float, MultipleOf(0.1)], [0.3, 0.7, -0.2, 0, 1], [0.35, 0.30001, 1e-20]),
        (Annotated[Sequence[float], Gt(0)], [(1.0, 2), []], [(1.0, 0.0), [-1]]),
        (Annotated[list, Gt(0)], [["a", 1]], [["a", 0]]),
        (Annotated[dict[int, tuple[float, ...]], Lt(1)], [{5: (0.5,)}], [{0: (0.5, 1)}]),
        (Annotated[Sequence[float] | None, OrInfinite(), Gt(0)], [None, (INF, 1)], [(-INF,), (math.nan,)]),
        (Annotated[int, Predicate(is_odd)], [3], [4]),
        (Annotated[float | None, Predicate(is_odd)], [3], [None, 2.5]),
        (Annotated[Sequence[float], Predicate(is_sorted)], [(1, 2), ()], [(2, 1)]),
        (Annotated[typing.Any, Predicate(is_sorted)], [Reference("", "KL"), [Reference("", "KL"), 1]], [(2, 1)]),
        (typing.Sequence, [(1, "a")], [3]),
        (Annotated[Sequence[Fraction], Len(2, 2)], [(0.0, 0.9), [0, 0]], [(), (0.9,), (0.9, 1.5), (0.1, 0.2, 0.3)]),
        (Annotated[Sequence[PositiveInt], MinLen(1)] | None, [None, (1,)], [(), (0,)]),
    ],
)
def test_domain(annotation, inside, outside):
    assert all(accepts(annotation, value, {}) for value in inside)
    assert not any(accepts(annotation, value, {}) for value in outside)


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (Positive, "a finite number above 0"),
        (Annotated[int, Interval(ge=2, le=1000)] | None, "a whole number at least 2 and at most 1000 or None"),
        (Scale, "a finite number at least 1e-15 and at most 1e+15"),
        (Annotated[float, Interval(ge=0), OrInfinite()], "a finite number at least 0 or infinite"),
        (Annotated[Sequence[Fraction], Len(2, 2)], "list of a finite number at least 0 and below 1, 2 entries"),
        (Annotated[int, Predicate(is_odd)], "a whole number such that is_odd holds"),
        (Annotated[Sequence[PositiveInt], MinLen(1)], "list of a whole number at least 1, not fewer than 1 entries"),
    ],
)
def test_domain_in_words(annotation, words):
    assert describe_type(annotation) == words


@pytest.mark.parametrize(
    "line",
    [
        *("Adam.lr = 0.0", "Adam.clip_norm = -1.0", "Adam.betas = (0.9,)", "Adam.cooldown = (-1, 3)"),
        *("EMA.half_life = 0", "EDMWeight.sigma_data = 0.0", "SNRClipped.limit = 0.0"),
        *("CustomWeighting.weights = (-1, 1)", "EDM.sigma_data = 0", "LogNormalSigma.std = 0"),
        *("LogitNormal.std = -1", "FixedSigma.sigma = 0.0", "R1Penalized.weight = -1.0", "R1Penalized.every = 0"),
        *("Scaled.weight = 0.0", "ScaledReward.beta = 0.0", "DigitClassifier.width = 12"),
        *("RandomAffine.scaling = 1.0", "CaptionedUNet.caption_dropout = 1.0", "NonLeaky.probability = -0.1"),
        *("Flips.probability = 1.2", "NonLeaky.scale_std = -1.0", "BatchConditions.kept = 0", "Clamped.limit = 0"),
        *("GaussianMixture.weights = (0.0,)", "Clipped.limit = 0.0", "LoRA.rank = 0"),
        *("RewardTilted.normalizer_samples = 0", "StochasticHeunSampler.s_churn = -1.0", "MLP.layers = 1"),
        *("RatioEvaluator.samples = 99", "WordEncoder.width = 0", "RewardTiltedSecondOrder.probes = 0"),
        *("TimeNormalized.bins = 0", "RatioNormalized.decay = 1.0", "OneStep.sigma_init = 0", "InkColour.width = 0"),
        *("MixtureEvaluator.samples = 1", "SDXLCaptionEncoder.sizes = (1,)", "ShardStream.channels = 2"),
        *("ShardStream.workers = -1", "ShardStream.max_damaged = 1.0", "UNet.patch_size = 0"),
    ],
)
def test_value_out_of_its_domain_is_refused(line):
    load_components()
    name = line.partition(".")[0]
    with pytest.raises(config.ConfigError, match=f"^flag .*: {line.partition(' ')[0]} takes .*, not .*"):
        config.parse([], [line], root=name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Adam.lr = 1e999", "Adam.lr takes a finite number above 0, not inf: numbers are finite."),
        ("Adam.lr = 1e300", "Adam.lr takes a finite number above 0, not 1e+300: float32 holds 0 and sizes from"),
        (f"Experiment.seed = {2**63}", f"Experiment.seed takes int, not {2**63}: whole numbers have 64 bits."),
        ("MLP.width = 0", "MLP.width takes a whole number at least 1, not 0"),
        (f"MLP.width = {2**62}", "cannot be built with these values: RuntimeError: "),
        ("MLP.dimension = 3", "student.denoiser (MLP) is for samples of 3, and teacher (RingMixture) for 2: configure"),
        ("MLP.classes = 9", "the student makes 9 classes, of which the teacher knows 2: give it as many"),
    ],
)
def test_refusal_says_what_would_do(line, message):
    with pytest.raises(config.ConfigError, match=re.escape(message)) as caught, torch.device("meta"):
        config.build(config.parse(["gin/mixture2d_scores.gin"], [line, "Experiment.evaluator = None"]))
    assert "\n" not in str(caught.value)


def test_an_exception_of_a_library_is_the_cause_of_one_line_with_the_place():
    with pytest.raises(config.ConfigError) as caught, torch.device("meta"):
        config.build(config.parse(["gin/mixture2d_scores.gin"], [f"MLP.width = {2**62}"]))
    assert re.match(
        r".*mixture2d.*\.gin:\d+: .* = @student/MLP\(\): cannot be built with these values: ", str(caught.value)
    )
    assert isinstance(caught.value.__cause__, RuntimeError)
