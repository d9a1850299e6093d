"""The coloured digits: captions say what is in the picture, and the rest is as varied as it should be."""

import io

import numpy as np
import pytest
from PIL import Image

from ratiograph.data.coloured_digits import COLOURS, DARKEST, DIGITS, caption_of, named
from ratiograph.data.embedded import _coloured_digits, resolve
from ratiograph.data.shards import read_shard


@pytest.fixture(scope="module")
def samples():
    return _coloured_digits()


def pixels(sample):
    return np.asarray(Image.open(io.BytesIO(sample["png"]))).astype(float)


def test_captions_and_what_they_name():
    assert caption_of(7, "red") == "a red seven"
    assert caption_of(8, None) == "an eight"
    assert caption_of(8, "blue") == "a blue eight"
    assert caption_of(None, "green") == "a green digit"
    assert caption_of(None, None) == "a digit"
    assert named("A RED seven") == (7, "red")
    assert named("an orange elephant") == (None, None)
    for digit in (None, *range(10)):
        for colour in (None, *COLOURS):
            assert named(caption_of(digit, colour)) == (digit, colour)


def test_the_same_every_time_and_no_two_keys_alike(samples):
    again = _coloured_digits()
    assert samples[:100] == again[:100]
    assert samples[-1] == again[-1]
    assert len({sample["__key__"] for sample in samples}) == len(samples) == 10_000


def test_captions_agree_with_the_digits_and_come_in_their_proportions(samples):
    said = [named(sample["txt"].decode()) for sample in samples]
    assert all(digit in (None, int(sample["cls"])) for (digit, _), sample in zip(said, samples, strict=True))
    both = sum(digit is not None and colour is not None for digit, colour in said)
    assert abs(both / 10_000 - 0.5) < 0.02
    assert abs(sum(colour is None for _, colour in said) / 10_000 - 0.25) < 0.02
    assert abs(sum(digit is None for digit, _ in said) / 10_000 - 0.25) < 0.02
    digits = [int(sample["cls"]) for sample in samples[500:1000]]
    assert np.bincount(digits).tolist() == [50] * len(DIGITS)


def test_ink_is_of_the_named_colour_and_its_shades_vary(samples):
    inks = {name: [] for name in COLOURS}
    for sample in samples[:600]:
        colour = named(sample["txt"].decode())[1]
        if colour is not None:
            light = pixels(sample).sum((0, 1))
            inks[colour].append(light / np.linalg.norm(light))
    for name, found in inks.items():
        palette = {other: np.array(c) / np.linalg.norm(c) for other, c in COLOURS.items()}
        nearest = [min(palette, key=lambda other: np.linalg.norm(ink - palette[other])) for ink in found]
        assert set(nearest) == {name}
        assert 0.01 < np.std(found, axis=0).mean() < 0.1
        assert np.abs(np.mean(found, axis=0) - palette[name]).max() < 0.03


def test_an_image_is_its_digit_times_one_colour(samples):
    greys = [sample for path in resolve("mnist") for sample in read_shard(path)]
    for position in (0, 7, 5003):
        grey = np.asarray(Image.open(io.BytesIO(greys[position % 5000].image))).astype(float)
        image = pixels(samples[position])
        ink = image[np.unravel_index(grey.argmax(), grey.shape)] / grey.max()
        np.testing.assert_allclose(image, grey[..., None] * ink, atol=1.01)  # of 255, from rounding twice
        assert 0.6 * DARKEST < ink.max() <= 1
