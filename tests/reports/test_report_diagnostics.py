"""The checks of a ratio and their charts: verdicts against closed forms, and marks that lie where the axes say."""

import json
import math
import re

import pytest
import torch

from ratiograph.algebra.diagnostics import RatioDiagnostics
from ratiograph.reports.axes import Guide
from ratiograph.reports.charts import bin_chart, calibration_chart, line_chart
from ratiograph.reports.quality import collapse_banner, quality_charts
from ratiograph.reports.ratio_checks import checks, verdict
from ratiograph.reports.run_report import write_report
from ratiograph.reports.trust import trust
from test_report import Page, points

M = 0.7  # distance of p = N(0, 1) and q = N(M, 1), so that l(x) = M^2/2 - M x


def measured(scale: float = 1.0, shift: float = 0.0, samples: int = 200_000) -> tuple[list[dict], dict]:
    """Records and diagnostics of the estimator scale * l + shift, where l is exact."""
    generator = torch.Generator().manual_seed(0)
    p = torch.empty(samples, dtype=torch.float64).normal_(generator=generator)
    q = torch.empty(samples, dtype=torch.float64).normal_(M, 1, generator=generator)
    real, student = (scale * (M * M / 2 - M * x) + shift for x in (p, q))
    tables, position = RatioDiagnostics(), torch.arange(samples) / samples
    tables.update(real, student, position, position)
    record = {"ratio/mean_exp_student": float(student.exp().mean()), "ratio/mean_exp_real": float((-real).exp().mean())}
    records = [{"step": 100 * k, "images": 6400 * k, "ratio/accuracy": 0.6, **record} for k in range(1, 31)]
    return records, {"step": 3000, "ratio": tables.summary()}


def judged(records, diagnostics) -> dict[str, bool | None]:
    return {check.name: check.holds for check in checks(records, diagnostics["ratio"])}


def number(text: str) -> float:
    return float(re.search(r"-?\d+\.?\d*", text)[0])


# -- the verdict -----------------------------------------------------------------------------------------------------


def test_the_exact_ratio_passes_every_check():
    records, diagnostics = measured()
    assert set(judged(records, diagnostics).values()) == {True}
    assert verdict(checks(records, diagnostics["ratio"]), 3000)[0] == "good"


def test_an_overconfident_ratio_fails_by_the_amounts_of_the_closed_forms():
    records, diagnostics = measured(scale=2)
    found = {check.name: check for check in checks(records, diagnostics["ratio"])}
    # Under q, l ~ N(-M^2/2, M^2), so E_q[e^(k l)] = e^(M^2 k (k - 1) / 2); E_p[e^(-k l)] is the same.
    student, real = re.findall(r"= ([\d.]+)", found["Identities"].found)
    assert float(student) == pytest.approx(math.exp(M * M), rel=0.03)
    assert float(real) == pytest.approx(math.exp(M * M), rel=0.03)
    assert found["Identities"].holds is False
    # P(real | D = d) is sigmoid(logit(d) / 2): the error is the mean of the difference over both classes.
    x = torch.linspace(-8, 9, 20001, dtype=torch.float64)
    p, q = (torch.exp(-((x - mean) ** 2) / 2) / math.sqrt(2 * math.pi) for mean in (0, M))
    exact = M * M / 2 - M * x
    gap = ((2 * exact).sigmoid() - exact.sigmoid()).abs()
    error = float(torch.trapezoid(gap * (p + q) / 2, x))
    assert error > 0.05
    assert number(found["Calibration error"].found) == pytest.approx(error, abs=0.005)  # levels of D are 0.1 wide
    assert found["Calibration error"].holds is False
    kind, line = verdict(list(found.values()), 3000)
    assert kind == "bad"
    assert "identities and calibration error fail;" in line


def test_a_scale_error_fails_both_identities_in_opposite_directions():
    records, diagnostics = measured(shift=math.log(1.3))
    text = next(check for check in checks(records, diagnostics["ratio"]) if check.name == "Identities")
    student, real = map(float, re.findall(r"= ([\d.]+)", text.found))
    assert (student, real) == (pytest.approx(1.3, rel=0.02), pytest.approx(1 / 1.3, rel=0.02))
    assert text.holds is False
    assert judged(*measured(shift=math.log(1.1)))["Identities"] is True


def test_an_estimator_that_says_nothing_is_undecided_although_identities_and_calibration_hold():
    records, diagnostics = measured(scale=0)
    found = judged(records, diagnostics)
    assert found == {
        "Identities": True,
        "Identities by noise level": True,
        "Accuracy": None,
        "Calibration error": True,
    }
    assert verdict(checks(records, diagnostics["ratio"]), 3000)[1].startswith("Undecided")


@pytest.mark.parametrize(
    ("accuracy", "holds"),
    [
        ([0.7, None, 0.5], True),
        ([0.56, 0.5], True),
        ([0.55, 0.5], None),
        ([0.98, 0.6], True),
        ([0.99, 0.6], False),
        ([1.0, 0.5], False),
    ],
)
def test_accuracy_is_held_between_chance_everywhere_and_separation_anywhere(accuracy, holds):
    _, diagnostics = measured(samples=1000)
    diagnostics["ratio"]["by_time"]["accuracy"] = accuracy
    assert judged([], diagnostics)["Accuracy"] is holds


@pytest.mark.parametrize(("worst", "holds"), [(0.51, True), (0.49, False), (1.99, True), (2.01, False)])
def test_one_noise_level_cannot_hide_in_the_average(worst, holds):
    _, diagnostics = measured(samples=1000)
    diagnostics["ratio"]["by_time"] |= {"mean_exp_student": [1.0] * 7 + [worst], "mean_exp_real": [1.0] * 7 + [None]}
    assert judged([], diagnostics)["Identities by noise level"] is holds


def test_identities_are_read_from_the_last_tenth():
    early = [{"step": k, "ratio/mean_exp_student": 50.0, "ratio/mean_exp_real": 50.0} for k in range(90)]
    late = [{"step": 90 + k, "ratio/mean_exp_student": 0.9 + k / 100, "ratio/mean_exp_real": 1.1} for k in range(10)]
    (identities, *_) = checks(early + late, {})
    assert identities.found == "E_q[e^l] = 0.945; E_p[e^−l] = 1.10"
    assert identities.holds is True
    assert checks([*early, *late[:5]], {})[0].holds is False  # the last 9 of 95 reach back to the early ones


def test_verdicts_that_are_none():
    records, diagnostics = measured(samples=1000)
    found = checks(records, diagnostics["ratio"])
    assert verdict(found, 99)[1].startswith("Too early to say: 99 steps")
    assert "passes" not in trust(records[:0], diagnostics | {"step": 99})[0]
    assert verdict(checks([], {}), 3000)[1].startswith("Not measured")
    kind, line = verdict(checks(measured()[0], {}), 3000)
    assert kind == "open"
    assert "identities by noise level, accuracy and calibration error not measured" in line


# -- charts ----------------------------------------------------------------------------------------------------------


def axis(html: str, x: bool) -> tuple[float, float, float, float]:
    """(pixel, value) of two numbers on one axis of the only chart in ``html``."""
    texts = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="\w+">([\d.,]+)</text>', html)
    marks = [
        (float(px) if x else float(py) - 3.5, float(t.replace(",", "")))
        for px, py, t in texts
        if (float(py) == 192) == x
    ]
    return (*marks[0], *marks[-2])  # the last one across may be moved inwards


def value(pixel: float, marks: tuple[float, float, float, float], log: bool = False) -> float:
    p0, v0, p1, v1 = marks
    share = (pixel - p0) / (p1 - p0)
    return v0 * (v1 / v0) ** share if log else v0 + share * (v1 - v0)


def test_calibration_dots_bars_and_diagonal_lie_where_the_axes_say():
    predicted, observed = [0.05, None, 0.5, 0.95], [0.2, None, 0.4, 1.0]
    html = calibration_chart("calibration", predicted, observed, [0.1, 0.0, 0.6, 0.3])
    page, across, up = Page(html), axis(html, x=True), axis(html, x=False)
    dots = [(value(float(a["cx"]), across), value(float(a["cy"]), up)) for a in page.all("circle")]
    for dot, wanted in zip(dots, [(0.05, 0.2), (0.5, 0.4), (0.95, 1.0)], strict=True):
        assert dot == pytest.approx(wanted, abs=0.003)
    (line,) = page.all("line", **{"class": "guide"})
    ends = [value(float(line[k]), across if k[0] == "x" else up) for k in ("x1", "y1", "x2", "y2")]
    assert ends == pytest.approx([0, 0, 1, 1], abs=0.003)
    bars = page.all("rect", **{"class": "share"})
    heights = [float(a["height"]) for a in bars]
    assert [h / heights[1] for h in heights] == pytest.approx([1 / 6, 1, 1 / 2], abs=0.01)
    feet = [value(float(a["y"]) + float(a["height"]), up) for a in bars]
    assert feet == pytest.approx([0, 0, 0], abs=0.003)
    middles = [value(float(a["x"]) + float(a["width"]) / 2, across) for a in bars]
    assert middles == pytest.approx([0.05, 0.5, 0.95], abs=0.003)
    data = json.loads(page.all("figure")[0]["data-chart"])
    assert (data["steps"], data["where"]) == ([0.05, 0.5, 0.95], "D = #")
    assert data["series"] == [["0.2000", "0.4000", "1.000"], ["0.1000", "0.6000", "0.3000"]]


def test_bins_are_lifted_over_an_empty_one_and_read_against_the_guide():
    html = bin_chart("e^l", "", {"a": [4.0, None, 0.25, 1.0]}, guide=Guide(1.0, shade=(0.8, 1.2), log=True))
    page, up = Page(html), axis(html, x=False)
    assert [value(float(a["cy"]), up, log=True) for a in page.all("circle")] == pytest.approx([4, 0.25, 1], rel=0.02)
    (curve,) = page.all("path")
    assert curve["d"].count("M") == 2
    (shade,), (line,) = page.all("rect", **{"class": "shade"}), page.all("line", **{"class": "guide"})
    ends = [float(shade["y"]), float(shade["y"]) + float(shade["height"])]
    assert [value(end, up, log=True) for end in ends] == pytest.approx([1.2, 0.8], rel=0.02)
    assert value(float(line["y1"]), up, log=True) == pytest.approx(1, rel=0.01)
    assert "gaps" not in html  # an empty bin is no fault
    assert json.loads(page.all("figure")[0]["data-chart"])["where"] == "noise level # of 4"


def test_a_logarithmic_guide_draws_the_absurd_at_its_edge_and_tells_the_true_value():
    html = line_chart("", "e^l", "", [1, 2, 3], {"a": [0.0, 1.0, 3e9]}, guide=Guide(1.0, log=True))
    page, up = Page(html), axis(html, x=False)
    (curve,) = page.all("path")
    assert [value(y, up, log=True) for _, y in points(curve["d"])] == pytest.approx([1e-4, 1, 1e4], rel=0.1)
    assert json.loads(page.all("figure")[0]["data-chart"])["series"] == [["0", "1.000", "3.00e+09"]]


def test_under_a_guide_the_strong_line_is_the_arithmetic_mean():
    values = [0.5, 1.5] * 100  # mean 1, geometric mean 0.87
    html = line_chart("", "e^l", "", list(range(200)), {"a": values}, guide=Guide(1.0, log=True))
    (curve,) = (a for a in Page(html).all("path") if a["class"].startswith("curve"))
    middle = [y for _, y in points(curve["d"])[50:150]]
    (line,) = Page(html).all("line", **{"class": "guide"})
    assert middle == pytest.approx([float(line["y1"])] * 100, abs=1.5)


def test_a_linear_guide_stays_in_view_and_fixed_ends_stay_fixed():
    html = bin_chart("KL", "nats", {"kl": [0.5, 0.4]}, guide=Guide(0.0))
    (line,) = Page(html).all("line", **{"class": "guide"})
    assert value(float(line["y1"]), axis(html, x=False)) == pytest.approx(0, abs=0.005)
    assert float(line["y1"]) < 176  # the foot of the plot
    html = bin_chart("accuracy", "", {"accuracy": [0.5, 0.6]}, guide=Guide(0.5, ends=(0.0, 1.0)))
    assert re.findall(r">([\d.]+)</text>", html) == ["0", "0.25", "0.5", "0.75", "1"]


# -- the section in the page -----------------------------------------------------------------------------------------


def folder(tmp_path, records, diagnostics=None, evaluation=None):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, found in (("diagnostics.json", diagnostics), ("evaluation.json", evaluation)):
        if found is not None:
            (tmp_path / name).write_text(json.dumps(found))
    return tmp_path


def sections(html: str) -> dict[str, str]:
    return dict(re.findall(r"<section><h2>(.*?)</h2>(.*?)</section>", html, re.S))


FIELDS = {"field/a": 1.0, "field/b": 0.1, "cosine/a, b": -0.5, "loss/ratio": 1.0}


def test_the_section_holds_nine_charts_each_with_its_reading_and_takes_its_metrics_from_the_curves(tmp_path):
    records, diagnostics = measured(samples=2000)
    records = [{**record, **FIELDS, "divergence/KL(q||p)": 0.2} for record in records]
    html = write_report(folder(tmp_path, records, diagnostics)).read_text(encoding="utf-8")
    Page(html)
    found = sections(html)
    section = found["Can the ratio be trusted?"]
    assert len(re.findall(r"</figure><p>[^<]{20}", section)) == section.count("<figure") == 9
    assert re.findall(r"<b>(.*?)</b>", found["Curves"]) == ["ratio"]  # the loss
    assert not re.search(r"https?://|url\(|@import", html)


def test_without_a_ratio_fields_stay_with_the_curves(tmp_path):
    empty = RatioDiagnostics().summary()  # a ratio that does not learn
    for diagnostics in (None, {"step": 9, "ratio": empty}):
        html = write_report(folder(tmp_path, [{"step": 9, **FIELDS}], diagnostics)).read_text(encoding="utf-8")
        assert "Can the ratio be trusted?" not in sections(html)
        assert re.findall(r"<b>(.*?)</b>", sections(html)["Curves"]) == ["ratio", "norms", "a, b"]


def test_every_text_of_a_run_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    records, diagnostics = measured(samples=1000)
    records = [{**r, f"field/{evil}": 1.0, f"divergence/{evil}": 1.0, f"evaluation/{evil}": 1.0} for r in records]
    html = write_report(folder(tmp_path, records, diagnostics)).read_text(encoding="utf-8")
    page = Page(html)
    assert len(page.all("script")) == 1
    assert page.text.count(evil) >= 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ('{"step": 1, "ratio": {"by_time": {"accuracy": [0.5]}}}', "lacks or misuses a field .*mean_exp_student"),
        (
            '{"ratio": {"by_time": {"accuracy": [0.5], "mean_exp_student": [1], "mean_exp_real": [1], "kl": [0]}, '
            '"calibration": {"predicted": [0.5, 0.6], "observed": [0.5], "share": [1]}}}',
            "lacks or misuses a field",
        ),
    ],
)
def test_wrong_diagnostics_are_a_clear_error_and_the_old_page_stays(tmp_path, text, message):
    records, diagnostics = measured(samples=1000)
    before = write_report(folder(tmp_path, records, diagnostics)).read_bytes()
    (tmp_path / "diagnostics.json").write_text(text)
    with pytest.raises(ValueError, match=rf"diagnostics\.json.*{message}"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before


# -- quality and collapse --------------------------------------------------------------------------------------------


def test_quality_is_drawn_against_images_with_the_labels_of_the_evaluation():
    records = [
        {"step": k, "images": 1000 * k, **({"evaluation/fd": 9.0 - k, "evaluation/collapsed": 0.0} if k % 2 else {})}
        for k in range(6)
    ]
    html = quality_charts(records, {"fd": {"label": "Fréchet distance", "better": "lower"}})
    page = Page(html)
    (figure,) = page.all("figure")  # collapsed has no curve
    data = json.loads(figure["data-chart"])
    assert (data["steps"], data["where"]) == ([1000, 3000, 5000], "# images")
    assert data["series"] == [["8.000", "6.000", "4.000"]]
    assert "Fréchet distance" in page.text
    assert "lower is better" in page.text
    assert quality_charts([{"step": 1, "images": 2, "loss/a": 1.0}], {}) == ""


def run(*collapsed: int) -> list[dict]:
    return [{"step": 1000 * k, "evaluation/collapsed": float(one)} for k, one in enumerate(collapsed, 1)]


def final(collapsed: bool | None) -> dict:
    return {"rows": [{"name": "teacher", "collapsed": True}, {"name": "s", "highlight": True, "collapsed": collapsed}]}


@pytest.mark.parametrize(
    ("records", "evaluation", "words"),
    [
        (run(0, 0), final(False), []),
        (run(1, 1, 0), final(False), []),  # before it had learnt
        ([], {}, []),
        ([], final(None), []),
        ([], final(True), ["The student has collapsed."]),
        (run(0, 1), {}, ["The student has collapsed.", "step 2,000"]),
        (run(1, 1), {}, ["The student has collapsed."]),
        (run(0, 0, 1, 1), final(True), ["The student has collapsed.", "step 3,000"]),
        (run(0, 1, 0), final(False), ["collapsed while training", "step 2,000", "no longer so"]),
        (run(0, 1), final(False), ["collapsed while training", "still so", "not in the final evaluation"]),
    ],
)
def test_collapse_is_announced(records, evaluation, words):
    banner = collapse_banner(records, evaluation)
    assert bool(banner) == bool(words)
    assert all(word in banner for word in words)


def test_the_banner_stands_above_the_results(tmp_path):
    html = write_report(folder(tmp_path, run(0, 1), evaluation=final(True))).read_text(encoding="utf-8")
    assert 0 < html.index('class="banner"') < html.index("<h2>Results</h2>")
