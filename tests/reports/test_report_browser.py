"""The pages in headless Chromium, at a laptop's and a phone's width; skipped where there is none."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ratiograph.reports.comparison import write_comparison
from ratiograph.reports.run_report import write_report
from ratiograph.training.logs import make_grid

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

WIDTHS = (1280, 390)
PROBE = """<script>addEventListener("load", () => {
  const inside = ".scroll, .graph, svg, pre, .unseen";
  const wide = [...document.querySelectorAll("body *")].filter((one) => !one.closest(inside) &&
    one.getBoundingClientRect().right > innerWidth + 1);
  const cut = [...document.querySelectorAll("svg text")].filter((one) => {
    const box = one.getBBox(), view = one.ownerSVGElement.viewBox.baseVal;
    return box.x < -0.5 || box.x + box.width > view.width + 0.5 || box.y + box.height > view.height + 0.5;
  });
  const small = [...document.querySelectorAll("body *")].filter((one) => !one.closest("svg, .unseen") &&
    one.childNodes.length && parseFloat(getComputedStyle(one).fontSize) < 11);
  parent.document.title = JSON.stringify({
    width: innerWidth, page: document.documentElement.scrollWidth,
    wide: wide.map((one) => one.outerHTML.slice(0, 80)), cut: cut.map((one) => one.textContent),
    small: small.map((one) => one.outerHTML.slice(0, 80)),
    charts: document.querySelectorAll("figure.chart").length,
    tables: [...document.querySelectorAll("table")].map((one) => Boolean(one.caption && one.caption.textContent)),
    images: [...document.images].map((one) => Boolean(one.alt && one.naturalWidth)),
  });
})</script>"""
POINT = """<script>addEventListener("load", () => {
  const charts = [...document.querySelectorAll("figure.chart")].map((chart) => {
    const svg = chart.querySelector("svg"), box = svg.getBoundingClientRect();
    svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left, clientY: box.top + 9 }));
    const legend = [...chart.querySelectorAll(".legend output")].map((one) => one.textContent);
    const head = chart.querySelector("figcaption output").textContent;
    return { data: JSON.parse(chart.dataset.chart), legend, head };
  });
  parent.document.title = JSON.stringify({ charts });
})</script>"""
LONG = "a name of one run that is much longer than names usually are"


def make(folder: Path, number: int) -> Path:
    """A run with everything, many metrics and long names."""
    (folder / "samples").mkdir(parents=True)
    generator, random = torch.Generator().manual_seed(number), np.random.default_rng(number)
    for name in ("step_00000000", "step_00000100", "teacher"):
        images = torch.rand(16, 1, 8, 8, generator=generator) * 2 - 1
        Image.fromarray(make_grid(images)).save(folder / "samples" / f"{name}.png")
    groups = ("loss/ratio", "loss/student_score", "field/gan", "ratio/mean_exp_student", "ratio/mean_exp_real")
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(10, 12_000, 100):
            record = {"step": step, "seconds": 1.0 * step, "images": 2048 * step, "memory/peak_gb": 31.25}
            record |= {name: float(random.lognormal(-9 * (name == "loss/ratio"), 0.3)) for name in groups}
            record |= {"rate/steps_per_second": 1e-3, "divergence/KL(q||p)": float(random.normal() * 1e7)}
            record |= {"evaluation/frechet": 1e5 / step}
            file.write(json.dumps(record) + "\n")
    names = {f"m{k}": f"metric number {k} of a long name (Inception-v3, legacy_tensorflow)" for k in range(12)}
    metrics = {key: {"label": label, "better": "lower"} for key, label in names.items()}
    metrics["frechet"] = {"label": "Fréchet distance (Inception-v3, legacy_tensorflow)", "better": "lower"}
    row = {"evaluations": 1, "samples": 50_000, "frechet": 2.0 + number, "shares": [0.1, 0.2, 0.7]}
    row |= {key: float(random.lognormal(0, 4)) for key in names}
    rows = [{**row, "name": f"teacher, {n} evaluations", "evaluations": n} for n in (1, 5, 35)]
    rows.append({**row, "name": "student, one evaluation", "highlight": True})
    labels = [f"mode {k}" for k in range(10)]
    shown = {"labels": labels, "series": [{"name": "share", "values": [0.1] * 10}]}
    document = {"title": f"{LONG} {number}", "rows": rows, "metrics": metrics, "histograms": shown, "notes": [LONG]}
    (folder / "evaluation.json").write_text(json.dumps(document))
    ways = ", ".join(f"'data/cifar10/a/very/long/folder/name/shard-{k:06d}.tar'" for k in range(6))
    (folder / "config.gin").write_text(
        f"Experiment.steps = {11_910 + number}\nRatioNormalizedOverTheBatch.weighting = @Mine{number}()\n"
        f"ShardStream.urls = [{ways}, '{number}']\n"
    )
    drawing = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="1300" height="500"><rect width="1300" height="500"/></svg>'
    )
    (folder / "graph.svg").write_text(drawing)
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of one run, that of eight, and that of a run that has just begun."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [make(folder / f"{LONG.replace(' ', '_')}_{number}", number) for number in range(8)]
    begun = folder / "begun"
    begun.mkdir()
    (begun / "config.gin").write_text("Experiment.steps = 5\n")
    return {
        "one": write_report(runs[0]),
        "several": write_comparison(runs, folder / "several.html"),
        "begun": write_report(begun),
    }


def chromium(folder: Path, *arguments: str) -> str:
    plain = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars")
    command = [CHROMIUM, *plain, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


def probed(page: Path, width: int, folder: Path, probe: str = PROBE) -> dict:
    """What the page's own document says of itself, in a frame of ``width`` (a window has a least width)."""
    inner = page.read_text(encoding="utf-8").replace("</body>", f"{probe}</body>")
    frame = f'<!DOCTYPE html><iframe width="{width}" height="900" style="border:0" srcdoc="{escape(inner)}"></iframe>'
    (folder / "frame.html").write_text(frame, encoding="utf-8")
    found = chromium(folder, "--window-size=1400,1000", "--dump-dom", (folder / "frame.html").as_uri())
    return json.loads(unescape(re.search(r"<title>(.*?)</title>", found, re.S)[1]))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("name", "charts"), [("one", 7), ("several", 9), ("begun", 0)])
def test_nothing_is_wider_than_the_screen_or_cut(pages, tmp_path, name, charts, width):
    found = probed(pages[name], width, tmp_path)
    assert (found["width"], found["page"]) == (width, width)
    assert found["wide"] == []
    assert found["cut"] == []
    assert found["small"] == []
    assert found["charts"] >= charts
    assert all(found["tables"])
    assert all(found["images"])
    assert len(found["images"]) == {"one": 5, "several": 16, "begun": 0}[name]


@pytest.mark.parametrize("name", ["one", "several"])
def test_values_follow_the_pointer(pages, tmp_path, name):
    """Every chart, pointed at by its left end: one series speaks in the heading, several in the legend."""
    for chart in probed(pages[name], 1280, tmp_path, POINT)["charts"]:
        first = [values[0] for values in chart["data"]["series"]]
        place = chart["data"]["where"].replace("#", f"{chart['data']['steps'][0]:,}")
        if chart["legend"]:
            assert (chart["legend"], chart["head"]) == (first, place)
        else:
            assert chart["head"] == f"{place}: {first[0]}"


@pytest.mark.parametrize("width", WIDTHS)
def test_a_screenshot_has_the_page_in_it(pages, tmp_path, width):
    shot = tmp_path / "shot.png"
    page = pages["several"]
    chromium(tmp_path, f"--window-size={width},1600", f"--screenshot={shot}", page.as_uri())
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (1600, width, 3)
    ground = pixels[0, 0]
    rows = (np.abs(pixels - ground).max(2) > 40).any(1)
    assert 0.2 < rows.mean() < 0.95  # text and lines all the way down, on the page's ground
    assert rows[1200:].any()
    edge = np.abs(pixels[:, -4:] - ground).max(2) > 40
    assert not edge.any()  # a margin is left on the right
    orange = np.abs(pixels - np.array([0xD0, 0x69, 0x2B])).max(2) < 12
    assert orange.sum() > 40  # the second run's colour


def test_pages_ask_for_nothing_outside(pages):
    for page in pages.values():
        html = page.read_text(encoding="utf-8")
        assert not re.search(r"(?:src|href|srcset|action|data)\s*=\s*[\"']?(?!data:image/)[a-z]+:", html)
        assert not re.search(r"@import|url\(|<link|<base|<iframe|<object|fetch\(|XMLHttpRequest", html)
        assert "@media print" in html
