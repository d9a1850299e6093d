"""Compiled blocks give what the network gives, and torch compiles each network without a break."""

import copy
import inspect

import pytest
import scipy.stats
import torch
from torch import nn
from torch._dynamo.utils import counters

from ranks import together
from ratiograph import config
from ratiograph.core.contracts import Evaluation, Needs, Nodes
from ratiograph.core.differentiation import uncompiled
from ratiograph.core.types import Batch, Condition, Noisy
from ratiograph.networks import compilation
from ratiograph.networks.architectures.captioned_unet import CaptionedUNet
from ratiograph.networks.architectures.classifier import DigitClassifier
from ratiograph.networks.architectures.edm import ADM, DDPMPP, NCSNPP
from ratiograph.networks.architectures.stable_diffusion_unets import SD15UNet, SDXLUNet, UNetFromFolder
from ratiograph.networks.architectures.unet import MLP, UNet
from ratiograph.networks.checkpointing import CheapOperations, WholeBlocks
from ratiograph.networks.compilation import VARIANTS, compile_blocks
from ratiograph.networks.denoisers import EDM
from ratiograph.networks.lora import LoRA
from ratiograph.networks.ratios import EncoderRatio
from ratiograph.training import parallel

EDM_SIZES = {"resolution": 8, "channels": 8, "multipliers": (1, 2), "blocks": 1, "attention_resolutions": (4,)}
TEXT_SIZES = {"resolution": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": 12}
TEXT_SIZES |= {"norm_groups": 4}
SDXL_SIZES = {"transformer_layers": (1, 1), "attention_heads": (1, 2), "pooled_width": 10, "size_embedding": 4}
LABELS = {"labels": torch.tensor([0, 2])}
TEXT = {"text": torch.linspace(-1, 1, 120).reshape(2, 5, 12)}
POOLED = {"pooled": torch.linspace(0, 1, 20).reshape(2, 10), "sizes": torch.full((2, 6), 64.0)}
NETWORKS = {
    "UNet": (lambda: UNet(resolution=8, channels=8, classes=3), LABELS),
    "CaptionedUNet": (lambda: CaptionedUNet(resolution=8, channels=8, text_width=12), TEXT),
    "MLP": (lambda: MLP(width=8, classes=3), LABELS),
    "DDPMPP": (lambda **changes: DDPMPP(**EDM_SIZES, classes=3, **changes), LABELS | {"augment": torch.ones(2, 9)}),
    "NCSNPP": (lambda: NCSNPP(**EDM_SIZES), {}),
    "ADM": (lambda: ADM(**EDM_SIZES | {"channels": 16}, head_channels=16, classes=3), LABELS),
    "SD15UNet": (lambda **changes: SD15UNet(**TEXT_SIZES, attention_heads=2, **changes), TEXT),
    "SDXLUNet": (lambda: SDXLUNet(**TEXT_SIZES, **SDXL_SIZES), TEXT | POOLED),
}


def made(name: str, **changes: object) -> tuple[nn.Module, Condition, torch.Tensor, torch.Tensor]:
    """(network without zero weights and without dropout, condition, x, c_noise) for a batch of two."""
    torch.manual_seed(0)
    make, told = NETWORKS[name]
    network = make(**changes).eval()
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, 0, 0.1)
    return network, Condition(**told), torch.randn(2, *network.shape), torch.tensor([-0.3, 0.4])


def answer(network, condition, x, c_noise) -> list[torch.Tensor]:
    """Features, output, and the gradients of both to x and to the weights."""
    x = x.clone().requires_grad_()
    encoding = network.encode(x, c_noise, condition)
    outputs = [*encoding.features, network.decode(encoding)]
    weights = [x, *(parameter for parameter in network.parameters() if parameter.requires_grad)]
    gradients = torch.autograd.grad(sum(o.square().mean() for o in outputs), weights, allow_unused=True)
    return [*outputs, *(g for g in gradients if g is not None)]


@pytest.fixture(autouse=True)
def fresh():
    """No graph of another test."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


SLOW = ("CaptionedUNet", "DDPMPP", "ADM", "SD15UNet", "SDXLUNet")
"""Networks that take seconds, or are much the same as another."""


def each(names, slow=SLOW):
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


def assert_one_graph(network, told, given) -> None:
    """Compiled whole, with breaks allowed, ``network`` gives what it gives and torch made none, in training neither."""

    def run(*given):
        return network.decode(network.encode(*given, told)) if told else network(*given)

    compiled = torch.compile(run, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*given), run(*given), rtol=0, atol=1e-6)
    assert (dict(counters["graph_break"]), counters["stats"]["unique_graphs"]) == ({}, 1)
    network.train()
    compiled(*given).sum().backward()
    assert (dict(counters["graph_break"]), counters["stats"]["unique_graphs"]) == ({}, 2)


@pytest.mark.parametrize("name", each(NETWORKS))
def test_a_network_is_one_graph(name):
    network, condition, *given = made(name)
    assert_one_graph(network, condition, given)


def test_the_digit_classifier_is_one_graph():
    assert_one_graph(DigitClassifier(width=8).eval(), None, [torch.randn(2, 1, 28, 28)])


@pytest.mark.slow
def test_a_network_of_a_folder_is_one_graph(tmp_path):
    stated, condition, *given = made("SD15UNet")
    stated.unet.save_config(tmp_path / "unet")
    assert_one_graph(UNetFromFolder(folder=str(tmp_path)).eval(), condition, given)


def test_a_break_is_seen():
    network = nn.Sequential(nn.Linear(2, 2))
    network.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(AssertionError, match="graph_break"):
        assert_one_graph(network, None, [torch.randn(3, 2)])


def graphs(found: list):
    """A backend that keeps the graphs it is given and runs them as they are."""

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    return backend


# Two levels of one block each, both ways, and the middle's; EDM's resample too, and their decoders have one more.
BLOCKS = {"UNet": 2 + 2 + 2, "MLP": 4, "DDPMPP": 3 + 2 + 5, "ADM": 3 + 2 + 5, "SD15UNet": 2 + 1 + 3 + 2 + 4}
BLOCKS |= {"NCSNPP": BLOCKS["DDPMPP"], "SDXLUNet": BLOCKS["SD15UNet"], "CaptionedUNet": BLOCKS["UNet"]}


@pytest.mark.parametrize("name", BLOCKS)
def test_all_blocks_are_marked(name):
    network, *_ = made(name)
    names = list(network.state_dict())
    compile_blocks(network, backend="eager")
    assert sum(module._compiled_call_impl is not None for module in network.modules()) == BLOCKS[name]
    assert list(network.state_dict()) == names


@pytest.mark.parametrize("name", each(BLOCKS, (*SLOW, "NCSNPP")))
def test_each_block_is_compiled_once_and_does_what_it_did(name):
    network, *inputs = made(name)
    expected, found = answer(network, *inputs), []
    compile_blocks(network, backend=graphs(found))
    for value, reference in zip(answer(network, *inputs), expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-6)
    assert len(found) == BLOCKS[name]
    answer(network, *inputs)
    assert len(found) == BLOCKS[name]  # the second pass runs the graphs of the first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("SD15UNet", {}),
        ("SD15UNet", {"gradient_checkpointing": True}),
        ("DDPMPP", {"checkpointing": WholeBlocks()}),
        ("DDPMPP", {"checkpointing": CheapOperations()}),
    ],
    ids=["adapters", "checkpointing in diffusers", "whole blocks", "cheap operations"],
)
def test_compiled_blocks_with_other_changes_to_them(name, changes):
    network, *inputs = made(name, **changes)
    if not changes:
        network = LoRA(network=network, rank=2)
        for parameter in network.parameters():  # the adapters' second factors are zero
            nn.init.normal_(parameter, 0, 0.1)
    expected, found = answer(network, *inputs), []
    compile_blocks(network, backend=graphs(found))
    for value, reference in zip(answer(network, *inputs), expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-6)
    assert len(found) == BLOCKS[name]
    assert not counters["graph_break"]


def relative_errors(values, exact) -> torch.Tensor:
    """|value - exact| / |exact| of each tensor."""
    return torch.stack([(v.float() - e).norm() / e.norm() for v, e in zip(values, exact, strict=True)]).detach()


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_inductor_s_outputs_and_gradients(name, dtype):
    network, *inputs = made(name)
    exact = answer(network, *inputs)
    with torch.autocast("cpu", torch.bfloat16, dtype != torch.float32):
        expected = answer(network, *inputs)
        compile_blocks(network)
        found = answer(network, *inputs)
    assert counters["stats"]["unique_graphs"] == BLOCKS[name]
    assert not counters["graph_break"]
    if dtype == torch.float32:
        for value, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)
        return
    # Fused code rounds at fewer places, so it is as far from float32 as eager code is, not the same.
    assert [value.dtype for value in found] == [value.dtype for value in expected]
    eager, compiled = relative_errors(expected, exact), relative_errors(found, exact)
    assert eager.max() > 2**-8
    # Two errors of n independent elements differ by chance, by a factor whose square has the law F(n, n).
    sizes = [value.numel() for value in exact]
    scatter = torch.from_numpy(scipy.stats.f.ppf(1 - 1e-4, sizes, sizes)).sqrt()
    assert (compiled <= scatter.clamp(min=2) * eager.clamp(min=2**-7)).all(), (compiled / eager).max()
    assert compiled.square().mean().sqrt() <= 1.25 * eager.square().mean().sqrt()


@pytest.mark.slow
def test_inductor_on_the_digit_classifier():
    torch.manual_seed(0)
    classifier, x = DigitClassifier(width=8), torch.randn(2, 1, 28, 28, requires_grad=True)
    weights = [x, *classifier.parameters()]
    outputs = []
    for run in (classifier, torch.compile(classifier, fullgraph=True)):
        logits = run(x)
        outputs.append([logits, *torch.autograd.grad(logits.square().mean(), weights)])
    for reference, value in zip(*outputs, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_inductor_on_a_ratio_s_encoder():
    """l, its gradient to x_t, which a term asks for, and those to the weights, which its loss asks for."""
    network, condition, x, c_noise = made("UNet")
    ratio = EncoderRatio(network=network)
    nn.init.normal_(ratio.out.weight)
    sigma = (4 * c_noise).exp()
    noisy = Noisy(x, sigma, torch.ones(2), sigma)

    def answers():
        evaluation = Evaluation(noisy, x, condition, Nodes(ratio=ratio), Needs(ratio_gradient=True))
        total = evaluation.log_ratio_output
        return [total, *torch.autograd.grad(total.sum(), [evaluation.noisy.x_t, *ratio.parameters()])]

    expected = answers()
    compile_blocks(ratio.network)
    for value, reference in zip(answers(), expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2 + 2


@pytest.mark.slow
def test_inductor_on_the_blocks_of_diffusers():
    """One of each kind as SDXL has them, in training and without a graph."""
    network, condition, *_ = made("SDXLUNet")
    modules = [module for module in network.unet.modules() if type(module).__name__ in compilation.DIFFUSERS]
    blocks = {type(module).__name__: module for module in reversed(modules)}
    features, embedding = torch.randn(2, 8, 4, 4), torch.randn(2, 32)
    given = {
        "ResnetBlock2D": (features, embedding),
        "BasicTransformerBlock": (torch.randn(2, 16, 16), None, condition.text),
    }
    assert blocks.keys() == given.keys() == set(compilation.DIFFUSERS)
    for name, block in blocks.items():
        weights = list(block.parameters())
        outputs = []
        for compiled in (False, True):
            if compiled:
                compile_blocks(nn.ModuleList([block]))
            with torch.no_grad():
                alone = block(*given[name])
            output = block(*given[name])
            outputs.append([alone, output, *torch.autograd.grad(output.square().mean(), weights)])
        for value, reference in zip(*reversed(outputs), strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_inductor_on_a_block():
    torch.manual_seed(0)
    block = EDM(network=MLP(width=8, layers=2), compiled=True).network.encoder[0]
    h = torch.randn(4, 8, requires_grad=True)
    found = torch.autograd.grad(block(h).square().sum(), [h, *block.parameters()])
    expected = torch.autograd.grad(
        (h + (h * h.sigmoid()) @ block.weight.T + block.bias).square().sum(), [h, *block.parameters()]
    )
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)


def test_as_many_variants_as_a_run_has():
    network, *_ = made("MLP")
    reference, found = copy.deepcopy(network), []
    compile_blocks(network, backend=graphs(found))
    for training in (True, False):
        for dtype in (torch.float32, torch.bfloat16):
            for gradient in (True, False):
                for batch in (2, 4, 6, 3, 5, 7):
                    x, c_noise = torch.randn(batch, 2), torch.randn(batch)
                    told = Condition(labels=torch.arange(batch) % 3)
                    outputs = []
                    for each in (network.train(training), reference.train(training)):
                        with torch.set_grad_enabled(gradient), torch.autocast("cpu", dtype, dtype != torch.float32):
                            outputs.append(each.decode(each.encode(x, c_noise, told)))
                    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    # The first two batch sizes make two graphs, and the second of them serves all sizes.
    assert len(found) <= 4 * 2 * 2 * 2 * 2
    assert len(found) < 4 * VARIANTS


def test_a_copy_runs_uncompiled():
    network, *inputs = made("UNet")
    found = []
    compile_blocks(network, backend=graphs(found))
    answer(copy.deepcopy(network), *inputs)
    assert not found


def test_second_derivatives_need_the_blocks_as_they_were_written():
    network, condition, x, c_noise = made("MLP")

    def penalty():
        leaf = x.clone().requires_grad_()
        total = network.encode(leaf, c_noise, condition).features[0].square().sum()
        (gradient,) = torch.autograd.grad(total, leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), network.encoder[0].weight)[0]

    expected = penalty()
    compile_blocks(network, backend="aot_eager")
    with pytest.raises(RuntimeError, match="double backward"):
        penalty()
    with uncompiled():
        torch.testing.assert_close(penalty(), expected, rtol=0, atol=0)


def test_a_torch_whose_blocks_share_a_cache(monkeypatch):
    """Then the one cache is made as large as all blocks' variants."""
    from torch._dynamo import config as settings

    known = inspect.signature(lambda model, *, fullgraph, backend: None)
    monkeypatch.setattr(compilation.inspect, "signature", lambda function: known)
    network, *inputs = made("MLP")
    expected, found = answer(network, *inputs), []
    with settings.patch(recompile_limit=8, accumulated_recompile_limit=8):
        compile_blocks(network, backend=graphs(found))
        assert settings.recompile_limit == settings.accumulated_recompile_limit == 4 * VARIANTS
        for value, reference in zip(answer(network, *inputs), expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-6)
    assert 1 <= len(found) <= 4


def sharded_and_compiled(rank: int) -> None:
    """The sharded, compiled denoiser gives what it gives alone and eager, twice, and is compiled."""
    torch.manual_seed(0)
    denoiser, found = EDM(network=UNet(resolution=8, channels=16, multipliers=(1, 2))), []
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, 0, 0.1)
    alone = copy.deepcopy(denoiser)

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        found.append(graph)
        return aot_eager(graph, inputs)

    compile_blocks(denoiser.network, backend=backend)
    parallel.Sharded(torch.device("cpu")).shard([denoiser], None)
    for seed in range(2):
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        noisy = Noisy(x, torch.ones(4), torch.ones(4), torch.ones(4))
        with torch.no_grad():
            torch.testing.assert_close(denoiser(noisy, Condition()), alone(noisy, Condition()))
        for each in (denoiser, alone):
            each.zero_grad(set_to_none=True)
            each(noisy, Condition()).square().mean().backward()
        for ours, theirs in zip(denoiser.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, rtol=1e-4, atol=1e-6)
    assert len(found) == 2 * BLOCKS["UNet"]  # with a graph and without


@pytest.mark.slow
def test_sharded_and_compiled():
    together(sharded_and_compiled, 2)


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match=r"Linear has no blocks to compile: set compiled = False, or mark the class"):
        EDM(network=nn.Linear(2, 2), compiled=True)


def test_by_a_flag_of_one_node():
    one = config.build(config.parse(["gin/mnist_sba.gin"], ["teacher/EDM.compiled = True", "UNet.channels = 16"])).task
    blocks = {
        name: sum(module._compiled_call_impl is not None for module in node.modules())
        for name, node in (("teacher", one.teacher), ("student", one.student), ("student_score", one.student_score))
    }
    assert blocks == {"teacher": 6, "student": 0, "student_score": 0}


@pytest.mark.slow
def test_a_step_of_compiled_networks_is_the_same_step(monkeypatch):
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **given: compiled(self, **given | {"backend": "aot_eager"}))
    rows, penalty = [], ["Distillation.ratio_loss = @R1Penalized()", "R1Penalized.loss = @LogisticLoss()"]
    for flag in (False, True):
        torch.manual_seed(0)
        tiny = ["UNet.channels = 8", "UNet.attention = False", "EDM.weights = None", f"EDM.compiled = {flag}"]
        task = config.build(config.parse(["gin/mnist_dmd2.gin"], tiny + penalty)).task
        task.prepare(torch.device("cpu"), None)
        generator = torch.Generator().manual_seed(0)
        real = Batch(torch.rand(4, 1, 28, 28, generator=generator), Condition())
        rows.append([task.step(real, 4, generator) for _ in range(2)])
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] > 0
    for expected, found in zip(*rows, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_noisy_inputs_of_a_compiled_denoiser():
    torch.manual_seed(0)
    denoiser = EDM(network=MLP(width=8))
    x, sigma = torch.randn(3, 2), torch.tensor([0.1, 1.0, 10.0])
    noisy = Noisy(x, sigma, torch.ones(3), sigma)
    nn.init.normal_(denoiser.network.out.weight)
    expected = denoiser.denoise(noisy, Condition())
    compile_blocks(denoiser.network, backend="eager")
    torch.testing.assert_close(denoiser.denoise(noisy, Condition()), expected, rtol=0, atol=0)
