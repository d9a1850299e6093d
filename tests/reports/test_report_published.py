"""report_published.py: every published row belongs to one recipe, and stands only beside numbers of the same kind."""

import re
from pathlib import Path

import pytest

from ratiograph import config
from ratiograph.config.differences import read_bindings
from ratiograph.reports.published import Measured, own_rows, published_table, read_published
from test_report import Page, cells

PAPERS = Path(__file__).resolve().parents[2] / "gin" / "papers"
RECIPES = sorted(p for p in PAPERS.glob("*/*.gin") if "stage1" not in p.name)
INCEPTION = "(Inception-v3, legacy_tensorflow)"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Bindings of a gin file as a run would have saved them."""
    folder = tmp_path_factory.mktemp("saved")

    def bindings(name, *lines):
        config.save(config.parse([str(PAPERS / name)], lines), folder / "config.gin")
        return read_bindings(folder / "config.gin")

    return bindings


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_each_recipe_is_recognised_as_its_own_row_and_as_no_other(saved, path):
    name = f"{path.parent.name}/{path.name}"
    bindings = saved(name)
    recognised = [row["file"] for dataset in datasets(bindings) for row in own_rows(bindings, dataset)]
    assert recognised == [row["file"] for row in read_published()["rows"] if row.get("file") == name]


def datasets(bindings) -> list[str]:
    text = str(list(bindings.values()))
    found = {"cifar10": "cifar10", "imagenet64": "imagenet-?64", "coco_sd15": "SD15UNet", "coco_sdxl": "SDXLUNet"}
    return [name for name, words in found.items() if re.search(words, text)]


def test_the_numbers_are_those_of_the_table_of_published_rows():
    """The README of gin/papers lists what each file reproduces; the two were copied from the papers separately."""
    listed = {}
    for line in (PAPERS / "README.md").read_text(encoding="utf-8").splitlines():
        parts = [part.strip() for part in line.split("|")]
        if len(parts) > 4 and parts[1].startswith("`"):
            listed[parts[1].strip("`")] = " | ".join(parts[2:4])
    rows = [row for row in read_published()["rows"] if "file" in row]
    assert len(rows) == 35
    for row in rows:
        text = listed[row["file"]]
        assert f"FID {row['frechet']:.2f}" in text, row["file"]
        for key, words, scale in (("recall", "recall", 1), ("inception_score", "IS", 1), ("clip_score", "CLIP", 100)):
            found = re.search(rf"{words} ([\d.]+)", text)
            assert (key in row) == bool(found), (row["file"], key)
            assert not found or row[key] == pytest.approx(scale * float(found[1])), (row["file"], key)
        if row["place"].startswith("Table"):
            assert f"{row['place']}," in text, row["file"]


def evaluation(frechet, samples=50_000, label=f"Fréchet distance {INCEPTION}", **numbers):
    metrics = {
        "frechet": {"label": label, "better": "lower"},
        "frechet_error": {"label": "±", "better": None, "of": "frechet"},
    }
    row = {"evaluations": 1, "samples": samples, "frechet": frechet, "frechet_error": 0.0134}
    rows = [
        {**row, "name": "student before training", "frechet": 99.0},
        {**row, "name": "student, one evaluation", "highlight": True},
        {"name": "real images", "evaluations": 0, "samples": samples, "frechet": 0.1},
    ]
    return {"rows": rows, "metrics": metrics}


def test_measured_rows_stand_above_the_published_ones_each_marked(saved):
    run = Measured("mine", saved("f_distill/cifar10_forward_kl.gin"), evaluation(1.98765))
    html = published_table([run])
    Page(html)
    rows = cells(html)
    assert rows[0] == ["student, one evaluation measured here 50,000 samples", "1.99 ± 0.013", "1"]
    assert all("published" in row[0] and "arXiv" in row[0] for row in rows[1:])
    values = [float(row[1]) for row in rows[1:]]
    assert values == sorted(values)
    assert values == sorted(row["frechet"] for row in read_published()["rows"] if row["dataset"] == "cifar10")
    own = [row for row in rows if "this recipe" in row[0]]
    assert [row[0].split(" this recipe")[0] for row in own] == ["forward KL, conditional, GAN"]
    assert "so the two compare only" not in html  # both on 50,000
    assert "clean-fid" in html


def test_another_number_of_samples_is_said(saved):
    html = published_table([Measured("", saved("score_free/imagenet64_dijs.gin"), evaluation(3.0, samples=5000))])
    assert "Measured on 5,000 samples, published on 50,000" in html
    assert "CIFAR" not in html


@pytest.mark.parametrize("label", ["Fréchet distance (digit features)", "Fréchet distance (EfficientNet-Lite0)"])
def test_distances_on_other_features_are_compared_with_nothing(saved, label):
    assert published_table([Measured("", saved("score_free/cifar10_dijs.gin"), evaluation(2.0, label=label))]) == ""


def test_other_data_have_no_published_rows(saved):
    assert published_table([Measured("", {"ShardStream.urls": "mnist"}, evaluation(2.0))]) == ""
    assert published_table([Measured("", {"ShardStream.urls": "data/cifar100/{000..009}.tar"}, evaluation(2.0))]) == ""


def test_zero_shot_numbers_need_the_protocol_s_30_000_samples(saved):
    bindings = saved("f_distill/sd15_jensen_shannon.gin")
    assert published_table([Measured("", bindings, evaluation(8.0, samples=5000))]) == ""
    html = published_table([Measured("", bindings, evaluation(8.0, samples=30_000))])
    (own,) = (row for row in cells(html) if "this recipe" in row[0])
    assert own[:2] == [own[0], "7.42"]


def test_of_several_runs_each_has_its_row_and_a_teacher_they_share_stands_once(saved):
    teacher = {"name": "teacher, 35 evaluations", "evaluations": 35, "samples": 50_000, "frechet": 1.8}
    runs = []
    for name, value in (("one", 2.1), ("two", 1.9)):
        found = evaluation(value)
        found["rows"].insert(0, teacher)
        runs.append(Measured(name, saved("score_free/cifar10_dijs.gin"), found))
    measured = [row for row in cells(published_table(runs)) if "measured here" in row[0]]
    assert [(row[0].partition(" measured")[0], row[1]) for row in measured] == [
        ("teacher, 35 evaluations", "1.80"),
        ("one", "2.10 ± 0.013"),
        ("two", "1.90 ± 0.013"),
    ]
