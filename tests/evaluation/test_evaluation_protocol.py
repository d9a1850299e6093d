"""The evaluator: the numbers of all images at once, for any batch size and number of ranks."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import nn

import tools_here
from ratiograph import config
from ratiograph.core.draws import SampleDraws
from ratiograph.core.types import Condition
from ratiograph.data import captions
from ratiograph.data.images import encode_png
from ratiograph.data.stream import ShardStream
from ratiograph.evaluation.alignment import ImageScore
from ratiograph.evaluation.candidates import AveragedStudent, LastStudent
from ratiograph.evaluation.feature_sets import FeatureSet, read_statistics, write_statistics
from ratiograph.evaluation.features import DigitFeatures, to_pixels
from ratiograph.evaluation.frechet import fit, frechet_distance
from ratiograph.evaluation.image_evaluator import ImageEvaluator
from ratiograph.evaluation.image_sources import (
    CaptionedSamples,
    FolderStream,
    StudentSamples,
    coco_captions,
    stream_images,
)
from ratiograph.evaluation.inception_features import InceptionFeatures
from ratiograph.evaluation.manifold import Manifold, expected_coverage
from ratiograph.evaluation.metrics import Frechet, InBatchSimilarity, NearestNeighbours
from ratiograph.networks.autoencoder import Autoencoder
from ratiograph.networks.conditions import BatchConditions, UniformLabels
from ratiograph.networks.text_encoders import SD15CaptionEncoder
from ratiograph.networks.weights import weight_files
from ratiograph.reports.run_report import write_report

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Rows of a test are its own; the digits' shards are written once for all tests."""
    monkeypatch.setattr("ratiograph.evaluation.result_cache.cache_folder", lambda: tmp_path)


class Generator(nn.Module):
    """Grey 28 x 28 images of noise [n, 8]."""

    def __init__(self, *, seed: int = 0):
        super().__init__()
        self.seed = seed
        self.layer = nn.Linear(8, 784)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.layer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def noise_of(self, draws):
        return draws.normal((8,))

    def forward(self, z, condition):
        return self.layer(z).tanh().reshape(-1, 1, 28, 28)


class Task:
    """What the evaluator asks of a distillation."""

    def __init__(self, conditions=None):
        self.average, self.student = Generator(seed=0), Generator(seed=1)
        self.denoiser = None
        self.conditions = Unconditional() if conditions is None else conditions
        self.asked = []

    def student_samples(self, draws, student=None):
        self.asked.append(draws.indices)
        return student(student.noise_of(draws), self.conditions.sampled(draws, student))

    def teacher_samples(self, draws, sampler):
        return sampler.sample(self.teacher, self.average.noise_of(draws), None, draws)


class Unconditional(UniformLabels):
    def sampled(self, draws, student):
        return Condition()


def evaluator(**arguments):
    settings = {
        "data": ShardStream(urls="mnist-heldout", labels=False),
        "features": {"digits": DigitFeatures()},
        "samples": 60,
        "real_samples": 90,
        "during_samples": 40,
    }
    return ImageEvaluator(**{**settings, **arguments})


def expected_numbers(task, real, samples, seed, student=None):
    """Fréchet distance and rates from all images at once."""
    made = task.student_samples(SampleDraws(seed, range(samples)), student or task.average).detach()
    network = DigitFeatures().load()
    found, reference = network(made), network(real)
    return {"frechet": frechet_distance(fit(reference), fit(found)), **Manifold(reference).compare(found)}


def real_images(count):
    return torch.cat(
        [m.images for m in stream_images(ShardStream(urls="mnist-heldout", labels=False), 30)(range(count))]
    )


# ------------------------------------------------------------------------------------------------ numbers


def test_row_is_what_all_images_at_once_give():
    task, judge = Task(), evaluator()
    found = judge.during(task, CPU, seed=3)
    expected = expected_numbers(task, real_images(90), 40, 3)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert found.keys() - expected.keys() == {"kid", "inception_score", "collapsed"}


@pytest.fixture(scope="module")
def row():
    """The row at a batch size of 64, on one process."""
    judge = evaluator()
    judge.prepare(CPU)
    return numbers(judge.measure("x", judge.images_of(Task(), AveragedStudent(), 5), samples=60))


def numbers(row):
    return {key: value for key, value in row.items() if isinstance(value, float)}


def test_batch_size_does_not_matter(row):
    judge = evaluator(batch_size=7)
    judge.prepare(CPU)
    found = judge.measure("x", judge.images_of(Task(), AveragedStudent(), 5), samples=60)
    assert len(row) == 14
    assert numbers(found) == pytest.approx(row, rel=1e-6)


def run_rank(rank, ranks, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    task, judge = Task(), evaluator(batch_size=9)
    judge.prepare(CPU)
    found = judge.measure("x", judge.images_of(task, AveragedStudent(), 5), samples=60)
    indices = [index for batch in task.asked for index in batch]
    Path(folder, f"{rank}.json").write_text(json.dumps([found, indices]))
    dist.destroy_process_group()


def test_number_of_ranks_does_not_matter(row, tmp_path):
    mp.start_processes(run_rank, (2, str(tmp_path)), nprocs=2, start_method="spawn")
    (first, indices), (second, others) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert numbers(first) == pytest.approx(row, rel=1e-6)
    assert (indices, others) == (list(range(30)), list(range(30, 60)))


def test_raw_weights_are_another_row():
    task, judge = Task(), evaluator(raw=True)
    found = judge.during(task, CPU, seed=0)
    real = real_images(90)
    assert found["frechet"] == pytest.approx(expected_numbers(task, real, 40, 0)["frechet"], rel=1e-9)
    raw = expected_numbers(task, real, 40, 0, task.student)["frechet"]
    assert found["raw/frechet"] == pytest.approx(raw, rel=1e-9)
    assert found["raw/frechet"] != found["frechet"]
    names = [row["name"] for row in judge.student_rows(task, 0)]
    assert names == ["student, one evaluation", "student, last weights"]


def test_several_averages_are_rows_and_the_best_is_marked():
    task, judge = Task(), evaluator(metrics=[Frechet()])
    task.averaged = {"short": Generator(seed=2), "long": Generator(seed=4)}
    networks = {
        "": task.average,
        "short/": task.averaged["short"],
        "long/": task.averaged["long"],
        "raw/": task.student,
    }
    found, real = judge.during(task, CPU, seed=0), real_images(90)
    expected = [expected_numbers(task, real, 40, 0, network)["frechet"] for network in networks.values()]
    assert [found[f"{prefix}frechet"] for prefix in networks] == pytest.approx(expected, rel=1e-9)
    rows = judge.student_rows(task, 0)
    assert [row["name"] for row in rows] == [
        "student, one evaluation",
        "student, average 'short'",
        "student, average 'long'",
        "student, last weights",
    ]
    expected = [expected_numbers(task, real, 60, 0, network)["frechet"] for network in networks.values()]
    assert [row["frechet"] for row in rows] == pytest.approx(expected, rel=1e-9)
    assert [row.get("best", False) for row in rows] == [number == min(expected) for number in expected]
    document = judge.document(rows)
    assert [row.get("best", False) for row in document["rows"]] == [row.get("best", False) for row in rows]


def test_dropout_of_a_student_in_training_is_off():
    task, judge = Task(), evaluator(raw=True, metrics=[Frechet()])
    expected = judge.during(task, CPU, seed=0)["raw/frechet"]
    task.student.layer = nn.Sequential(task.student.layer, nn.Dropout(0.5)).train()
    assert judge.during(task, CPU, seed=0)["raw/frechet"] == pytest.approx(expected, rel=1e-9)
    assert task.student.training


class Doubled:
    """Stands for a many-step sampler."""

    evaluations = 7

    def sample(self, denoiser, noise, condition, draws=None):
        return (2 * denoiser(noise, condition)).clamp(-1, 1)


def test_teacher_has_rows_of_its_own():
    task, judge = Task(), evaluator(metrics=[Frechet()], teacher_samplers=[Doubled()])
    task.teacher = Generator(seed=3)
    rows = judge.after(task, CPU, 0, [], Path())["rows"]
    assert [(row["name"], row.get("evaluations")) for row in rows[1:]] == [
        ("teacher, 7 evaluations", 7),
        ("student, one evaluation", 1),
    ]
    made = Doubled().sample(task.teacher, task.teacher.noise_of(SampleDraws(0, range(60))), None).detach()
    network = DigitFeatures().load()
    expected = frechet_distance(fit(network(real_images(90))), fit(network(made)))
    assert rows[1]["frechet"] == pytest.approx(expected, rel=1e-9)


def test_collapse_is_a_coverage_below_a_share_of_that_of_real_images():
    class Mixed(Task):
        """Samples of which a share are real images, those that the evaluator does not compare with."""

        def student_samples(self, draws, student=None):
            made = super().student_samples(draws, student)
            return torch.cat([real_images(150)[90 : 90 + self.real], made[self.real :]])

    for real, collapsed in ((40, 0), (0, 1)):
        task = Mixed()
        task.real = real
        found = evaluator(batch_size=40).during(task, CPU, seed=0)
        assert found["collapsed"] == collapsed, found
        assert collapsed == (found["coverage"] < 0.1 * expected_coverage(90, 40))
    assert evaluator(least_coverage=0).during(Task(), CPU, seed=0)["collapsed"] == 0


def test_statistics_stand_for_the_data(tmp_path):
    network = DigitFeatures().load()
    write_statistics(tmp_path / "s.npz", FeatureSet(network(real_images(90))), network)
    by_file = evaluator(data=None, statistics={"digits": str(tmp_path / "s.npz")})
    assert by_file.during(Task(), CPU, seed=1) == pytest.approx(evaluator().during(Task(), CPU, seed=1), rel=1e-9)


def test_real_images_are_not_flipped():
    plain, flipped = (ShardStream(urls="mnist-heldout", labels=False, flip=flip) for flip in (False, True))
    expected = next(plain.batches(30, 0)).images
    assert not torch.equal(next(flipped.batches(30, 0)).images, expected)
    assert torch.equal(next(stream_images(flipped, 30)(range(30))).images, expected)


def test_all_real_images_by_default():
    judge = evaluator(real_samples=None)
    judge.prepare(CPU)
    assert len(judge.real["digits"]) == 500
    judge = evaluator(real_samples=700)
    judge.prepare(CPU)
    assert len(judge.real["digits"]) == 500


# ------------------------------------------------------------------------------------------------ documents


def test_missing_weights_leave_the_rest(tmp_path, caplog):
    absent = InceptionFeatures(weights=str(tmp_path / "inception-2015-12-05.pt"))
    judge = evaluator(features={"inception": absent, "digits": DigitFeatures()}, metrics=[Frechet()])
    row = judge.before(Task(), CPU, seed=0)[0]
    assert row["frechet_digits"] == pytest.approx(expected_numbers(Task(), real_images(90), 40, 0)["frechet"], rel=1e-9)
    assert "frechet" not in row
    document = judge.document([row])
    assert set(document["metrics"]) == {"frechet_digits", "frechet_error_digits"}
    assert document["metrics"]["frechet_digits"]["label"] == "Fréchet distance (digit classifier)"
    assert document["metrics"]["frechet_error_digits"]["of"] == "frechet_digits"
    (line,) = [note for note in document["notes"] if "inception-2015-12-05.pt" in note]
    assert "91 MB" in line
    assert "curl -L" in line
    assert "inception-2015-12-05.pt" in caplog.text
    with pytest.raises(FileNotFoundError, match=r"inception-2015-12-05\.pt"):
        evaluator(features={"inception": absent}).prepare(CPU)


def test_document_of_a_run(tmp_path):
    task, judge = Task(), evaluator(metrics=[Frechet(), NearestNeighbours(), InBatchSimilarity()])
    before = judge.before(task, CPU, seed=0)
    document = judge.after(task, CPU, 0, before, tmp_path)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    names = [row["name"] for row in document["rows"]]
    assert names[1:] == ["student before training", "student, one evaluation"]
    assert names[0] == "real images (one half of 45 against the other)"
    assert document["rows"][0]["frechet"] < document["rows"][2]["frechet"] / 2
    assert any("no caption has two samples" in note for note in document["notes"])
    (tmp_path / "evaluation.json").write_text(json.dumps(document))
    text = write_report(tmp_path).read_text()
    assert "Fréchet distance (digit classifier)" in text
    assert "one half of 45" in text


def test_finished_rows_are_measured_once():
    task = Task()
    first = evaluator().after(task, CPU, 0, [], Path())
    asked = len(task.asked)
    again = evaluator(batch_size=5).after(task, CPU, 0, [], Path())
    assert len(task.asked) == asked
    real, *students = first["rows"]
    assert again["rows"][1:] == students
    for name, value in real.items():  # measured anew, in other batches
        assert again["rows"][0][name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6)), name
    assert any("earlier run" in note for note in again["notes"])
    for change in ({"samples": 50}, {"metrics": [Frechet()]}, {"real_samples": 80}):
        evaluator(**change).after(task, CPU, 0, [], Path())
        assert len(task.asked) > asked
        asked = len(task.asked)
    evaluator().after(task, CPU, 1, [], Path())
    assert len(task.asked) > asked
    asked = len(task.asked)
    task.average.layer.bias.data[3] += 1e-3
    evaluator().after(task, CPU, 0, [], Path())
    assert len(task.asked) > asked


def test_broken_student():
    task = Task()
    task.average.layer.bias.data[3] = torch.nan
    with pytest.raises(ValueError, match="40 of 40 images hold NaN"):
        evaluator().during(task, CPU, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 3}, "samples, real_samples and during_samples >= 4"),
        ({"data": None}, "give either data"),
        ({"statistics": {"digits": "x.npz"}}, "give either data"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluator(**arguments)


def test_gin_builds_the_evaluator(tmp_path):
    lines = [
        f"include '{ROOT / 'gin/mnist_sba.gin'}'",
        "Experiment.evaluator = @ImageEvaluator()",
        "ImageEvaluator.data = @ShardStream()",
        "ImageEvaluator.features = {'digits': @DigitFeatures(), 'dino': @TimmFeatures()}",
        "ImageEvaluator.metrics = [@Frechet(), @NearestNeighbours(), @InBatchSimilarity()]",
        "ImageEvaluator.teacher_samplers = [@HeunSampler()]",
        "ImageEvaluator.samples = 321",
        "TimmFeatures.model = 'vit_small_patch16_224.dino'",
        "NearestNeighbours.splits = 2",
    ]
    (tmp_path / "run.gin").write_text("\n".join(lines))
    judge = config.build(config.parse([str(tmp_path / "run.gin")], [], {})).evaluator
    assert (judge.samples, judge.data.urls, judge.features["dino"].model) == (
        321,
        "mnist",
        "vit_small_patch16_224.dino",
    )
    assert [type(metric) for metric in judge.metrics] == [Frechet, NearestNeighbours, InBatchSimilarity]
    assert judge.metrics[1].splits == 2
    assert judge.teacher_samplers[0].evaluations == 35


# ------------------------------------------------------------------------------------------------ captions


class Brightness(ImageScore):
    """Mean pixel plus the caption's length."""

    label, needs_captions, network = "brightness", True, nn.Identity()

    def __call__(self, images, texts):
        return to_pixels(images).mean((1, 2, 3)) + torch.tensor([1000.0 * len(text) for text in texts])

    def identity(self):
        return "brightness"


def test_scores_need_no_real_images():
    conditions = BatchConditions()
    conditions.remembered = Condition(caption=captions.pack(["a"]))
    judge = ImageEvaluator(features={}, scores={"bright": Brightness()}, samples=20, during_samples=20)
    (row,) = judge.before(Task(conditions), CPU, seed=2)
    made = Task(conditions).student_samples(SampleDraws(2, range(20)), Task().average).detach()
    assert row["bright"] == pytest.approx(1000 + float(to_pixels(made).mean((1, 2, 3)).double().mean()), rel=1e-6)
    with pytest.raises(ValueError, match="'bright' needs captions"):
        judge.before(Task(), CPU, seed=2)


def test_scores_see_each_image_with_its_caption():
    conditions = BatchConditions()
    conditions.remembered = Condition(caption=captions.pack(["a", "bcd", "ef"]))
    task, judge = Task(conditions), evaluator(scores={"bright": Brightness()}, metrics=[InBatchSimilarity()])
    (found,) = judge.before(task, CPU, seed=2)
    made = task.student_samples(SampleDraws(2, range(40)), task.average).detach()
    expected = to_pixels(made).mean((1, 2, 3)).double() + torch.tensor([1000.0, 3000, 2000]).repeat(14)[:40]
    assert found["bright"] == pytest.approx(float(expected.mean()), rel=1e-6)
    assert found["bright_error"] == pytest.approx(float(expected.std()) / 40**0.5, rel=1e-5)
    unit = nn.functional.normalize(DigitFeatures().load()(made).double(), dim=1)
    groups = [unit[k::3] @ unit[k::3].T for k in range(3)]
    means = [float((g.sum() - g.diagonal().sum()) / (len(g) * (len(g) - 1))) for g in groups]
    assert found["in_batch_similarity"] == pytest.approx(np.mean(means), rel=1e-6)


class Encoder:
    weights = "none"

    def load(self):
        pass

    def to(self, device):
        pass

    def encode(self, texts):
        return Condition(caption=captions.pack(texts))


def test_captioned_samples(tmp_path):
    """Sample i has caption i // repeats, its own noise, and the asked size."""
    (tmp_path / "list.txt").write_text("one\n\ntwo\nthree\n")
    source = CaptionedSamples(captions=str(tmp_path / "list.txt"), encoder=Encoder(), prompts=3, repeats=2, size=14)
    source.load(CPU)
    task = Task()
    made = source.make(task, SampleDraws(7, [5, 0, 2]), AveragedStudent())
    assert captions.unpack(made.captions) == ["three", "one", "two"]
    assert made.images.shape == (3, 3, 14, 14)
    (whole,) = to_pixels(task.average(task.average.noise_of(SampleDraws(7, [5])), None))
    small = np.asarray(Image.fromarray(whole[0].numpy(), mode="F").resize((14, 14), Image.BICUBIC)).clip(0, 255)
    np.testing.assert_allclose(to_pixels(made.images)[0, 0].numpy(), small.round(), atol=1)
    assert np.mean(to_pixels(made.images)[0, 0].numpy() != small.round()) < 0.02
    assert not torch.equal(source.make(task, SampleDraws(7, [5]), LastStudent()).images[0], made.images[0])
    digest = hashlib.sha256(b"one\ntwo\nthree\n").hexdigest()
    assert source.settings()["captions"] == digest
    (note,) = source.notes()
    assert "3 captions" in note
    assert f"{digest}), 2 samples each, judged at 14 x 14" in note


def test_stable_diffusion_is_told_the_captions(tmp_path):
    """From captions through text encoder, student and autoencoder to pixels, by the libraries' own modules."""
    pytest.importorskip("diffusers")
    from tiny_pipelines import sd15

    pipeline = sd15(tmp_path / "sd")
    (tmp_path / "list.txt").write_text("ab c\nd e f\n")
    source = CaptionedSamples(
        captions=str(tmp_path / "list.txt"),
        encoder=SD15CaptionEncoder(weights=str(tmp_path / "sd")),
        autoencoder=Autoencoder(weights=str(tmp_path / "sd")),
        prompts=2,
        size=16,
    )
    source.load(CPU)

    class Student(nn.Module):
        def noise_of(self, draws):
            return draws.normal((4, 8, 8))

        def forward(self, z, condition):
            return z + condition.text.mean((1, 2))[:, None, None, None]

    task = SimpleNamespace(average=Student())
    found = to_pixels(source.make(task, SampleDraws(1, [1, 0]), AveragedStudent()).images)
    inputs = pipeline.tokenizer(["d e f", "ab c"], padding="max_length", max_length=12, return_tensors="pt")
    with torch.no_grad():
        states = pipeline.text_encoder(inputs.input_ids).last_hidden_state.mean((1, 2))
        latents = SampleDraws(1, [1, 0]).normal((4, 8, 8)) + states[:, None, None, None]
        images = pipeline.vae.decode(latents / 0.18215).sample
    assert (found - to_pixels(images)).abs().max() <= 1
    assert (found == to_pixels(images)).double().mean() > 0.99


def test_coco_captions_are_one_fixed_list(tmp_path):
    annotations = [{"id": 7 * k % 101, "image_id": k, "caption": f" caption {7 * k % 101}\n"} for k in range(101)]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": annotations}))
    found = coco_captions(tmp_path / "captions.json", 30)
    assert len(set(found)) == 30
    assert all(text.startswith("caption ") and text == text.strip() for text in found)
    (tmp_path / "other.json").write_text(json.dumps({"annotations": annotations[::-1]}))
    assert coco_captions(tmp_path / "other.json", 30) == found
    assert coco_captions(tmp_path / "captions.json", 20) == found[:20]
    assert coco_captions(tmp_path / "captions.json", 30, seed=1) != found
    with pytest.raises(ValueError, match="has 101 captions, fewer than prompts=102"):
        coco_captions(tmp_path / "captions.json", 102)
    with pytest.raises(ValueError, match=r"captions_val2014\.json \(39 MB\)"):
        coco_captions(tmp_path / "none.json", 1)
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match="no captions file of COCO"):
        coco_captions(tmp_path / "other.json", 1)


class Decoder:
    """Stands for an autoencoder: latents to images twice as bright."""

    weights = "none"

    def decode(self, latents):
        return 2 * latents


def test_latents_are_decoded():
    task, draws = Task(), SampleDraws(0, range(3))
    plain = StudentSamples().make(task, SampleDraws(0, range(3)), AveragedStudent()).images
    torch.testing.assert_close(
        StudentSamples(autoencoder=Decoder()).make(task, draws, AveragedStudent()).images, 2 * plain
    )


# ------------------------------------------------------------------------------------------------ folders


def test_folder_and_arrays_are_the_same_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 9, 3), dtype=np.uint8)
    for k, image in enumerate(pixels):
        (tmp_path / "images" / str(k % 2)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / str(k % 2) / f"{k}.png").write_bytes(encode_png(image))
    np.savez(tmp_path / "a.npz", arr_0=pixels[[0, 2, 4, 1, 3]])
    np.savez(tmp_path / "b.npz", x0=pixels[[0, 2, 4, 1, 3]].transpose(0, 3, 1, 2) / np.float32(127.5) - 1)
    folder, *arrays = (FolderStream(path=str(tmp_path / name)) for name in ("images", "a.npz", "b.npz"))
    seen = [to_pixels(torch.cat([m.images for m in stream_images(s, 2)(range(1, 5))])) for s in (folder, *arrays)]
    assert seen[0].shape == (4, 3, 6, 9)
    assert torch.equal(seen[0], torch.from_numpy(pixels[[2, 4, 1, 3]]).permute(0, 3, 1, 2).float())
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    square = FolderStream(path=str(tmp_path / "images"), size=6)
    expected = torch.from_numpy(pixels[0]).permute(2, 0, 1)[:, :, 1:7].float()
    assert torch.equal(to_pixels(next(square.batches(1, 0)).images)[0], expected)


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="neither a folder of images"):
        len(FolderStream(path=str(tmp_path)))
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.png cannot be decoded"):
        next(FolderStream(path=str(tmp_path)).batches(1, 0))
    (tmp_path / "a.png").write_bytes(encode_png(np.zeros((4, 4), np.uint16)))
    with pytest.raises(ValueError, match=r"a\.png has more than 8 bits a channel"):
        next(FolderStream(path=str(tmp_path)).batches(1, 0))
    for name, side in (("a", 4), ("b", 5)):
        (tmp_path / f"{name}.png").write_bytes(encode_png(np.zeros((side, side, 3), np.uint8)))
    with pytest.raises(ValueError, match=r"b\.png is 5x5, .*a\.png 4x4: give size"):
        next(FolderStream(path=str(tmp_path)).batches(2, 0))
    for low, high in ((0, 1), (0, 255), (-128, 127)):
        np.savez(tmp_path / "x.npz", np.linspace(low, high, 48, dtype=np.float32).reshape(1, 3, 4, 4))
        with pytest.raises(ValueError, match=rf"holds floats from {low} to {high}, .* expected in \[-1, 1\], black"):
            len(FolderStream(path=str(tmp_path / "x.npz")))
    np.savez(tmp_path / "x.npz", np.zeros((1, 3, 4, 4), np.int64))
    with pytest.raises(ValueError, match="holds int64"):
        len(FolderStream(path=str(tmp_path / "x.npz")))
    np.savez(tmp_path / "x.npz", np.zeros(3))
    with pytest.raises(ValueError, match=r"holds float64 \(3,\)"):
        len(FolderStream(path=str(tmp_path / "x.npz")))


# ------------------------------------------------------------------------------------------------ the tool


def tool(*arguments):
    command = [
        sys.executable,
        str(ROOT / "tools/evaluate.py"),
        *map(str, arguments),
        "--device=cpu",
        "--features=digits",
    ]
    return subprocess.run(command, capture_output=True, text=True)


def test_tool_of_folders_and_statistics(tmp_path):
    images = (real_images(60) + 1) * 127.5
    for name, part in (("a", images[:24]), ("b", images[24:])):
        (tmp_path / name).mkdir()
        for k, image in enumerate(part.round().to(torch.uint8)):
            (tmp_path / name / f"{k:03d}.png").write_bytes(encode_png(image[0].numpy()))
    done = tool("stats", f"--data={tmp_path / 'b'}", f"--out={tmp_path / 's.npz'}")
    assert done.returncode == 0, done.stderr
    network = DigitFeatures().load()
    assert "one half of 18 against the other" in done.stdout
    kept = read_statistics(tmp_path / "s.npz", network)
    torch.testing.assert_close(kept.features, network(images[24:] / 127.5 - 1), rtol=1e-5, atol=1e-5)
    done = tool("folder", tmp_path / "a", tmp_path / "b", "--metrics=frechet,kid_exact", f"--out={tmp_path / 'e.json'}")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "e.json").read_text())["rows"]
    expected = frechet_distance(fit(network(images[:24] / 127.5 - 1)), fit(kept.features))
    assert row["frechet"] == pytest.approx(expected, rel=1e-6)
    assert (row["samples"], row["name"]) == (24, str(tmp_path / "a"))
    assert "Fréchet distance (digit classifier)" in done.stdout


def test_presets_are_the_published_protocols():
    with tools_here.tool("evaluate") as evaluate:
        shipped = {name: (given["samples"], given["features"]) for name, given in evaluate.PRESETS.items()}
        assert shipped == {
            "cifar10": (50_000, ["inception_tf"]),
            "imagenet64": (50_000, ["inception_tf"]),
            "coco30k": (30_000, ["inception"]),
        }
        evaluate.FLAGS(["evaluate", "--preset=coco30k", "--samples=20"])
        evaluate.apply_preset()
        assert (evaluate.FLAGS.samples, evaluate.FLAGS.prompts, evaluate.FLAGS.features) == (20, 30_000, ["inception"])


def test_tool_of_a_run(tmp_path):
    cfg = config.parse([str(ROOT / "gin/mnist_sba.gin")], ["Experiment.steps = 1", "Experiment.precision = 'fp32'"], {})
    config.save(cfg, tmp_path / "config.gin")
    torch.manual_seed(0)
    task = config.build(cfg).task
    task.prepare(CPU, None)
    weight_files.save_weights(tmp_path / "student.safetensors", task.average)
    (tmp_path / "evaluation.json").write_text(json.dumps({"rows": [{"name": "r", "samples": 1}], "notes": ["kept"]}))
    done = tool(tmp_path, "--samples=12", "--real_samples=40", "--metrics=frechet", "--batch_size=5")
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "evaluation.json").read_text())
    assert [row["name"] for row in document["rows"]] == ["r", "student, one evaluation"]
    assert document["notes"][0] == "kept"
    network = DigitFeatures().load()
    made = task.student_samples(SampleDraws(0, range(12)))
    stream = ShardStream(urls="mnist", labels=False)
    real = torch.cat([part.images for part in stream_images(stream, 40)(range(40))])
    expected = frechet_distance(fit(network(made.detach())), fit(network(real)))
    assert document["rows"][1]["frechet"] == pytest.approx(expected, rel=1e-5)
    done = tool(tmp_path / "nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
