"""Students that are not Stable Diffusion's, exported: the folder samples to the bit as the run, and needs no run."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ratiograph import config
from ratiograph.core.draws import SampleDraws
from ratiograph.data.captions import pack
from ratiograph.networks.conditions import BatchConditions
from ratiograph.networks.guidance import Guided, NoCaption
from ratiograph.networks.samplers import HeunSampler
from ratiograph.networks.weights.weight_files import load_weights, save_weights
from ratiograph.networks.word_encoder import WordEncoder
from ratiograph.reports.export import export_lora, export_pipeline, export_plain
from ratiograph.tasks.student_files import load_student, read_experiment
from ratiograph.training import checkpoints
from tools_here import call, tool

SIZES = (
    *("CaptionedUNet.resolution = 8", "CaptionedUNet.channels = 16", "EncodedStream.encoder = @WordEncoder()"),
    "CaptionedStream.resolution = 8",
)
PROMPTS = ["a red seven", "", "a blue " + "very " * 2000 + "thin three"]


def randomized(module, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    return module


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The folder of a captions run, its weights random, its teacher's in a file beside it."""
    root = tmp_path_factory.mktemp("captions")
    bare = config.build(config.parse(["gin/captions_distillation.gin"], [*SIZES, "TEACHER = None"])).task
    save_weights(root / "teacher.safetensors", randomized(bare.teacher.denoiser, 1))
    cfg = config.parse(["gin/captions_distillation.gin"], [*SIZES, f"TEACHER = '{root}/teacher.safetensors'"])
    folder = root / "run"
    folder.mkdir()
    config.save(cfg, folder / "config.gin")
    save_weights(folder / "student.safetensors", randomized(bare.student, 2))
    told = WordEncoder().encode(["a red two", "a green six", "a nine"])
    state = {"text": told.text, "caption": pack(["a red two", "a green six", "a nine"])}
    checkpoints.save(folder / "checkpoints", 1, {"task": {"conditions": state}})
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 0.5}\n')
    return folder


@pytest.fixture
def sample(capsys):
    """sample(folder, *flags) => (exit code, error line)."""
    with tool("sample") as module:

        def sample(folder, *arguments):
            code = call(module, folder, "--precision=fp32", "--device=cpu", *arguments)
            return code, capsys.readouterr().err

        yield sample


def x0(path):
    with np.load(path) as file:
        return file["x0"]


def test_the_folder_samples_as_the_run_does_to_the_bit(workdir, sample, tmp_path):
    out = export_plain(workdir, tmp_path / "red")
    assert sorted(path.name for path in out.iterdir()) == [
        *("README.md", "conditions.safetensors", "config.gin", "student.safetensors"),
    ]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red seven\na three\n")
    for name, given in {"own": [], "prompts": [f"--prompts={prompts}"]}.items():
        for folder in (workdir, out):
            assert sample(folder, "--samples=5", *given, f"--out={tmp_path}/{folder.name}-{name}.npz")[0] == 0
    task = config.build(config.parse([str(workdir / "config.gin")])).task
    load_weights(workdir / "student.safetensors", task.student)
    z = SampleDraws(0, range(5)).normal((3, 8, 8))
    told = {
        "own": ["a red two", "a green six", "a nine", "a red two", "a green six"],
        "prompts": ["a red seven", "a three", "a red seven", "a three", "a red seven"],
    }
    for name, captions in told.items():
        found = x0(tmp_path / f"red-{name}.npz")
        assert np.array_equal(found, x0(tmp_path / f"run-{name}.npz"))
        with torch.no_grad():
            expected = task.student(z, WordEncoder().encode(captions)).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(x0(tmp_path / "red-own.npz") - x0(tmp_path / "red-prompts.npz")).max() > 1e-2


def test_the_folder_needs_neither_the_run_nor_the_teacher_s_weights(workdir, sample, tmp_path):
    moved = shutil.copytree(workdir, tmp_path / "run")
    text = (moved / "config.gin").read_text()
    (moved / "config.gin").write_text(text.replace(str(workdir.parent), "/gone"))
    out = export_plain(moved, tmp_path / "out")
    shutil.rmtree(moved)
    assert sample(out, "--samples=3", f"--out={tmp_path}/a.npz")[0] == 0
    assert sample(workdir, "--samples=3", f"--out={tmp_path}/b.npz")[0] == 0
    assert np.array_equal(x0(tmp_path / "a.npz"), x0(tmp_path / "b.npz"))
    code, error = sample(out, "--samples=3", "--compare", f"--out={tmp_path}/c.png")
    assert (code, error.count("\n")) == (1, 1)
    assert "no weights at /gone/teacher.safetensors" in error


def test_the_card_says_what_was_measured_and_how_to_sample(workdir, tmp_path):
    card = (export_plain(workdir, tmp_path / "red") / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: ratiograph")
    assert "python tools/sample.py red --prompts=prompts.txt" in card
    assert "- loss: 0.5" in card
    assert "network: CaptionedUNet" in card
    count = sum(tensor.numel() for tensor in read_experiment(workdir, memory=False).task.student.state_dict().values())
    assert f"the {count:,} averaged parameters" in card
    moved = shutil.copytree(workdir, tmp_path / "run")
    rows = '{"rows": [{"name": "student", "fd": 1.65058, "samples": 10}], "metrics": {"fd": {"label": "distance"}}}'
    (moved / "evaluation.json").write_text(rows)
    card = (export_plain(moved, tmp_path / "rows") / "README.md").read_text()
    assert "|  | distance | samples |\n|---|---:|---:|\n| student | 1.651 | 10 |" in card


def test_teacher_above_student_with_empty_and_very_long_captions(workdir, sample, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(["a red seven", PROMPTS[2]]))
    given = [f"--prompts={prompts}", "--samples=3", "--compare", "--steps=3", "--guidance_scale=3"]
    assert sample(workdir, *given, f"--out={tmp_path}/sheet.png")[0] == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    task = config.build(config.parse([str(workdir / "config.gin")])).task
    task.teacher.load()
    load_weights(workdir / "student.safetensors", task.student)
    guided = Guided(denoiser=task.teacher.denoiser, guidance_scale=3.0, unconditional=NoCaption())
    told = WordEncoder().encode(["a red seven", PROMPTS[2], "a red seven"])
    z = SampleDraws(0, range(3)).normal((3, 8, 8))
    with torch.no_grad():
        rows = [HeunSampler(steps=3).sample(guided, z, told), task.student(z, told)]
    left = sheet.shape[1] - 3 * 114 - 10
    for row, images in enumerate(rows):
        shown = np.rint((images.numpy().clip(-1, 1) + 1) * 127.5).transpose(0, 2, 3, 1)
        for k, image in enumerate(shown):
            top, x = 10 + 114 * row, left + 114 * k
            assert np.abs(sheet[top : top + 112 : 14, x : x + 112 : 14] - image).max() <= 1
    assert sheet.shape[0] == 10 + 2 * 114 + 3 * 16 + 10  # three lines of the long caption, no more


def test_a_run_that_has_not_finished_is_said_to_be_so(workdir, tmp_path):
    begun = shutil.copytree(workdir, tmp_path / "run")
    (begun / "student.safetensors").unlink()
    student = read_experiment(begun, memory=False).task.student
    with pytest.raises(FileNotFoundError, match=r"run/student\.safetensors is written at the end of training: repeat"):
        load_student(student, begun / "student.safetensors")


def test_mistakes_are_told(workdir, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.gin: give the workdir of a finished run"):
        export_plain(tmp_path, tmp_path / "out")
    for export in (export_pipeline, export_lora):
        with pytest.raises(ValueError, match="trained no student of Stable Diffusion"):
            export(workdir, tmp_path / "out")
    moved = shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(moved / "checkpoints")
    with pytest.raises(ValueError, match="has no checkpoint"):
        export_plain(moved, tmp_path / "out")
    save_weights(moved / "student.safetensors", torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="does not fit OneStep"):
        export_plain(moved, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with tool("export") as export:
        assert call(export, "--half", workdir, tmp_path / "out") == 1
        assert call(export, "--nohalf", workdir, tmp_path / "out") == 0
    assert (tmp_path / "out" / "student.safetensors").read_bytes() == (workdir / "student.safetensors").read_bytes()


def test_a_student_alone_takes_no_other_memory(workdir):
    task = read_experiment(workdir, memory=False).task
    assert isinstance(task.conditions, BatchConditions)
    student = load_student(task.student, workdir / "student.safetensors")
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in student.parameters())
    others = [p for node in (task.teacher, task.student_score, task.ratio) for p in node.parameters()]
    assert others
    assert all(parameter.is_meta for parameter in others)
