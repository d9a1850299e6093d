"""CaptionsEvaluator and InkColour: real digits are read right, wrong ones are found out, rewards tilt what is open."""

import json
import math

import numpy as np
import pytest
import torch

from ratiograph import config
from ratiograph.algebra.rewards import ClassReward
from ratiograph.core.types import Condition
from ratiograph.data.captions import pack, unpack
from ratiograph.data.coloured_digits import COLOURS, named
from ratiograph.data.embedded import _coloured_digits
from ratiograph.data.shards import write_shards
from ratiograph.data.stream import load_all
from ratiograph.evaluation.caption_evaluator import CaptionsEvaluator, tilted_shares
from ratiograph.evaluation.frechet import fit, frechet_distance
from ratiograph.evaluation.prompt_readings import Readings, prompts, to_grey
from ratiograph.evaluation.prompt_sheet import GAP, HEAD, prompt_sheet
from ratiograph.evaluation.small_images import gaussian_of
from ratiograph.networks.architectures.ink_colour import InkColour
from ratiograph.networks.word_encoder import WordEncoder
from ratiograph.training.logs import make_grid

LOG_REWARDS = (2.0, 0.0, 0.0, 0.0, 0.0)
CPU = torch.device("cpu")


def painted(colour, brightness=1.0):
    """An image [3, 28, 28] with a bar of the colour's ink."""
    image = torch.zeros(3, 28, 28)
    image[:, 4:24, 12:16] = torch.tensor(COLOURS[colour])[:, None, None] * brightness
    return image * 2 - 1


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "digits"
    write_shards(folder, "digits", _coloured_digits()[:500], 2)
    return f"{folder}/digits-{{000000,000001}}.tar"


@pytest.fixture(scope="module")
def evaluator(shards):
    reward = ClassReward(classifier=InkColour(), log_rewards=LOG_REWARDS)
    made = CaptionsEvaluator(
        encoder=WordEncoder(), reference=shards, reward=reward, samples=200, batch_size=80, teacher_evaluations=(3,)
    )
    made.prepare(CPU)
    return made


class Sampler:
    """Real digits in the place of samples; ``answer`` chooses one for each caption."""

    def __init__(self, evaluator, answer):
        self.evaluator, self.answer, self.calls = evaluator, answer, []

    def __call__(self, draws, conditions):
        captions = unpack(conditions.sampled(draws, None).caption)
        self.calls.append(len(draws))
        return torch.stack(
            [self.answer(caption, index) for caption, index in zip(captions, draws.indices, strict=True)]
        )


def test_colours_are_read_whatever_the_brightness_and_differentiably():
    images = torch.stack([painted(colour, b) for b in (1.0, 0.5) for colour in COLOURS])
    colour = InkColour().double()
    assert colour(images).argmax(1).tolist() == [*range(5)] * 2
    assert colour(images).softmax(1).amax(1).min() > 0.99
    x = (torch.rand(2, 3, 6, 6, dtype=torch.float64) * 1.6 - 0.8).requires_grad_()
    assert torch.autograd.gradcheck(colour, x)
    black = torch.full((1, 3, 4, 4), -1.0, requires_grad=True)
    colour(black).sum().backward()
    assert black.grad.isfinite().all()


def test_logits_are_squared_distances_of_directions():
    directions = torch.nn.functional.normalize(torch.tensor(list(COLOURS.values())), dim=1)
    red = torch.tensor(COLOURS["red"])[None, :, None, None].expand(1, 3, 8, 8) * 2 - 1
    want = -(directions[0] - directions).square().sum(1) / (2 * 0.2**2)
    torch.testing.assert_close(InkColour(width=0.2)(red)[0], want, rtol=5e-3, atol=1e-4)


def test_prompts_come_in_the_datas_proportions():
    said = [named(prompt) for prompt in prompts()]
    assert len(said) == 200
    assert sum(None not in pair for pair in said) == 100
    assert sum(colour is None for _, colour in said) == sum(digit is None for digit, _ in said) == 50


def test_grey_is_the_brightest_channel_at_full_brightness():
    grey = to_grey(painted("blue", 0.5)[None])
    assert grey.shape == (1, 1, 28, 28)
    assert grey.max() == 1
    assert grey.min() == -1


def test_real_digits_are_what_their_captions_say(evaluator):
    row = evaluator.real_row()
    assert row["prompt_accuracy"] > 0.98
    assert row["colour_accuracy"] == 1
    assert row["samples"] == 500
    assert max(abs(share - 0.2) for share in row["open_colours"]) < 0.1
    # Every red sample has log R near 2, all others near 0.
    assert abs(row["open_log_reward"] - 2 * row["open_colours"][0]) < 0.05


def test_a_sampler_that_obeys_and_one_that_does_not(evaluator):
    real, shown = evaluator.real, load_images(evaluator)

    def obey(caption, index):
        fits = [
            k
            for k in range(500)
            if named(caption)[0] in (None, int(real.digits[k]))
            and named(caption)[1] in (None, list(COLOURS)[int(real.colours[k])])
        ]
        return shown[fits[index % len(fits)]]

    sampler = Sampler(evaluator, obey)
    row = evaluator.measure("obeys", sampler, evaluations=1)
    assert sampler.calls == [80, 80, 40]
    assert row["prompt_accuracy"] == row["digit_accuracy"] == row["colour_accuracy"] == 1
    red = [k for k in range(500) if real.colours[k] == 0]
    row = evaluator.measure(
        "red", Sampler(evaluator, lambda caption, index: shown[red[index % len(red)]]), evaluations=1
    )
    named_red = sum(named(p)[1] == "red" for p in prompts()) / sum(named(p)[1] is not None for p in prompts())
    assert row["colour_accuracy"] == pytest.approx(named_red) == 0.2
    assert row["open_colours"] == [1, 0, 0, 0, 0]
    assert row["open_log_reward"] > 1.9
    assert row["prompt_accuracy"] < 0.2


def test_diversity_is_the_distance_within_a_caption():
    """Against distances of all pairs, and the two samplers whose value is known."""
    captions = ["a red seven", "a two", "a red seven", "a red seven", "a four", "a two"]
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nothing = torch.zeros(6)

    def readings(rows):
        return Readings(captions, rows, nothing, nothing, None)

    sevens = torch.pdist(features[[0, 2, 3]]).mean().item()
    twos = (features[1] - features[5]).norm().item()
    spreads = readings(features).spreads()
    assert {caption: n for caption, (n, _) in spreads.items()} == {"a red seven": 3, "a two": 2}
    assert spreads["a red seven"][1] == pytest.approx(sevens)
    real = {"a red seven": (50, 3.0), "a two": (9, 2.0), "a four": (2, 1.0)}
    assert readings(features).diversity(real) == pytest.approx((3 * sevens + 2 * twos) / (3 * 3 + 2 * 2))
    del real["a two"]
    assert readings(features).diversity(real) == pytest.approx(sevens / 3)
    assert readings(features).diversity(spreads) == pytest.approx(1)
    assert readings(features[[0, 1, 0, 0, 4, 1]]).diversity(real) == 0
    assert math.isnan(readings(features).diversity({}))


def load_images(evaluator):
    """The reference's images in the order of ``evaluator.real``."""
    return load_all(evaluator.reference, resolution=28, channels=3)[0]


def test_broken_samples_are_named(evaluator):
    with pytest.raises(ValueError, match="'x' hold NaN"):
        evaluator.measure("x", lambda draws, conditions: torch.full((len(draws), 3, 28, 28), math.nan), evaluations=1)
    with pytest.raises(ValueError, match="expected"):
        evaluator.measure("x", lambda draws, conditions: torch.zeros(len(draws), 1, 28, 28), evaluations=1)
    with pytest.raises(ValueError, match="samples >= 4"):
        CaptionsEvaluator(encoder=WordEncoder(), samples=3)


def test_the_reward_is_its_share_of_the_red(evaluator):
    log_rewards = evaluator.reward.log_reward(torch.stack([painted(c) for c in COLOURS]), Condition())
    torch.testing.assert_close(log_rewards, torch.tensor(LOG_REWARDS), atol=0.02, rtol=0.0)


def test_a_sheet_has_a_row_a_prompt():
    images = torch.stack([painted(c) for c in COLOURS for _ in range(3)])
    sheet = prompt_sheet({"a": images, "b": -images}, list(COLOURS))
    block = make_grid(-images, 3)
    left = sheet.width - GAP - block.shape[1]
    assert np.array_equal(np.asarray(sheet)[HEAD : HEAD + block.shape[0], left : left + block.shape[1]], block)
    assert (np.asarray(sheet)[HEAD + 20 : HEAD + 40, :60] < 128).any()  # the first prompt, in black
    name = "a name that is wider than its block of three images"
    wide = prompt_sheet({name: images, "b": -images}, list(COLOURS))
    assert wide.width > sheet.width + 100
    left = wide.width - GAP - block.shape[1]
    assert np.array_equal(np.asarray(wide)[HEAD : HEAD + block.shape[0], left : left + block.shape[1]], block)
    assert (np.asarray(wide)[:HEAD, left - GAP : left] == 255).all()  # it does not run into the next


def test_red_is_counted_where_the_colour_is_open(evaluator):
    """A sampler that paints what is named, and blue otherwise but for "a seven" and "a two"."""

    def paint(caption, index):
        colour = named(caption)[1] or ("red" if caption in ("a seven", "a two") else "blue")
        return painted(colour)

    row = evaluator.measure("paints", Sampler(evaluator, paint), evaluations=1)
    open_ = [prompt for prompt in prompts() if named(prompt)[1] is None]
    assert row["red_share"] == sum(prompt in ("a seven", "a two") for prompt in open_) / len(open_) == 0.2
    assert row["colour_accuracy"] == 1
    assert row["diversity"] == 0


FILES = ("gin/captions_distillation.gin", "gin/captions_reward_tilt.gin", "gin/captions_reward_ascent.gin")


@pytest.mark.parametrize("file", FILES)
def test_a_run_of_a_gin_file_ends_in_a_document(file, shards, tmp_path, monkeypatch):
    monkeypatch.setenv("RATIOGRAPH_CACHE", str(tmp_path))
    bindings = [
        *("EDM.weights = None", "CaptionedUNet.channels = 16", "Experiment.batch_size = 4", f"DATA = '{shards}'"),
        *("CaptionsEvaluator.samples = 8", "CaptionsEvaluator.teacher_evaluations = (1,)"),
    ]
    torch.manual_seed(0)
    experiment = config.build(config.parse([file], bindings, {}))
    task, evaluator = experiment.task, experiment.evaluator
    task.prepare(CPU, None)
    batches, generator = experiment.data.batches(4, 0), torch.Generator().manual_seed(0)
    task.fit(batches, generator)
    before = evaluator.before(task, CPU, 0)
    for _ in range(2):
        assert all(value.isfinite() for value in task.step(next(batches), 4, generator).values())
    document = json.loads(json.dumps(evaluator.after(task, CPU, 0, before, tmp_path)))
    names = [row["name"] for row in document["rows"]]
    teacher = "teacher at guidance 2, 1 evaluation"
    assert names == ["real digits", teacher, "student before training", "student, one evaluation"]
    assert set(document["metrics"]) < set(document["rows"][0])
    assert (tmp_path / document["figures"][0]["file"]).is_file()
    series = {one["name"]: one["values"] for one in document["histograms"][0]["series"]}
    tilted = tilted_shares(task, [0.2] * 5)
    if "reward" in file:
        e = math.exp(2.5)
        assert tilted["p*(colour), tilted"] == pytest.approx([e / (e + 4), *[1 / (e + 4)] * 4])
        assert sum(series["p*(colour), tilted"]) == pytest.approx(1)
    else:
        assert tilted == {}
    again = evaluator.teacher_row(task, 1)
    assert again["frechet_distance"] == document["rows"][1]["frechet_distance"]
    assert "teacher_distance" not in document["rows"][1]
    to_teacher = frechet_distance(fit(evaluator.real.features), gaussian_of(again["fitted"]))
    assert document["rows"][0]["teacher_distance"] == pytest.approx(to_teacher)
    assert set(evaluator.during(task, CPU, 0)) == {"prompt_accuracy", "log_reward", "frechet_distance"}


def test_the_teachers_gin_file_steps(shards):
    bindings = [f"DATA = '{shards}'", "CaptionedUNet.channels = 16", "EDMFromGrey.weights = None"]
    torch.manual_seed(0)
    experiment = config.build(config.parse(["gin/captions_teacher.gin"], bindings, {}))
    task, batches = experiment.task, experiment.data.batches(8, 0)
    task.prepare(CPU, None)
    assert all(task.step(next(batches), 8, torch.Generator().manual_seed(0))["loss/denoising"] > 0 for _ in range(2))
    assert task.preview(2, torch.Generator().manual_seed(0)).shape == (2, 3, 28, 28)


def test_captions_travel_with_their_batch(shards):
    config_ = config.parse(["gin/captions_teacher.gin"], [f"DATA = '{shards}'"], {})
    batch = next(config.build(config_).data.batches(16, 0))
    colour = InkColour()(batch.images).argmax(1).tolist()
    captions = unpack(batch.condition.caption)
    assert all(named(c)[1] in (None, list(COLOURS)[k]) for c, k in zip(captions, colour, strict=True))
    assert torch.equal(batch.condition.text, WordEncoder().encode(captions).text)
    assert torch.equal(pack(captions), batch.condition.caption)
