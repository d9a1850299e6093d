"""Sizes, levels, tilted shares and Gaussians as text, against sums by hand and pixels by numpy."""

import math

import numpy as np
import pytest
import torch

from ratiograph.evaluation.caption_evaluator import CaptionsEvaluator
from ratiograph.evaluation.digit_evaluator import DigitsEvaluator
from ratiograph.evaluation.frechet import fit, frechet_distance
from ratiograph.evaluation.small_images import gaussian_of, gaussian_text, levels_of, tilted
from ratiograph.networks.word_encoder import WordEncoder


@pytest.mark.parametrize("make", [DigitsEvaluator, lambda **sizes: CaptionsEvaluator(encoder=WordEncoder(), **sizes)])
def test_small_sizes_are_refused_by_name(make):
    make(samples=4, during_samples=4, batch_size=1, teacher_evaluations=())
    for sizes in ({"samples": 3}, {"during_samples": 3}, {"batch_size": 0}, {"teacher_evaluations": (5, 0)}):
        with pytest.raises(ValueError, match=r"(Digits|Captions)Evaluator needs samples >= 4, during_samples >= 4"):
            make(**sizes)


def test_pixels_are_those_of_an_image_file():
    images = torch.linspace(-1.3, 1.3, 2 * 3 * 5 * 5).reshape(2, 3, 5, 5).double()
    levels = levels_of("x", images, (2, 3, 5, 5))
    pixels = np.rint((images.numpy().clip(-1, 1) + 1) * 127.5)
    assert levels.dtype == torch.float32
    np.testing.assert_allclose(levels.numpy(), pixels / 127.5 - 1, atol=1e-6)
    assert torch.equal(levels_of("x", levels, (2, 3, 5, 5)), levels)


def test_what_is_no_image_is_refused():
    images = torch.zeros(4, 1, 2, 2)
    with pytest.raises(ValueError, match=r"\(4, 1, 2, 2\), expected \(4, 3, 2, 2\): bind Experiment.evaluator"):
        levels_of("x", images, (4, 3, 2, 2))
    images[1, 0, 0, 1], images[3] = math.nan, math.inf
    with pytest.raises(ValueError, match="2 of 4 images of 'x' hold NaN"):
        levels_of("x", images, (4, 1, 2, 2))


def test_shares_are_tilted():
    assert tilted([0.25, 0.75], [math.log(6), math.log(2)]) == pytest.approx([0.5, 0.5])
    assert tilted([0.2, 0.3, 0.5], [1.7] * 3) == pytest.approx([0.2, 0.3, 0.5])


def test_a_gaussian_survives_as_text():
    features = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    fitted = fit(features)
    read = gaussian_of(gaussian_text(fitted))
    torch.testing.assert_close(read.mean, fitted.mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(read.covariance, fitted.covariance, rtol=1e-6, atol=1e-7)
    moved = fit(features + 1)
    assert frechet_distance(read, moved) == pytest.approx(frechet_distance(fitted, moved), rel=1e-5) == pytest.approx(7)
