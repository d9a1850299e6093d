"""Every shipped run builds on the meta device and takes steps at a tiny size; test_papers.py does the papers' rows."""

from pathlib import Path

import pytest
import torch

from ratiograph import config

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    str(p.relative_to(ROOT))
    for p in (ROOT / "gin").rglob("*.gin")
    if not {"base", "papers"} & set(p.relative_to(ROOT).parts)
)
NARROW = {"UNet.channels": 16, "CaptionedUNet.channels": 16, "MLP.width": 16}
TINY = NARROW | {"EDM.weights": None, "EDMFromGrey.weights": None, "EncoderRatio.encoder_weights": None}


def parse(file):
    """The configuration of ``file`` with those of TINY's bindings that it uses."""
    names = config.to_dict(config.parse([file], [], {}))
    used = {name.rpartition("/")[2] for name in names}
    return config.parse([file], [f"{k} = {v}" for k, v in TINY.items() if k in used], {})


def test_there_are_runs():
    assert {"gin/mnist_sba.gin", "gin/mnist_js.gin", "gin/mnist_reward_tilt.gin", "gin/mnist_teacher.gin"} <= set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_builds_on_the_meta_device(file):
    with torch.device("meta"):
        experiment = config.build(config.parse([file], [], {}))
    assert all(parameter.is_meta for parameter in experiment.task.parameters())
    assert sum(parameter.numel() for parameter in experiment.task.parameters()) > 1000


# Stable Diffusion's runs take steps on small pipelines in test_sd15_run.py.
@pytest.mark.parametrize("file", [file for file in FILES if not Path(file).name.startswith("sd15_")])
def test_takes_steps(file):
    torch.manual_seed(0)
    experiment = config.build(parse(file))
    task = experiment.task
    task.prepare(torch.device("cpu"), None)
    batches = experiment.data.batches(4, 0, 0) if experiment.data else None
    generator = torch.Generator().manual_seed(0)
    for name, value in task.fit(batches, generator).items():
        assert abs(value) < 100, name
    task.critic_steps = 0
    before = {name: [p.clone() for p in network.parameters()] for name, network in task.trained().items()}
    for _ in range(3):
        metrics = task.step(next(batches) if batches else None, 4, generator)
    assert all(value.isfinite() for value in metrics.values())
    for name in task.optimizers:
        parameters = task.trained()[name].parameters()
        assert any(not torch.equal(a, b) for a, b in zip(before[name], parameters, strict=True)), f"{name} stood still"
