"""The sheet's blocks are the teacher's and the students' own samples of the same prompts and noise."""

import numpy as np
import pytest
import torch
from PIL import Image

from ratiograph import config
from ratiograph.core.draws import SampleDraws
from ratiograph.evaluation.prompt_sheet import GAP, HEAD
from ratiograph.networks.conditions import Prompts
from ratiograph.networks.weights.weight_files import save_weights
from ratiograph.networks.word_encoder import WordEncoder
from ratiograph.training.logs import make_grid
from tools_here import call, tool

LINES = ["EDM.weights = None", "CaptionedUNet.channels = 16", "Experiment.precision = 'fp32'"]
PROMPTS = ["a red seven", "a two", "a digit"]
CPU = torch.device("cpu")


def made(folder, seed):
    """A run's folder with a student of random weights; its task."""
    folder.mkdir()
    cfg = config.parse(["gin/captions_distillation.gin"], LINES, {})
    config.save(cfg, folder / "config.gin")
    torch.manual_seed(seed)
    task = config.build(cfg).task
    task.prepare(CPU, None)
    for weights in task.average.parameters():
        weights.data += 0.02 * torch.randn_like(weights)
    save_weights(folder / "student.safetensors", task.average)
    return task


def test_every_block_is_its_samplers(tmp_path, capsys):
    tasks = [made(tmp_path / name, seed) for seed, name in enumerate(("a", "b"))]
    out = tmp_path / "sheet.png"
    with tool("compare_students") as sheet:
        runs = (f"--run={tmp_path / 'a'}", f"--run=second={tmp_path / 'b'}", f"--out={out}")
        prompts = (f"--prompt={prompt}" for prompt in PROMPTS)
        assert call(sheet, *runs, *prompts, "--columns=2", "--evaluations=0", "--seed=3", "--device=cpu") == 0
    assert capsys.readouterr().out.strip() == str(out)
    captions = Prompts(captions=[prompt for prompt in PROMPTS for _ in range(2)], encoder=WordEncoder())
    picture, blocks = np.asarray(Image.open(out)), []
    for task in tasks:
        draws = SampleDraws(3, range(6), CPU)
        with torch.no_grad():
            images = task.average(task.average.noise_of(draws), captions.sampled(draws, task.average))
        blocks.append(make_grid(images, 2, min_side=56))
    left = picture.shape[1]
    for block in reversed(blocks):
        left -= block.shape[1] + GAP
        seen = picture[HEAD : HEAD + block.shape[0], left : left + block.shape[1]].astype(int)
        assert np.abs(seen - block).max() <= 1
    assert np.abs(blocks[0].astype(int) - blocks[1]).max() > 20


@pytest.mark.parametrize(
    ("runs", "said"), [(["{0}"], "has no config.gin"), (["x={0}/a", "x={0}/a"], "two runs are called x")]
)
def test_mistakes_are_one_clear_line(tmp_path, capsys, runs, said):
    made(tmp_path / "a", 0)
    with tool("compare_students") as sheet:
        folders = (f"--run={run.format(tmp_path)}" for run in runs)
        assert call(sheet, *folders, "--evaluations=0", "--device=cpu") == 1
    assert said in capsys.readouterr().err
