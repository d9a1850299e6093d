"""Recorded passes give what the network gives: on a CPU by a recording that runs the same work on the same memory."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.inputs import made_up_batch, randomised
from ratiograph import config
from ratiograph.core.types import Condition
from ratiograph.networks import cuda_graphs
from ratiograph.networks.architectures.unet import UNet
from ratiograph.networks.cuda_graphs import MOST, WARM, record_passes
from ratiograph.networks.denoisers import EDM
from ratiograph.tasks.distillation_check import check_parallel
from test_compilation import NETWORKS, made


class Simulated:
    """What a CUDA graph does: reads the inputs' memory, writes the results' memory, and runs none of Python's lines."""

    made = 0
    replays = 0

    def __init__(self, work, pool, device):
        Simulated.made += 1
        self.work, self.result = work, work()

    def replay(self):
        Simulated.replays += 1
        with torch.no_grad():
            cuda_graphs._map(lambda own, fresh: own.copy_(fresh), self.result, self.work())


@pytest.fixture(autouse=True)
def counted():
    Simulated.made = Simulated.replays = 0


def recorded(network: nn.Module, kind=Simulated, device: str = "cpu") -> nn.Module:
    """A copy of ``network`` whose passes are recorded."""
    network = copy.deepcopy(network)
    record_passes(EDM(network=network), kind, device)
    return network


def run(network, condition, x, c_noise):
    """Features and output of a pass."""
    encoding = network.encode(x, c_noise, condition)
    return [*encoding.features, network.decode(encoding)]


def equal(found, expected):
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_replays_follow_inputs_conditions_and_weights_and_leave_earlier_results_alone(name):
    network, condition, x, c_noise = made(name)
    mine = recorded(network)
    earlier = []
    for k in range(WARM + 4):
        condition = condition.map(lambda part: part if part.dtype == torch.int64 else part + 0.1)
        given = (condition, x + k, c_noise - 0.1 * k)
        expected = run(network, *given)
        found = run(mine, *given)
        assert equal(found, expected)
        earlier.append((found, [each.clone() for each in expected]))
        for one, other in zip(network.parameters(), mine.parameters(), strict=True):
            one.mul_(1.01), other.mul_(1.01)
    assert all(equal(*pair) for pair in earlier)
    assert (Simulated.made, Simulated.replays) == (2, 8)


def test_a_pass_with_gradients_runs_as_it_is():
    network, condition, x, c_noise = made("UNet")
    mine = recorded(network)
    for _ in range(WARM + 2):
        run(mine, condition, x, c_noise)[-1].square().sum().backward()
    run(network, condition, x, c_noise)[-1].square().sum().backward()
    assert not Simulated.made
    for one, other in zip(network.parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(other.grad, (WARM + 2) * one.grad, rtol=1e-6, atol=0)


@torch.no_grad()
def test_each_shape_precision_and_mode_is_recorded_apart_and_no_more_than_so_many():
    network, condition, x, c_noise = made("UNet")
    mine = recorded(network)

    def often():
        for _ in range(WARM + 1):
            run(mine, condition, x, c_noise)
        return Simulated.made // 2

    assert often() == often() == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert often() == 2
        assert equal(run(mine, condition, x, c_noise), run(network, condition, x, c_noise))
    mine.train()
    assert often() == 3
    mine.eval()
    mine.to(torch.float64).to(torch.float32)  # weights elsewhere
    assert often() == 4
    for batch in range(3, 3 + MOST):
        several = Condition(labels=torch.zeros(batch, dtype=torch.int64))
        images, levels = torch.randn(batch, *network.shape), torch.zeros(batch)
        for _ in range(WARM + 2):
            assert equal(run(mine, several, images, levels), run(network, several, images, levels))
    assert Simulated.made == 2 * MOST


@torch.no_grad()
def test_a_condition_told_and_one_not_told_are_two_recordings():
    _, condition, x, c_noise = made("UNet")
    network = UNet(resolution=8, channels=8, classes=3, label_dropout=0.1).eval()
    mine = recorded(network)
    for _ in range(WARM + 2):
        for told in (condition, Condition(), Condition(caption=torch.zeros(2, 1024, dtype=torch.uint8))):
            assert equal(run(mine, told, x, c_noise), run(network, told, x, c_noise))
    assert Simulated.made == 2 + 1  # decoding is the same, and a caption is not read


@torch.no_grad()
def test_a_copy_of_a_network_records_its_own_weights():
    network, condition, x, c_noise = made("UNet")
    mine = recorded(network)
    for _ in range(WARM + 1):
        run(mine, condition, x, c_noise)
    average = copy.deepcopy(mine)
    for parameter in average.parameters():
        parameter.mul_(1.1)
    for parameter in network.parameters():
        parameter.mul_(1.1)
    for _ in range(WARM + 2):
        assert equal(run(average, condition, x, c_noise), run(network, condition, x, c_noise))
    assert Simulated.made == 4


@pytest.mark.parametrize("run_file", ["gin/mnist_f_distill.gin", "gin/mnist_sba.gin"])
def test_steps_with_recorded_passes_are_the_steps_without(run_file, monkeypatch):
    def steps(*lines):
        torch.manual_seed(0)
        task = config.build(config.parse([run_file], ["UNet.channels=8", *lines], {})).task
        task.critic_steps = 0
        randomised(task).prepare(torch.device("cpu"), None)
        batch = made_up_batch(task.student.denoiser.network, 8, torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(2)
        for _ in range(WARM + 3):
            task.step(batch, 8, generator)
        return [parameter.detach() for parameter in task.parameters()]

    before = record_passes
    monkeypatch.setattr("ratiograph.tasks.distillation.record_passes", lambda task: before(task, Simulated, "cpu"))
    plain = steps()
    assert not Simulated.made
    assert equal(steps("Distillation.cuda_graphs=True"), plain)
    assert Simulated.replays > 4


def test_sharded_weights_are_refused():
    task = config.build(config.parse(["gin/mnist_sba.gin"], ["Distillation.cuda_graphs=True"], {})).task
    task.parallel = SimpleNamespace(shards=True)
    with pytest.raises(ValueError, match=r"use --parallel=ddp, or set Distillation\.cuda_graphs = False"):
        check_parallel(task)


def test_on_a_cpu_nothing_changes():
    network, condition, x, c_noise = made("MLP")
    mine = recorded(network, device="cuda")
    with torch.no_grad():
        for _ in range(WARM + 2):
            assert equal(run(mine, condition, x, c_noise), run(network, condition, x, c_noise))
    assert not Simulated.made


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_cuda_graphs_give_what_the_network_gives(name, dtype):
    network, condition, x, c_noise = made(name)
    network, condition, x, c_noise = network.cuda(), condition.to("cuda"), x.cuda(), c_noise.cuda()
    mine = recorded(network, cuda_graphs.Recording, "cuda")
    for k in range(WARM + 4):
        with torch.no_grad(), torch.autocast("cuda", dtype or torch.bfloat16, dtype is not None):
            found, expected = (run(each, condition, x + k, c_noise) for each in (mine, network))
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other)
            for one, other in zip(network.parameters(), mine.parameters(), strict=True):
                one.mul_(1.01), other.mul_(1.01)
