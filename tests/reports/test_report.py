"""report.py and its charts: the page says what the files say, whatever is missing, and needs nothing else."""

import base64
import json
import math
import re
import struct
import subprocess
import sys
import zlib
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ratiograph.reports import axes
from ratiograph.reports.axes import Axis, log_ticks, nice_ticks, smooth, tick_label
from ratiograph.reports.charts import line_chart
from ratiograph.reports.results import bar_chart, mini_bars
from ratiograph.reports.run_report import write_report
from ratiograph.training.logs import make_grid

VOID = {"meta", "img", "br", "wbr", "hr", "link", "input"}
SELF_CLOSED = {"path", "line", "rect"}


class Page(HTMLParser):
    """Parses strictly: every element is closed in order. Keeps elements with attributes, and the visible text."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(html.replace("<wbr>", ""))
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID | SELF_CLOSED:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in SELF_CLOSED:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text += data + " "

    def all(self, tag, **attributes):
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in attributes.items())]


def cells(html: str) -> list[list[str]]:
    """Texts of the cells of the first table's body, row by row."""
    body = re.search(r"<tbody>(.*?)</tbody>", html, re.S)[1]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", body, re.S)
    return [
        [unescape(re.sub(r"<[^>]+>", "", c)) for c in re.findall(r"<t[hd](?: [^>]*)?>(.*?)</t[hd]>", r, re.S)]
        for r in rows
    ]


def points(path_data: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path_data)]


EVALUATION = {
    "title": "Digits & <one> step",
    "rows": [
        {"name": "real against real", "evaluations": 0, "samples": 5000, "frechet": 0.52, "confidence": 0.98},
        {"name": "teacher", "evaluations": 35, "samples": 5000, "frechet": 3.456, "confidence": 0.9612},
        {"name": "student before", "evaluations": 1, "samples": 5000, "frechet": 1234.5, "confidence": None},
        {"name": "student", "evaluations": 1, "samples": 5000, "frechet": 4.0, "confidence": 0.97, "highlight": True},
    ],
    "metrics": {
        "frechet": {"label": "Fréchet distance", "better": "lower"},
        "confidence": {"label": "confidence", "better": None},
    },
    "histograms": {
        "labels": ["0", "1"],
        "series": [{"name": "p", "values": [0.5, 0.5]}, {"name": "p*", "values": [0.8, 0.2]}],
    },
    "figures": [{"file": "figures/density.png", "caption": "density"}],
    "notes": ["a note <b>not bold</b>"],
}


@pytest.fixture
def workdir(tmp_path) -> Path:
    folder = tmp_path / "mnist_sba"
    for name in ("samples", "figures"):
        (folder / name).mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for step in range(0, 2001, 100):
        images = torch.rand(4, 1, 8, 8, generator=generator) * 2 - 1
        Image.fromarray(make_grid(images, 2)).save(folder / "samples" / f"step_{step:08d}.png")
    Image.new("RGB", (20, 10)).save(folder / "figures" / "density.png")
    lines = [
        {
            "step": k,
            "seconds": k * 0.15,
            "images": 128 * k,
            "loss/ratio": 0.7 - k / 1e4,
            "field/gan": math.exp(-k / 200),
        }
        for k in range(5, 2001, 5)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 20')
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    (folder / "config.gin").write_text("experiment.steps = 2000\nText.prompt = '</pre><script>alert(1)</script>'\n")
    (folder / "graph.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>')
    return folder


def test_page_is_well_formed_and_needs_nothing_outside(workdir):
    path = write_report(workdir)
    assert path == workdir / "report.html"
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    addresses = [value for _, a in page.elements for key, value in a.items() if key in ("src", "href", "xlink:href")]
    assert len(addresses) == 8  # 6 grids, a figure, the graph
    assert all(address.startswith("data:image/") for address in addresses)
    assert not re.search(r"https?://|url\(|@import", html)


def test_table_rounds_a_column_alike_and_marks_what_is_missing(workdir):
    html = write_report(workdir).read_text(encoding="utf-8")
    assert cells(html) == [
        ["real against real", "–", "0.52", "0.980"],
        ["teacher", "35", "3.46", "0.961"],
        ["student before", "1", "1,234.50", "–"],
        ["student", "1", "4.00", "0.970"],
    ]
    assert "5,000 samples in every row." in html
    assert re.search(r'<tr class="highlight"><th scope="row">student</th>', html)
    assert html.index("Fréchet distance") < html.index("lower is better")
    assert "higher is better" not in html


def test_many_metrics_stand_below_one_another_and_truth_values_are_words(workdir):
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    names = [f"m{k}" for k in range(6)]
    for index, row in enumerate(evaluation["rows"]):
        row |= dict.fromkeys(names, index + 0.5) | {"collapsed": index == 2}
    (workdir / "evaluation.json").write_text(json.dumps(evaluation))
    html = write_report(workdir).read_text(encoding="utf-8")
    found = {row[0]: row[1:] for row in cells(html)}
    assert found["network evaluations"] == ["–", "35", "1", "1"]
    assert found["Fréchet distance lower is better"] == ["0.52", "3.46", "1,234.50", "4.00"]
    assert found["collapsed"] == ["no", "no", "yes", "no"]
    assert found["m3"] == ["0.50", "1.50", "2.50", "3.50"]
    heads = re.search(r"<thead>(.*?)</thead>", html)[1]
    assert re.findall(r"<th([^>]*)>([^<]+)</th>", heads)[-1] == (' scope="col" class="highlight"', "student")
    assert html.count('<td class="highlight">') == len(found)


def test_header_sums_up_the_run(workdir):
    page = Page(write_report(workdir).read_text(encoding="utf-8"))
    words = " ".join(page.text.split())
    assert "steps 2,000 training images 256,000 training time 5:00 min steps per second 6.67" in words


def test_every_text_is_escaped(workdir):
    evil = "<script>alert('x')</script>\"&"
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    evaluation |= {"title": evil, "notes": [evil]}
    evaluation["rows"][0]["name"] = evil
    evaluation["metrics"]["frechet"]["label"] = evil
    evaluation["histograms"] |= {"labels": [evil, "1"], "title": evil}
    evaluation["histograms"]["series"][0]["name"] = evil
    evaluation["figures"][0]["caption"] = evil
    (workdir / "evaluation.json").write_text(json.dumps(evaluation))
    (workdir / "metrics.jsonl").write_text(json.dumps({"step": 1, f"loss/{evil}": 1.0, f"{evil}/a": 2.0}))
    page = Page(write_report(workdir).read_text(encoding="utf-8"))
    assert len(page.all("script")) == 1
    assert page.text.count("<script>alert('x')</script>\"&") >= 10
    assert "</pre><script>alert(1)</script>" in page.text


def test_pictures_are_the_files_and_the_first_and_last_grid_are_shown(workdir):
    page = Page(write_report(workdir).read_text(encoding="utf-8"))
    shown = {a["alt"]: base64.b64decode(a["src"].partition("base64,")[2]) for a in page.all("img")}
    for step in (0, 400, 800, 1200, 1600, 2000):
        assert shown[f"samples at step {step}"] == (workdir / "samples" / f"step_{step:08d}.png").read_bytes()
    assert shown["density"] == (workdir / "figures" / "density.png").read_bytes()
    assert shown["component graph of the run"] == (workdir / "graph.svg").read_bytes()


@pytest.mark.parametrize("grids", [1, 2, 5, 6, 7, 8, 40])
def test_choice_of_grids(tmp_path, grids):
    (tmp_path / "samples").mkdir()
    for step in range(grids):
        Image.new("RGB", (4, 4)).save(tmp_path / "samples" / f"step_{step * 10:08d}.png")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    steps = [int(a["alt"].rpartition(" ")[2]) for a in page.all("img")]
    assert len(steps) == min(grids, 6)
    assert (steps[0], steps[-1]) == (0, 10 * (grids - 1))
    assert steps == sorted(set(steps))


def test_pictures_outside_the_run_are_not_taken_in(workdir):
    secret = workdir.parent / "secret.png"
    Image.new("RGB", (3, 3), "red").save(secret)
    figures = [{"file": "../secret.png"}, {"file": str(secret)}, {"file": "config.gin"}, {"file": "figures/none.png"}]
    (workdir / "evaluation.json").write_text(json.dumps({"figures": figures}))
    page = Page(write_report(workdir).read_text(encoding="utf-8"))
    assert page.text.count("cannot be shown: it is no picture in the run's folder") == 4
    assert base64.b64encode(secret.read_bytes()).decode() not in str(page.elements)


@pytest.mark.parametrize(
    "missing", ["metrics.jsonl", "evaluation.json", "config.gin", "graph.svg", "samples", "figures/density.png"]
)
def test_a_missing_file_costs_its_own_section_only(workdir, missing):
    path = workdir / missing
    if path.is_dir():
        path = path.rename(workdir / "elsewhere")
    else:
        path.unlink()
    headings = {
        "metrics.jsonl": ["Curves"],
        "evaluation.json": ["Results", "Classes", "Figures", "Notes"],
        "config.gin": ["Configuration"],
        "graph.svg": ["Graph"],
        "samples": ["Samples over training"],
        "figures/density.png": [],
    }
    html = write_report(workdir).read_text(encoding="utf-8")
    Page(html)
    gone = headings.pop(missing)
    assert not [heading for heading in gone if f"<h2>{heading}</h2>" in html]
    assert all(f"<h2>{heading}</h2>" in html for others in headings.values() for heading in others)


def test_an_empty_folder_gives_a_page_that_says_so(tmp_path):
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "Nothing has been measured here yet." in page.text
    with pytest.raises(FileNotFoundError, match="no run at"):
        write_report(tmp_path / "absent")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "holds a list, not an object"),
        ("[" * 100_000, "nested too deep"),
        ('{"rows": {"name": "a"}}', "rows is a dict"),
        ('{"rows": [{"name": "a", "samples": "many"}]}', "samples of a row is a str"),
        ('{"rows": [{"name": "a", "fd": 1' + "0" * 400 + "}]}", "fd of a row is too large"),
        ('{"metrics": {"fd": []}}', "metrics.fd is a list"),
        ('{"notes": 5}', "notes is a int"),
        ('{"rows": [{"evaluations": 1}]}', "lacks or misuses a field .*name"),
        ('{"histograms": {"labels": ["0"], "series": [{"name": "p", "values": [1, 2]}]}}', "2 values for 1 labels"),
    ],
)
def test_a_wrong_evaluation_is_a_clear_error_and_the_old_page_stays(workdir, text, message):
    before = write_report(workdir).read_bytes()
    (workdir / "evaluation.json").write_text(text)
    with pytest.raises(ValueError, match=rf"evaluation\.json.*{message}"):
        write_report(workdir)
    assert (workdir / "report.html").read_bytes() == before


def test_a_torn_drawing_is_named(workdir):
    (workdir / "graph.svg").write_text("<svg><g></svg>")
    assert "graph.svg cannot be shown: it is not a drawing" in write_report(workdir).read_text(encoding="utf-8")


def claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims so many pixels."""
    data = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", data), (b"IDAT", b"torn"))
    parts = [
        struct.pack(">I", len(one)) + name + one + struct.pack(">I", zlib.crc32(name + one)) for name, one in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    "name", ["samples/teacher.png", "samples/step_00000000.png", "figures/density.png", "graph.svg"]
)
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (claiming(60_000, 60_000), "pixels"),
        (claiming(4, 4), "cannot be decoded"),
        (b"<?xml version='1.0' encoding='bogus'?><svg/>", "not a drawing"),
        (b"<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>", "defines entities"),
        (None, "no picture in the run"),
    ],
)
def test_a_picture_that_cannot_be_shown_is_a_sentence(workdir, name, content, reason):
    path = workdir / name
    path.unlink(missing_ok=True)
    if content is None:
        path.symlink_to("/etc/passwd")
    else:
        path.write_bytes(content)
    text = Page(write_report(workdir).read_text(encoding="utf-8")).text
    drawing = content is not None and content.startswith(b"<")
    told = reason if content is None or drawing == name.endswith("svg") else ""
    assert f"{name} cannot be shown: " in text
    assert told in text


def test_tool_writes_the_page_and_reports_mistakes_in_one_line(workdir):
    tool = Path(__file__).resolve().parents[2] / "tools" / "report.py"
    done = subprocess.run([sys.executable, tool, workdir], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, str(workdir / "report.html"))
    Page((workdir / "report.html").read_text(encoding="utf-8"))
    done = subprocess.run([sys.executable, tool, workdir / "absent"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "no run at" in done.stderr


# -- charts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", [False, True])
def test_curves_lie_where_the_axes_say(log):
    """Undoes the drawing with nothing but the numbers printed on the axes."""
    steps = list(range(0, 101, 10))  # too few points to be smoothed
    values = [10 ** (3 - step / 20) if log else 2 + step / 50 for step in steps]
    html = line_chart("loss", "ratio", "nats", steps, {"ratio": values})
    page = Page(html)
    labels = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]*)</text>', html)
    ticks = [(float(y) - 3.5, float(t.replace(",", ""))) for x, y, a, t in labels if a == "end" and float(x) < 60]
    across = [(float(x), float(t)) for x, y, a, t in labels if a == "middle" or float(x) > 60]
    (y0, v0), (y1, v1) = ticks[0], ticks[-1]
    (x0, s0), (x1, s1) = across[0], across[-1]
    assert ("log scale" in page.text) == log
    (curve,) = page.all("path")
    found = points(curve["d"])
    assert len(found) == len(steps)
    for (x, y), step, value in zip(found, steps, values, strict=True):
        assert s0 + (x - x0) / (x1 - x0) * (s1 - s0) == pytest.approx(step, abs=0.1)
        share = (y - y0) / (y1 - y0)
        if log:
            assert math.log(v0) + share * math.log(v1 / v0) == pytest.approx(math.log(value), abs=0.02)
        else:
            assert v0 + share * (v1 - v0) == pytest.approx(value, abs=0.01)


def test_values_under_the_pointer_and_the_last_value_are_the_raw_ones():
    values = [0.5, math.nan, 0.25, 0.125]
    page = Page(line_chart("loss", "ratio", "", [1, 2, 3, 4], {"ratio": values}))
    data = json.loads(page.all("figure")[0]["data-chart"])
    assert data["steps"] == [1, 2, 3, 4]
    assert data["series"] == [["0.5000", "nan", "0.2500", "0.1250"]]
    assert "0.1250" in page.text
    assert "gaps in ratio: not finite there" in page.text
    (curve,) = page.all("path")
    assert curve["d"].count("M") == 2  # lifted over the gap


def test_series_that_share_a_chart_have_a_legend_and_one_axis():
    steps = list(range(50))
    page = Page(line_chart("field", "norms", "rms", steps, {"a": [1.0] * 50, "b": [2.0] * 50}))
    curves = {a["class"]: points(a["d"]) for a in page.all("path") if a["class"].startswith("curve")}
    assert set(curves) == {"curve c0", "curve c1"}
    assert curves["curve c0"][0][1] > curves["curve c1"][0][1]  # pixels count downwards
    assert [a["class"] for a in page.all("li")] == ["c0", "c1"]


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [-5.0, -5.0], [1e-30, 1e-30, 2e-30], [1e20, -1e20]])
def test_degenerate_curves_stay_inside_the_plot(values):
    page = Page(line_chart("", "x", "", list(range(len(values))), {"x": values}))
    (curve,) = page.all("path")
    found = points(curve["d"])
    assert len(found) == len(values)
    assert all(0 <= x <= axes.WIDTH and 0 <= y <= axes.HEIGHT for x, y in found)


def test_smoothing_equals_the_slow_sum_and_ignores_gaps():
    generator = np.random.default_rng(0)
    values, width = generator.normal(size=40), 2.5
    values[[7, 20, 21]] = np.nan
    expected = []
    for i in range(40):
        near = [j for j in range(40) if abs(i - j) <= 8 and np.isfinite(values[j])]  # 3 standard deviations
        weights = [math.exp(-0.5 * ((i - j) / width) ** 2) for j in near]
        total = sum(w * values[j] for w, j in zip(weights, near, strict=True))
        expected.append(total / sum(weights) if np.isfinite(values[i]) else np.nan)
    np.testing.assert_allclose(smooth(values, width), expected, rtol=1e-12)


@given(
    st.floats(-1e6, 1e6).filter(lambda v: v == 0 or abs(v) > 1e-6),
    st.floats(1e-3, 1e6),
)
def test_ticks_are_round_even_and_inside(low, spread):
    high = low + spread
    ticks = nice_ticks(low, high)
    assert 1 <= len(ticks) <= 5
    gaps = np.diff(ticks)
    slack = 1e-6 * spread + 1e-9 * abs(low)
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    if len(gaps):
        mantissa = gaps[0] / 10 ** math.floor(math.log10(gaps[0] * (1 + 1e-6)))
        assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5)) < 1e-3
        np.testing.assert_allclose(gaps, gaps[0], atol=slack)


def test_log_ticks():
    assert log_ticks(0.5, 30) == [0.5, 1, 2, 5, 10, 20]
    assert log_ticks(1e-3, 1e2) == [1e-3, 1e-2, 0.1, 1, 10, 100]
    assert log_ticks(1e-4, 1e2) == [1e-4, 1e-2, 1, 100]
    assert Axis(0.9, 1.1, 0, 1, log=True).ticks() == nice_ticks(0.9, 1.1)


@pytest.mark.parametrize(
    ("value", "label"),
    [(0, "0"), (0.25, "0.25"), (2000, "2,000"), (1e-5, "1e-5"), (2.5e6, "2.5e6"), (-0.5, "-0.5"), (100, "100")],
)
def test_tick_label(value, label):
    assert tick_label(value) == label


def test_bars_are_proportional_and_the_numbers_stand_below():
    html = bar_chart(["even", "odd"], {"p": [0.5, 0.25], "p*": [0.75, 0.0]})
    heights = [float(h) for h in re.findall(r'style="height:([\d.]+)%"', html)]  # by label, then by series
    assert np.allclose(np.array(heights) / heights[0], [1, 1.5, 0.5, 0], atol=1e-3)
    rules = [(float(b), float(t)) for b, t in re.findall(r'bottom:([\d.]+)%"><span>([\d.]+)<', html)]
    assert all(bottom == pytest.approx(value / 0.5 * heights[0], abs=0.02) for bottom, value in rules)
    assert cells(html) == [["p", "0.500", "0.250"], ["p*", "0.750", "0.000"]]


def test_mini_bars():
    page = Page(mini_bars([0.1, 0.2, 0.0]))
    assert [(a["y"], a["height"]) for a in page.all("rect")] == [("8.0", "8.0"), ("0.0", "16.0"), ("16.0", "0.0")]
    assert "0.100, 0.200, 0" in page.text
