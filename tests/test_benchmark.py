"""Timing in turn, and a step's floor: the right passes, as often as the step needs them."""

from __future__ import annotations

import json

import pytest
import torch
from absl import flags
from test_distillation import adversarial, matching, task_of
from tools_here import tool

from ratiograph import benchmark
from ratiograph.benchmark_step import StepBench, randomised
from ratiograph.networks import UNet
from ratiograph.ratio_losses import LogisticLoss, R1Penalized
from ratiograph.ratios import EncoderRatio, StudentScoreHeadRatio

CPU = torch.device("cpu")


def test_variants_run_in_turn_and_the_first_round_is_not_counted():
    order = []
    seconds = benchmark.in_turn({name: lambda n=name: order.append(n) for name in "abc"}, 3, CPU)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert benchmark.medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}


def test_flops_of_a_product():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert benchmark.count_flops(lambda: a @ b) == 2 * 3 * 5 * 7


def test_records_are_lines_with_date_and_hardware(tmp_path):
    for k in range(2):
        benchmark.append_record(tmp_path / "b" / "results.jsonl", {"k": k}, CPU)
    lines = [json.loads(line) for line in (tmp_path / "b" / "results.jsonl").read_text().splitlines()]
    assert [line["k"] for line in lines] == [0, 1]
    assert lines[0]["hardware"]["torch"] == torch.__version__
    assert lines[0]["date"].count("-") == 2


TERMS = {"matching": matching, "adversarial": adversarial}
ENCODER = UNet(resolution=8, channels=16, multipliers=(1, 2))


@pytest.mark.parametrize(
    ("terms", "changes", "passes"),
    [
        (
            ["matching", "adversarial"],
            {},
            {
                "student, forward and backward": 1,
                "teacher, forward": 1,
                "student score, forward": 1,
                "student score, forward and backward": 1,
                "ratio, forward and backward": 1,
            },
        ),
        (
            ["matching", "adversarial"],
            {"student_score_updates": 4, "ratio_updates": 4, "ratio_loss": R1Penalized(loss=LogisticLoss())},
            {
                "student, forward and backward": 1,
                "student, forward": 3,
                "teacher, forward": 1,
                "student score, forward": 1,
                "student score, forward and backward": 4,
                "ratio, forward and backward": 4,
            },
        ),
        (
            ["adversarial"],
            {"student_score": None, "teacher": None, "ratio": EncoderRatio(network=ENCODER)},
            {
                "student, forward and backward": 1,
                "ratio, forward and backward to x_t": 1,
                "ratio, forward and backward": 1,
            },
        ),
        (
            ["matching", "adversarial"],
            {"ratio": StudentScoreHeadRatio(width=16), "ratio_times": None},
            {
                "student, forward and backward": 1,
                "teacher, forward": 1,
                "student score, forward": 1,
                "student score, forward and backward": 1,
                "ratio, forward and backward": 1,
            },
        ),
    ],
)
def test_the_floor_is_the_passes_that_the_step_makes(terms, changes, passes):
    """And makes them at no more than the step's own floating-point operations."""
    task = randomised(task_of({name: TERMS[name]() for name in terms}, **changes))
    task.prepare(CPU, None)
    bench = StepBench(task, 4, CPU)
    floor = bench.floor()
    assert {name: times for name, (times, _) in floor.items()} == passes
    least = sum(times * benchmark.count_flops(run) for times, run in floor.values())
    whole = benchmark.count_flops(bench.step)
    assert 0.97 * whole <= least <= whole
    assert all(parameter.grad is None for parameter in task.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: say what to time, network, step, scaling (not nothing)"),
        (["network", "--network=VGG"], "error: --network=VGG: choose one of DDPMPP, NCSNPP, ADM, UNet"),
        (["step"], "error: say which step to time: --gin_file="),
        (["step", "--gin_file=gin/mnist_teacher.gin"], "error: gin/mnist_teacher.gin trains a DenoiserTraining"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    with tool("bench") as bench:
        flags.FLAGS(["bench", *arguments])
        with pytest.raises(SystemExit) as stop:
            bench.main(["bench", *[a for a in arguments if not a.startswith("--")]])
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith(message)
