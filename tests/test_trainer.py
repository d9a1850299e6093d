"""The loop: exact resume, seeds, precision, and what ends a run."""

import json

import pytest
import torch

from ratiograph import checkpoints, config, trainer, weight_files

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
    return experiment, trainer.train(experiment, workdir=workdir, device="cpu")


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


def test_a_finished_run_does_not_train_again(tmp_path):
    run(tmp_path, steps=3)
    before = (tmp_path / "metrics.jsonl").read_text()
    run(tmp_path, steps=3)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_samples_and_weights_are_left(tmp_path):
    experiment, _ = run(tmp_path, steps=3)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step_00000000.png", "step_00000003.png"]
    student = experiment.task.ema.copy_of(experiment.task.average)
    for parameter in student.parameters():
        parameter.zero_()
    weight_files.load_weights(tmp_path / "student.safetensors", student)
    for ours, written in zip(experiment.task.average.parameters(), student.parameters(), strict=True):
        assert torch.equal(ours, written)


def test_a_nan_ends_the_run_with_the_earlier_checkpoint_intact(tmp_path):
    run(tmp_path, steps=3)
    torch.manual_seed(0)
    experiment = config.build(config.parse(["gin/mnist_sba.gin"], TINY, {"Experiment.steps": 6}))
    original = experiment.task.objective.fields
    experiment.task.objective.fields = lambda e: {k: v * float("nan") for k, v in original(e).items()}
    with pytest.raises(ValueError, match=r"field/distribution.* became NaN .* the checkpoint of step 3 is intact"):
        trainer.train(experiment, workdir=tmp_path, device="cpu")
    step, state = checkpoints.latest(tmp_path / "checkpoints")
    assert step == 3
    assert all(value.isfinite().all() for value in state["task"]["networks"]["student"].values())


def test_an_overflowing_identity_does_not_end_the_run(tmp_path, monkeypatch):
    """E_q[e^l] is infinite in fp32 from l = 89 on; the weights may be fine."""
    infinite = torch.tensor(float("inf"))
    monkeypatch.setattr("ratiograph.distillation.ratio_metrics", lambda *ratios: {"ratio/mean_exp_student": infinite})
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


def test_a_checkpoint_of_another_graph_is_refused(tmp_path):
    run(tmp_path, steps=3)
    with pytest.raises(ValueError, match=r"another graph: student\.denoiser\.network"):
        run(tmp_path, "UNet.channels = 32")


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
    assert trainer.autocast_dtype(precision, torch.device("cpu")) is expected


@pytest.mark.parametrize("has", [True, False])
def test_auto_precision_takes_bf16_only_in_hardware(monkeypatch, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has, "amx_bf16": False})
    expected = torch.bfloat16 if has else None
    assert trainer.autocast_dtype("auto", torch.device("cpu")) is expected


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="is no device"):
        trainer.choose_device("gpu0")
