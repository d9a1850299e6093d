"""tools/evaluate.py on a run of Stable Diffusion, tiny: the COCO-30k protocol and in-batch similarity, end to end."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from PIL import Image
from transformers import CLIPImageProcessor

import tiny_runs
from ratiograph.core.draws import SampleDraws
from ratiograph.evaluation.alignment import ClipScore
from ratiograph.evaluation.candidates import AveragedStudent
from ratiograph.evaluation.features import EfficientNetLite0Features, to_pixels
from ratiograph.evaluation.frechet import fit, frechet_distance
from ratiograph.evaluation.image_sources import CaptionedSamples, FolderStream, stream_images
from ratiograph.evaluation.metrics import in_batch_similarity
from ratiograph.networks.autoencoder import Autoencoder
from ratiograph.networks.text_encoders import SD15CaptionEncoder

CPU = torch.device("cpu")
WORDS = ("ab", "cab", "two", "CATS", "a", "dog")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(task, folder with ``run``, real images and COCO's captions file, the materials of the run)."""
    folder = tmp_path_factory.mktemp("coco")
    macros = tiny_runs.material(folder / "material", "sd15")
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessor(**sizes).save_pretrained(macros["REWARD"])
    task = tiny_runs.train(tiny_runs.parse(["gin/sd15_di_bregman.gin"], macros, steps=1), folder / "run")
    annotations = [{"id": 5 * k, "caption": f"{WORDS[k % 6]} {WORDS[k // 6]} "} for k in range(36)]
    (folder / "captions_val2014.json").write_text(json.dumps({"annotations": annotations}))
    (folder / "val2014").mkdir()
    generator = np.random.default_rng(0)
    for k in range(24):
        Image.fromarray(generator.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / "val2014" / f"{k:03d}.png")
    return task, folder, macros


def tool(*arguments):
    command = [sys.executable, tiny_runs.ROOT / "tools/evaluate.py", *map(str, arguments), "--device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


def images(made, prompts, repeats):
    """What the tool is to judge: [prompts * repeats, 3, 16, 16] and the captions."""
    task, folder, macros = made
    source = CaptionedSamples(
        captions=str(folder / "captions_val2014.json"),
        encoder=SD15CaptionEncoder(weights=macros["TEACHER"]),
        autoencoder=Autoencoder(weights=macros["TEACHER"]),
        prompts=prompts,
        repeats=repeats,
        size=16,
    )
    source.load(CPU)
    found = source.make(task, SampleDraws(0, range(prompts * repeats)), AveragedStudent())
    return found.images, [source.texts[k // repeats] for k in range(prompts * repeats)]


@pytest.mark.slow
def test_the_zero_shot_protocol(made):
    _, folder, macros = made
    statistics = folder / "coco16.npz"
    tool("stats", f"--data={folder / 'val2014'}", "--size=16", "--features=lite0", f"--out={statistics}")
    done = tool(
        folder / "run",
        "--preset=coco30k",
        *("--samples=20", "--prompts=20", "--size=16", "--batch_size=7", "--features=lite0", "--metrics=frechet,kid"),
        *(f"--reference={statistics}", f"--captions={folder / 'captions_val2014.json'}"),
        *(f"--pipeline={macros['TEACHER']}", f"--clip={macros['REWARD']}"),
        *("--hps=none.pt", "--aesthetic=none.pth", f"--out={folder / 'zero_shot.json'}"),
    )
    (row,) = json.loads((folder / "zero_shot.json").read_text())["rows"]
    pictures, texts = images(made, 20, 1)
    network = EfficientNetLite0Features().load()
    real = next(stream_images(FolderStream(path=str(folder / "val2014"), size=16), 24)(range(24))).images
    expected = frechet_distance(fit(network(real)), fit(network(pictures)))
    assert row["frechet"] == pytest.approx(expected, rel=1e-3)
    scores = ClipScore(folder=macros["REWARD"]).load()(pictures, texts).double()
    assert row["clip"] == pytest.approx(float(scores.mean()), abs=1e-3)
    assert row["clip_error"] == pytest.approx(float(scores.std()) / 20**0.5, rel=1e-2)
    assert row["samples"] == 20
    assert {"hps", "aesthetic"} & row.keys() == set()
    for line in ("HPSv2Reward.weights='none.pt'", "AestheticReward.head='none.pth'"):
        assert sum(line in told for told in done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_in_batch_similarity_of_each_caption(made):
    _, folder, macros = made
    tool(
        folder / "run",
        *("--prompts=4", "--repeats=3", "--samples=12", "--size=16", "--batch_size=5", "--features=lite0"),
        *("--metrics=in_batch_similarity", f"--reference={folder / 'val2014'}", f"--out={folder / 'similarity.json'}"),
        *(f"--captions={folder / 'captions_val2014.json'}", f"--pipeline={macros['TEACHER']}"),
    )
    (row,) = json.loads((folder / "similarity.json").read_text())["rows"]
    pictures, _ = images(made, 4, 3)
    features = EfficientNetLite0Features().load()(pictures)
    similarity, error = in_batch_similarity(features, torch.arange(12) // 3)
    assert row["in_batch_similarity"] == pytest.approx(similarity, abs=1e-4)
    assert row["in_batch_similarity_error"] == pytest.approx(error, abs=1e-4)
    assert to_pixels(pictures).std() > 1
