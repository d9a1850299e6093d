"""The figures' numbers against independent mathematics, and the files that each command writes."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import special, stats

from paper_figures import normalized_weights, run_curves, score_difference, weighting_curves
from paper_figures.drawing import TABLE, columns, curves, save, spread
from ratiograph import config
from ratiograph.algebra.noising import VarianceExploding
from ratiograph.algebra.times import LogNormalSigma
from ratiograph.core.contracts import Evaluation, Nodes
from ratiograph.core.types import Condition
from ratiograph.networks.teachers.mixture import ExactRatio, GaussianMixture
from ratiograph.training import trainer
from ratiograph.training.logs import make_grid

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "figures.py"
OMEGA = {
    "KL": lambda rho: rho**0,
    "LR / Jensen–Shannon": lambda rho: rho / (1 + rho),
    "softened reverse KL": lambda rho: 1 / (1 + rho),
    "BE / forward KL": lambda rho: rho,
    "Jeffreys": lambda rho: 1 + rho,
    "squared Hellinger": lambda rho: np.sqrt(rho) / 4,
    "LS (SBA λ = 1)": lambda rho: 1 / rho,
    "SBA λ = 0.5": lambda rho: rho**-0.5,
    "SBA λ = 3": lambda rho: rho**-3.0,
    "SBA λ = 5": lambda rho: rho**-5.0,
    "SBA λ = 10": lambda rho: rho**-10.0,
}
"""omega over rho = p/q, from the table of the papers, by the labels of the figures."""


def read(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=11), st.floats(0.01, 0.1))
def test_labels_are_apart_in_order_and_inside(heights, step):
    heights = sorted(heights)
    placed = np.array(spread(heights, step))
    assert placed.min() >= -1e-9
    assert placed.max() <= 1 + 1e-9 or step * (len(heights) - 1) > 1
    assert (np.diff(placed) >= step - 1e-6).all()
    if (np.diff(heights) >= step).all():
        np.testing.assert_allclose(placed, heights, atol=1e-9)


def test_overlapping_labels_stay_about_their_mean():
    np.testing.assert_allclose(spread([0.5, 0.5, 0.53], 0.1), [0.41, 0.51, 0.61], atol=1e-9)
    np.testing.assert_allclose(spread([0.2, 0.98, 1.0], 0.1), [0.2, 0.9, 1.0], atol=1e-9)


def test_normalized_variance_is_exact_and_reached_by_samples():
    rows = weighting_curves.normalized_variance(samples=100_000, step=0.5, largest=2.0)
    by_row = curves(rows)
    assert list(by_row) == list(OMEGA)
    y = np.linspace(-60, 60, 240_001)
    density = np.exp(-y * y / 2) / math.sqrt(2 * math.pi) * (y[1] - y[0])
    reached = 0
    for label, mine in by_row.items():
        assert [row["m"] for row in mine] == pytest.approx(np.arange(1, 21) / 10)
        for row in mine:
            m, exact = row["m"], row["exact"]
            if exact < 1e5:
                omega = OMEGA[label](np.exp(m * y - m * m / 2))
                mean = (density * omega).sum()
                assert exact == pytest.approx((density * (omega / mean - 1) ** 2).sum(), rel=1e-6, abs=1e-12)
            sampled = 0 < exact < weighting_curves.TOP and round(10 * m) % 5 == 0
            assert math.isfinite(row["monte_carlo"]) == math.isfinite(row["importance_sampling"]) == sampled
            if sampled:
                assert row["importance_sampling"] == pytest.approx(exact, rel=0.1)  # of 10,000 samples: 5 s.e.
                assert abs(row["monte_carlo"] / exact - 1) < 5 * row["standard_error"]
                reached += 3 * row["standard_error"] <= weighting_curves.BAR
    assert reached >= 8


def test_generators_are_those_of_the_papers_with_value_and_slope_0_and_curvature_1():
    by_row = curves(weighting_curves.h_curves(largest=4.0, points=41))
    r = columns(by_row["KL"], "ratio")[0]
    h = {
        "KL": r * np.log(r) - r + 1,
        "BE / forward KL": r - 1 - np.log(r),
        "LS (SBA λ = 1)": (r - 1) ** 2 / 2,
        "squared Hellinger": 2 * (np.sqrt(r) - 1) ** 2,
        "LR / Jensen–Shannon": 2 * (r * np.log(r) - (1 + r) * np.log((1 + r) / 2)),
        "softened reverse KL": 2 * ((1 + r) * np.log((1 + r) / 2) - (r - 1)),
        "Jeffreys": (r - 1) * np.log(r) / 2,
        "SBA λ = 3": (r**4 - 4 * r + 3) / 12,
    }
    for label, expected in h.items():
        np.testing.assert_allclose(columns(by_row[label], "h")[0], expected, atol=1e-12)
    for label, mine in by_row.items():
        ratio, mine_h, mine_f = columns(mine, "ratio", "h", "f")
        np.testing.assert_allclose(mine_f, ratio * mine_h[::-1], rtol=1e-9, atol=1e-12)  # f(rho) = rho h(1/rho)
        assert mine_h[20] == pytest.approx(0, abs=1e-12), label
        assert (np.delete(mine_h, 20) > 0).all()


def test_weightings_are_those_of_the_table():
    for label, mine in curves(weighting_curves.weighting_curves(largest=3.0, points=61)).items():
        log_ratio, r, rho, omega, relative = columns(mine, "log_ratio", "r", "rho", "omega", "relative")
        np.testing.assert_allclose(rho, np.exp(log_ratio))
        np.testing.assert_allclose(r * rho, 1)
        np.testing.assert_allclose(omega, OMEGA[label](rho), rtol=1e-9)
        np.testing.assert_allclose(relative, OMEGA[label](rho) / OMEGA[label](1.0), rtol=1e-9)


def test_normalisation_takes_out_bias_and_drift_and_nothing_else():
    rows = normalized_weights.normalized_weights(steps=200, batch_size=256)
    found = {(row["weighting"], row["ratio"], row["stage"]): row for row in rows}
    before, ratio, _ = normalized_weights.STAGES
    exact = 1 + found["BE / forward KL", "exact", before]["normalized_variance"]
    # omega is a product: E of e^(b cos) over a period is I0(b), the noise is log-normal.
    bias = special.i0(2 * normalized_weights.BIAS) / special.i0(normalized_weights.BIAS) ** 2
    drift = special.i0(2 * normalized_weights.DRIFT) / special.i0(normalized_weights.DRIFT) ** 2
    noise = math.exp(normalized_weights.SPREAD**2)
    off = 1 + found["BE / forward KL", "miscalibrated", before]["normalized_variance"]
    assert off == pytest.approx(exact * bias * drift * noise, rel=0.05)
    mended = 1 + found["BE / forward KL", "miscalibrated", ratio]["normalized_variance"]
    assert exact * noise < mended < exact * noise * 1.05  # what is left of the bias inside a bin
    for row in TABLE:
        stages = [found[row.label, "miscalibrated", stage] for stage in normalized_weights.STAGES]
        assert stages[2]["step_variance"] < 1e-12
        if row.label == "KL":
            assert all(stage["normalized_variance"] < 1e-12 for stage in stages)
        elif row.label not in ("SBA λ = 5", "SBA λ = 10"):  # whose means are those of a few samples
            assert stages[1]["normalized_variance"] < 0.5 * stages[0]["normalized_variance"]
            assert stages[1]["step_variance"] < 0.2 * stages[0]["step_variance"]


class ExactStudent:
    """A mixture that is sampled like a generator: the noise is the sample."""

    q = GaussianMixture(means=[[-0.8, 0.1], [1.1, 0.2]], std=[0.5, 0.5], weights=[0.7, 0.3])

    def condition(self, samples, generator):
        return Condition()

    def noise(self, samples, generator):
        return self.q.sample(samples, generator, dtype=torch.float64)

    def __call__(self, z, condition):
        return z


class ExactTask:
    """What ``score_difference`` asks of a task, between two mixtures; keeps the evaluations."""

    teacher = GaussianMixture(means=[[-1.0, 0.0], [1.0, 0.5]], std=[0.4, 0.6])
    student, noising, times = ExactStudent(), VarianceExploding(), LogNormalSigma()

    def __init__(self):
        self.nodes = Nodes(self.teacher, self.student.q, ExactRatio(student=self.student.q))
        self.evaluations = []

    def evaluate(self, x0, condition, generator):
        t = self.times(self.noising, len(x0), generator).double()
        noisy = self.noising.add_noise(x0, t, torch.randn(x0.shape, dtype=torch.float64, generator=generator))
        self.evaluations.append(Evaluation(noisy, x0, condition, self.nodes))
        return self.evaluations[-1]


def test_score_difference_is_that_of_the_densities():
    task = ExactTask()
    rows = score_difference.score_difference(task, samples=70, generator=torch.Generator().manual_seed(0), batch=32)
    p, q, expected = task.teacher, task.student.q, []
    for evaluation in task.evaluations:
        noisy, condition = evaluation.noisy, Condition()
        difference = (q.score(noisy, condition) - p.score(noisy, condition)).norm(dim=1)
        log_ratio = p.log_density(noisy, condition) - q.log_density(noisy, condition)
        expected += zip(noisy.t.tolist(), difference.tolist(), log_ratio.tolist(), strict=True)
    found = np.stack(columns(rows, "sigma", "score_difference", "log_ratio"), 1)
    np.testing.assert_allclose(found, np.array(expected), rtol=1e-6, atol=1e-9)
    sigma, score, denoised, quantile = columns(rows, "sigma", "score_difference", "denoised_difference", "quantile")
    np.testing.assert_allclose(score, denoised / sigma**2, rtol=1e-12)
    np.testing.assert_allclose(quantile, stats.norm.cdf((np.log(sigma) + 1.2) / 1.2), atol=1e-5)


@pytest.fixture
def scored():
    """Rows whose l falls with the difference inside each time, and rises with it from one time to the next."""
    rng = np.random.default_rng(0)
    quantile = (np.arange(800) + 0.5) / 800
    group = np.arange(800) // 100
    inside = rng.uniform(0, 1, 800)
    difference = np.round(10.0 * group + 9 * inside, 2)  # with ties
    log_ratio = 0.3 * group - inside + 0.2 * rng.standard_normal(800)
    names = ("quantile", "sigma", "score_difference", "denoised_difference", "log_ratio")
    return [
        dict(zip(names, values, strict=True))
        for values in zip(quantile, quantile, difference, difference, log_ratio, strict=True)
    ]


def test_correlations_are_scipys(scored):
    difference, log_ratio = columns(scored, "score_difference", "log_ratio")
    for label, (pearson, spearman, within) in score_difference.correlations(scored, "score_difference").items():
        if label == "KL":
            assert np.isnan([pearson, spearman, within]).all()
            continue
        omega = OMEGA[label](np.exp(log_ratio))
        assert pearson == pytest.approx(stats.pearsonr(omega, difference)[0], rel=1e-9)
        assert spearman == pytest.approx(stats.spearmanr(omega, difference)[0], rel=1e-9)
        groups = zip(omega.reshape(8, 100), difference.reshape(8, 100), strict=True)
        assert within == pytest.approx(np.mean([stats.spearmanr(*group)[0] for group in groups]), rel=1e-9)
    found = score_difference.correlations(scored, "score_difference")
    assert found["BE / forward KL"][1] > 0.5 > -0.5 > found["BE / forward KL"][2]  # the times hid the sign


def test_grouped_weights_are_means_in_order_of_the_difference(scored):
    difference, log_ratio = columns(scored, "score_difference", "log_ratio")
    everywhere = score_difference.percentiles(scored, "score_difference")
    np.testing.assert_allclose(everywhere, 100 * (stats.rankdata(difference) - 0.5) / 800)
    at_equal_times = score_difference.percentiles(scored, "score_difference", bins=8)
    np.testing.assert_allclose(at_equal_times[300:400], stats.rankdata(difference[300:400]) - 0.5)
    for percentile in (everywhere, at_equal_times):
        order = np.argsort(percentile)
        for label, means in score_difference.grouped_weights(scored, percentile, groups=4).items():
            omega = OMEGA[label](np.exp(log_ratio))
            np.testing.assert_allclose(means, omega[order].reshape(4, 200).mean(1) / omega.mean(), rtol=1e-9)


def write_run(folder: Path, gin: str, records: list[dict], *, before=None, after=None, colours=()):
    """A run's folder with a config.gin, metrics, evaluations, and a grid of plain images for each colour in [-1, 1]."""
    (folder / "samples").mkdir(parents=True)
    (folder / "config.gin").write_text(gin)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if before:
        (folder / "before.json").write_text(json.dumps([{"name": "teacher"}, before]))
        rows = [{"name": "teacher"}, {"name": "before", **before}, {"name": "student", **after}]
        (folder / "evaluation.json").write_text(json.dumps({"rows": rows}))
    for step, colour in enumerate(colours):
        grid = make_grid(torch.full((64, 1, 28, 28), float(colour)))
        Image.fromarray(grid).save(folder / "samples" / f"step_{100 * step:08d}.png")
    return folder


@pytest.fixture
def lambdas(tmp_path):
    """Three runs: with logged evaluations and images, with steps alone, and with evaluations before and after only."""
    sba = "WEIGHTING = @SBA()\n\nExperiment.batch_size = 64\nSBA.lam = {}\n"
    logged = [{"step": s, "evaluation/frechet_distance": d} for s, d in ((10, 8.0), (20, 4.0))]
    with_images = [{**r, "images": 7 * r["step"], "evaluation/inception_score": 6.0} for r in logged]
    folder = tmp_path / "runs"
    write_run(folder / "c", sba.format(3.0), [{"step": 5, "loss": 1.0}, *with_images], colours=(-1, 0, 1))
    write_run(folder / "b", sba.format(-1.0), logged, colours=(1, -1))
    kl = "WEIGHTING = @KL()\nExperiment.batch_size = 4\n"
    write_run(
        folder / "a",
        kl,
        [{"step": 30, "loss": 1.0}],
        before={"frechet_distance": 26.0},
        after={"frechet_distance": 3.5, "inception_score": 7.0},
        colours=(-1, 1),
    )
    return folder


def test_lambda_curves_read_whatever_a_run_has(lambdas):
    found = run_curves.find_runs(lambdas)
    assert {label: path.name for label, path in found.items()} == {"λ = -1": "b", "λ = 0 (KL)": "a", "λ = 3": "c"}
    rows = run_curves.lambda_curves(found)
    values = [tuple(row.values()) for row in rows]
    expected = [
        ("λ = -1", 640, 8.0, math.nan),
        ("λ = -1", 1280, 4.0, math.nan),
        ("λ = 0 (KL)", 0, 26.0, math.nan),
        ("λ = 0 (KL)", 120, 3.5, 7.0),
        ("λ = 3", 70, 8.0, 6.0),
        ("λ = 3", 140, 4.0, 6.0),
    ]
    assert repr(values) == repr(expected)  # in which NaN is NaN
    figure = run_curves.draw_lambda_curves(rows)
    drawn = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    assert drawn == [[[0.64, 8], [1.28, 4]], [[0, 26], [0.12, 3.5]], [[0.07, 8], [0.14, 4]]]
    assert len(figure.axes[1].lines) == 2  # who never measured it has no curve


@pytest.mark.parametrize(
    ("gin", "label"),
    [
        ("WEIGHTING = @SBA()\nSBA.lam = 0.5", "λ = 0.5"),
        ("WEIGHTING = @LS()", "λ = 1 (LS)"),
        ("WEIGHTING = @ForwardKL()", "λ = -1 (ForwardKL)"),
        ("WEIGHTING = @JensenShannon()", "JensenShannon"),
        ("Experiment.steps = 3", "folder"),
    ],
)
def test_the_legend_is_what_the_gin_file_binds(gin, label, tmp_path):
    assert run_curves.label_of(write_run(tmp_path / "folder", gin, [])) == label


def test_runs_without_anything_to_draw_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"no folder with a config\.gin"):
        run_curves.find_runs(tmp_path)
    folder = write_run(tmp_path / "run", "WEIGHTING = @KL()", [{"step": 1, "loss": 2.0}], colours=(1,))
    with pytest.raises(ValueError, match="no run has evaluation/frechet_distance"):
        run_curves.lambda_curves({"run": folder})
    with pytest.raises(ValueError, match="holds 1 grids"):
        run_curves.initialisations({"run": folder})
    with pytest.raises(FileNotFoundError, match=r"has no config\.gin"):
        score_difference.load_run(tmp_path, torch.device("cpu"))


def test_initialisations_show_the_first_and_the_last_grid(lambdas):
    rows = run_curves.initialisations(run_curves.find_runs(lambdas))
    assert [(row["run"], row["stage"], row["step"]) for row in rows[:4]] == [
        ("λ = -1", "before", 0),
        ("λ = -1", "after", 100),
        ("λ = 0 (KL)", "before", 0),
        ("λ = 0 (KL)", "after", 100),
    ]
    assert repr([row["frechet_distance"] for row in rows]) == "[nan, nan, 26.0, 3.5, nan, nan]"
    figure = run_curves.draw_initialisations(rows)
    pictures = [np.asarray(axis.images[0].get_array()) for axis in figure.axes]
    whole = np.asarray(Image.open(rows[0]["file"]))
    for picture, value in zip(pictures, [255, 0, 0, 0, 255, 255], strict=True):  # all before, then all after
        assert (picture == whole[: 2 + 4 * 58, : 2 + 4 * 58] if value == 255 else picture[2:58, 2:58] == value).all()
    assert figure.axes[1].get_title(loc="left") == "λ = 0 (KL)\nstep 0, FD 26.0"


def test_saved_files_hold_the_figure_and_its_numbers(tmp_path):
    rows = weighting_curves.h_curves(points=21)
    paths = save(weighting_curves.draw_h_curves(rows), rows, tmp_path / "new" / "h")
    assert [path.name for path in paths] == ["h.png", "h.svg", "h.csv"]
    assert Image.open(paths[0]).size == (2000, 768)
    text = paths[1].read_text()
    assert all(row.label in text for row in TABLE)
    assert [(row["weighting"], float(row["h"])) for row in read(paths[2])] == [(r["weighting"], r["h"]) for r in rows]
    first = [path.read_bytes() for path in paths]
    save(weighting_curves.draw_h_curves(rows), rows, tmp_path / "new" / "h")
    assert [path.read_bytes() for path in paths] == first


def command(*flags):
    return subprocess.run([sys.executable, TOOL, *flags], capture_output=True, text=True)


@pytest.mark.slow
def test_all_draws_what_needs_no_run(tmp_path):
    done = command("all", f"--out={tmp_path}", "--samples=1000")
    assert done.returncode == 0, done.stderr
    names = ("normalized_variance", "h_curves", "weighting_curves", "normalized_weights", "reward_error")
    expected = {f"{name}.{suffix}" for name in names for suffix in ("png", "svg", "csv")}
    assert {path.name for path in tmp_path.iterdir()} == expected == {Path(p).name for p in done.stdout.split()}
    rows = read(tmp_path / "normalized_variance.csv")
    exact = {(row["weighting"], float(row["m"])): float(row["exact"]) for row in rows}
    assert exact["BE / forward KL", 1.0] == pytest.approx(math.e - 1, rel=1e-12)


@pytest.fixture
def trained(tmp_path):
    """A run of three steps on the ring of modes."""
    lines = ["MLP.width = 16", "Experiment.evaluator = None", "Experiment.steps = 3", "Experiment.batch_size = 16"]
    cfg = config.parse(["gin/mixture2d_scores.gin"], [*lines, "WEIGHTING = @BE()"], {})
    workdir = tmp_path / "trained"
    workdir.mkdir()
    config.save(cfg, workdir / "config.gin")
    trainer.train(config.build(cfg), workdir=workdir, device="cpu")
    return workdir


def test_figures_of_runs_are_drawn_by_their_commands(trained, lambdas, tmp_path):
    names = ["score_difference", "lambda_curves", "initialisations"]
    run = f"--run=mine=2={lambdas / 'c'}"
    done = command(
        *names, f"--workdir={trained}", f"--folder={lambdas}", run, f"--out={tmp_path / 'out'}", "--samples=300"
    )
    assert done.returncode == 0, done.stderr
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {f"{name}.{suffix}" for name in names for suffix in ("png", "svg", "csv")}
    rows = read(tmp_path / "out" / "score_difference.csv")
    assert len(rows) == 300
    assert "Spearman" in done.stdout
    assert "mine=2" in {row["run"] for row in read(tmp_path / "out" / "lambda_curves.csv")}
    task, step = score_difference.load_run(trained, torch.device("cpu"))
    drawn = score_difference.score_difference(task, samples=300, generator=torch.Generator().manual_seed(0))
    assert step == 3
    np.testing.assert_allclose([float(row["log_ratio"]) for row in rows], columns(drawn, "log_ratio")[0], atol=1e-6)
    assert np.ptp(columns(drawn, "log_ratio")[0]) > 0  # the trained estimator's, not the zero it starts from


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nonsense"], "not nonsense: normalized_variance"),
        ([], "give the name of a figure"),
        (["score_difference"], "give its folder as --workdir"),
        (["lambda_curves"], "give --folder=FOLDER"),
        (["lambda_curves", "--run=KL=/nowhere"], "--run=KL=/nowhere: give LABEL=FOLDER"),
    ],
)
def test_mistakes_end_in_one_line(flags, message, tmp_path):
    done = command(*flags, f"--out={tmp_path}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_list_says_what_there_is():
    done = command("--list")
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "normalized_variance",
        "h_curves",
        "weighting_curves",
        "normalized_weights",
        "reward_error",
        "score_difference",
        "lambda_curves",
        "initialisations",
    ]
