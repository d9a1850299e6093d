"""Changes between two runs: by hand-made records whose verdicts are known."""

from __future__ import annotations

import json

import pytest

from benchmarks.changes import compared
from benchmarks.timing import medians
from tools_here import call, tool

HERE = {"device": "a CPU", "threads": 2, "instructions": []}


def step(seconds, floor=1.0, device="a CPU", batch=4, **more):
    """A step's record from its rounds."""
    rounds = {"step": seconds, "teacher": [0.5, 0.5, 0.5]}
    middle = medians(rounds)
    return {
        "bench": "step", "gin_file": ["gin/a.gin"], "gin_param": [], "precision": "fp32", "batch_size": batch,
        "hardware": HERE | {"device": device}, "seconds": middle["step"], "step_over_floor": middle["step"] / floor,
        "passes": [{"pass": "teacher", "times": 1, "seconds": middle["teacher"]}], "rounds_seconds": rounds,
        "peak_memory_gb": 2.0, **more,
    }  # fmt: skip


def verdicts(old, new, **more):
    return {change.measure: change.verdict for change in compared([old], [new], **more)}


def test_a_slower_step_beyond_noise():
    old, new = step([1.0, 1.01, 0.99, 1.0]), step([1.2, 1.21, 1.19, 1.2], peak_memory_gb=2.3)
    assert verdicts(old, new) == {
        "step_over_floor": "larger", "peak_memory_gb": "larger", "teacher, seconds": "", "step, seconds": "slower",
    }  # fmt: skip
    assert verdicts(new, old)["step, seconds"] == "better"
    assert verdicts(old, new, tolerance=0.3)["step, seconds"] == ""


def test_noise_of_either_run_excuses_a_change():
    """A fifth slower, with rounds that spread by a half: medians of 4 have an error of 0.46."""
    noisy = step([0.7, 1.7, 0.8, 1.6])
    (change,) = [c for c in compared([step([1.0, 1.0, 1.0, 1.0])], [noisy]) if c.measure == "step, seconds"]
    spread = 1.4826 * 0.45
    assert change.noise == pytest.approx(1.2533 * spread / 2 / 1.2)
    assert change.ratio == pytest.approx(1.2)
    assert change.verdict == ""


def test_one_round_has_no_noise_and_the_tolerance_decides():
    (change,) = [c for c in compared([step([1.0])], [step([1.04])]) if c.measure == "step, seconds"]
    assert (change.noise, change.verdict) == (None, "")
    assert verdicts(step([1.0]), step([1.06]))["step, seconds"] == "slower"


def test_seconds_of_another_machine_are_not_compared():
    found = verdicts(step([1.0]), step([3.0], floor=3.0, device="a GPU"))
    assert found == {"step_over_floor": "", "peak_memory_gb": ""}


def test_the_last_records_of_shared_measurements():
    old, new = [step([9.0]), step([1.0]), step([1.0], batch=8)], [step([1.0]), step([5.0], batch=16)]
    assert {change.of for change in compared(old, new)} == {"step a fp32, batch 4"}
    assert all(change.ratio == 1 for change in compared(old, new))
    with pytest.raises(ValueError, match="no measurement in common"):
        compared(old, [step([1.0], batch=5)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"bench": "st', "line 1, is no JSON"),
        ("[" * 100_000, "nested too deep"),
        ("[1]", "line 1 holds a list, not an object"),
        ('{"date": "2026", "bench": "step", "gin_file": 3, "hardware": []}', "misuses a field"),
    ],
)
def test_damaged_records_are_one_line(tmp_path, capsys, line, message):
    path = tmp_path / "records.jsonl"
    path.write_text(line + "\n")
    with tool("bench") as bench:
        for arguments in (("compare", path, path), ("table", f"--out={path}")):
            call(bench, *arguments)
    told = capsys.readouterr().err.splitlines()
    assert message in told[0]
    assert all(one.startswith("error: ") and "records.jsonl" in one for one in told)


def test_the_command(tmp_path, capsys):
    for name, seconds in (("old", 1.0), ("new", 1.5)):
        record = step([seconds, seconds, seconds]) | {"date": f"{name}-day"}
        with (tmp_path / "both.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
    both = tmp_path / "both.jsonl"
    with tool("bench") as bench:
        for new, code in (("new", 3), ("old", 0)):
            assert call(bench, "compare", f"{both}@old", f"{both}@{new}") == code
    shown = capsys.readouterr().out
    assert "2 of 4 measures are worse beyond noise" in shown
    assert "1.500x  ±   0.0%  slower" in shown
