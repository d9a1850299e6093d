"""The shipped digit classifier, its training task and the augmentation."""

import json
import math

import pytest
import torch
from torch.nn import functional

from ratiograph.core.types import Batch, Condition
from ratiograph.data.images import encode_png
from ratiograph.data.shards import write_shards
from ratiograph.networks.architectures.classifier import SHIPPED_WEIGHTS, DigitClassifier, classify_all
from ratiograph.networks.weights.weight_files import save_weights
from ratiograph.tasks.classifier_training import ClassifierEvaluator, ClassifierTraining, RandomAffine
from ratiograph.training.optim import EMA, Adam

CPU = torch.device("cpu")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def patterns(count, seed=0):
    """Images of which half are bright: class 0 on the left, class 1 on the right, with noise."""
    labels = torch.arange(count) % 2
    images = -torch.ones(count, 1, 28, 28)
    images[labels == 0, :, 6:22, 4:12] = 0.8
    images[labels == 1, :, 6:22, 16:24] = 0.8
    noise = 0.1 * torch.rand(images.shape, generator=generator(seed))
    return Batch(images + noise, Condition(labels))


def small_task():
    torch.manual_seed(0)
    task = ClassifierTraining(
        classifier=DigitClassifier(width=8, feature_size=8),
        augmentation=RandomAffine(),
        optimizer=Adam(lr=3e-3, betas=(0.9, 0.99)),
        ema=EMA(half_life=200, ramp_up=0.2),
    )
    task.prepare(CPU, None)
    return task


def advance(task, first, last):
    return [task.step(patterns(32, step), 32, generator(step)) for step in range(first, last)]


# ------------------------------------------------------------------------------------------ shipped weights


def test_shipped_weights_reach_their_recorded_accuracy():
    record = json.loads(SHIPPED_WEIGHTS.with_suffix(".json").read_text())
    row = ClassifierEvaluator(held_out=record["held_out"]).measure("shipped", DigitClassifier().load())
    assert row["samples"] == record["samples"] == 500
    assert row["accuracy"] == pytest.approx(record["accuracy"], abs=0.0021)  # one digit, for another processor
    assert row["cross_entropy"] == pytest.approx(record["cross_entropy_nats"], rel=1e-2)
    assert row["accuracy"] >= 0.98


def test_logits_come_from_the_features():
    classifier = DigitClassifier().load()
    images = patterns(7).images
    features, logits = classify_all(classifier, images, batch_size=3)
    torch.testing.assert_close(features, classifier.features(images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, classifier(images), rtol=1e-4, atol=1e-4)
    by_hand = functional.silu(features) @ classifier.to_logits.weight.T + classifier.to_logits.bias
    torch.testing.assert_close(logits, by_hand, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in classifier.parameters())


def test_weights_of_another_network_or_none(tmp_path):
    save_weights(tmp_path / "w.safetensors", DigitClassifier(width=8))
    with pytest.raises(ValueError, match=r"w\.safetensors does not fit DigitClassifier: .*layers\.0\.0\.weight"):
        DigitClassifier(weights=str(tmp_path / "w.safetensors")).load()
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        DigitClassifier(weights=str(tmp_path / "none.safetensors")).load()


# ------------------------------------------------------------------------------------------ augmentation


def test_augmentation_without_bounds_is_the_identity():
    images = patterns(3).images.clamp(-1, 1)
    moved = RandomAffine(rotation=0, scaling=0, shift=0)(images, generator(0))
    torch.testing.assert_close(moved, images, rtol=0, atol=1e-5)


def test_augmentation_moves_a_disc_as_it_says():
    """A disc off the centre: its area gives the zoom, its centroid the turn and the shift; within the bounds."""
    n = 400
    y, x = torch.meshgrid(torch.arange(28) - 13.5, torch.arange(28) - 13.5, indexing="ij")
    disc = torch.where((x - 6).square() + y.square() < 9.5, 1.0, -1.0).expand(n, 1, 28, 28)
    radius_of = lambda moved: ((moved + 1).sum((1, 2, 3)) / (disc[:1] + 1).sum()).sqrt()  # noqa: E731

    def centroid(moved):
        weight = (moved[:, 0] + 1) / (moved[:, 0] + 1).sum((1, 2), keepdim=True)
        return (weight * x).sum((1, 2)), (weight * y).sum((1, 2))

    zoom = radius_of(RandomAffine(rotation=0, scaling=0.2, shift=0)(disc, generator(1)))
    assert 0.78 < zoom.min() < 0.84
    assert 1.16 < zoom.max() < 1.22
    cx, cy = centroid(RandomAffine(rotation=30, scaling=0, shift=0)(disc, generator(2)))
    turn = torch.atan2(cy, cx).rad2deg()
    assert -31 < turn.min() < -28
    assert 28 < turn.max() < 31
    torch.testing.assert_close(cx.square() + cy.square(), torch.full((n,), 36.0), rtol=0.02, atol=0)
    cx, cy = centroid(RandomAffine(rotation=0, scaling=0, shift=3)(disc, generator(3)))
    for moved in (cx - 6, cy):
        assert -3.05 < moved.min() < -2.8
        assert 2.8 < moved.max() < 3.05
        assert abs(moved.mean()) < 4 * 3 / math.sqrt(3 * n)  # uniform: standard deviation 3 / sqrt(3)


def test_augmentation_is_the_generators():
    images = patterns(4).images
    augment = RandomAffine()
    assert torch.equal(augment(images, generator(5)), augment(images, generator(5)))
    assert not torch.equal(augment(images, generator(5)), augment(images, generator(6)))


# ------------------------------------------------------------------------------------------ training


def test_training_learns_and_its_average_too():
    task = small_task()
    first, *_, last = advance(task, 0, 60)
    assert first["loss/cross_entropy"] == pytest.approx(math.log(10), abs=0.3)
    assert last["loss/cross_entropy"] < 0.1
    batch = patterns(200, seed=999)
    _, logits = classify_all(task.weights()["mnist_classifier"], batch.images)
    assert (logits.argmax(1) == batch.condition.labels).float().mean() == 1


def test_resumed_training_equals_uninterrupted_training():
    whole = small_task()
    expected = advance(whole, 0, 6)
    task = small_task()
    advance(task, 0, 3)
    resumed = small_task()
    resumed.load_training_state(task.training_state())
    continued = advance(resumed, 3, 6)
    assert [m["loss/cross_entropy"] for m in continued] == [m["loss/cross_entropy"] for m in expected[3:]]
    for a, b in zip(whole.average.parameters(), resumed.average.parameters(), strict=True):
        assert torch.equal(a, b)


def test_evaluator_counts_right_answers_and_leaves_the_record(tmp_path):
    batch = patterns(20)
    levels = ((batch.images[:, 0].clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    wrong = {3, 8, 11}  # three labels are false
    samples = [
        {"__key__": f"{i:02d}", "png": encode_png(levels[i]), "cls": str((i + (i in wrong)) % 2).encode()}
        for i in range(20)
    ]
    (path,) = write_shards(tmp_path / "held", "held", samples, shards=1)
    task = small_task()
    evaluator = ClassifierEvaluator(held_out=str(path))
    before = evaluator.before(task, CPU, seed=0)
    advance(task, 0, 60)
    document = evaluator.after(task, CPU, 0, before, str(tmp_path))
    assert [row["name"] for row in document["rows"]] == ["before training", "trained"]
    assert document["rows"][1]["accuracy"] == pytest.approx(17 / 20)
    record = json.loads((tmp_path / "mnist_classifier.json").read_text())
    assert record["accuracy"] == pytest.approx(17 / 20)
    assert record["samples"] == 20
    assert record["training_steps"] == 60
