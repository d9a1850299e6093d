"""Timing in turn, records, the bare networks' settings, and a step's floor: the passes that it needs, as often."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import network, timing
from benchmarks.inputs import randomised
from benchmarks.network import SETTINGS, Setting, bench_network
from benchmarks.step import StepBench, bench_precisions, bench_step
from ratiograph.algebra.ratio_losses import LogisticLoss, R1Penalized
from ratiograph.networks.architectures.unet import UNet
from ratiograph.networks.ratios import EncoderRatio, StudentScoreHeadRatio
from test_distillation import adversarial, matching, task_of
from tools_here import call, tool

CPU = torch.device("cpu")


def test_variants_run_in_turn_and_the_first_round_is_not_counted():
    order = []
    seconds = timing.in_turn({name: lambda n=name: order.append(n) for name in "abc"}, 3, CPU)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert timing.medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}


def test_flops_of_a_product():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert timing.count_flops(lambda: a @ b) == 2 * 3 * 5 * 7


def test_records_are_lines_with_date_and_hardware(tmp_path):
    for k in range(2):
        timing.append_record(tmp_path / "b" / "results.jsonl", {"k": k}, CPU)
    lines = [json.loads(line) for line in (tmp_path / "b" / "results.jsonl").read_text().splitlines()]
    assert [line["k"] for line in lines] == [0, 1]
    assert lines[0]["hardware"]["torch"] == torch.__version__
    assert lines[0]["date"].count("-") == 2
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(timing.__file__).parent
    )
    assert head.stdout.startswith(str(lines[0]["revision"]).rstrip("+")) or head.returncode


def test_records_by_date_and_revision(tmp_path):
    path = tmp_path / "results.jsonl"
    dated = [
        {"date": "2026-01-02", "revision": "abc+"},
        {"date": "2026-02-02", "revision": None},
        {"date": "2027-01-01"},
    ]
    path.write_text("".join(json.dumps(each) + "\n" for each in dated))
    assert timing.read_records(path) == dated
    assert timing.read_records(path, "2026") == dated[:2]
    assert timing.read_records(path, "abc") == dated[:1]
    for start, text, message in [("x", None, "no record of a date"), ("", "[1]\n", "line 1"), ("", "{\n", "line 1")]:
        path.write_text(text or path.read_text())
        with pytest.raises(ValueError, match=message):
            timing.read_records(path, start)
    with pytest.raises(ValueError, match=r"no records at .*none"):
        timing.read_records(tmp_path / "none")


def test_the_error_of_a_median():
    """Against the spread of medians of many samples; one slow round does not count."""
    torch.manual_seed(0)
    rounds = 10 + torch.randn(4000, 101)
    found = torch.tensor([timing.standard_error(row) for row in rounds[:200].tolist()])
    expected = rounds.median(1).values.std() / 10
    assert abs(found.mean() / expected - 1) < 0.1
    assert timing.standard_error([1.0, 1.0, 1.0, 1.0, 50.0]) == 0
    assert timing.standard_error([1.0, 2.0]) is None


SMALL = {"sizes": {"resolution": 8, "channels": 16}, "batch_size": 2, "rounds": 3, "device": CPU}


def test_a_network_s_settings():
    record = bench_network("UNet", settings=["fp32, channels-last", "bf16"], **SMALL)
    rows = {row["variant"]: row for row in record["rows"]}
    assert list(rows) == ["fp32", "fp32, channels-last", "bf16"]
    assert (rows["fp32"]["relative_difference"], rows["fp32"]["faster"]) == (0, 1)
    assert rows["fp32, channels-last"]["relative_difference"] < 1e-5
    assert 1e-4 < rows["bf16"]["relative_difference"] < 0.05
    network = UNet(resolution=8, channels=16)
    assert record["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    assert {name: len(values) for name, values in record["rounds_seconds"].items()} == dict.fromkeys(rows, 3)
    assert rows["bf16"]["tflops"] == pytest.approx(record["flops"] / rows["bf16"]["seconds"] / 1e12)


def test_settings_are_free_combinations():
    read = {name: Setting.parse(name) for name in SETTINGS}
    assert [str(setting) for setting in read.values()] == list(read)
    assert len(set(read.values())) == 2**3
    assert read["fp32, channels-last, compiled"] == Setting(last=True, compiled=True)
    assert read["bf16, channels-last"] == Setting(last=True, bf16=True)
    assert Setting.parse(" compiled,bf16") == read["bf16, compiled"]


def test_a_setting_given_twice_runs_once(monkeypatch):
    compiled = []
    monkeypatch.setattr(network.compilation, "compile_blocks", compiled.append)
    settings = ["compiled, channels-last, fp32", "fp32", "fp32, channels-last,compiled"]
    record = bench_network("UNet", settings=settings, **SMALL)
    assert [row["variant"] for row in record["rows"]] == ["fp32", "fp32, channels-last, compiled"]
    formats = [network.stem.weight.is_contiguous(memory_format=torch.channels_last) for network in compiled]
    assert formats == [False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"settings": ["bf16", "fp8, compiled"]},
            "--settings: 'fp8, compiled' is no setting: write fp32 or bf16, then channels-last, compiled or both where "
            "wanted, as in 'bf16, channels-last, compiled'; ';' goes between settings",
        ),
        ({"settings": ["compiled"]}, "'compiled' is no setting: write fp32 or bf16"),
        ({"settings": ["fp32, bf16"]}, "'fp32, bf16' is no setting"),
        ({"settings": ["fp32, compiled, compiled"]}, "'fp32, compiled, compiled' is no setting"),
        ({"settings": [""]}, "'' is no setting"),
        ({"name": "VGG"}, "--network=VGG: choose one of DDPMPP"),
        ({"sizes": {"chanels": 8}}, "--network=UNet: .*chanels"),
        ({"sizes": {"channels": 65536}}, "GB are left: close other programs"),
    ],
)
def test_networks_that_cannot_be_timed(changes, message):
    with pytest.raises(ValueError, match=message):
        bench_network(**{"name": "UNet", "settings": []} | SMALL | changes)


TINY = {"gin_file": ["gin/mnist_js.gin"], "gin_param": ["UNet.channels = 16"], "batch_size": 2, "rounds": 3}


def test_a_step_s_record():
    record = bench_step(**TINY, precision="fp32", device=CPU)
    floor = sum(row["times"] * row["seconds"] for row in record["passes"])
    assert record["floor"] == pytest.approx(floor)
    assert record["step_over_floor"] == pytest.approx(record["seconds"] / floor)
    assert record["images_per_second"] == pytest.approx(2 / record["seconds"])
    assert set(record["rounds_seconds"]) == {"step", "unit", *(row["pass"] for row in record["passes"])}
    assert {name: record[name] for name in TINY} == TINY
    assert record["precision"] == "fp32"
    assert record["peak_memory_gb"] > 0.1


def test_the_same_step_in_both_precisions():
    record = bench_precisions(**TINY, device=CPU)
    fp32, bf16 = record["rows"]
    assert (fp32["variant"], bf16["variant"], fp32["faster"]) == ("fp32", "bf16", 1)
    assert bf16["faster"] == pytest.approx(fp32["seconds"] / bf16["seconds"])


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
                "ratio, penalised": 4,
            },
        ),
        (
            ["matching", "adversarial"],
            {
                "student_score_updates": 4,
                "ratio_updates": 4,
                "fresh_samples": False,
                "ratio_loss": R1Penalized(loss=LogisticLoss(), every=4),
            },
            {
                "student, forward and backward": 1,
                "teacher, forward": 1,
                "student score, forward": 1,
                "student score, forward and backward": 4,
                "ratio, penalised": 1,
                "ratio, forward and backward": 3,
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
    least = sum(times * timing.count_flops(run) for times, run in floor.values())
    whole = timing.count_flops(bench.step)
    assert 0.97 * whole <= least <= whole
    assert all(parameter.grad is None for parameter in task.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "error: say what to do, network, step, precisions, data, scaling, plan, compare, table, gpu (not nothing)",
        ),
        (["network", "--network=VGG"], "error: --network=VGG: choose one of DDPMPP, NCSNPP, ADM, UNet"),
        (["network", "--size=channels"], "error: --size=channels: write an argument and its value"),
        (["compare", "one.jsonl"], "error: compare takes 2 names beside flags, not 1"),
        (["compare", "a.jsonl", "b.jsonl"], "error: no records at a.jsonl"),
        (["table", "--out=nowhere.jsonl"], "error: no records at nowhere.jsonl"),
        (["data", "--gin_file=gin/mixture2d_scores.gin"], "error: say whose data to time"),
        (["step"], "error: say which step to time: --gin_file="),
        (["step", "--gin_file=gin/mnist_teacher.gin"], "error: gin/mnist_teacher.gin trains a DenoiserTraining"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    with tool("bench") as bench:
        assert call(bench, *arguments) == 1
    assert capsys.readouterr().err.startswith(message)
