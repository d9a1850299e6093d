"""The non-leaky augmentation: known filters, exact motions, an analytic image and a slow pipeline of scipy's."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage, signal, stats
from torch._subclasses.fake_tensor import FakeTensorMode

from ratiograph.core.randomness import BatchGenerator
from ratiograph.core.types import Condition
from ratiograph.networks import augmentation
from ratiograph.networks.augmentation import CENTRE, SYM6, Flips, NoAugmentation, NonLeaky, Parameters


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(batch=3, height=12, width=10, seed=0, dtype=torch.float64):
    return torch.randn(batch, 2, height, width, generator=generator(seed), dtype=dtype)


def parameters_of(count, **given):
    """Parameters that do nothing but what is given."""
    named = {name: torch.zeros(count, dtype=torch.float64) for name in Parameters.__dataclass_fields__}
    return Parameters(**named | {name: torch.as_tensor(value, dtype=torch.float64) for name, value in given.items()})


def moved(images, **given):
    parameters = parameters_of(len(images), **given)
    return NonLeaky().transform(images, parameters), parameters.labels()


# --------------------------------------------------------------------------------------------- the filter


def test_the_filter_is_a_symlet():
    """Orthonormal to its even shifts, with six vanishing moments."""
    h, k = np.array(SYM6), np.arange(12)
    assert h.sum() == pytest.approx(math.sqrt(2), abs=1e-12)
    assert [float(h[: 12 - 2 * m] @ h[2 * m :]) for m in range(6)] == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-11)
    assert [float(((-1.0) ** k * k**power) @ h) for power in range(6)] == pytest.approx([0] * 6, abs=1e-8)
    assert float((k - CENTRE) ** 2 @ h) == pytest.approx(0, abs=1e-9)  # so quadratic images move exactly, too


# ------------------------------------------------------------------------------------------ exact motions


def test_probability_zero_is_the_identity():
    images = noise(64, dtype=torch.float32)
    found, labels = NonLeaky(probability=0.0)(images, generator())
    assert torch.equal(found, images)
    assert torch.equal(labels, torch.zeros(64, 9))


def test_images_that_nothing_happens_to_are_untouched():
    images = noise(200, dtype=torch.float32)
    found, labels = NonLeaky(probability=0.12)(images, generator())
    flipped = labels[:, 0] == 1
    still = (labels[:, 1:] == 0).all(1)
    assert 0.4 < float(still.float().mean()) < 0.7  # 0.88^4 (1 - 0.06)
    assert torch.equal(found[still & ~flipped], images[still & ~flipped])
    assert torch.equal(found[still & flipped], images[still & flipped].flip(3))
    assert (found[~still] - images[~still]).flatten(1).abs().amax(1).min() > 0.01


def test_flips_are_exact():
    images = noise()
    found, labels = moved(images, flip_x=[1, 0, 1], flip_y=[0, 1, 1])
    assert torch.equal(found, torch.stack([images[0].flip(2), images[1].flip(1), images[2].flip(1, 2)]))
    assert labels[:, :2].tolist() == [[1, 0], [0, 1], [1, 1]]
    assert (labels[:, 2:] == 0).all()


def reflected_shift(image, right, down):
    """The image [C, H, W] moved by whole pixels; what comes in mirrors at the outermost pixels."""
    height, width = image.shape[1:]
    rows, columns = (
        [min(k % (2 * n - 2), (-k) % (2 * n - 2)) for k in range(-by, n - by)]
        for n, by in ((height, down), (width, right))
    )
    return image[:, rows][:, :, columns]


@pytest.mark.parametrize(("right", "down"), [(3, 0), (0, -2), (-4, 5), (37, -100)])
def test_whole_pixel_shifts_are_exact(right, down):
    images = noise()
    found, labels = moved(images, shift_x=[right / (0.125 * 10)] * 3, shift_y=[down / (0.125 * 12)] * 3)
    expected = torch.stack([reflected_shift(image, right, down) for image in images])
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    assert labels[0, 7:].tolist() == pytest.approx([right / 1.25, down / 1.5])
    small = moved(images.float(), shift_x=[right / 1.25] * 3, shift_y=[down / 1.5] * 3)[0]
    torch.testing.assert_close(small.double(), expected, atol=2e-4, rtol=0)


# -------------------------------------------------------------------------------------- an analytic image


WAVES = (((1, 0), 0.5), ((0, 1), -0.3), ((1, 1), 0.4), ((2, 1), 0.25), ((1, 2), -0.2))


def smooth(x, y, width, height):
    """Cosines of whole half-periods, so that continuing by reflection at the outermost pixels is the formula itself.

    ``x`` and ``y`` are pixels from the centre.
    """
    u, v = math.pi * (x / (width - 1) + 0.5), math.pi * (y / (height - 1) + 0.5)
    return sum(weight * torch.cos(a * u) * torch.cos(b * v) for (a, b), weight in WAVES)


def grid(width, height):
    x = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    y = torch.arange(height, dtype=torch.float64) - (height - 1) / 2
    return torch.meshgrid(x, y, indexing="xy")


def analytic(parameters, k, width, height):
    """The smooth image, at the places where the matrices of EDM's Table 6 say that image ``k`` is read."""

    def turn(angle):
        return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])

    p = {name: float(getattr(parameters, name)[k]) for name in parameters.__dataclass_fields__}
    stretch = 2 ** (0.2 * p["anisotropy"])
    matrix = np.diag([1 - 2 * p["flip_x"], 1 - 2 * p["flip_y"]])
    matrix = 2 ** (0.2 * p["scale"]) * turn(-p["rotation"]) @ matrix
    matrix = turn(-p["axis"]) @ np.diag([stretch, 1 / stretch]) @ turn(p["axis"]) @ matrix
    x, y = grid(width, height)
    x, y = x - p["shift_x"] * width / 8, y - p["shift_y"] * height / 8
    (a, b), (c, d) = np.linalg.inv(matrix)
    return smooth(a * x + b * y, c * x + d * y, width, height)


def error_of(parameters, size=(64, 48), dtype=torch.float64):
    width, height = size
    count = len(parameters.scale)
    images = smooth(*grid(width, height), width, height).to(dtype).expand(count, 1, height, width)
    found = NonLeaky().transform(images, parameters)
    expected = torch.stack([analytic(parameters, k, width, height) for k in range(count)])
    return float((found[:, 0] - expected).abs().max())


@pytest.mark.parametrize(
    "given",
    [
        {"shift_x": [0.3, -1.7]},
        {"shift_y": [0.3, -1.7]},
        {"scale": [1.0, 2.5]},
        {"rotation": [0.3, -2.0]},
        {"anisotropy": [1.0, -0.8]},
        {"anisotropy": [1.0, -0.8], "axis": [0.4, -2.0]},
    ],
)
def test_a_smooth_image_moves_as_the_table_says(given):
    parameters = parameters_of(2, **given)
    assert error_of(parameters) < 1e-3
    assert error_of(parameters, dtype=torch.float32) < 1e-3


def test_all_parameters_together():
    """And interpolation errors are of second order in the pixel: a quarter at twice the resolution."""
    parameters = NonLeaky(probability=1.0).draw(40, generator(3))
    coarse, fine = error_of(parameters), error_of(parameters, size=(128, 96))
    assert fine < 0.3 * coarse
    assert fine < 2e-3


def test_a_quarter_turn_is_rot90():
    width = 64
    image = smooth(*grid(width, width), width, width)[None, None]
    for quarters in (1, 2, 3):
        found = moved(image, rotation=[quarters * math.pi / 2])[0]
        assert (found - torch.rot90(image, quarters, dims=(2, 3))).abs().max() < 1e-3
    assert (found - image).abs().max() > 0.5


# ------------------------------------------------------------------------------------------ scipy's pipeline


def slow_warp(image, parameters, k):
    """One channel [H, W]: a wide reflection, scipy's upsampling, linear lookup and downsampling."""
    height, width = image.shape
    pad = 60
    wide = np.pad(image, pad, mode="reflect")
    root = math.sqrt(2)
    for axis in (0, 1):
        wide = signal.upfirdn(root * np.array(SYM6), wide, up=2, axis=axis)

    def inverse(x, y):
        turn = [[math.cos(a := float(parameters.rotation[k])), -math.sin(a)], [math.sin(a), math.cos(a)]]
        x, y = x - float(parameters.shift_x[k]) * width / 8, y - float(parameters.shift_y[k]) * height / 8
        size = 2 ** (0.2 * float(parameters.scale[k]))
        return (turn[0][0] * x + turn[0][1] * y) / size, (turn[1][0] * x + turn[1][1] * y) / size

    m, n = np.meshgrid(np.arange(2 * height + 10), np.arange(2 * width + 10), indexing="ij")
    x, y = inverse((n - CENTRE - (width - 1)) / 2, (m - CENTRE - (height - 1)) / 2)
    places = [2 * (y + (height - 1) / 2 + pad) + CENTRE, 2 * (x + (width - 1) / 2 + pad) + CENTRE]
    found = ndimage.map_coordinates(wide, places, order=1)
    for axis in (0, 1):
        found = signal.upfirdn(np.array(SYM6)[::-1] / root, found, down=1, axis=axis)
        keep = np.arange(11, found.shape[axis] - 11, 2)
        found = found.take(keep, axis=axis)
    return found


def test_is_the_slow_pipeline_on_noise():
    images, count = noise(6), 6
    normal = torch.randn(4, count, generator=generator(1), dtype=torch.float64)
    parameters = parameters_of(count, scale=normal[0], rotation=3 * normal[1], shift_x=normal[2], shift_y=2 * normal[3])
    found = NonLeaky().transform(images, parameters)
    for k in range(count):
        for channel in range(2):
            expected = slow_warp(images[k, channel].numpy(), parameters, k)
            assert found[k, channel].numpy() == pytest.approx(expected, abs=1e-9)


# -------------------------------------------------------------------------------------- labels and chances


def test_labels_determine_the_transform():
    """All but the sign of the stretch, which EDM's labels do not tell: one of the two is what was done."""
    images, pipeline = noise(80), NonLeaky(probability=0.5)
    found, labels = pipeline(images, generator(2))
    labels = labels.double()
    stretch, axis = labels[:, 5:7].norm(dim=1), torch.atan2(labels[:, 6], labels[:, 5])
    known = {
        "flip_x": labels[:, 0],
        "flip_y": labels[:, 1],
        "scale": labels[:, 2],
        "rotation": torch.atan2(labels[:, 4], labels[:, 3] + 1),
        "shift_x": labels[:, 7],
        "shift_y": labels[:, 8],
    }
    errors = []
    for sign in (1, -1):
        turned = axis if sign == 1 else axis + math.pi
        parameters = parameters_of(80, **known, axis=turned, anisotropy=sign * stretch)
        torch.testing.assert_close(parameters.labels(), labels, atol=1e-6, rtol=0)
        errors.append((pipeline.transform(images, parameters) - found).flatten(1).abs().amax(1))
    first, second = errors
    assert torch.minimum(first, second).max() < 2e-5
    plain = stretch == 0
    assert torch.equal(first[plain], second[plain])
    assert torch.maximum(first, second)[stretch > 0.3].min() > 0.01
    assert 5 < int((first < second)[~plain].sum()) < int((~plain).sum()) - 5


def test_labels_are_edms():
    given = {"flip_x": 1, "flip_y": 1, "scale": 0.5, "rotation": 2.0, "anisotropy": -1.5, "axis": 0.7, "shift_x": 3.0}
    labels = moved(noise(1), **{name: [value] for name, value in given.items()}, shift_y=[-4.0])[1]
    turned = [math.cos(2) - 1, math.sin(2)]
    stretched = [-1.5 * math.cos(0.7), -1.5 * math.sin(0.7)]
    assert labels[0].tolist() == pytest.approx([1, 1, 0.5, *turned, *stretched, 3, -4])


def test_parameters_have_their_distributions():
    count = 40_000
    drawn = NonLeaky(probability=0.12).draw(count, generator(4))
    assert float(drawn.flip_x.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(drawn.flip_y.mean()) == pytest.approx(0.06, abs=0.006)
    happened = {name: getattr(drawn, name) != 0 for name in ("scale", "rotation", "anisotropy", "shift_x")}
    for name, mask in happened.items():
        assert float(mask.float().mean()) == pytest.approx(0.12, abs=0.008), name
        law = stats.uniform(-math.pi, 2 * math.pi).cdf if name == "rotation" else "norm"
        assert stats.kstest(getattr(drawn, name)[mask].numpy(), law).pvalue > 1e-3, name
    assert torch.equal(drawn.shift_x != 0, drawn.shift_y != 0)
    stretched = drawn.axis[happened["anisotropy"]]
    assert float((stretched == 0).float().mean()) == pytest.approx(0.5, abs=0.035)
    assert stats.kstest(stretched[stretched != 0].numpy(), stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 1e-3
    together = (happened["scale"] & happened["rotation"]).float().mean()
    assert float(together) == pytest.approx(0.12**2, abs=0.003)


def test_flips_have_no_labels():
    images = noise(2000, 4, 4, dtype=torch.float32)
    found, labels = Flips(probability=0.3)(images, generator())
    assert labels is None
    mirrored = (found == images.flip(3)).flatten(1).all(1)
    assert torch.equal(found[~mirrored], images[~mirrored])
    assert float(mirrored.float().mean()) == pytest.approx(0.3, abs=4 * (0.21 / 2000) ** 0.5)


# ------------------------------------------------------------------------------------------------- use


def test_conditions_are_told():
    images, condition = noise(4), Condition(labels=torch.arange(4))
    found, told = NonLeaky(probability=0.9).apply(images, condition, generator(1))
    expected, labels = NonLeaky(probability=0.9)(images, generator(1))
    assert torch.equal(found, expected)
    assert torch.equal(told.augment, labels)
    assert told.labels is condition.labels
    for pipeline in (NoAugmentation(), Flips(probability=0.0)):
        found, told = pipeline.apply(images, condition, generator())
        assert torch.equal(found, images)
        assert told.augment is None


def test_random_numbers_are_the_generators():
    images, pipeline = noise(16), NonLeaky(probability=0.5)
    first, again, other = (pipeline(images, generator(seed))[0] for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_processes_augment_their_rows_of_the_global_batch():
    images, pipeline = noise(6, dtype=torch.float32), NonLeaky(probability=0.5)
    whole, labels = pipeline(images, generator(8))
    for part in (0, 1):
        own = BatchGenerator(torch.device("cpu"), part, 2)
        own.manual_seed(8)
        rows = slice(3 * part, 3 * part + 3)
        found, told = pipeline(images[rows], own)
        torch.testing.assert_close(found, whole[rows])
        assert torch.equal(told, labels[rows])


def test_no_value_is_read():
    """Tensors without values go through, so nothing waits for the device."""
    try:
        with FakeTensorMode():
            images, labels = NonLeaky(probability=0.5)(torch.empty(4, 3, 8, 8), generator())
            assert (tuple(images.shape), tuple(labels.shape)) == ((4, 3, 8, 8), (4, 9))
    finally:
        augmentation._resampling.cache_clear()  # it has kept tensors without values


def test_half_precision_images_keep_their_type():
    images = noise(8, dtype=torch.float32)
    found, labels = NonLeaky(probability=0.5)(images.bfloat16(), generator(1))
    assert (found.dtype, labels.dtype) == (torch.bfloat16, torch.float32)
    expected = NonLeaky(probability=0.5)(images.bfloat16().float(), generator(1))[0]
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.01)


def test_refusals():
    with pytest.raises(ValueError, match="at least 2"):
        moved(torch.zeros(1, 1, 1, 4, dtype=torch.float16), scale=[1.0])
