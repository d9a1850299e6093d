"""Waiting for data, on streams whose delays are known; and in real steps of digits and of made-up latents."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from benchmarks.data_wait import bench_data, delivery_seconds, waits
from benchmarks.inputs import drawn, made_up_batch, made_up_condition, made_up_latents
from ratiograph import config
from ratiograph.networks.architectures.unet import UNet

CPU = torch.device("cpu")
SD15 = [
    *("SD15UNet.block_out_channels = (8, 8)", "SD15UNet.layers_per_block = 1", "SD15UNet.norm_groups = 4"),
    *("SD15UNet.resolution = 8", "SD15UNet.cross_attention_dim = 12", "SD15UNet.attention_heads = 2"),
    *("StudentScoreHeadRatio.width = 8", "LatentStream.workers = 0"),
]


def slow(seconds):
    """Batches that take so long each."""
    for number in itertools.count():
        time.sleep(seconds)
        yield number


def test_waits_and_work_are_told_apart():
    seen = []
    waited, worked = waits(slow(0.02), lambda batch: (seen.append(batch), time.sleep(0.05)), 4)
    assert seen == list(range(6))  # two that are not counted
    assert len(waited) == len(worked) == 4
    assert min(waited) >= 0.02
    assert min(worked) >= 0.05
    assert min(waited) < 0.04 < min(worked)


def test_delivery_is_a_batch_s_share():
    assert 0.02 <= delivery_seconds(slow(0.02), 5) < 0.2


def test_digits():
    tiny = ["UNet.channels = 16"]
    record = bench_data(["gin/mnist_sba.gin"], tiny, precision="fp32", batch_size=8, steps=3, made_up=0, device=CPU)
    assert 0 <= record["wait_share"] < 1
    assert record["samples_per_second"] == pytest.approx(8 / record["delivery_seconds"])
    assert record["step_seconds"] > 0


def test_conditions_are_what_the_network_is_told():
    generator = torch.Generator().manual_seed(0)
    assert made_up_condition(UNet(resolution=8, channels=16), 3, generator).parts() == {}
    labels = made_up_condition(UNet(resolution=8, channels=16, classes=3), 200, generator).labels
    assert set(labels.tolist()) == {0, 1, 2}


def test_latents_of_the_run_s_own_shapes(tmp_path):
    pytest.importorskip("diffusers")
    experiment = config.build(config.parse(["gin/sd15_di_bregman.gin"], SD15))
    (path,) = made_up_latents(experiment, tmp_path, 20)
    assert path.parent == tmp_path
    batch = next(experiment.data.batches(4, 0))
    assert batch.images.shape == (4, 4, 8, 8)
    assert batch.condition.text.shape == (4, 77, 12)
    network = experiment.task.student.denoiser.network
    made = made_up_batch(network, 20, torch.Generator().manual_seed(0)).images.half().float()
    assert (made[:, None] == batch.images[None]).flatten(2).all(2).any(0).all()  # the very samples


@pytest.mark.parametrize(("more", "draws"), [((), 3), (("gin/base/sd15_lora.gin",), 1)])
def test_networks_without_weights_are_drawn_and_a_shared_base_once(more, draws, monkeypatch):
    pytest.importorskip("diffusers")
    from ratiograph.networks.architectures.text_unet import TextUNet

    seen, draw = [], TextUNet.draw
    monkeypatch.setattr(TextUNet, "draw", lambda network: (seen.append(network), draw(network)))
    task = drawn(config.build(config.parse(["gin/sd15_di_bregman.gin", *more], SD15)).task)
    assert len(seen) == draws
    networks = [module for module in task.modules() if isinstance(module, TextUNet)]
    assert [network.filled for network in networks] == [True] * 3
    for network in networks:
        assert bool((network.unet.conv_norm_out.weight == 1).all())
        largest = float(network.unet.conv_in.weight.detach().abs().max())
        assert 0.9 < largest * 36**0.5 <= 1  # torch draws uniformly up to one over the root of the fan-in


def test_a_run_of_made_up_latents():
    pytest.importorskip("diffusers")
    asked = {"precision": "fp32", "batch_size": 2, "steps": 2, "device": CPU}
    record = bench_data(["gin/sd15_di_bregman.gin"], SD15, made_up=20, **asked)
    assert 0 < record["delivery_seconds"] < 10
    assert record["made_up"] == 20


@pytest.mark.parametrize(
    ("file", "made_up", "message"),
    [("gin/mnist_sba.gin", 5, "reads a ShardStream"), ("gin/mixture2d_scores.gin", 0, "say whose data")],
)
def test_what_has_no_such_data(file, made_up, message):
    with pytest.raises(ValueError, match=message):
        bench_data([file], [], precision="fp32", batch_size=2, steps=1, made_up=made_up, device=CPU)
