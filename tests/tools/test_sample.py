"""tools/sample.py: one set of samples, whatever the batch, the number of processes or the file."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ratiograph import config
from ratiograph.core.draws import SampleDraws
from ratiograph.core.types import Condition
from ratiograph.networks.autoencoder import Autoencoder
from ratiograph.networks.guidance import Guided
from ratiograph.networks.samplers import DDIMSampler, HeunSampler
from ratiograph.networks.text_encoders import SD15CaptionEncoder, SDXLCaptionEncoder
from ratiograph.networks.weights.weight_files import load_weights, save_weights
from ratiograph.training import checkpoints
from tools_here import call as run_tool
from tools_here import tool

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "sample.py"

RUN = """
Experiment.task = @Distillation()
Experiment.steps = 1
Experiment.batch_size = 2
Experiment.seed = 3
EDM.network = @UNet()
UNet.resolution = 8
UNet.channels = 16
UNet.multipliers = (1, 2)
UNet.classes = 3
UNet.label_dropout = 0.1
Distillation.student = @OneStep()
OneStep.denoiser = @EDM()
Distillation.teacher = @EDM()
Distillation.student_score = @EDM()
Distillation.student_score_times = @KarrasIndex()
Distillation.student_score_optimizer = @Adam()
Distillation.objective = @Objective()
Objective.terms = {'matching': @Term()}
Term.direction = @ScoreDifference()
Term.weighting = @KL()
Distillation.noising = @VarianceExploding()
Distillation.times = @KarrasIndex()
Distillation.student_optimizer = @Adam()
Distillation.ema = @EMA()
"""


def randomized(module, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    return module


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The folder of a run, with a teacher and a student that take their labels to heart."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "run.gin").write_text(RUN)
    task = config.build(config.parse([str(folder / "run.gin")])).task
    save_weights(folder / "teacher.safetensors", randomized(task.teacher, 1))
    save_weights(folder / "student.safetensors", randomized(task.student, 2))
    lines = [f"teacher/EDM.weights='{folder}/teacher.safetensors'", "Distillation.teacher=@teacher/EDM()"]
    config.save(config.parse([str(folder / "run.gin")], lines), folder / "config.gin")
    return folder


def task_of(workdir):
    task = config.build(config.parse([str(workdir / "config.gin")])).task
    task.prepare(torch.device("cpu"), None)
    task.average.load_state_dict(randomized(task.student, 2).state_dict())
    return task.eval()


@pytest.fixture
def run(workdir, capsys):
    """run(*flags) => (exit code, error line), in this process."""
    with tool("sample") as sample:

        def call(*arguments, folder=workdir):
            code = run_tool(sample, f"--workdir={folder}", "--precision=fp32", "--device=cpu", *arguments)
            return code, capsys.readouterr().err

        yield call


def arrays(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def levels(x0):
    return np.rint((x0.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)


# ------------------------------------------------------------------------------------------- what is sampled


def test_samples_are_the_students_of_their_own_draws(run, workdir, tmp_path):
    assert run("--samples=9", "--first=4", "--seed=6", f"--out={tmp_path}/a.npz")[0] == 0
    found, task = arrays(tmp_path / "a.npz"), task_of(workdir)
    draws = SampleDraws(6, range(4, 13))
    labels, z = draws.integers(3), draws.normal((1, 8, 8))
    with torch.no_grad():
        expected = task.student(z, Condition(labels))
    assert list(found) == ["x0", "indices", "labels"]
    assert found["indices"].tolist() == list(range(4, 13))
    assert found["labels"].tolist() == labels.tolist()
    np.testing.assert_allclose(found["x0"], expected.numpy(), atol=1e-6)
    other = task.student(z, Condition((labels + 1) % 3)).detach()
    assert float((other - expected).abs().amax((1, 2, 3)).min()) > 1e-3


def test_neither_batch_nor_first_changes_a_sample(run, tmp_path):
    """Up to the order in which a processor adds."""
    flags_of = {"whole": ["--batch_size=64"], "sevens": ["--batch_size=7"], "later": ["--first=5", "--samples=25"]}
    for name, given in flags_of.items():
        assert run("--samples=30", *given, f"--out={tmp_path}/{name}.npz")[0] == 0
    whole, sevens, later = (arrays(tmp_path / f"{name}.npz") for name in flags_of)
    np.testing.assert_allclose(sevens["x0"], whole["x0"], atol=2e-6)
    np.testing.assert_allclose(later["x0"], whole["x0"][5:], atol=2e-6)
    assert np.array_equal(sevens["labels"], whole["labels"])
    assert np.array_equal(later["labels"], whole["labels"][5:])
    assert np.abs(whole["x0"][1:] - whole["x0"][:-1]).reshape(29, -1).max(1).min() > 0.1


def test_the_teacher_gets_the_same_noise_and_labels(run, workdir, tmp_path):
    assert run("--samples=6", "--sampler=heun", "--steps=4", f"--out={tmp_path}/t.npz")[0] == 0
    found, task = arrays(tmp_path / "t.npz"), task_of(workdir)
    draws = SampleDraws(0, range(6))
    condition, noise = Condition(draws.integers(3)), draws.normal((1, 8, 8))
    expected = HeunSampler(steps=4).sample(task.teacher, noise, condition)
    np.testing.assert_allclose(found["x0"], expected.numpy(), atol=1e-5)
    guided = Guided(denoiser=task.teacher, guidance_scale=2.5)
    for flag, sampler in (("heun", HeunSampler(steps=4)), ("ddim", DDIMSampler(steps=4))):
        out = f"--out={tmp_path}/{flag}.npz"
        assert run("--samples=6", f"--sampler={flag}", "--steps=4", "--guidance_scale=2.5", out)[0] == 0
        expected = sampler.sample(guided, noise, condition).numpy()
        np.testing.assert_allclose(arrays(tmp_path / f"{flag}.npz")["x0"], expected, atol=1e-5)
    assert np.abs(arrays(tmp_path / "heun.npz")["x0"] - found["x0"]).max() > 1e-3


def test_classes_in_turn_keep_the_noise(run, workdir, tmp_path):
    assert run("--samples=5", "--class_label=2", "--class_label=0", f"--out={tmp_path}/c.npz")[0] == 0
    found = arrays(tmp_path / "c.npz")
    assert found["labels"].tolist() == [2, 0, 2, 0, 2]
    z = SampleDraws(0, range(5)).normal((1, 8, 8))
    with torch.no_grad():
        expected = task_of(workdir).student(z, Condition(torch.tensor([2, 0, 2, 0, 2])))
    np.testing.assert_allclose(found["x0"], expected.numpy(), atol=1e-6)


def test_conditions_of_the_data_come_from_the_checkpoint(run, workdir, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    text = (workdir / "config.gin").read_text() + "\nDistillation.conditions = @BatchConditions()\n"
    text += "Experiment.data = @ShardStream()\nShardStream.urls = 'mnist'\n"
    (folder / "config.gin").write_text(text)
    (folder / "student.safetensors").write_bytes((workdir / "student.safetensors").read_bytes())
    code, error = run("--samples=2", f"--out={tmp_path}/a.npz", folder=folder)
    assert (code, "has no checkpoint" in error) == (1, True)
    checkpoints.save(folder / "checkpoints", 1, {"task": {"conditions": {"labels": torch.tensor([1, 0, 2])}}})
    assert run("--samples=5", f"--out={tmp_path}/a.npz", folder=folder)[0] == 0
    assert arrays(tmp_path / "a.npz")["labels"].tolist() == [1, 0, 2, 1, 0]


CAPTIONED = """
include '{run}'
OneStep.denoiser = @StableDiffusion()
Distillation.teacher = @StableDiffusion()
Distillation.student_score = @StableDiffusion()
Distillation.conditions = @BatchConditions()
StableDiffusion.network = @UNetFromFolder()
UNetFromFolder.folder = '{pipeline}'
StableDiffusion.weights = '{pipeline}'
Experiment.data = @LatentStream()
LatentStream.urls = 'nowhere.tar'
"""


def captioned_run(folder, pipeline):
    """A run's configuration, with a student that differs from its teacher."""
    folder.mkdir()
    kept = [line for line in RUN.splitlines() if "UNet." not in line and "EDM" not in line]
    (folder / "run.gin").write_text("\n".join(kept))
    text = CAPTIONED.format(run=folder / "run.gin", pipeline=pipeline)
    (folder / "captioned.gin").write_text(text)
    cfg = config.parse([str(folder / "captioned.gin")])
    config.save(cfg, folder / "config.gin")
    student = config.build(cfg).task.student
    student.denoiser.load()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_weights(folder / "student.safetensors", student)
    return cfg


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_prompts_become_images(run, tmp_path, kind):
    pytest.importorskip("diffusers")
    import tiny_pipelines

    pipeline, folder = tmp_path / kind, tmp_path / "run"
    getattr(tiny_pipelines, kind)(pipeline)
    student = config.build(captioned_run(folder, pipeline)).task.student
    load_weights(folder / "student.safetensors", student)
    (tmp_path / "prompts.txt").write_text("ab cab\n\nTwo CATS\n")
    given = [f"--prompts={tmp_path}/prompts.txt", f"--pipeline={pipeline}", "--samples=3"]
    assert run(*given, f"--out={tmp_path}/x.npz", folder=folder)[0] == 0
    encoder = {"sd15": SD15CaptionEncoder, "sdxl": SDXLCaptionEncoder}[kind](weights=str(pipeline))
    autoencoder = Autoencoder(weights=str(pipeline))
    encoder.load()
    autoencoder.load()
    with torch.no_grad():
        latents = student(SampleDraws(0, range(3)).normal((4, 8, 8)), encoder.encode(["ab cab", "Two CATS", "ab cab"]))
        expected = autoencoder.decode(latents)
    found = arrays(tmp_path / "x.npz")
    assert list(found) == ["x0", "indices"]
    assert found["x0"].shape == (3, 3, 16, 16)
    np.testing.assert_allclose(found["x0"], expected.numpy(), atol=1e-5)
    assert run(given[0], given[2], f"--out={tmp_path}/own.npz", folder=folder)[0] == 0  # the run's own pipeline
    assert np.array_equal(arrays(tmp_path / "own.npz")["x0"], found["x0"])


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_the_teacher_above_the_student_with_captions(run, tmp_path, kind):
    pytest.importorskip("diffusers")
    import tiny_pipelines

    pipeline, folder = tmp_path / kind, tmp_path / "run"
    getattr(tiny_pipelines, kind)(pipeline)
    cfg = captioned_run(folder, pipeline)
    prompts = ["ab cab", "Two CATS"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    given = [f"--prompts={tmp_path}/prompts.txt", "--compare", "--sampler=ddim", "--steps=3"]
    assert run(*given, f"--out={tmp_path}/sheet.png", folder=folder)[0] == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    task = config.build(cfg).task
    encoder = {"sd15": SD15CaptionEncoder, "sdxl": SDXLCaptionEncoder}[kind](weights=str(pipeline))
    autoencoder = Autoencoder(weights=str(pipeline))
    for part in (task.teacher, encoder, autoencoder):
        part.load()
    load_weights(folder / "student.safetensors", task.student)
    z = SampleDraws(0, range(2)).normal((4, 8, 8))
    with torch.no_grad():
        made = DDIMSampler(steps=3).sample(task.teacher, z, encoder.encode(prompts))
        shown = [levels(autoencoder.decode(x0).numpy()) for x0 in (made, task.student(z, encoder.encode(prompts)))]
    assert np.abs(shown[0].astype(int) - shown[1]).max() > 10
    side, left = 112, sheet.shape[1] - 2 * 114 - 10  # two cells of 16 pixels seven times as large, and the margin
    for row, images in enumerate(shown):
        for k, image in enumerate(images.astype(int)):
            top, x = 10 + 114 * row, left + 114 * k
            assert np.abs(sheet[top : top + side : 7, x : x + side : 7] - image).max() <= 1, (row, k)
    captions, names = sheet[10 + 2 * 114 :, left:], sheet[:, :left]
    assert all(float((part < 100).mean()) > 0.005 for part in (captions[:, :114], captions[:, 114:], names))


# ---------------------------------------------------------------------------------------------- the files


def test_every_kind_of_file_holds_the_same_images(run, tmp_path):
    given = ["--samples=10", "--batch_size=4"]
    for out in ("x.npz", "grid.png", "folder"):
        assert run(*given, f"--out={tmp_path}/{out}")[0] == 0
    assert run(*given, "--uint8", f"--out={tmp_path}/u.npz")[0] == 0
    assert run(*given, "--shards=3", f"--out={tmp_path}/set")[0] == 0
    found = arrays(tmp_path / "x.npz")
    expected = levels(found["x0"])
    assert np.array_equal(arrays(tmp_path / "u.npz")["images"], expected)
    names = sorted(path.name for path in (tmp_path / "folder").glob("*.png"))
    assert names == [f"{k:06d}.png" for k in range(10)]
    for k, name in enumerate(names):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "folder" / name)), expected[k, ..., 0])
    grid = np.asarray(Image.open(tmp_path / "grid.png"))  # eight a row, pixels seven times as large, gaps of two
    assert np.array_equal(grid[2 : 2 + 56 : 7, 2 + 58 : 58 + 58 : 7, 0], expected[1, ..., 0])
    assert np.array_equal(grid[60 : 60 + 56 : 7, 2 : 2 + 56 : 7, 0], expected[8, ..., 0])
    index = json.loads((tmp_path / "set" / "index.json").read_text())["shards"]
    assert [shard["samples"] for shard in index.values()] == [3, 3, 4]
    members = {}
    for name in index:
        with tarfile.open(tmp_path / "set" / name) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}
    for k in range(10):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(members[f"{k:09d}.png"]))), expected[k, ..., 0])
        assert int(members[f"{k:09d}.cls"]) == found["labels"][k]


def test_a_folder_goes_on_where_it_was_left(run, tmp_path):
    given = ["--samples=12", "--batch_size=4", f"--out={tmp_path}/images"]
    assert run(*given)[0] == 0
    files = sorted((tmp_path / "images").glob("*.png"))
    before = {path: path.read_bytes() for path in files}
    times = {path: path.stat().st_mtime_ns for path in files}
    for k in (5, 6, 10):
        files[k].unlink()
    assert run(*given)[0] == 0
    assert {path: path.read_bytes() for path in sorted((tmp_path / "images").glob("*.png"))} == before
    untouched = [path for path in files[:4] if path.stat().st_mtime_ns == times[path]]
    assert len(untouched) == 4
    assert run("--samples=14", *given[1:])[0] == 0
    assert len(list((tmp_path / "images").glob("*.png"))) == 14
    for other in (["--seed=1"], ["--class_label=1"], ["--sampler=heun", "--steps=2"]):
        code, error = run(*given, *other)
        assert code == 1
        assert "holds samples of other settings" in error
    assert not list((tmp_path / "images").glob(".*"))


def test_two_processes_leave_the_same_bytes(run, workdir, tmp_path):
    given = [f"--workdir={workdir}", "--precision=fp32", "--device=cpu", "--samples=20", "--batch_size=4"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(TOOL)]
    done = subprocess.run(
        [*torchrun, *given, f"--out={tmp_path}/two.npz"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{tmp_path}/two.npz"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run("--samples=20", "--batch_size=4", f"--out={tmp_path}/one.npz")[0] == 0
    torch.set_num_threads(threads)
    one, two = (arrays(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert list(one) == list(two)
    for name, array in one.items():
        assert np.array_equal(array, two[name]), name


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--class_label=3"], "class 3 was asked for, but the student's network has classes 0 to 2"),
        (["--steps=4"], "give --sampler=heun too, or --compare"),
        (["--compare", "--out=x.npz"], "--compare draws a picture: give --out=NAME.png"),
        (["--prompts=/dev/null"], "--prompts=/dev/null holds no caption: write one a line"),
        (["runs/other"], "'runs/other' is no flag: give one folder"),
        (["--out=x.tar"], "--out=x.tar: a name ends in .png or .npz"),
        (["--out=x.png", "--shards=2"], "--shards fills a folder"),
        (["--out=x.png", "--uint8"], "--uint8 is of arrays"),
        (["--prompts=x.txt", "--pipeline=sd"], "No such file"),
        (["--weights=nowhere.safetensors"], "no weights at nowhere.safetensors"),
        (["--sampler=ddim", "--steps=1001", "--out=x.npz"], "1001 must be 1 to the process's 1000"),
    ],
)
def test_mistakes_are_one_clear_line(run, tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    code, error = run("--samples=2", *given)
    assert code == 1
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_no_run_is_one_clear_line(run, tmp_path):
    code, error = run(folder=tmp_path)
    assert (code, error) == (1, f"error: {tmp_path} has no config.gin: give the folder of a run as --workdir\n")


def test_points_are_no_images(run, tmp_path):
    cfg = config.parse([str(ROOT / "gin/mixture2d_scores.gin")])
    config.save(cfg, tmp_path / "config.gin")
    task = config.build(cfg).task
    save_weights(tmp_path / "student.safetensors", task.student)
    code, error = run("--samples=3", f"--out={tmp_path}/grid.png", folder=tmp_path)
    assert (code, "samples of shape [2] are no images" in error) == (1, True)
    assert run("--samples=3", f"--out={tmp_path}/x.npz", folder=tmp_path)[0] == 0
    assert arrays(tmp_path / "x.npz")["x0"].shape == (3, 2)


def test_samples_of_nan_are_not_written(run, workdir, tmp_path, monkeypatch):
    from ratiograph.networks.students import OneStep

    monkeypatch.setattr(OneStep, "forward", lambda self, z, condition: z * float("nan"))
    code, error = run("--samples=4", f"--out={tmp_path / 'nan.png'}")
    assert (code, "samples of the student hold NaN or infinity, and are not written" in error) == (1, True)
    assert not (tmp_path / "nan.png").exists()
