"""Weak scaling: the efficiency's formula, and launches of one and two processes."""

from __future__ import annotations

import pytest

from benchmarks import scaling
from benchmarks.scaling import efficiencies, step_seconds, weak_scaling

TINY = {"gin_file": ["gin/mnist_sba.gin"], "gin_param": ["UNet.channels = 16"], "batch_size": 2}


def test_efficiency_is_of_medians():
    assert efficiencies({1: [2.0, 1.0, 9.0], 2: [2.5, 2.5, 1.0], 4: [4.0]}) == {1: 1.0, 2: 0.8, 4: 0.5}


def test_a_record_has_a_row_for_each_number(monkeypatch):
    taken = []

    def told(ranks, **_asked):
        taken.append(ranks)
        return {"seconds": [0.5 * ranks, 0.5 * ranks], "cpu_seconds": [0.25 * ranks]}

    monkeypatch.setattr(scaling, "step_seconds", told)
    record = weak_scaling(**TINY, ranks=(1, 2), rounds=2)
    assert taken == [1, 2, 1, 2]
    assert [row["images_per_second"] for row in record["rows"]] == [4.0, 4.0]
    assert [row["efficiency"] for row in record["rows"]] == [1.0, 0.5]
    assert [row["cpu_seconds"] for row in record["rows"]] == [0.25, 0.5]


@pytest.mark.parametrize("ranks", [1, 2])
def test_processes_take_steps(ranks, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    taken = step_seconds(ranks, **TINY, steps=2, device="cpu")
    assert [len(each) for each in taken.values()] == [2, 2]
    for seconds, cpu_seconds in zip(taken["seconds"], taken["cpu_seconds"], strict=True):
        assert 0 < cpu_seconds < 1.5 * seconds < 90  # one thread, and those of the exchange


def test_processes_that_fail_say_why():
    with pytest.raises(ValueError, match="no_such"):
        step_seconds(1, gin_file=["gin/no_such.gin"], batch_size=2, steps=1, device="cpu")
