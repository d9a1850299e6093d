"""Several averages of one student: each is its formula's, in every mode, and is judged beside the others."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ranks import together
from ratiograph import config
from ratiograph.core.randomness import BatchGenerator
from ratiograph.core.types import Batch, Condition
from ratiograph.evaluation.candidates import marked_best, students_of
from ratiograph.networks.weights import weight_files
from ratiograph.reports.run_and_report import run_and_report
from ratiograph.training import checkpoints, parallel
from ratiograph.training.experiment import Task
from ratiograph.training.optim import EMA
from test_distillation import matching, task_of

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
BATCH = 8
RECIPES = {"short": EMA(half_life=10, ramp_up=1e9), "long": EMA(half_life=1000, ramp_up=0.5)}
RING = [
    "MLP.width = 8",
    "Experiment.batch_size = 8",
    "Experiment.checkpoint_every = 2",
    "Experiment.evaluate_every = 2",
    "MixtureEvaluator.samples = 50",
    "MixtureEvaluator.repeats = 2",
    "Distillation.averages = {'short': @short/EMA(), 'long': @long/EMA()}",
    "short/EMA.half_life = 4.0",
    "short/EMA.ramp_up = 1e9",
    "long/EMA.half_life = 1000.0",
    "long/EMA.ramp_up = 1e9",
]


def prepared(how: parallel.Parallel | None = None, **changes):
    torch.manual_seed(0)
    task = task_of({"matching": matching()}, **{"averages": RECIPES, **changes}).double()
    task.parallel = how or parallel.Replicated()
    task.prepare(CPU, None)
    return task


def advance(task, steps: range, part: int = 0, parts: int = 1) -> None:
    for step in steps:
        images = torch.randn(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        own = Batch(images.tensor_split(parts)[part], Condition())
        task.step(own, BATCH // parts, BatchGenerator(CPU, part, parts).manual_seed(step))


def test_each_average_is_its_formula():
    task = prepared()
    expected = {name: copy.deepcopy(task.student.state_dict()) for name in ("", *RECIPES)}
    recipes = {"": task.ema, **RECIPES}
    for step in range(4):
        advance(task, range(step, step + 1))
        images = (step + 1) * BATCH
        for name, recipe in recipes.items():
            beta = 0.5 ** (BATCH / min(recipe.half_life, recipe.ramp_up * images))
            for key, new in task.student.state_dict().items():
                expected[name][key] = beta * expected[name][key] + (1 - beta) * new
    learned = dict(task.student.named_parameters())
    for name, average in {"": task.average, **task.averaged}.items():
        for key in learned:
            torch.testing.assert_close(average.state_dict()[key], expected[name][key], rtol=1e-12, atol=1e-14)
    key = next(iter(learned))
    assert not torch.equal(task.averaged["short"].state_dict()[key], task.averaged["long"].state_dict()[key])


def test_further_averages_change_nothing_else():
    one, several = prepared(averages=None), prepared()
    for task in (one, several):
        advance(task, range(3))
    state = several.training_state()["networks"]
    for name, network in one.training_state()["networks"].items():
        for key, value in network.items():
            assert torch.equal(state[name][key], value), f"{name}.{key}"
    assert state.keys() - one.training_state()["networks"].keys() == {"student_average_short", "student_average_long"}
    assert list(one.weights()) == ["student", "ratio"]
    assert list(several.weights()) == ["student", "student_short", "student_long", "ratio"]


def two_ranks(rank: int, folder: str) -> None:
    torch.manual_seed(0)
    found = {}
    for mode in ("ddp", "fsdp"):
        how = parallel.choose(mode, task_of({"matching": matching()}), CPU, held=float)
        task = prepared(how)
        advance(task, range(3), rank, 2)
        found[mode] = task.training_state()["networks"]
        task = prepared(how)
        task.load_training_state(torch.load(f"{folder}/one.pt", weights_only=True))
        advance(task, range(3, 6), rank, 2)
        found[f"one => {mode}"] = task.training_state()
        with task.parallel.whole():  # each process alone
            draws = torch.Generator().manual_seed(1)
            candidate = students_of(task)[1]
            found[f"{mode} samples"] = candidate.sampler(task)(4, draws) if rank == 0 else None
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averages")
    task = prepared()
    advance(task, range(3))
    torch.save(task.training_state(), folder / "one.pt")
    together(two_ranks, 2, str(folder))
    return torch.load(folder / "found.pt", weights_only=True)


def assert_same(found: dict, task: Task) -> None:
    expected = task.training_state()["networks"]
    assert found.keys() == expected.keys()
    for name, network in expected.items():
        for key, value in network.items():
            torch.testing.assert_close(found[name][key], value, rtol=1e-6, atol=1e-9, msg=f"{name}.{key}")


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_averages_move_between_all_modes(found, mode):
    task = prepared()
    advance(task, range(3))
    assert_same(found[mode], task)
    advance(task, range(3, 6))
    assert_same(found[f"one => {mode}"]["networks"], task)
    samples = students_of(task)[1].sampler(task)(4, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found[f"{mode} samples"], samples, rtol=1e-6, atol=1e-7)
    back = prepared()
    back.load_training_state(found[f"one => {mode}"])
    for each in (task, back):
        advance(each, range(6, 8))
    assert_same(back.training_state()["networks"], task)


def ring(workdir, steps: int, *lines: str):
    torch.manual_seed(0)
    parsed = config.parse([str(ROOT / "gin/mixture2d_scores.gin")], [*RING, *lines], {"Experiment.steps": steps})
    workdir.mkdir(exist_ok=True)
    config.save(parsed, workdir / "config.gin")
    experiment = config.build(parsed)
    run_and_report(experiment, workdir=workdir, device="cpu")
    return experiment.task


def test_a_run_with_averages_resumes_exactly(tmp_path):
    ring(tmp_path / "halves", 2)
    halves, whole = ring(tmp_path / "halves", 4), ring(tmp_path / "whole", 4)
    for name, average in whole.averaged.items():
        for key, value in average.state_dict().items():
            assert torch.equal(halves.averaged[name].state_dict()[key], value), f"{name}.{key}"


def test_every_average_is_judged_and_written(tmp_path):
    task = ring(tmp_path, 2, "Experiment.best_metric = 'evaluation/short/relative_energy_distance'")
    document = json.loads((tmp_path / "evaluation.json").read_text())
    names = ["student", "student, average 'short'", "student, average 'long'", "student, last weights"]
    rows = document["rows"][2:]
    assert [row["name"] for row in rows] == names
    assert [row.get("highlight", False) for row in rows] == [True, False, False, False]
    distances = [row["energy_distance"] for row in rows]
    assert len(set(distances)) == 4
    assert [row.get("best", False) for row in rows] == [distance == min(distances) for distance in distances]
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    for prefix, row in zip(("", "short/", "long/", "raw/"), rows, strict=True):
        assert record[f"evaluation/{prefix}relative_energy_distance"] == pytest.approx(row["relative_energy_distance"])
    best = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert best["evaluation/short/relative_energy_distance"] == pytest.approx(rows[1]["relative_energy_distance"])
    assert "average &#x27;short&#x27;" in (tmp_path / "report.html").read_text()

    for name, average in task.averaged.items():
        written = copy.deepcopy(average)
        for parameter in written.parameters():
            parameter.zero_()
        weight_files.load_weights(tmp_path / f"student_{name}.safetensors", written)
        for ours, theirs in zip(average.parameters(), written.parameters(), strict=True):
            assert torch.equal(ours, theirs)

    command = [sys.executable, ROOT / "tools/evaluate_run.py", f"--workdir={tmp_path}", "--device=cpu"]
    done = subprocess.run([*command, f"--out={tmp_path}/again.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "again.json").read_text())["rows"] == document["rows"]


def test_a_warm_start_warms_every_average(tmp_path):
    plain = ring(tmp_path / "plain", 2, "Distillation.averages = None")
    warm = ["Distillation.warm_start = @WarmStart()", f"WarmStart.run = '{tmp_path / 'plain'}'"]
    torch.manual_seed(1)
    experiment = config.build(config.parse([str(ROOT / "gin/mixture2d_scores.gin")], [*RING, *warm], {}))
    experiment.task.prepare(CPU, None)
    for average in experiment.task.averaged.values():
        for ours, theirs in zip(average.parameters(), plain.average.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_an_old_checkpoint_without_the_average_is_refused_by_name(tmp_path):
    ring(tmp_path, 2, "Distillation.averages = {'short': @short/EMA()}")
    with pytest.raises(ValueError, match=r"another graph: averages\[long\] is EMA here and absent there"):
        ring(tmp_path, 4)
    assert checkpoints.latest(tmp_path / "checkpoints")[0] == 2


def test_the_best_is_by_the_first_number_that_all_have():
    metrics = {"size": {"better": None}, "recall": {"better": "higher"}, "fid": {"better": "lower"}}
    rows = [{"recall": 0.5, "fid": 3.0, "size": 1}, {"recall": None, "fid": 2.0, "size": 1}]
    assert [row.get("best") for row in marked_best(rows, metrics)] == [None, True]
    rows[1]["recall"] = 0.4
    assert [row.get("best") for row in marked_best(rows, metrics)] == [True, None]
    assert marked_best(rows[:1], metrics) == [{**rows[0], "highlight": True}]


@pytest.mark.parametrize("name", ["raw", "a/b", "", "pop", "a.b"])
def test_names_that_no_average_can_have(name):
    with pytest.raises(ValueError, match="take a name of small letters and digits, such as 'short'"):
        task_of({"matching": matching()}, averages={name: EMA()})
