"""The table of results from records, and the suite that makes them: what it runs, leaves out and survives."""

from __future__ import annotations

import json

import pytest
from absl import flags

from benchmarks import suite
from benchmarks.commands import MEASUREMENTS
from benchmarks.results_table import COLUMNS, CONFIGURATIONS, render
from benchmarks.suite import Measurement, plans, run, steps
from ratiograph import config
from tools_here import call, tool

HARDWARE = {"device": "EPYC", "threads": 2, "instructions": ["avx2"]}
DIJS = {"gin_file": ["gin/papers/score_free/cifar10_dijs.gin"], "gin_param": []}
PLAN = DIJS | {
    "bench": "plan", "batch_size": 4, "precision": "fp32", "hardware": HARDWARE, "planned_memory_gb": 1.5,
    "flops": 8e11, "parameters": {"student": 55_733_891, "ratio": 5},
}  # fmt: skip
STEP = DIJS | {
    "bench": "step", "batch_size": 4, "precision": "fp32", "hardware": HARDWARE, "seconds": 4.0,
    "step_over_floor": 1.012, "tflops": 0.2, "peak_memory_gb": 1.9,
}  # fmt: skip
DATA = DIJS | {"bench": "data", "hardware": HARDWARE, "wait_share": 0.0123, "batch_size": 4}


def rows(records, name="CIFAR-10 DDPM++, DiJS"):
    """The rows of one configuration."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in render(records).splitlines()]
    assert lines[0] == list(COLUMNS)
    found = [line for line in lines[2:] if len(line) == len(COLUMNS)]
    assert len(found) == len(lines) - 2
    names = [row[0] for row in found]
    if name not in names:
        return []
    first = names.index(name)
    after = next((k for k in range(first + 1, len(names)) if names[k]), len(names))
    return found[first:after]


def test_a_row_s_numbers():
    assert rows([PLAN, STEP, DATA]) == [
        [
            "CIFAR-10 DDPM++, DiJS",
            "55.7 M",
            "0.2",
            "EPYC, 2 threads fp32",
            "4",
            "4",
            "1.01",
            "0.2",
            "1.2 %",
            "1.90",
            "1.50",
        ]
    ]


def test_a_plan_alone_and_nothing_at_all():
    assert rows([PLAN]) == [["CIFAR-10 DDPM++, DiJS", "55.7 M", "0.2", "–", "4", *5 * [""], "1.50, fp32"]]
    assert rows([]) == []


def test_the_last_of_each_place_precision_and_batch():
    records = [PLAN, STEP, STEP | {"seconds": 3.0}, STEP | {"precision": "bf16", "seconds": 2.0}]
    found = rows(records)
    assert [(row[3], row[5], row[-1]) for row in found] == [
        ("EPYC, 2 threads fp32", "3", "1.50"), ("EPYC, 2 threads bf16", "2", ""),
    ]  # fmt: skip
    assert found[1][:3] == ["", "", ""]


def test_adapters_have_rows_of_their_own():
    base, adapters = "gin/sd15_di_bregman.gin", "gin/base/sd15_lora.gin"
    whole, lora = (STEP | {"gin_file": files, "seconds": s} for files, s in (([base], 9.0), ([base, adapters], 5.0)))
    assert [row[5] for row in rows([whole, lora], "SD 1.5 512², Di-Bregman")] == ["9"]
    assert [row[5] for row in rows([whole, lora], "SD 1.5 512², LoRA of rank 64")] == ["5"]


def test_a_step_taken_once_has_no_floor_and_its_plan_s_operations():
    alone = STEP | {"seconds": 160.0, "step_over_floor": None, "tflops": None}
    assert [row[5:8] for row in rows([alone])] == [["160", "", ""]]
    assert [row[5:8] for row in rows([PLAN | {"gin_param": []}, alone])] == [["160", "", "0.005"]]


def test_the_wait_of_a_network_made_small_is_not_the_configuration_s():
    small = DATA | {"gin_param": ["DDPMPP.channels = 16"], "wait_share": 0.5}
    assert [row[8] for row in rows([STEP, DATA, small])] == ["1.2 %"]
    assert [row[8] for row in rows([STEP, small])] == [""]


def test_between_the_markers(tmp_path, capsys):
    page, records = tmp_path / "RESULTS.md", tmp_path / "records.jsonl"
    records.write_text(json.dumps(STEP | {"date": "2026-12-01"}) + "\n")
    page.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    with tool("bench") as bench:
        assert call(bench, "table", f"--out={records}", f"--page={page}") == 0
        table = capsys.readouterr().out
        assert page.read_text() == f"before\n<!-- bench -->\n{table}<!-- /bench -->\nafter\n"
        page.write_text("no markers")
        assert call(bench, "table", f"--out={records}", f"--page={page}") == 1
    told = "write the lines <!-- bench --> and <!-- /bench --> where it belongs"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("tiny", [False, True])
def test_what_the_suite_asks_parses(tiny):
    """Every gin file and line that it names, and every flag."""
    asked = steps(tiny) + plans("fp32")
    named = {argument for each in asked for argument in each.arguments if argument.startswith("--gin_file=")}
    assert named == {f"--gin_file={file}" for each in CONFIGURATIONS for file in each.files}
    with tool("bench"):
        for each in asked:
            assert each.arguments[0] in MEASUREMENTS
            flags.FLAGS.unparse_flags()
            flags.FLAGS(["bench", *each.arguments[1:]])
            if flags.FLAGS.gin_file:
                config.parse(flags.FLAGS.gin_file, flags.FLAGS.gin_param)
            flags.FLAGS.gin_file, flags.FLAGS.gin_param = [], []


def test_the_suite_goes_on_after_failures_and_ends_in_time(tmp_path, monkeypatch):
    script = tmp_path / "bench.py"
    script.write_text(
        "import sys, time\n"
        "if 'fail' in sys.argv: sys.exit('error: no memory')\n"
        "time.sleep(60 if 'sleep' in sys.argv else 0); print('did', *sys.argv[1:])"
    )
    monkeypatch.setattr(suite, "TOOL", script)
    said = []
    wanted = [
        Measurement(("fail",), 0),
        Measurement(("step",), 0),
        Measurement(("long",), 1e4),
        Measurement(("sleep",), 0),
    ]
    counts = run(wanted, minutes=0.1, common=["--device=cpu"], say=said.append)
    assert counts == {"done": 1, "failed": 2, "left out": 1}
    assert "failed: error: no memory" in said
    assert "did step --device=cpu" in said
    assert any(line.startswith("left out") and line.endswith("long") for line in said)
    assert said[-1] == "failed: the time is up"


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CONFIGURATIONS)))
def test_each_tiny_step_of_the_suite_on_the_cpu(number, tmp_path):
    pytest.importorskip("diffusers")
    out = tmp_path / "results.jsonl"
    files = [f"--gin_file={file}" for file in CONFIGURATIONS[number].files]
    if "--gin_file=gin/base/adam_8bit.gin" in files:
        pytest.importorskip("torchao")
    wanted = [each for each in steps(tiny=True) if [a for a in each.arguments if a.startswith("--gin_file")] == files]
    said = []
    counts = run(wanted[:1], minutes=10, common=["--device=cpu", f"--out={out}", "--rounds=1"], say=said.append)
    assert counts["done"] == 1, said
    (record,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert record["bench"] == "step"
    assert record["seconds"] > 0
