"""What checkpointing keeps, to the byte; what it does twice, by operation; and that nothing else changes.

One *map* is B C H W numbers. float64 on one thread: an operation done twice gives the same bits.
"""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plan import _Bytes, planned
from ranks import together
from ratiograph.core.differentiation import twice_differentiable
from ratiograph.core.types import Condition, Noisy
from ratiograph.networks import checkpointing
from ratiograph.networks.architectures.blocks import ResidualBlock
from ratiograph.networks.architectures.captioned_unet import CaptionedUNet
from ratiograph.networks.architectures.edm import ADM, DDPMPP, NCSNPP
from ratiograph.networks.architectures.edm_blocks import Attention, ScaleShiftBlock, ShiftBlock
from ratiograph.networks.architectures.unet import UNet
from ratiograph.networks.checkpointing import CheapOperations, Checkpointing, WholeBlocks
from ratiograph.networks.compilation import compile_blocks
from ratiograph.networks.denoisers import EDM
from ratiograph.training import parallel
from test_compilation import graphs

SIZES = {"resolution": 8, "channels": 8, "multipliers": (1, 2), "blocks": 1}
EDM_SIZES = SIZES | {"attention_resolutions": (4,)}
TEXT = torch.linspace(-1, 1, 60).double().reshape(2, 5, 6)
NETWORKS = {
    "ddpmpp": (lambda **given: DDPMPP(**EDM_SIZES | {"classes": 3} | given), Condition(torch.tensor([0, 2]))),
    "ncsnpp": (lambda **given: NCSNPP(**EDM_SIZES | {"multipliers": (1, 2, 2)} | given), Condition()),
    "adm": (lambda **given: ADM(**EDM_SIZES | {"head_channels": 8} | given), Condition(torch.tensor([1, 2]))),
    "unet": (lambda **given: UNet(**SIZES | {"channels": 16} | given), Condition()),
    "captioned": (lambda **given: CaptionedUNet(**SIZES, text_width=6, **given), Condition(text=TEXT)),
}
POLICIES = {"cheap": CheapOperations, "whole": WholeBlocks}


def made(name: str, policy: Checkpointing | None = None, **given) -> tuple[nn.Module, Condition]:
    """A network in which every branch counts, in float64, and what it is told."""
    make, condition = NETWORKS[name]
    torch.manual_seed(0)
    network = make(checkpointing=policy, **{"dropout": 0.0, **given}).double()
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, 0, 0.1)
    return network, condition


def noise(network: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """x, which wants a gradient, and c_noise."""
    x = torch.randn(2, *network.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.requires_grad_(), torch.tensor([-0.3, 0.4], dtype=torch.float64)


def answer(network: nn.Module, condition: Condition, context=nullcontext) -> list[torch.Tensor]:
    """The output, and the gradients of its square and the features' to x and to all weights that have one."""
    x, c_noise = noise(network)
    torch.manual_seed(3)  # of dropout
    with context():
        encoding = network.encode(x, c_noise, condition)
        outputs = [*encoding.features, network.decode(encoding)]
    sum(each.double().square().sum() for each in outputs).backward()
    return [outputs[-1].detach(), x.grad, *(p.grad for p in network.parameters() if p.grad is not None)]


class Operations(TorchDispatchMode):
    """Counts what is computed, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    @property
    def dear(self) -> dict[str, int]:
        """Convolutions, products and attention."""
        kinds = ("conv", "mm", "attention")
        return {name: count for name, count in self.counts.items() if any(kind in name for kind in kinds)}


def bfloat16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_are_those_of_a_pass_that_keeps_everything_to_the_bit(name, policy):
    for given, context in ({"dropout": 0.3}, nullcontext), ({}, bfloat16):
        network, condition = made(name, **given)
        expected = answer(network.train(), condition, context)
        network, condition = made(name, POLICIES[policy](), **given)
        found = answer(network.train(), condition, context)
        assert len(found) > 40
        for ours, plain in zip(found, expected, strict=True):
            assert torch.equal(ours, plain)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_convolution_or_product_is_done_twice(name):
    """Neither where the weights learn nor in a frozen network, which is differentiated to x alone."""
    counted = {}
    for policy in (None, CheapOperations(), WholeBlocks()):
        network, condition = made(name, policy)
        with Operations() as operations, FlopCounterMode(display=False) as flops:
            answer(network, condition)
        found = [operations.dear, flops.get_total_flops()]
        norms = operations.counts["native_group_norm"]
        with Operations() as operations:
            answer(network.requires_grad_(False), condition)
        counted[type(policy)] = [*found, operations.dear]
        assert norms == (1 + (policy is not None)) * sum(isinstance(m, nn.GroupNorm) for m in network.modules())
    plain, cheap, whole = counted.values()
    assert plain == cheap
    assert plain[1] > 0
    assert whole[1] > 1.1 * plain[1]
    assert sum(whole[2].values()) > sum(plain[2].values())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_second_derivative(policy, frozen):
    """As R1 takes it of a network's features, of whose frozen convolutions none is done twice by either pass."""
    found, counts = [], []
    for each in (None, POLICIES[policy]()):
        network, condition = made("adm", each)
        network.requires_grad_(not frozen)
        x, c_noise = noise(network)
        with Operations() as operations:
            with twice_differentiable():
                features = network.encode(x, c_noise, condition).features[-1]
            (gradient,) = torch.autograd.grad(features.square().sum(), x, create_graph=True)
            gradient.square().sum().backward()
        found.append([x.grad, *(p.grad for p in network.parameters() if p.grad is not None)])
        counts.append(sum(count for name, count in operations.counts.items() if name == "convolution"))
    for ours, plain in zip(*found, strict=True):
        assert torch.equal(ours, plain)
    assert found[0][0].abs().max() > 0
    assert len(found[0]) > 1 or frozen
    if policy == "cheap":
        assert counts[0] == counts[1]


def held(make, policy: Checkpointing, *inputs: torch.Tensor) -> tuple[float, float]:
    """Maps that live after a pass of a block beside the inputs and weights, and the number of one map's bytes."""
    with _Bytes() as counter:
        inputs = [each.clone().requires_grad_() for each in inputs]
        block = make()
        before = counter.live
        output = policy.run(block, *inputs)
        return counter.live - before, output.nbytes


@pytest.mark.parametrize(
    ("make", "maps", "plain", "values"),
    [
        (lambda: ShiftBlock(64, 64, 12, dropout=0.2), 2, 7, 64),  # conv1, output
        (lambda: ScaleShiftBlock(64, 64, 12, dropout=0.2), 2, 8, 128),
        (lambda: ResidualBlock(64, 64, 12, dropout=0.2), 2, 8, 128),
        # And the attention's input, query, key, value and result.
        (lambda: ShiftBlock(64, 64, 12, heads=1), 7, 11, 64),
    ],
)
def test_two_maps_of_a_block_are_kept(make, maps, plain, values):
    x, embedding = torch.randn(2, 64, 16, 16), torch.randn(2, 12)
    bytes_of_values = 2 * values * 4  # of the embedding's layer
    kept, one = held(make, CheapOperations(), x, embedding)
    sums = 2 * 256 * 4 * (maps > 2)  # the attention's one a position
    assert kept == maps * one + bytes_of_values + sums
    assert held(make, Checkpointing(), x, embedding)[0] >= plain * one
    assert held(make, WholeBlocks(), x, embedding)[0] == one


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_keeps_no_map_of_all_pairs(heads):
    """256 positions of 64 channels: a head's map of all pairs is four maps of features."""
    kept, one = held(lambda: Attention(64, heads, 1e-5), Checkpointing(), torch.randn(2, 64, 16, 16))
    # Norm, its statistics, query, key, value, result as attention gives it and as the layer takes it, and output.
    assert kept < 7.2 * one


def test_nothing_is_done_twice_where_nothing_is_kept(monkeypatch):
    """Without a graph checkpointing is not even begun; a part that nothing learns in is not run again."""
    network, condition = made("ddpmpp", CheapOperations())
    network.requires_grad_(False)
    network.out_norm.requires_grad_(True)
    x, c_noise = noise(network)
    with Operations() as operations:
        network.decode(network.encode(x.detach(), c_noise, condition)).square().sum().backward()
    assert operations.counts["native_group_norm"] == 1 + sum(isinstance(m, nn.GroupNorm) for m in network.modules())

    def refuse(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(checkpointing, "checkpoint", refuse)
    with torch.no_grad():
        network.decode(network.encode(x, c_noise, condition))
    with pytest.raises(AssertionError):
        network.encode(x, c_noise, condition)


@pytest.mark.parametrize("policy", POLICIES)
def test_compiled_blocks(policy):
    network, condition = made("unet")
    expected, found = answer(network, condition), []
    network, condition = made("unet", POLICIES[policy]())
    torch._dynamo.reset()
    compile_blocks(network, backend=graphs(found))
    for ours, plain in zip(answer(network, condition), expected, strict=True):
        torch.testing.assert_close(ours, plain)
    torch._dynamo.reset()
    assert len(found) == 6


def sharded_and_checkpointed(rank: int) -> None:
    for name in ("ddpmpp", "unet"):
        for policy in POLICIES.values():
            network, condition = made(name, policy())
            alone = EDM(network=made(name)[0]).double()
            shared = EDM(network=network).double()
            parallel.Sharded(torch.device("cpu")).shard([shared], None)
            x, _ = noise(network)
            noisy = Noisy(x.detach(), *torch.tensor([[0.5, 1.0, 2.0], [0.7, 1.0, 0.3]]).double().T)
            alone.denoise(noisy, condition).square().mean().backward()
            shared.denoise(noisy.split(2)[rank], condition.split(2)[rank]).square().mean().backward()
            for ours, plain in zip(shared.parameters(), alone.parameters(), strict=True):
                if plain.grad is not None:
                    torch.testing.assert_close(ours.grad.full_tensor(), plain.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_sharded():
    together(sharded_and_checkpointed, 2)


def test_a_copy_keeps_the_policy():
    network, condition = made("ddpmpp", CheapOperations())
    with Operations() as operations:
        answer(copy.deepcopy(network), condition)
    assert operations.counts["native_group_norm"] == 2 * sum(isinstance(m, nn.GroupNorm) for m in network.modules())


@pytest.mark.slow
def test_a_plan_tells_the_smaller_peak():
    plain, cheap = (
        planned(["gin/mnist_sba.gin"], ["UNet.attention = False", *more], precision="fp32", batch_size=64)
        for more in ([], ["UNet.checkpointing = @CheapOperations()"])
    )
    assert cheap.peak_gb - cheap.held_gb < 0.6 * (plain.peak_gb - plain.held_gb)
    assert cheap.held_gb == plain.held_gb
    assert cheap.flops == plain.flops
