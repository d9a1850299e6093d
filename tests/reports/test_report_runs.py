"""Several runs in one page: `reports.comparison`, overlaid charts and tools/report.py."""

import base64
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ratiograph.config.differences import ABSENT
from ratiograph.reports.charts import colour_class, overlay_chart
from ratiograph.reports.comparison import labels_of, merged_evaluation, write_comparison
from ratiograph.reports.curves import curves_section
from ratiograph.reports.quality import quality_section
from ratiograph.reports.results import results_table, spread
from ratiograph.reports.run_report import write_report
from test_report import Page, cells, points

TOOL = Path(__file__).resolve().parents[2] / "tools" / "report.py"
METRICS = {
    "fd": {"label": "Fréchet distance", "better": "lower"},
    "fd_error": {"label": "±", "better": None, "of": "fd"},
    "recall": {"label": "recall", "better": "higher"},
}


def evaluation(fd, recall, *, samples=5000, before=30.0, metrics=METRICS):
    rows = [
        {"name": "teacher", "evaluations": 35, "samples": samples, "fd": 3.0, "recall": 0.9},
        {"name": "student before training", "evaluations": 1, "samples": samples, "fd": before, "recall": 0.1},
        {"name": "student", "evaluations": 1, "samples": samples, "fd": fd, "recall": recall, "fd_error": 0.0213}
        | {"highlight": True},
    ]
    return {"rows": rows, "metrics": metrics, "notes": ["of the protocol"]}


def make(folder: Path, *, lam=0.5, steps=100, scale=1.0, batch=64, found=None) -> Path:
    (folder / "samples").mkdir(parents=True)
    (folder / "config.gin").write_text(
        f"Experiment.steps = {steps}\nExperiment.seed = 0\nSBA.lam = {lam}\nDigitsEvaluator.samples = 5000\n"
    )
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(10, 101, 10):
            record = {"step": step, "seconds": 2.0 * step, "images": batch * step, "loss/ratio": scale / step}
            record |= {"rate/steps_per_second": 0.5, "rate/images_per_second": 0.5 * batch, "memory/peak_gb": step / 50}
            record |= {"evaluation/fd": scale * 100 / step} if step % 50 == 0 else {}
            file.write(json.dumps(record) + "\n")
    Image.new("RGB", (20, 20), "red").save(folder / "samples" / "step_00000100.png")
    if found:
        (folder / "evaluation.json").write_text(json.dumps(found))
    return folder


@pytest.fixture
def runs(tmp_path):
    one = make(tmp_path / "one", found=evaluation(3.5, 0.8))
    two = make(tmp_path / "two", lam=3.0, scale=2.0, found=evaluation(3.2, 0.7))
    return [one, two]


def sections(html: str) -> dict[str, str]:
    return dict(re.findall(r"<section><h2>(.*?)</h2>(.*?)</section>", html, re.S))


def compared(runs, tmp_path) -> dict[str, str]:
    html = write_comparison(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    Page(html)
    assert not re.search(r"https?://|url\(|@import|<link|<iframe", html)
    return sections(html)


# -- the page ----------------------------------------------------------------------------------------------------------


def test_results_have_the_best_in_bold_errors_and_the_teacher_once(runs, tmp_path):
    table = compared(runs, tmp_path)["Results"]
    assert cells(table) == [
        ["one", "1", "3.50 ± 0.021", "0.800"],
        ["two", "1", "3.20 ± 0.021", "0.700"],
        ["teacher", "35", "3.00", "0.900"],
        ["student before training", "1", "30.00", "0.100"],
    ]
    assert re.findall(r"<b>(.*?)</b>", table) == ["0.800", "3.20 ± 0.021"]
    assert "5,000 samples in every row" in table


def test_only_parameters_that_differ_are_listed(runs, tmp_path):
    assert cells(compared(runs, tmp_path)["Configuration"]) == [["SBA.lam", "0.5", "3.0"]]
    (runs[1] / "config.gin").write_text((runs[0] / "config.gin").read_text())
    assert "The configurations mean the same." in compared(runs, tmp_path)["Configuration"]


def test_length_speed_and_memory(runs, tmp_path):
    found = cells(compared(runs, tmp_path)["Runs"])
    assert found[0] == ["one", "100", "6,400", "3:20 min", "2.00 s", "32.0", "2.00 GB", ABSENT]


def test_grids_stand_side_by_side_the_teacher_above(runs, tmp_path):
    Image.new("RGB", (20, 20), "blue").save(runs[1] / "samples" / "teacher.png")
    section = compared(runs, tmp_path)["Samples"]
    pictures = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)", section)]
    files = [runs[0] / "samples/step_00000100.png", runs[1] / "samples/teacher.png"]
    assert pictures == [path.read_bytes() for path in (*files, runs[1] / "samples/step_00000100.png")]
    assert "teacher, many evaluations" in section


@pytest.mark.parametrize(
    ("lines", "words"), [("", "from the same noise"), ("Experiment.seed = 1\n", "different noise")]
)
def test_whether_noise_is_shared_is_read_from_the_configurations(runs, tmp_path, lines, words):
    text = (runs[1] / "config.gin").read_text()
    (runs[1] / "config.gin").write_text(text.replace("Experiment.seed = 0\n", "") + (lines or "Experiment.seed = 0\n"))
    assert words in compared(runs, tmp_path)["Samples"]


def test_verdicts_stand_side_by_side(runs, tmp_path):
    lines = [{"step": k, "ratio/mean_exp_student": 1.02, "ratio/mean_exp_real": 3.0} for k in range(100, 400, 100)]
    (runs[1] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = cells(compared(runs, tmp_path)["Can the ratios be trusted?"])
    assert rows[0] == ["one", "no ratio that learns, or not measured"]
    assert rows[1][:3] == ["two", "Doubtful", "fails E_q[e^l] = 1.02; E_p[e^−l] = 3.00"]


def test_a_run_that_has_begun_one_without_evaluation_and_a_torn_line_are_said(runs, tmp_path):
    begun, torn = tmp_path / "begun", tmp_path / "torn"
    begun.mkdir()
    (begun / "config.gin").write_text("Experiment.steps = 100\n")
    make(torn, steps=500)
    path = torn / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"step": 30, ', '{"step": 3', 1) + '{"step": 110, "lo')
    found = compared([*runs, begun, torn], tmp_path)
    assert "begun</b>: This run has just begun" in found["Runs"]
    assert "torn</b>: Not finished: 100 of 500 steps" in found["Runs"]
    assert "Not evaluated: begun, torn." in found["Results"]
    assert "torn</b>: metrics.jsonl:3 is not an object with a step and numbers: skipped." in found["Notes"]
    (torn / "config.gin").unlink()
    assert "torn has no config.gin that can be read" in compared([*runs, torn], tmp_path)["Configuration"]


def test_runs_with_other_metrics_have_empty_cells_and_charts_of_their_own(runs, tmp_path):
    other = make(tmp_path / "other", found=evaluation(1.0, 2.0))
    (other / "evaluation.json").write_text(json.dumps({"rows": [{"name": "student", "samples": 5000, "energy": 0.5}]}))
    (other / "metrics.jsonl").write_text('{"step": 5, "loss/energy": 1.0}\n')
    found = compared([*runs, other], tmp_path)
    rows = {row[0]: row[1:] for row in cells(found["Results"])}
    assert rows["other"] == [ABSENT, ABSENT, ABSENT, "0.500"]
    assert rows["one"] == ["1", "3.50 ± 0.021", "0.800", ABSENT]
    charts = re.findall(r'aria-label="(.*?)"', found["Curves"])
    assert "loss energy of 1 runs: other ends at 1.000" in charts


def test_none_evaluated_is_said(tmp_path):
    runs = [make(tmp_path / name) for name in ("a", "b")]
    assert "None of the runs has been evaluated." in compared(runs, tmp_path)["Results"]


def test_different_protocols_are_warned_of(runs, tmp_path):
    text = (runs[1] / "config.gin").read_text()
    (runs[1] / "config.gin").write_text(text.replace("samples = 5000", "samples = 100"))
    assert "not evaluated alike: DigitsEvaluator.samples differs" in compared(runs, tmp_path)["Results"]


def test_every_text_is_escaped(runs, tmp_path):
    evil = "<script>alert(1)</script>"
    found = evaluation(1.0, 2.0, metrics=METRICS | {"fd": {"label": evil, "better": "lower"}})
    found["notes"] = [evil]
    found["rows"][0]["name"] = evil
    bad = make(tmp_path / "<b>bad", found=found)
    (bad / "config.gin").write_text(f"Experiment.steps = 100\nText.prompt = '{evil}'\n")
    (bad / "metrics.jsonl").write_text(json.dumps({"step": 1, f"loss/{evil}": 1.0, f"evaluation/{evil}": 2.0}) + "\n")
    page = Page(write_comparison([*runs, bad], tmp_path / "page.html").read_text(encoding="utf-8"))
    assert len(page.all("script")) == 1
    assert page.text.count(evil) >= 5


# -- merging -----------------------------------------------------------------------------------------------------------


def test_one_name_for_two_features_becomes_two_metrics():
    other = {**METRICS, "fd": {"label": "Fréchet distance (DINO)", "better": "lower"}}
    main, _ = merged_evaluation({"a": evaluation(3.5, 0.8), "b": evaluation(100.0, 0.9, metrics=other)})
    assert [main["metrics"][key]["label"] for key in ("fd", "fd 2")] == ["Fréchet distance", "Fréchet distance (DINO)"]
    own = {row["name"]: row for row in main["rows"]}
    assert (own["a"]["fd"], own["b"]["fd 2"]) == (3.5, 100.0)
    assert "fd" not in own["b"]
    assert main["metrics"]["fd_error"]["of"] == "fd"


def test_rows_that_differ_between_runs_are_kept_apart():
    main, rest = merged_evaluation({"a": evaluation(3.5, 0.8), "b": evaluation(3.6, 0.8, before=31.0)})
    assert [row["name"] for row in main["rows"]] == ["a", "b", "teacher"]
    assert [(row["name"], row["fd"]) for row in rest["rows"]] == [
        ("a: student before training", 30.0),
        ("b: student before training", 31.0),
    ]


@pytest.mark.parametrize(
    ("values", "samples", "bold"),
    [
        ([2.0, 1.0, 3.0], [5, 5, 5], ["1.00"]),
        ([1.001, 1.002, 3.0], [5, 5, 5], ["1.00", "1.00"]),  # alike as they are written
        ([1.0, 1.0], [5, 5], []),  # nothing to choose
        ([2.0, 1.0], [5, 6], []),  # of different numbers of samples
        ([2.0, None, 1.0], [5, 9, 5], ["1.00"]),
        ([math.inf, 2.0, 3.0], [5, 5, 5], ["2.00"]),
    ],
)
def test_the_best_is_bold_where_there_is_one(values, samples, bold):
    rows = [{"name": "x", "fd": v, "samples": n, "compared": True} for v, n in zip(values, samples, strict=True)] + [
        {"name": "teacher", "fd": 0.1, "samples": 5, "compared": False}
    ]
    table, _ = results_table({"rows": rows, "metrics": METRICS})
    assert re.findall(r"<b>(.*?)</b>", table) == bold


@pytest.mark.parametrize(
    ("error", "text"), [(0.0134, "0.013"), (2.1e-5, "0.000021"), (0.05, "0.050"), (3.7, "3.7"), (1234.0, "1,234")]
)
def test_standard_errors_have_two_digits(error, text):
    assert spread(error) == text


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.000594, 0.000621, 0.0213], ["0.00059", "0.00062", "0.0213"]),  # two digits at least
        ([0.0026, 0.2534, 0.0037], ["0.0026", "0.2534", "0.0037"]),
        ([0.9, 0.8, 0.0004, 0.0], ["0.900", "0.800", "0.00040", "0.000"]),
        ([1, 2500], ["1", "2,500"]),
    ],
)
def test_a_metric_has_the_same_decimals_in_every_row(values, texts):
    table, _ = results_table({"rows": [{"name": "x", "fd": value} for value in values]})
    assert [row[1] for row in cells(table)] == texts


def test_labels_are_the_shortest_ends_that_differ(tmp_path):
    folders = [tmp_path / name for name in ("x/one/run", "y/one/run", "y/two/run", "z")]
    assert labels_of(folders) == ["x/one/run", "y/one/run", "two/run", "z"]
    with pytest.raises(ValueError, match="given twice"):
        labels_of([tmp_path / "a", tmp_path / "b" / ".." / "a"])


# -- curves ------------------------------------------------------------------------------------------------------------


def test_before_the_checks_are_read_none_of_them_passes(runs, tmp_path):
    (runs[1] / "metrics.jsonl").write_text(
        json.dumps({"step": 20, "ratio/mean_exp_student": 1.02, "ratio/mean_exp_real": 1.01}) + "\n"
    )
    rows = cells(compared(runs, tmp_path)["Can the ratios be trusted?"])
    assert rows[1][:3] == ["two", "Too early to say", "not yet E_q[e^l] = 1.02; E_p[e^−l] = 1.01"]


def test_a_run_s_only_value_is_a_dot_where_it_lies():
    curves = {"a": ([0, 10, 20], [1.0, 2.0, 3.0]), "b": ([10], [2.0])}
    page = Page(overlay_chart("", "x", "", curves, {"a": 0, "b": 1}))
    (dot,) = page.all("circle")
    line = next(points(a["d"]) for a in page.all("path") if a["class"] == "curve c0")
    assert dot["class"] == "c1"
    assert (float(dot["cx"]), float(dot["cy"])) == line[1]


def test_an_evaluated_run_s_page_keeps_the_name_of_its_folder(runs):
    html = write_report(runs[0]).read_text()
    name = runs[0].name
    assert re.search(r"<title>(.*?)</title>", html)[1] == name
    title = re.search(r'<p class="eyebrow">(.*?)</p><h1>(.*?)</h1>', html)
    evaluated = json.loads((runs[0] / "evaluation.json").read_text()).get("title")
    assert title.groups() == ((f"ratiograph run {name}", evaluated) if evaluated else ("ratiograph run", name))


def test_each_run_has_its_own_steps_and_its_own_colour():
    curves = {"a": ([0, 10, 20], [1.0, 2.0, 3.0]), "b": ([0, 40], [3.0, 1.0])}
    page = Page(overlay_chart("loss", "ratio", "nats", curves, {"a": 0, "b": 3}))
    drawn = {a["class"]: points(a["d"]) for a in page.all("path")}
    assert set(drawn) == {"curve c0", "curve c3"}
    (x0, y1), (x10, y2), (x20, y3) = drawn["curve c0"]
    (start, b3), (x40, b1) = drawn["curve c3"]
    assert (start, b3, b1) == (x0, y3, y1)  # one pair of axes for both
    assert (x10 - x0, x20 - x0) == (pytest.approx((x40 - x0) / 4, abs=0.1), pytest.approx((x40 - x0) / 2, abs=0.1))
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.1)
    assert "nats" in page.text
    assert "training steps" in page.text


def test_under_the_pointer_is_the_nearest_logged_value_and_nothing_beyond_a_run_s_end():
    curves = {"a": ([0, 10, 20], [1.0, 2.0, 3.0]), "b": ([4, 40], [5.0, math.nan])}
    page = Page(overlay_chart("", "x", "", curves, {"a": 0, "b": 1}))
    data = json.loads(page.all("figure")[0]["data-chart"])
    assert data["steps"] == [0, 4, 10, 20, 40]
    assert data["series"] == [["1.000", "1.000", "2.000", "3.000", "–"], ["–", "5.000", "5.000", "5.000", "nan"]]
    assert "gaps in b" in page.text


def test_values_that_span_decades_in_any_run_take_a_logarithmic_axis():
    curves = {"a": (range(3), [1.0, 1.1, 1.2]), "b": (range(3), [30.0, 31.0, 32.0])}
    assert "log scale" in overlay_chart("", "x", "", curves, {"a": 0, "b": 1})
    assert "log scale" not in overlay_chart("", "x", "", {"a": curves["a"]}, {"a": 0})


def test_many_runs_differ_in_colour_or_dashes():
    assert len({colour_class(index) for index in range(18)}) == 18


def test_raw_values_are_drawn_for_few_runs_only():
    noisy = (range(40), list(np.sin(np.arange(40.0))))
    for runs, raw in ((3, 3), (4, 0)):
        names = {str(index): index for index in range(runs)}
        page = Page(overlay_chart("", "x", "", dict.fromkeys(names, noisy), names))
        assert len([a for a in page.all("path") if a["class"].startswith("raw")]) == raw


def test_runs_of_other_batches_are_compared_at_equal_images():
    def records(batch):
        return [{"step": k, "images": batch * k, "loss/a": 1.0, "evaluation/fd": 2.0} for k in (10, 20)]

    for other, where, last in ((64, "step #", 20), (128, "# images", 2560)):
        runs = {"a": records(64), "b": records(other)}
        for section in (curves_section(runs), quality_section(runs, {"fd": {"label": "Fréchet distance"}})):
            data = json.loads(Page(section).all("figure")[0]["data-chart"])
            assert (data["where"], data["steps"][-1]) == (where, last)


# -- one run's page ----------------------------------------------------------------------------------------------------


def test_one_run_s_page_says_how_far_it_is_and_what_was_skipped(tmp_path):
    run = make(tmp_path / "run", steps=400)
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"step": 30, ', '{"step": 3', 1))
    html = write_report(run).read_text(encoding="utf-8")
    words = " ".join(Page(html).text.split())
    assert "steps 100 of 400" in words
    assert "Not finished: 100 of 400 steps." in words
    assert "metrics.jsonl:3 is not an object with a step and numbers: skipped." in words
    (run / "metrics.jsonl").unlink()
    assert "This run has just begun" in write_report(run).read_text(encoding="utf-8")


def test_one_run_s_page_shows_the_teacher_above_its_last_grid(tmp_path):
    run = make(tmp_path / "run")
    Image.new("RGB", (20, 20), "blue").save(run / "samples" / "teacher.png")
    section = sections(write_report(run).read_text(encoding="utf-8"))["Samples over training"]
    pair = re.search(r'<div class="pair">(.*?)</div>', section, re.S)[1]
    assert re.findall(r'alt="(.*?)"', pair) == ["samples of the teacher", "samples of the last step"]


# -- the tool ----------------------------------------------------------------------------------------------------------


def tool(*arguments, folder):
    done = subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, cwd=folder)
    return done.returncode, done.stdout.strip(), done.stderr


def test_the_tool_writes_one_page_for_several_runs(runs, tmp_path):
    assert tool(*runs, folder=tmp_path)[:2] == (0, "comparison.html")
    assert "2 runs compared" in (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert tool(runs[0], "--out=one.html", folder=tmp_path)[:2] == (0, "one.html")
    assert (tmp_path / "one.html").exists()
    assert not (runs[0] / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no run: give the folder of one"),
        (["one", "absent"], "no run at absent"),
        (["one", "empty"], "empty is not the folder of a run: it has no config.gin, metrics.jsonl or evaluation.json"),
        (["one", "one/"], "given twice"),
        (["one", "two", "--out=empty"], "--out=empty is a folder"),
        (["one", "broken"], "broken/evaluation.json is no JSON"),
        (["one", "odd"], "odd/evaluation.json lacks or misuses a field (KeyError: 'name')"),
    ],
)
def test_the_tool_names_a_mistake_in_one_line(runs, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    for name, text in (("broken", "{"), ("odd", '{"rows": [{"fd": 1}]}')):
        make(tmp_path / name)
        (tmp_path / name / "evaluation.json").write_text(text)
    code, out, error = tool(*arguments, folder=tmp_path)
    assert (code, out, error.count("\n")) == (1, "", 1)
    assert error.startswith("error: ")
    assert message in error
