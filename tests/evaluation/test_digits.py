"""The digit evaluation: rows against the metrics computed by hand, determinism, cache, and the report's layout."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist

from ratiograph import config
from ratiograph.data.stream import load_all
from ratiograph.evaluation.digit_evaluator import DigitsEvaluator
from ratiograph.evaluation.digit_readings import METRICS, DigitReadings, DigitReference
from ratiograph.evaluation.inception_score import inception_score
from ratiograph.evaluation.manifold import Manifold
from ratiograph.evaluation.result_cache import ResultCache, file_identity
from ratiograph.networks.architectures.classifier import DigitClassifier

CPU = torch.device("cpu")
TEACHER_ROWS = ["teacher, 1 evaluation", "teacher, 35 evaluations", "teacher, 5 evaluations"]


@pytest.fixture(scope="module")
def real():
    return load_all("mnist")


@pytest.fixture(scope="module")
def evaluator():
    made = DigitsEvaluator(samples=600, batch_size=250)
    made.prepare(CPU)
    return made


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RATIOGRAPH_CACHE", str(tmp_path))
    return tmp_path


def resampler(real, share_of_ones=None, blur=0.0):
    """Draws real digits: all alike, or with a given share of the class 1; blurred by ``blur`` pixels."""
    images, labels = real
    weights = torch.ones(len(labels))
    if share_of_ones is not None:
        weights = torch.where(labels == 1, share_of_ones / 500, (1 - share_of_ones) / 4500)

    def sample(n, generator):
        drawn = images[torch.multinomial(weights, n, replacement=True, generator=generator)]
        if blur:
            axis = torch.arange(-3.0, 4)
            kernel = torch.exp(-axis.square() / (2 * blur**2))
            kernel = torch.outer(kernel, kernel)[None, None] / kernel.sum() ** 2
            drawn = torch.nn.functional.conv2d(drawn + 1, kernel, padding=3) - 1
        return drawn

    return sample


# ------------------------------------------------------------------------------------------ rows


def test_row_is_what_the_definitions_give(evaluator, real):
    images = resampler(real, share_of_ones=0.3)(600, torch.Generator().manual_seed(3))
    position = 0

    def sampler(n, generator):  # hands the prepared images out, batch by batch
        nonlocal position
        position += n
        return images[position - n : position] + 1e-4  # less than half a grey level

    row = evaluator.measure("x", sampler, evaluations=7)
    assert position == 600
    assert (row["name"], row["evaluations"], row["samples"]) == ("x", 7, 600)

    classifier = DigitClassifier().load()
    with torch.no_grad():
        features, everything = classifier.features(images), classifier.features(real[0])
        probabilities = classifier(images).softmax(1)
    shares = np.bincount(probabilities.argmax(1), minlength=10) / 600
    np.testing.assert_allclose(row["class_shares"], shares, atol=1e-7)
    assert row["smallest_class_share"] == pytest.approx(shares.min())
    assert row["largest_class_share"] == pytest.approx(shares.max())
    assert row["confidence"] == pytest.approx(probabilities.amax(1).mean().item(), rel=1e-5)
    a, b = features.double().numpy(), everything.double().numpy()
    eigenvalues = np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T))  # those of C_a^1/2 C_b C_a^1/2
    cross = 2 * np.sqrt(eigenvalues.real.clip(0)).sum()
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.cov(a.T).trace() + np.cov(b.T).trace() - cross
    assert row["frechet_distance"] == pytest.approx(distance, rel=1e-3)

    rates = Manifold(everything).compare(features)  # of which test_manifold is the proof
    assert {name: row[name] for name in rates} == pytest.approx(rates, abs=2e-3)
    assert row["inception_score"] == pytest.approx(inception_score(probabilities.log(), splits=1)[0], rel=1e-5)
    spread = [pdist(x.flatten(1).double().numpy()).mean() for x in (images, real[0][:1000])]
    assert row["in_batch_distance"] == pytest.approx(spread[0] / spread[1], rel=0.01)
    assert row["class_coverage"] == 1
    assert row["collapsed"] is False


def test_row_is_a_function_of_the_seed(evaluator, real):
    sampler = resampler(real)
    row = evaluator.measure("x", sampler, evaluations=1, seed=4)
    assert evaluator.measure("x", sampler, evaluations=1, seed=4) == row
    assert evaluator.measure("x", sampler, evaluations=1, seed=5)["frechet_distance"] != row["frechet_distance"]


def test_every_batch_has_noise_of_its_own(evaluator):
    seen = []

    def sampler(n, generator):
        seen.append(torch.randn(n, 1, 28, 28, generator=generator))
        return seen[-1]

    evaluator.measure("noise", sampler, evaluations=1)
    assert [len(noise) for noise in seen] == [250, 250, 100]
    first_values = torch.stack([noise[:100] for noise in seen]).flatten(1)
    assert (torch.corrcoef(first_values) - torch.eye(3)).abs().max() < 0.02


def test_distance_sees_blur_and_imbalance(evaluator, real):
    """Blur, and a wrong class balance, both cost more than drawing the real digits again."""
    plain, blurred, unbalanced = (
        evaluator.measure("x", resampler(real, **kind), evaluations=1)
        for kind in ({}, {"blur": 1.0}, {"share_of_ones": 0.4})
    )
    assert blurred["frechet_distance"] > 3 * plain["frechet_distance"]
    assert unbalanced["frechet_distance"] > 3 * plain["frechet_distance"]
    assert unbalanced["class_shares"][1] == pytest.approx(0.4, abs=4 * (0.24 / 600) ** 0.5 + 0.01)
    assert plain["class_shares"] == pytest.approx([0.1] * 10, abs=4 * (0.09 / 600) ** 0.5 + 0.01)


def test_collapsed_samplers_are_called_so(evaluator, real):
    """One image; one for each class, which only recall and coverage see; and two classes out of ten."""
    images, labels = real
    first = torch.stack([images[labels == digit][0] for digit in range(10)])
    few = images[labels < 2]

    def measured(images):
        return evaluator.measure(
            "x", lambda n, generator: images[torch.randint(len(images), (n,), generator=generator)], evaluations=1
        )

    whole, one, ten, two = measured(images), measured(first[:1]), measured(first), measured(few)
    assert [row["collapsed"] for row in (whole, one, ten, two)] == [False, True, False, True]
    assert (one["in_batch_distance"], one["class_coverage"]) == (pytest.approx(0, abs=1e-9), 0.1)
    assert whole["in_batch_distance"] == pytest.approx(1, abs=0.02)
    assert ten["in_batch_distance"] == pytest.approx(0.9, abs=0.15)
    assert two["class_coverage"] == pytest.approx(0.2)
    assert ten["recall"] <= 0.002 + 1e-9
    assert ten["coverage"] < 0.05
    assert whole["recall"] > 0.05
    assert whole["precision"] == ten["precision"] == 1  # all are real digits
    assert ten["inception_score"] > 5 > 2.5 > two["inception_score"] > 1.5 > one["inception_score"]


def test_wanted_shares_decide_what_is_a_collapse(evaluator, real):
    sampler = resampler(real, share_of_ones=0.7)
    wanted = [0.3 / 9] * 10
    wanted[1] = 0.7
    uniform = evaluator.measure("x", sampler, evaluations=1)
    assert uniform["collapsed"] is True
    tilted = evaluator.measure("x", sampler, evaluations=1, expected_shares=wanted)
    assert tilted == {**uniform, "collapsed": False}


def test_real_row_compares_disjoint_halves(evaluator, monkeypatch):
    """Of twelve numbers no two splits into halves have the same distance, so the distance tells the split."""
    numbers = 2.0 ** torch.arange(12, dtype=torch.float64)
    images = numbers[:, None, None, None].expand(12, 1, 28, 28)
    digits = DigitReadings(images, numbers[:, None], torch.eye(12)[:, :10])
    monkeypatch.setattr(evaluator, "real", DigitReference(digits))
    (row,) = evaluator.real_rows()
    splits = {}
    for half in itertools.combinations(range(12), 6):
        a, b = numbers[list(half)], numbers[[i for i in range(12) if i not in half]]
        distance = float((a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2)
        splits[abs(row["frechet_distance"] - distance)] = a, b
    a, b = splits[min(splits)]
    assert min(splits) < 1e-3
    assert row["samples"] == 6
    assert row["name"] == "real digits (one half of 6 against the other)"
    agreeing = []
    for half, other in ((a, b), (b, a)):  # the Fréchet distance does not say which of them is the reference
        expected = Manifold(other[:, None]).compare(half[:, None])
        expected["in_batch_distance"] = pdist(half[:, None].numpy()).mean() / pdist(other[:, None].numpy()).mean()
        agreeing.append({name: row[name] for name in expected} == pytest.approx(expected, rel=1e-9))
    assert sum(agreeing) == 1
    assert evaluator.real_rows() == [row]


def test_real_digits_are_like_each_other(evaluator):
    (row,) = evaluator.real_rows()
    assert row["density"] == pytest.approx(1, abs=0.05)
    assert row["in_batch_distance"] == pytest.approx(1, abs=0.02)
    assert min(row["precision"], row["recall"], row["coverage"]) > 0.85
    assert 9 < row["inception_score"] <= 10
    assert row["collapsed"] is False


def test_evaluation_while_training(evaluator, real, monkeypatch):
    """The numbers are the row's, torch's random state is not moved, and a student in training is not kept."""
    monkeypatch.setattr(evaluator, "during_samples", 300)
    monkeypatch.setattr(evaluator, "cache", None)
    terms = {"distribution": SimpleNamespace(target=SimpleNamespace())}
    task = SimpleNamespace(student_sampler=resampler(real), objective=SimpleNamespace(terms=terms))
    state = torch.get_rng_state()
    found = evaluator.during(task, CPU, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    row = evaluator.measure("x", task.student_sampler, evaluations=1, samples=300, seed=3)
    names = {"frechet_distance", "inception_score", "coverage", "recall", "smallest_class_share", "collapsed"}
    assert found == {name: float(row[name]) for name in names}
    assert found["collapsed"] == 0.0

    task.student_sampler = lambda n, generator: real[0][:1].expand(n, 1, 28, 28)
    assert evaluator.during(task, CPU, seed=3)["collapsed"] == 1.0

    one_of_each = torch.stack([real[0][int((real[1] == label).nonzero()[0])] for label in range(10)])
    task.student_sampler = lambda n, generator: one_of_each.repeat(n // 10 + 1, 1, 1, 1)[:n]
    assert evaluator.measure("x", task.student_sampler, evaluations=1, samples=300)["collapsed"] is False
    assert evaluator.during(task, CPU, seed=3)["collapsed"] == 1.0  # by its coverage

    task.student_sampler = resampler(real, share_of_ones=0.7)
    assert evaluator.during(task, CPU, seed=3)["collapsed"] == 1.0
    log_rewards = [0.0] * 10
    log_rewards[1] = float(np.log(9 * 0.7 / 0.3))
    terms["distribution"].target.reward = SimpleNamespace(log_rewards=log_rewards)
    assert evaluator.during(task, CPU, seed=3)["collapsed"] == 0.0


def test_broken_samplers(evaluator):
    def nan(n, generator):
        images = torch.zeros(n, 1, 28, 28)
        images[3, 0, 5, 5] = torch.nan
        return images

    with pytest.raises(ValueError, match="1 of 250 images of 'student' hold NaN"):
        evaluator.measure("student", nan, evaluations=1)
    with pytest.raises(ValueError, match=r"'student' returned images \(250, 784\)"):
        evaluator.measure("student", lambda n, generator: torch.zeros(n, 784), evaluations=1)
    with pytest.raises(ValueError, match="samples >= 4"):
        DigitsEvaluator(samples=3)
    with pytest.raises(ValueError, match="during_samples >= 4"):
        DigitsEvaluator(during_samples=3)


# ------------------------------------------------------------------------------------------ cache


def test_row_with_an_identity_is_measured_once(evaluator, real, own_cache):
    calls = []

    def sampler(n, generator):
        calls.append(n)
        return resampler(real)(n, generator)

    first = evaluator.measure("teacher", sampler, evaluations=35, identity="a")
    again = evaluator.measure("teacher, 35", sampler, evaluations=35, identity="a")
    assert calls == [250, 250, 100]
    assert again == {**first, "name": "teacher, 35", "cached": True}
    for change in (
        {"identity": "b"},
        {"identity": "a", "seed": 1},
        {"identity": "a", "samples": 250},
        {"identity": "a", "expected_shares": [0.1] * 10},
    ):
        evaluator.measure("teacher", sampler, evaluations=35, **change)
    evaluator.measure("teacher", sampler, evaluations=5, identity="a")
    assert len(calls) == 3 + 3 + 3 + 1 + 3 + 3
    notes = evaluator.document([again])["notes"]
    assert any("earlier run" in note and "teacher, 35" in note for note in notes)


def test_rows_of_an_older_protocol_are_measured_again(evaluator, real, own_cache, monkeypatch):
    evaluator.measure("teacher", resampler(real), evaluations=35, identity="a")
    monkeypatch.setattr("ratiograph.evaluation.digit_evaluator.PROTOCOL", 1)
    assert "cached" not in evaluator.measure("teacher", resampler(real), evaluations=35, identity="a")


def test_shipped_rows_have_every_metric():
    rows = json.loads(DigitsEvaluator().cache.shipped.read_text()).values()
    assert sorted(row["name"] for row in rows) == ["student before training", *TEACHER_ROWS]
    for row in rows:
        assert set(row) == {"name", "evaluations", "samples", "class_shares", *METRICS}
    verdicts = {row["name"]: row["collapsed"] for row in rows}
    assert [verdicts[name] for name in TEACHER_ROWS] == [True, False, True]


def test_cache_prefers_the_shipped_file_and_survives_a_damaged_one(own_cache, tmp_path):
    shipped = tmp_path / "package" / "rows.json"
    cache = ResultCache(shipped)
    assert cache.get("k") is None
    cache.put("k", {"frechet_distance": 1.5})
    cache.put("j", {"frechet_distance": 2.5})
    assert (cache.get("k"), cache.get("j")) == ({"frechet_distance": 1.5}, {"frechet_distance": 2.5})
    shipped.parent.mkdir()
    shipped.write_text(json.dumps({"k": {"frechet_distance": 3.5}}))
    assert cache.get("k") == {"frechet_distance": 3.5}
    cache.kept.write_text("{ torn")
    assert cache.get("j") is None
    cache.put("j", {"frechet_distance": 4.5})
    assert cache.get("j") == {"frechet_distance": 4.5}


def test_cache_that_cannot_be_written_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RATIOGRAPH_CACHE", str(tmp_path / "file"))
    ResultCache(tmp_path / "rows.json").put("k", {"frechet_distance": 1.0})
    assert "not kept" in caplog.text


def test_identity_follows_bytes_and_settings(tmp_path):
    path = tmp_path / "w"
    path.write_bytes(b"weights")
    base = file_identity(path, {"steps": 18, "rho": 7.0})
    assert file_identity(path, {"rho": 7.0, "steps": 18}) == base
    assert file_identity(path, {"steps": 17, "rho": 7.0}) != base
    path.write_bytes(b"Weights")
    assert file_identity(path, {"steps": 18, "rho": 7.0}) != base


# ------------------------------------------------------------------------------------------ document


def test_document_is_json_with_every_shown_metric_labelled(evaluator, real):
    rows = [*evaluator.real_rows(), evaluator.measure("student", resampler(real), evaluations=1)]
    wanted = [0.05, 0.15] * 5
    document = evaluator.document(rows, {"p*(y)": wanted})
    assert json.loads(json.dumps(document)) == document
    for row in document["rows"]:
        assert set(row) - {"name", "evaluations", "samples"} == set(document["metrics"])
    series = document["histograms"]["series"]
    assert [s["name"] for s in series] == [rows[0]["name"], "student", "p*(y)"]
    assert series[1]["values"] == rows[1]["class_shares"]
    assert series[2]["values"] == wanted
    assert document["histograms"]["labels"] == list("0123456789")
    assert any("5,000 digits of 'mnist'" in note for note in document["notes"])


def test_the_row_before_training_is_kept_for_weights_of_a_file(tmp_path, monkeypatch):
    """The shipped row is what is measured, and saves both the measurement and the reading of the real digits."""
    monkeypatch.setenv("RATIOGRAPH_CACHE", str(tmp_path))
    task = config.build(config.parse(["gin/mnist_sba.gin"], ["DigitsEvaluator.samples = 200"])).task
    task.prepare(CPU, None)
    evaluator = DigitsEvaluator(samples=200)
    (measured,) = evaluator.before(task, CPU, 3)
    assert "cached" not in measured
    again = DigitsEvaluator(samples=200)
    (kept,) = again.before(task, CPU, 3)
    assert kept == {**measured, "cached": True}
    assert not hasattr(again, "real")
    assert "cached" not in DigitsEvaluator(samples=200).before(task, CPU, 4)[0]
    task.student.sigma_init = 1.0
    assert "cached" not in DigitsEvaluator(samples=200).before(task, CPU, 3)[0]
