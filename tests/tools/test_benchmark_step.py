"""Steps that take minutes: what is run how often, and what their records lack."""

from __future__ import annotations

import pytest
import torch

from benchmarks import step
from benchmarks.step import StepBench, bench_step
from benchmarks.suite import SIZES

CPU = torch.device("cpu")
TINY = {"gin_file": ["gin/mnist_js.gin"], "gin_param": ["UNet.channels = 16"], "batch_size": 2, "precision": "fp32"}


@pytest.fixture
def calls(monkeypatch):
    """How often the step and the student's own pass were run."""
    counted = {"step": 0, "_student": 0, "unit": 0}

    def counting(name):
        run = getattr(StepBench, name)

        def counted_run(bench):
            counted[name] += 1
            run(bench)

        return counted_run

    for name in counted:
        monkeypatch.setattr(StepBench, name, counting(name))
    return counted


@pytest.mark.parametrize(("rounds", "steps", "passes"), [(1, 4, 1), (3, 7, 4)])
def test_how_often_each_is_run(rounds, steps, passes, calls):
    """Twice for the peak of memory, once to count operations; rounds, and one more that warms up unless it is alone."""
    record = bench_step(**TINY, rounds=rounds, device=CPU)
    assert calls == {"step": steps, "_student": passes, "unit": passes}
    assert {len(each) for each in record["rounds_seconds"].values()} == {rounds}


def test_a_step_beyond_patience_is_taken_once(calls, monkeypatch):
    monkeypatch.setattr(step, "PATIENCE", 0.0)
    record = bench_step(**TINY, rounds=3, device=CPU)
    assert calls == {"step": 1, "_student": 0, "unit": 0}
    assert record["rounds_seconds"] == {"step": [record["seconds"]]}
    assert record["images_per_second"] == 2 / record["seconds"]
    assert [record[k] for k in ("floor", "step_over_floor", "units", "flops", "tflops", "passes")] == [*5 * [None], []]
    assert record["peak_memory_gb"] > 0.1


def test_adapters_on_a_base_in_bf16_have_no_unit(calls):
    pytest.importorskip("peft")
    pytest.importorskip("diffusers")
    files = ["gin/sd15_di_bregman.gin", "gin/base/sd15_lora.gin"]
    told = {"gin_file": files, "gin_param": [*SIZES["SD15UNet"], "LoRA.rank = 2"], "batch_size": 1}
    record = bench_step(**told, precision="bf16", rounds=1, device=CPU)
    assert calls["unit"] == 0
    assert record["units"] is None
    assert record["step_over_floor"] == pytest.approx(record["seconds"] / record["floor"])
