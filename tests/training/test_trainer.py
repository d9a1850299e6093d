"""The loop: exact resume, seeds, precision, and what ends a run."""

import json
import re
import resource
import time
from pathlib import Path

import pytest
import torch

from ratiograph import config
from ratiograph.networks.weights import weight_files
from ratiograph.reports.run_and_report import run_and_report
from ratiograph.training import checkpoints, devices, trainer
from ratiograph.training.checkpoint_manager import CheckpointManager

TINY = [
    "EDM.weights = None",
    "UNet.channels = 16",
    "Experiment.batch_size = 4",
    "Experiment.precision = 'fp32'",
    "Experiment.checkpoint_every = 3",
    "Experiment.preview_every = 3",
    "Experiment.log_every = 2",
    "Experiment.preview_samples = 4",
    "Experiment.evaluator = None",
]


def run(workdir, *changes, steps=6):
    torch.manual_seed(0)
    experiment = config.build(config.parse(["gin/mnist_sba.gin"], [*TINY, *changes], {"Experiment.steps": steps}))
    return experiment, run_and_report(experiment, workdir=workdir, device="cpu")


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_is_the_run_that_would_have_been(tmp_path):
    run(tmp_path / "whole")
    run(tmp_path / "halves", steps=3)
    _, report = run(tmp_path / "halves")
    _, whole = checkpoints.latest(tmp_path / "whole" / "checkpoints")
    _, halves = checkpoints.latest(tmp_path / "halves" / "checkpoints")
    assert whole["step"] == halves["step"] == 6
    for name, network in whole["task"]["networks"].items():
        for key, value in network.items():
            assert torch.equal(value, halves["task"]["networks"][name][key]), f"{name}.{key}"
    last = [lines(tmp_path / folder)[-1] for folder in ("whole", "halves")]
    assert last[0]["loss/student_score"] == last[1]["loss/student_score"]
    assert [line["step"] for line in lines(tmp_path / "halves")] == [2, 3, 4, 6]
    assert report.name == "report.html"
    assert "<svg" in report.read_text()


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [truncated, flipped, Path.unlink])
def test_from_before_a_damaged_checkpoint_the_run_comes_to_the_same_end(tmp_path, capsys, damage):
    def ring(workdir, steps):
        torch.manual_seed(0)
        values = ["batch_size = 8", "checkpoint_every = 2", "evaluator = None"]
        parsed = config.parse(
            ["gin/mixture2d_scores.gin"],
            ["MLP.width = 8", *(f"Experiment.{value}" for value in values)],
            {"Experiment.steps": steps},
        )
        trainer.train(config.build(parsed), workdir=workdir, device="cpu")
        return checkpoints.latest(workdir / "checkpoints")[1]["task"]["networks"]

    whole = ring(tmp_path / "whole", 8)
    ring(tmp_path / "damaged", 6)
    damage(tmp_path / "damaged" / "checkpoints" / "step_00000006.pt")
    with pytest.warns(UserWarning, match=r"step_00000006\.pt is (damaged|missing).*the one before it"):
        networks = ring(tmp_path / "damaged", 8)
    assert "resumed from step 4 of 8" in capsys.readouterr().out
    for name, network in whole.items():
        for key, value in network.items():
            assert torch.equal(value, networks[name][key]), f"{name}.{key}"


def test_a_finished_run_does_not_train_again(tmp_path):
    run(tmp_path, steps=3)
    before = (tmp_path / "metrics.jsonl").read_text()
    run(tmp_path, steps=3)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_samples_and_weights_are_left(tmp_path):
    experiment, _ = run(tmp_path, steps=3)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "step_00000000.png",
        "step_00000003.png",
        "teacher.png",
    ]
    student = experiment.task.ema.copy_of(experiment.task.average)
    for parameter in student.parameters():
        parameter.zero_()
    weight_files.load_weights(tmp_path / "student.safetensors", student)
    for ours, written in zip(experiment.task.average.parameters(), student.parameters(), strict=True):
        assert torch.equal(ours, written)


def test_lasting_nans_end_the_run_with_the_earlier_checkpoint_intact(tmp_path):
    run(tmp_path, steps=3)
    torch.manual_seed(0)
    lines = [*TINY, "Experiment.max_bad_steps = 2"]
    experiment = config.build(config.parse(["gin/mnist_sba.gin"], lines, {"Experiment.steps": 9}))
    original = experiment.task.objective.fields
    experiment.task.objective.fields = lambda e: {k: v * float("nan") for k, v in original(e).items()}
    expected = r"3 steps in a row up to step 6 .*the term 'distribution'.* the checkpoint of step 3 is intact"
    with pytest.raises(ValueError, match=expected):
        trainer.train(experiment, workdir=tmp_path, device="cpu")
    step, state = checkpoints.latest(tmp_path / "checkpoints")
    assert step == 3
    assert all(value.isfinite().all() for value in state["task"]["networks"]["student"].values())


def test_an_overflowing_identity_does_not_end_the_run(tmp_path, monkeypatch):
    """E_q[e^l] is infinite in fp32 from l = 89 on; the weights may be fine."""
    infinite = torch.tensor(float("inf"))
    monkeypatch.setattr("ratiograph.tasks.critics.ratio_metrics", lambda *ratios: {"ratio/mean_exp_student": infinite})
    run(tmp_path, steps=2)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2
    assert last["ratio/mean_exp_student"] is None


def test_quick_evaluations_are_logged_and_change_nothing(tmp_path):
    """The measured run takes the very steps of the other, and tells about its ratio."""
    plain, judged = (tmp_path / name for name in ("plain", "judged"))
    run(plain, steps=4)
    quick = ["during_samples = 50", "samples = 50", "teacher_evaluations = (1,)"]
    lines = ["Experiment.evaluator = @DigitsEvaluator()", "Experiment.evaluate_every = 2"]
    run(judged, *lines, *(f"DigitsEvaluator.{line}" for line in quick), steps=4)
    records = [json.loads(line) for line in (judged / "metrics.jsonl").read_text().splitlines()]
    key = "evaluation/frechet_distance"
    measured = {record["step"]: record[key] for record in records if key in record}
    assert sorted(measured) == [2, 4]
    assert all(value > 1 for value in measured.values())
    states = [checkpoints.latest(folder / "checkpoints")[1]["task"]["networks"] for folder in (plain, judged)]
    for key, value in states[0]["student"].items():
        assert torch.equal(value, states[1]["student"][key]), key
    summary = json.loads((judged / "diagnostics.json").read_text())
    assert summary["step"] == 4
    assert sum(summary["ratio"]["calibration"]["share"]) == pytest.approx(1)


def test_a_collapse_is_told_at_once(tmp_path, capsys):
    torch.manual_seed(0)
    changes = ["Experiment.evaluator = @DigitsEvaluator()", "Experiment.evaluate_every = 1"]
    experiment = config.build(config.parse(["gin/mnist_sba.gin"], [*TINY, *changes], {"Experiment.steps": 3}))
    found = iter([{"collapsed": 0.0, "coverage": 0.5}, {"collapsed": 1.0, "coverage": 0.0312}, {"collapsed": 1.0}])
    evaluator = experiment.evaluator
    evaluator.before, evaluator.after = lambda *_: [], lambda *_: {}
    evaluator.during = lambda *_: next(found)
    trainer.train(experiment, workdir=tmp_path, device="cpu")
    told = [line for line in capsys.readouterr().out.splitlines() if "collapsing" in line]
    assert told == [
        "step 2: the student may be collapsing: its samples cover 3.1 % of the real ones",
        "step 3: the student may be collapsing",
    ]


def test_a_checkpoint_of_another_graph_is_refused(tmp_path):
    run(tmp_path, steps=3)
    expected = (
        r"another graph: student\.denoiser\.network is UNet with (\d+) weights of its own here and UNet with (\d+) "
        r"weights of its own there; teacher\.network is .*; student_score\.network is .*; and 1 more"
    )
    with pytest.raises(ValueError, match=expected):
        run(tmp_path, "UNet.channels = 32")
    expected = (
        r"another graph: objective\.terms\[distribution\]\.weighting\.weighting\.weighting is KL here and SBA there"
    )
    with pytest.raises(ValueError, match=expected):
        run(tmp_path, "WEIGHTING = @KL()")


def test_a_checkpoint_says_where_the_run_stood(tmp_path):
    run(tmp_path, steps=3)
    _, state = checkpoints.latest(tmp_path / "checkpoints")
    assert state["run"]["samples"] == 12
    assert state["run"]["best"] is None
    assert state["run"]["graph"]["student.denoiser"] == "EDM"


def test_the_stream_goes_on_from_the_checkpoint_s_sample(tmp_path):
    run(tmp_path, steps=3)
    torch.manual_seed(0)
    experiment = config.build(config.parse(["gin/mnist_sba.gin"], TINY, {"Experiment.steps": 4}))
    starts, batches = [], experiment.data.batches
    experiment.data.batches = lambda *asked: starts.append(asked) or batches(*asked)
    trainer.train(experiment, workdir=tmp_path, device="cpu")
    assert starts == [(4, 0, 12, 0, 1)]


def test_a_run_interrupted_after_its_last_step_writes_its_own_evaluation(tmp_path):
    """The evaluation of the shorter run that it goes on from would be taken for it."""
    run(tmp_path, steps=2)
    (tmp_path / "evaluation.json").write_text('{"title": "short"}')
    torch.manual_seed(0)
    changes = [*TINY, "Experiment.evaluator = @DigitsEvaluator()"]
    experiment = config.build(config.parse(["gin/mnist_sba.gin"], changes, {"Experiment.steps": 3}))
    experiment.evaluator.after = lambda *_: {"title": "long"}
    weights = experiment.task.weights
    experiment.task.weights = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train(experiment, workdir=tmp_path, device="cpu")
    experiment.task.weights = weights
    trainer.train(experiment, workdir=tmp_path, device="cpu")
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {"title": "long"}
    assert json.loads((tmp_path / "evaluation_step_00000002.json").read_text()) == {"title": "short"}


def test_memory_and_throughput_are_logged_and_told(tmp_path, capsys):
    run(tmp_path, steps=4)
    records = lines(tmp_path)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    assert all(0.1 < record["memory/peak_gb"] <= used for record in records)
    for record in records:
        assert record["rate/images_per_second"] == pytest.approx(4 * record["rate/steps_per_second"])
    assert re.search(r"images/s, at most [\d.]+ GB of memory\n", capsys.readouterr().out)


def test_every_nth_and_the_best_checkpoint_are_kept(tmp_path):
    values = iter([5.0, 3.0, 4.0, float("nan"), 3.0])
    torch.manual_seed(0)
    changes = ["Experiment.evaluator = @DigitsEvaluator()", "Experiment.evaluate_every = 2", "Experiment.keep_last = 1"]
    changes += ["Experiment.keep_every = 6", "Experiment.best_metric = 'evaluation/error'"]
    parsed = config.parse(["gin/mnist_sba.gin"], [*TINY, *changes], {"Experiment.steps": 10})
    experiment = config.build(parsed)
    evaluator = experiment.evaluator
    evaluator.before = lambda *_: []
    evaluator.during = lambda *_: {"error": next(values)}
    evaluator.after = lambda *_: {}
    trainer.train(experiment, workdir=tmp_path, device="cpu")
    # Steps 2 and 4 were the best so far, 6 is a multiple of 6, 10 the last.
    assert checkpoints.steps(tmp_path / "checkpoints") == [4, 6, 10]
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text()) == {"step": 4, "evaluation/error": 3.0}


def test_a_checkpoint_every_100_steps_costs_at_most_two_percent(tmp_path):
    """In processor time, all threads counted, of the digit run at its own size; and in time that the run waits."""
    torch.manual_seed(0)
    experiment = config.build(config.parse(["gin/mnist_sba.gin"], [], {"Experiment.precision": "fp32"}))
    task, generator = experiment.task, torch.Generator()
    task.prepare(torch.device("cpu"), None)
    batch = next(experiment.data.batches(experiment.batch_size, 0))
    steps, saves, waits = [], [], []
    with CheckpointManager(tmp_path) as manager:
        for step in range(3):
            started = time.process_time()
            task.step(batch, experiment.batch_size, generator.manual_seed(step))
            steps.append(time.process_time() - started)
            started, clock = time.process_time(), time.perf_counter()
            manager.save(step, task.training_state(), {})
            waits.append(time.perf_counter() - clock)
            manager.wait()
            saves.append(time.process_time() - started)
    size = (tmp_path / "step_00000002.pt").stat().st_size / 1e6
    share, waiting = min(saves) / (100 * min(steps)), min(waits) / (100 * min(steps))
    print(f"{size:.1f} MB: {100 * share:.2f} % of 100 steps' processor time, waiting for {100 * waiting:.2f} %")
    assert share < 0.02
    assert waiting < 0.02


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Experiment.keep_every = 4", "keep_every=4 must be 0 or a multiple of checkpoint_every=3"),
        ("Experiment.best_metric = 'evaluation/x'", "needs measurements: bind Experiment.evaluator"),
        ("Experiment.max_bad_steps = 0", "max_bad_steps takes a whole number at least 1, not 0"),
        ("Experiment.hang_minutes = 0.0", "hang_minutes takes a finite number above 0, not 0.0"),
    ],
)
def test_run_level_values_that_make_no_sense_are_refused(tmp_path, line, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(tmp_path, line)


def test_a_teacher_of_another_shape_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not fit EDM"):
        run(tmp_path, "EDM.weights = 'mnist_teacher'", steps=1)


def test_a_missing_teacher_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        run(tmp_path, "EDM.weights = 'nowhere.safetensors'", steps=1)


def test_seeds_are_stable_and_distinct():
    assert trainer.step_seed(0, 3, 1) == trainer.step_seed(0, 3, 1)
    seeds = {trainer.step_seed(seed, 3, step) for seed in range(20) for step in range(200)}
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**63 for seed in seeds)
    # A digest's first bytes, so that a run repeats on any machine and any Python.
    assert trainer.step_seed(0, 3, 1) == 5349098028284854029


@pytest.mark.parametrize(("precision", "expected"), [("fp32", None), ("bf16", torch.bfloat16)])
def test_precision_by_name(precision, expected):
    assert devices.autocast_dtype(precision, torch.device("cpu")) is expected


@pytest.mark.parametrize("has", [True, False])
def test_auto_precision_takes_bf16_only_in_hardware(monkeypatch, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has, "amx_bf16": False})
    expected = torch.bfloat16 if has else None
    assert devices.autocast_dtype("auto", torch.device("cpu")) is expected


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="is no device"):
        devices.choose_device("gpu0")


def test_what_is_lost_or_torn_of_a_finished_run_is_made_again(tmp_path, capsys):
    def finish(steps):
        torch.manual_seed(0)
        changes = [*TINY, "Experiment.evaluator = @DigitsEvaluator()"]
        experiment = config.build(config.parse(["gin/mnist_sba.gin"], changes, {"Experiment.steps": steps}))
        experiment.evaluator.before = lambda *_: [{"name": "untrained"}]
        experiment.evaluator.after = lambda task, device, seed, before, folder: {"rows": before}
        trainer.train(experiment, workdir=tmp_path, device="cpu")

    finish(2)
    names = ("student.safetensors", "ratio.safetensors", "evaluation.json")
    before = [(tmp_path / name).read_bytes() for name in names]
    (tmp_path / names[0]).unlink()
    for name in (*names[1:], "diagnostics.json"):
        truncated(tmp_path / name)
    finish(2)
    assert [(tmp_path / name).read_bytes() for name in names] == before
    assert not (tmp_path / "diagnostics.json").exists()  # the next checkpoint has a new one
    truncated(tmp_path / "before.json")
    finish(3)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {"rows": []}
    assert re.search(r"before\.json is no JSON .*Removed", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {"step": 2, "run": {}}, "it has no task"),
        (lambda state: [1], "it has no run"),
        (lambda state: state | {"task": {"networks": {}}}, "of another graph"),
        (lambda state: state | {"task": state["task"] | {"optimizers": {}}}, "another version .*KeyError"),
    ],
)
def test_a_checkpoint_of_another_version_is_named(tmp_path, change, message):
    run(tmp_path, steps=2)
    folder = tmp_path / "checkpoints"
    checkpoints.save(folder, 2, change(checkpoints.latest(folder)[1]))
    with pytest.raises(ValueError, match=message):
        run(tmp_path, steps=3)
