"""Adapters: the base to the bit at first, alone in what is saved, one base for all, merged and measured."""

import copy

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines
from ratiograph.algebra.noising import ScaledLinearDDPM
from ratiograph.core.types import Condition
from ratiograph.networks.architectures.stable_diffusion_unets import SD15UNet, UNetFromFolder
from ratiograph.networks.lora import LoRA, share_bases
from ratiograph.networks.students import OneStepDDPM
from ratiograph.networks.teachers.stable_diffusion import StableDiffusion
from ratiograph.training.optim import EMA, Adam

SIZES = {
    "resolution": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_heads": 2,
    "norm_groups": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipeline")
    tiny_pipelines.unet(seed=5).save_pretrained(root / "unet")
    return str(root)


def denoiser(folder, lora=False, seed=0, rank=4, **more):
    torch.manual_seed(seed)
    network = SD15UNet(**SIZES)
    return StableDiffusion(network=LoRA(network=network, rank=rank, **more) if lora else network, weights=folder)


def noisy(seed=2):
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 12, 12, generator=generator)
    return ScaledLinearDDPM().add_noise(x, torch.tensor([3.0, 700.0]), noise), Condition(text=text)


def adapters(module):
    return {name: p for name, p in module.named_parameters() if ".lora_" in name}


def perturbed(module, seed=7):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters(module).values():
            parameter.normal_(std=0.1, generator=generator)
    return module


def test_a_base_without_weights_is_drawn_and_the_adapters_stay():
    torch.manual_seed(0)
    adapted = LoRA(network=SD15UNet(**SIZES, random_weights=False), rank=4)
    before = {name: parameter.clone() for name, parameter in adapters(adapted).items()}
    with pytest.raises(ValueError, match="no weights yet"):
        adapted.encode(noisy()[0].x_t, torch.tensor([5.0, 5.0]), noisy()[1])
    StableDiffusion(network=adapted).load()
    assert all(torch.equal(parameter, before[name]) for name, parameter in adapters(adapted).items())
    assert all(bool((parameter == 0).all()) == (".lora_B." in name) for name, parameter in before.items())
    weight = adapted.unet.mid_block.resnets[0].conv1.base_layer.weight
    bound = 1 / weight[0].numel() ** 0.5  # torch draws uniformly up to one over the root of the fan-in
    assert 0.95 * bound < float(weight.abs().max()) <= bound
    assert bool((adapted.unet.conv_norm_out.weight == 1).all())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_begins_as_its_base_to_the_bit(folder, dtype):
    plain, adapted = denoiser(folder), denoiser(folder, lora=True, seed=1)
    for one in (plain, adapted):
        one.load()
        one.autocast_dtype = dtype
    assert torch.equal(plain.denoise(*noisy()), adapted.denoise(*noisy()))
    features = [one.encode(*noisy()).features for one in (plain, adapted)]
    assert all(torch.equal(a, b) for a, b in zip(*features, strict=True))
    assert not torch.equal(perturbed(adapted).denoise(*noisy()), plain.denoise(*noisy()))
    for name in ("shape", "classes", "feature_channels", "text_width"):
        assert getattr(adapted.network, name) == getattr(plain.network, name)


def test_only_the_adapters_learn_and_are_saved(folder):
    adapted = denoiser(folder, lora=True)
    adapted.load()
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == set(adapters(adapted))
    assert adapted.state_dict().keys() == set(adapters(adapted))
    frozen = {name: p.clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    updater = Adam(lr=1e-2).build(adapted.parameters())
    assert sum(p.numel() for p in updater.parameters) == sum(p.numel() for p in adapters(adapted).values())
    before = adapted.denoise(*noisy()).detach()
    adapted.denoise(*noisy()).square().sum().backward()
    updater.step()
    assert all(torch.equal(p, frozen[name]) for name, p in adapted.named_parameters() if name in frozen)
    assert not torch.equal(adapted.denoise(*noisy()), before)


def test_what_is_saved_restores_it_strictly(folder):
    source, other = perturbed(denoiser(folder, lora=True)), denoiser(folder, lora=True, seed=9)
    source.load()
    other.load()
    other.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(source.denoise(*noisy()), other.denoise(*noisy()))
    torn = dict(list(source.state_dict().items())[1:])
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(torn, strict=True)


def test_an_average_has_adapters_of_its_own_on_the_same_base(folder):
    student = OneStepDDPM(denoiser=denoiser(folder, lora=True))
    student.denoiser.load()
    ema = EMA(half_life=10.0, ramp_up=1e9)
    average = ema.copy_of(student)
    pairs = list(zip(student.named_parameters(), average.parameters(), strict=True))
    assert all((one is other) == (".lora_" not in name) for (name, one), other in pairs)
    start = {name: p.clone() for name, p in adapters(average).items()}
    base = {name: p.clone() for name, p in student.named_parameters() if ".lora_" not in name}
    perturbed(student)
    ema.update(average, student, 10, 10)
    for name, found in adapters(average).items():
        torch.testing.assert_close(found, (start[name] + adapters(student)[name]) / 2)
    assert all(torch.equal(p, base[name]) for name, p in student.named_parameters() if name in base)


def test_teacher_student_and_student_score_share_one_base(folder):
    teacher, student, score = denoiser(folder).requires_grad_(False), *(denoiser(folder, True, k) for k in (1, 2))
    separate = sum(p.numel() for p in teacher.parameters())
    share_bases(teacher, student, score)
    for one in (teacher, student, score):
        one.load()
    unique = {p.data_ptr(): p.numel() for one in (teacher, student, score) for p in one.parameters()}
    own = sum(p.numel() for one in (student, score) for p in adapters(one).values())
    assert sum(unique.values()) == separate + own
    expected = tiny_pipelines.unet(seed=5).state_dict()
    assert all(torch.equal(p, expected[name]) for name, p in teacher.network.unet.named_parameters())
    assert torch.equal(student.denoise(*noisy()), teacher.denoise(*noisy()))
    teacher.to(torch.bfloat16)
    bases = [p for name, p in student.named_parameters() if ".lora_" not in name]
    assert {p.dtype for p in bases} == {torch.bfloat16}
    assert {p.dtype for p in adapters(student).values()} == {torch.float32}


def test_networks_that_learn_or_differ_share_nothing(folder, tmp_path):
    tiny_pipelines.unet(seed=6).save_pretrained(tmp_path / "unet")
    kept = [
        denoiser(folder).requires_grad_(False),
        denoiser(folder),
        denoiser(str(tmp_path), True),
        denoiser(None, True),
    ]
    share_bases(None, *kept)
    pointers = [p.data_ptr() for one in kept for p in one.parameters()]
    assert len(set(pointers)) == len(pointers)


def test_merged_weights_are_those_of_a_plain_network(folder):
    adapted = perturbed(denoiser(folder, lora=True, alpha=8.0))
    adapted.load()
    plain = denoiser(None)
    plain.network.unet.load_state_dict(adapted.network.merged(), strict=True)
    torch.testing.assert_close(plain.denoise(*noisy()), adapted.denoise(*noisy()), rtol=1e-4, atol=1e-4)
    base = tiny_pipelines.unet(seed=5).state_dict()
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    a, b = (adapters(adapted)[f"network.network.unet.{name}.lora_{k}.default.weight"] for k in "AB")
    expected = base[f"{name}.weight"] + 8.0 / 4 * b @ a
    torch.testing.assert_close(adapted.network.merged()[f"{name}.weight"], expected)


def test_checkpointing_and_double_backward_with_adapters(folder):
    gradients = []
    for more in ({}, {"gradient_checkpointing": True, "double_backward": True}):
        torch.manual_seed(0)
        adapted = StableDiffusion(network=LoRA(network=UNetFromFolder(folder=folder, **more), rank=2), weights=folder)
        adapted.load()
        perturbed(adapted).denoise(*noisy()).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in adapters(adapted).values()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)
    assert gradients[0].abs().max() > 1e-3


def test_full_size_costs_a_twelfth(folder):
    with torch.device("meta"):
        network = LoRA(network=SD15UNet(), rank=64)
    own = sum(p.numel() for p in adapters(network).values())
    assert sum(p.numel() for p in network.parameters()) - own == 859_520_964
    print(own)
    copied = copy.deepcopy(network)
    assert sum(p is not q for p, q in zip(network.parameters(), copied.parameters(), strict=True)) == len(
        adapters(network)
    )


def test_bad_input_says_what_to_do():
    with pytest.raises(ValueError, match="no layer's name ends so"):
        LoRA(network=SD15UNet(**SIZES), targets=("nothing",))
