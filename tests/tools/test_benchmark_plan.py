"""Operations and bytes by shapes alone, against the same step taken with real tensors."""

from __future__ import annotations

import pytest
import torch

from benchmarks import plan, timing
from benchmarks.inputs import made_up_batch, without_files
from benchmarks.plan import _Bytes, bench_plan, planned
from benchmarks.suite import SIZES
from ratiograph import config
from ratiograph.training.optim_8bit import Adam8bit

CPU = torch.device("cpu")
FILES = ["gin/mnist_sba.gin"]
TINY = ["UNet.channels = 16"]
SD15 = ["gin/sd15_di_bregman.gin"]
EIGHT_BITS = [*FILES, "gin/base/adam_8bit.gin"]


def test_the_bytes_of_tensors_that_live():
    with _Bytes() as counter:
        a = torch.ones(1000)
        b = a[10:] + 1  # a view has no bytes of its own
        del a
        c = torch.ones(10, dtype=torch.bfloat16)
    assert counter.live == 4 * 990 + 20
    assert counter.peak == 4 * 1990
    counter.begin()
    assert counter.peak == counter.live
    del b, c
    assert counter.live == 0


@pytest.mark.parametrize(
    ("files", "lines", "precision"),
    [
        (FILES, TINY, "fp32"),
        (FILES, TINY, "bf16"),
        (EIGHT_BITS, TINY, "fp32"),
        pytest.param(SD15, SIZES["SD15UNet"], "bf16", marks=pytest.mark.slow),
        pytest.param([*SD15, "gin/base/sd15_lora.gin"], SIZES["SD15UNet"], "bf16", marks=pytest.mark.slow),
    ],
)
def test_a_plan_is_the_step_with_real_tensors(files, lines, precision):
    if files is EIGHT_BITS:
        pytest.importorskip("torchao")
    with _Bytes() as counter:
        torch.manual_seed(0)
        task = without_files(config.build(config.parse(files, lines)).task)
        task.prepare(CPU, torch.bfloat16 if precision == "bf16" else None)
        counter.begin()
        generator = torch.Generator()
        batch = made_up_batch(task.student.denoiser.network, 4, generator)
        task.step(batch, 4, generator)
        held = counter.live
        task.step(batch, 4, generator)
        peak = counter.peak
        flops = timing.count_flops(lambda: task.step(batch, 4, generator))
    plan = planned(files, lines, precision=precision, batch_size=4)
    assert plan.flops == flops
    assert plan.held_gb == pytest.approx(held / 1e9, rel=0.01)
    assert plan.peak_gb == pytest.approx(peak / 1e9, rel=0.03)
    assert plan.parameters["student"] == sum(parameter.numel() for parameter in task.student.parameters())


def test_what_exists_while_the_graph_is_built_is_no_part_of_a_step(monkeypatch):
    materialise, expected = plan._materialise, planned(FILES, TINY, batch_size=4)

    def wasteful(task):
        torch.empty(10**9)
        materialise(task)

    monkeypatch.setattr(plan, "_materialise", wasteful)
    assert planned(FILES, TINY, batch_size=4) == expected
    assert expected.peak_gb < 0.1


def test_what_is_held_by_arithmetic():
    """4 bytes a weight, and a moment's 4 of what learns by Adam without a first one; the student's average 4 more."""
    record = bench_plan(FILES, TINY, precision="fp32", batch_size=4)
    count = record["parameters"]
    expected = 4 * count["teacher"] + 12 * count["student"] + 8 * (count["student_score"] + count["ratio"])
    assert record["held_gb"] == pytest.approx(expected / 1e9, rel=0.03)
    assert record["planned_memory_gb"] > record["held_gb"]


def test_moments_in_8_bits():
    """Six bytes a weight of student and student score fewer, but for the scales and for the tensors held in float32."""
    pytest.importorskip("torchao")
    told = {"gin_param": ["UNet.channels = 32", "Adam.betas = (0.9, 0.999)"], "precision": "fp32", "batch_size": 4}
    whole, coded = (bench_plan(files, **told) for files in (FILES, EIGHT_BITS))
    with torch.device("meta"):
        task = config.build(config.parse(EIGHT_BITS, told["gin_param"])).task
    bytes_held = sum(Adam8bit.moment_bytes(p) for one in (task.student, task.student_score) for p in one.parameters())
    count = whole["parameters"]["student"] + whole["parameters"]["student_score"]
    assert whole["held_gb"] - coded["held_gb"] == pytest.approx((8 * count - bytes_held) / 1e9, rel=0.01)
    assert whole["held_gb"] - coded["held_gb"] > 5 * count / 1e9


def test_only_distillations():
    with pytest.raises(ValueError, match=r"mnist_teacher\.gin trains a DenoiserTraining"):
        planned(["gin/mnist_teacher.gin"])
