"""Stable Diffusion as a denoiser: against diffusers' own forward, the process's definitions, and at tiny size."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import DDIMScheduler

import tiny_pipelines
from ratiograph import config
from ratiograph.algebra.noising import RectifiedFlow, ScaledLinearDDPM, VarianceExploding, VariancePreserving
from ratiograph.algebra.ratio_losses import LogisticLoss, R1Penalized
from ratiograph.core.differentiation import twice_differentiable
from ratiograph.core.types import Condition, Encoding, Noisy
from ratiograph.data.latents import write_latents
from ratiograph.networks.architectures.stable_diffusion_unets import SD15UNet, SDXLUNet, UNetFromFolder
from ratiograph.networks.guidance import EmptyPrompt, Guided, NoCaption
from ratiograph.networks.students import OneStepDDPM
from ratiograph.networks.teachers.stable_diffusion import (
    EpsilonPrediction,
    SamplePrediction,
    StableDiffusion,
    VPrediction,
)
from ratiograph.networks.weights.pipeline_files import fit, read_part
from ratiograph.training import trainer

ROOT = Path(__file__).resolve().parents[2]
PAPERS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "gin" / "papers").rglob("sd*.gin"))
FILES = [*PAPERS, "gin/sd15_di_bregman.gin"]  # gin/sd15_reward_tilt.gin, which decodes images too, in test_sd15_run.py
SD15 = {"resolution": 8, "block_out_channels": (16, 32), "cross_attention_dim": 12, "norm_groups": 4}
SDXL = {**SD15, "transformer_layers": (1, 2), "attention_heads": (1, 2), "pooled_width": 10, "size_embedding": 4}
DDPM = ScaledLinearDDPM()


def small(network=SD15UNet, seed=0, **changes):
    torch.manual_seed(seed)
    arguments = {**(SD15 | {"attention_heads": 2} if network is SD15UNet else SDXL), "layers_per_block": 1, **changes}
    return network(**arguments)


def captions(samples=2, seed=1, sized=False):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(samples, 3, 12, generator=generator)
    if not sized:
        return Condition(text=text)
    sizes = torch.tensor([1024.0, 1024.0, 0.0, 16.0, 512.0, 512.0]).repeat(samples, 1)
    return Condition(text=text, pooled=torch.randn(samples, 10, generator=generator), sizes=sizes)


def latents(samples=2, seed=2):
    return torch.randn(samples, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def own_forward(network, x, index, condition):
    """diffusers' forward of the wrapped module."""
    added = {} if condition.pooled is None else {"text_embeds": condition.pooled, "time_ids": condition.sizes}
    return network.unet(x, index, condition.text, added_cond_kwargs=added).sample


# --- the network in two halves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("network", "sized"), [(SD15UNet, False), (SDXLUNet, True)])
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True, "double_backward": True}])
def test_both_halves_are_the_modules_own_forward(network, sized, changes):
    unet, x, index, condition = small(network, **changes), latents(), torch.tensor([3.0, 981.0]), captions(sized=sized)
    expected = own_forward(unet, x, index.long(), condition)
    encoding = unet.encode(x, index, condition)
    torch.testing.assert_close(unet.decode(encoding), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.01
    assert [tuple(f.shape[1:]) for f in encoding.features] == [(16, 8, 8), (32, 4, 4), (32, 4, 4)]
    assert unet.feature_channels == (16, 32, 32)
    assert unet.shape == (4, 8, 8)


def test_three_levels_with_two_layers_each():
    unet = small(block_out_channels=(8, 16, 16), layers_per_block=2)
    x, index = latents(), torch.tensor([20.0, 500.0])
    encoding = unet.encode(x, index, captions())
    torch.testing.assert_close(unet.decode(encoding), own_forward(unet, x, index, captions()), rtol=1e-5, atol=1e-5)
    # A level's feature is its last map before it is halved, which is the skip that the level's decoder adds last.
    assert all(any(f is s for s in encoding.skips) for f in encoding.features[:-1])


@pytest.mark.parametrize("part", ["text", "pooled", "sizes"])
def test_every_part_of_the_condition_is_heard(part):
    unet, condition = small(SDXLUNet), captions(sized=True)
    parts = condition.parts()
    changed = Condition(**{**parts, part: parts[part].flip(-1) + 1})
    outputs = [unet.decode(unet.encode(latents(), torch.tensor([5.0, 5.0]), c)) for c in (condition, changed)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4


def test_a_missing_caption_is_refused():
    with pytest.raises(ValueError, match="conditions = @BatchConditions"):
        small().encode(latents(), torch.tensor([5.0, 5.0]), Condition())
    with pytest.raises(ValueError, match=r"pooled captions and sizes.*LatentStream.pooled"):
        small(SDXLUNet).encode(latents(), torch.tensor([5.0, 5.0]), captions())


def test_a_detached_encoding_carries_no_graph():
    x = latents().requires_grad_()
    encoding = small().encode(x, torch.tensor([5.0, 5.0]), captions())
    assert encoding.features[0].requires_grad
    detached = encoding.detach()
    tensors = [*detached.features, *detached.skips, detached.embedding, detached.text]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_checkpointing_and_explicit_attention_leave_the_gradient_alone():
    gradients = []
    for changes in ({}, {"gradient_checkpointing": True}, {"double_backward": True}):
        unet = small(**changes)
        unet.decode(unet.encode(latents(), torch.tensor([5.0, 700.0]), captions())).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=1e-4, atol=1e-5)


def test_r1_on_the_features_is_differentiable():
    """d/dw of 1/2 |grad_x (w . features)|^2 is quadratic in w, so that its derivative along w is twice its value."""
    unet = small(gradient_checkpointing=True, double_backward=True).requires_grad_(False)
    x = latents().requires_grad_()
    w = torch.randn(32, generator=torch.Generator().manual_seed(5)).requires_grad_()
    features = unet.encode(x, torch.tensor([5.0, 700.0]), captions()).features[-1]
    logit = features.mean((2, 3)) @ w
    with_penalty = R1Penalized(loss=LogisticLoss())(logit, logit, x)
    penalty = with_penalty - LogisticLoss()(logit, logit, x)
    (gradient,) = torch.autograd.grad(penalty, w)
    assert penalty > 1e-4
    torch.testing.assert_close((gradient * w).sum(), 2 * penalty, rtol=1e-3, atol=0)


def test_blocks_run_again_have_the_same_second_derivatives():
    """Of |grad_x |features|^2|^2, in a context that computes attention and frozen convolutions in other ways."""
    found = []
    for again in (False, True):
        unet = small(gradient_checkpointing=again).requires_grad_(False).double()
        x = latents().double().requires_grad_()
        told = Condition(text=captions().text.double())
        with twice_differentiable():
            features = unet.encode(x, torch.tensor([5.0, 700.0]), told).features
        (slope,) = torch.autograd.grad(sum(each.square().sum() for each in features), x, create_graph=True)
        found += torch.autograd.grad(slope.square().sum(), x)
    assert found[0].abs().max() > 1
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=0)


def test_without_its_decoder_it_still_encodes():
    unet = small()
    expected = unet.encode(latents(), torch.tensor([5.0, 5.0]), captions()).features[-1]
    before = sum(p.numel() for p in unet.parameters())
    unet.drop_decoder()
    assert sum(p.numel() for p in unet.parameters()) < before
    found = unet.encode(latents(), torch.tensor([5.0, 5.0]), captions()).features[-1]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("network", "count"), [(SD15UNet, 859_520_964), (SDXLUNet, 2_567_463_684)])
def test_published_sizes(network, count):
    with torch.device("meta"):
        unet = network()
    assert sum(p.numel() for p in unet.parameters()) == count
    assert all(p.is_meta for p in unet.parameters())


def test_a_side_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match="must be a multiple of 8, not 60"):
        SD15UNet(resolution=60)


# --- the denoiser -----------------------------------------------------------------------------------------------------


class Told(torch.nn.Module):
    """A network whose output is given, and which notes what it was asked."""

    shape, classes, feature_channels = (4, 8, 8), 0, (4,)

    def __init__(self, output):
        super().__init__()
        self.output = output

    def encode(self, x, c_noise, condition):
        self.x, self.c_noise = x, c_noise
        return Encoding((x,))

    def decode(self, encoding):
        return self.output


PROCESSES = [DDPM, VarianceExploding(), VariancePreserving(), RectifiedFlow()]


@pytest.mark.parametrize("noising", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("prediction", [EpsilonPrediction, VPrediction, SamplePrediction])
def test_a_perfect_prediction_denoises_perfectly(noising, prediction):
    """Whatever the network predicts, told the truth about it mu is x0, under every process."""
    index = torch.tensor([1.0, 250.0, 640.0, 999.0])
    alpha, sigma = (table[index.long()].float()[:, None, None, None] for table in (DDPM.alpha_table, DDPM.sigma_table))
    x0, noise = latents(4), latents(4, seed=3)
    truth = {
        EpsilonPrediction: noise,
        VPrediction: alpha * noise - sigma * x0,
        SamplePrediction: x0,
    }[prediction]
    network = Told(truth)
    t = noising.time_of((sigma / alpha).flatten())
    noisy = noising.add_noise(x0, t, noise)
    denoiser = StableDiffusion(network=network, prediction=prediction())
    torch.testing.assert_close(denoiser.denoise(noisy, Condition()), x0, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(network.c_noise, index)
    torch.testing.assert_close(network.x, alpha * x0 + sigma * noise, rtol=1e-4, atol=1e-4)


def test_every_index_finds_itself():
    network = Told(latents(1000))
    index = torch.arange(1000.0)
    StableDiffusion(network=network).encode(DDPM.add_noise(latents(1000), index, latents(1000, 4)), Condition())
    assert torch.equal(network.c_noise, index)


def test_the_estimate_does_not_depend_on_the_schedule():
    denoiser = StableDiffusion(network=small())
    noisy = DDPM.add_noise(latents(), torch.tensor([100.0, 800.0]), latents(seed=3))
    scale = torch.tensor([0.5, 7.0])
    other = Noisy(noisy.x_t * scale[:, None, None, None], noisy.t, noisy.alpha * scale, noisy.sigma * scale)
    expected = denoiser.denoise(noisy, captions())
    torch.testing.assert_close(denoiser.denoise(other, captions()), expected, rtol=1e-4, atol=1e-4)
    by_hand = noisy.x_t - noisy.sigma[:, None, None, None] * own_forward(
        denoiser.network, noisy.x_t, noisy.t.long(), captions()
    )
    torch.testing.assert_close(expected, by_hand / noisy.alpha[:, None, None, None], rtol=1e-4, atol=1e-4)


SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


def own_step(prediction, output, x, index):
    """x0 by diffusers' scheduler."""
    scheduler = DDIMScheduler(**SCHEDULE, prediction_type=prediction.name)
    scheduler.set_timesteps(1000)
    return scheduler.step(output, index, x).pred_original_sample


@pytest.mark.parametrize("prediction", [EpsilonPrediction, VPrediction, SamplePrediction])
@pytest.mark.parametrize(("network", "sized"), [(SD15UNet, False), (SDXLUNet, True)])
def test_equals_diffusers_unet_and_scheduler(network, sized, prediction):
    """To the bit at a step of the process, though under EDM's scaling of the same sample in another order."""
    denoiser, condition = StableDiffusion(network=small(network), prediction=prediction()), captions(sized=sized)
    for index in (0, 1, 20, 399, 640, 999):
        noisy = DDPM.add_noise(latents(), torch.full((2,), float(index)), latents(seed=3))
        with torch.no_grad():
            output = own_forward(denoiser.network, noisy.x_t, torch.tensor(index), condition)
            expected = own_step(denoiser.prediction, output, noisy.x_t, index)
            assert torch.equal(denoiser.denoise(noisy, condition), expected)
            scale = 1 / noisy.alpha
            exploding = Noisy(
                noisy.x_t * scale[:, None, None, None], noisy.sigma * scale, scale**0, noisy.sigma * scale
            )
            found = denoiser.denoise(exploding, condition)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(scale.max()))


@pytest.mark.parametrize("index", [1, 250, 640, 999])
def test_guidance_equals_diffusers_pipeline(tmp_path, index):
    denoiser, condition = StableDiffusion(network=small()), captions()
    unconditional = EmptyPrompt(file=empty_prompt(tmp_path / "empty.safetensors"))
    guided = Guided(denoiser=denoiser, guidance_scale=7.5, unconditional=unconditional)
    guided.load()
    noisy = DDPM.add_noise(latents(), torch.full((2,), float(index)), latents(seed=3))
    with torch.no_grad():
        empty = Condition(text=torch.full((2, 3, 12), 0.25))
        told, free = (own_forward(denoiser.network, noisy.x_t, torch.tensor(index), c) for c in (condition, empty))
        expected = own_step(denoiser.prediction, free + 7.5 * (told - free), noisy.x_t, index)
        for found in (guided.denoise(noisy, condition), guided.decode(guided.encode(noisy, condition))):
            assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize(("network", "sized"), [(SD15UNet, False), (SDXLUNet, True)])
def test_features_are_those_of_diffusers_forward(network, sized):
    """Caught by hooks in diffusers' own forward: each level's last map before it is halved, and the middle's."""
    unet, condition, caught = small(network), captions(sized=sized), []
    for block in (*(block.resnets[-1] for block in unet.unet.down_blocks), unet.unet.mid_block):
        block.register_forward_hook(lambda module, inputs, output: caught.append(output))
    for block in unet.unet.down_blocks:
        for attention in getattr(block, "attentions", []):
            attention.register_forward_hook(lambda m, i, output: caught.append(output[0]))
    with torch.no_grad():
        own_forward(unet, latents(), torch.tensor(250), condition)
        seen, caught[:] = list(caught), []
        features = unet.encode(latents(), torch.tensor([250.0, 250.0]), condition).features
    assert all(any(torch.equal(feature, output) for output in seen) for feature in features)
    assert len(features) == 3


@pytest.mark.parametrize("timestep", [999, 399])
def test_the_student_takes_noise_as_the_process_s_own_sample(timestep):
    student = OneStepDDPM(denoiser=StableDiffusion(network=small()), timestep=timestep)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    signal = np.prod(1 - betas[: timestep + 1])
    assert student.sigma_init == pytest.approx(((1 - signal) / signal) ** 0.5)
    z = latents()
    alpha, sigma_t = (float(table[timestep]) for table in (DDPM.alpha_table, DDPM.sigma_table))
    output = own_forward(student.denoiser.network, z, torch.tensor(timestep), captions())
    torch.testing.assert_close(student(z, captions()), (z - sigma_t * output) / alpha, rtol=1e-4, atol=1e-4)


def test_a_step_beyond_the_process_is_refused():
    with pytest.raises(ValueError, match="timestep=1000 must be a step of the process, 0 to 999"):
        OneStepDDPM(denoiser=StableDiffusion(network=small()), timestep=1000)


# --- files ------------------------------------------------------------------------------------------------------------


def test_weights_come_from_a_file_or_a_folder(tmp_path):
    source = small(seed=7)
    (tmp_path / "unet").mkdir()
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.half() for name, tensor in source.unet.state_dict().items()}, weights)
    for path in (tmp_path, tmp_path / "unet", weights):
        denoiser = StableDiffusion(network=small(seed=8), weights=str(path))
        denoiser.load()
        for name, tensor in denoiser.network.unet.state_dict().items():
            torch.testing.assert_close(tensor, source.unet.state_dict()[name].half().float(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="does not fit"):
        StableDiffusion(network=small(block_out_channels=(16, 16)), weights=str(weights)).load()


@pytest.mark.parametrize(("network", "layers"), [(SD15UNet, 1), (SD15UNet, 2), (SDXLUNet, 1)])
def test_one_file_of_the_whole_model_in_its_authors_naming(tmp_path, network, layers):
    source = small(network, seed=7, layers_per_block=layers)
    autoencoder = tiny_pipelines.autoencoder()
    file = tmp_path / "model.safetensors"
    save_file(tiny_pipelines.whole_model(source.unet.state_dict(), autoencoder.state_dict(), layers, 2), file)
    denoiser = StableDiffusion(network=small(network, seed=8, layers_per_block=layers), weights=str(file))
    denoiser.load()
    found = denoiser.network.unet.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in source.unet.state_dict().items())


def test_weights_in_half_precision_alone(tmp_path):
    source = tiny_pipelines.unet(seed=7).half()
    source.save_pretrained(tmp_path / "unet", variant="fp16")
    assert not (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").exists()
    denoiser = StableDiffusion(network=small(seed=8), weights=str(tmp_path))
    denoiser.load()
    found = denoiser.network.unet.state_dict()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in source.state_dict().items())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the hub, and no network."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_model_of_the_hub_that_was_downloaded_before(hub):
    folder = hub / "models--owner--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    source = tiny_pipelines.unet(seed=7)
    source.save_pretrained(folder / "snapshots" / ("a" * 40) / "unet")
    denoiser = StableDiffusion(network=UNetFromFolder(folder="hf://owner/name"), weights="hf://owner/name")
    denoiser.load()
    found = denoiser.network.unet.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in source.state_dict().items())


def test_a_model_of_the_hub_that_cannot_be_had_says_so_in_one_line(hub, monkeypatch):
    denoiser = StableDiffusion(network=small(), weights="hf://owner/name")
    with pytest.raises(ValueError, match=r"cannot fetch hf://owner/name .*hf download owner/name --include") as caught:
        denoiser.load()
    assert "\n" not in str(caught.value)
    from huggingface_hub.errors import GatedRepoError

    def gated(name, *, allow_patterns, local_files_only):
        assert all(pattern.endswith((".safetensors", ".json", ".txt")) for pattern in allow_patterns)
        raise GatedRepoError("no", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.snapshot_download", gated)
    with pytest.raises(ValueError, match=r"is gated: accept its licence at https.*hf auth login") as caught:
        denoiser.load()
    assert "\n" not in str(caught.value)


def test_missing_weights_say_what_to_get(tmp_path):
    denoiser = StableDiffusion(network=small(), weights=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"unet/diffusion_pytorch_model.safetensors.*GB.*hf download") as caught:
        denoiser.load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("network", [SD15UNet, SDXLUNet])
def test_weights_are_drawn_where_no_file_gives_them(network):
    bare, like = small(network, random_weights=False), small(network)
    with pytest.raises(ValueError, match=r"no weights yet: call its load\(\) or draw\(\) first"):
        bare.encode(latents(), torch.tensor([5.0, 5.0]), captions(sized=network is SDXLUNet))
    torch.manual_seed(5)
    StableDiffusion(network=bare).load()
    found, expected = bare.unet.state_dict(), like.unet.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        constant = tensor.unique().numel() == 1  # scales and shifts of norms
        assert torch.equal(found[name], tensor) if constant else not torch.equal(found[name], tensor)
        bound = float(tensor.abs().max())
        assert 0.5 * bound <= float(found[name].abs().max()) <= 2 * bound or tensor.numel() < 20
    torch.testing.assert_close(
        *(torch.cat([t.flatten() for t in state.values()]).std() for state in (found, expected)), rtol=0.02, atol=0
    )
    before = {name: tensor.clone() for name, tensor in found.items()}
    bare.draw()
    assert all(torch.equal(tensor, before[name]) for name, tensor in bare.unet.state_dict().items())


def test_weights_become_the_pages_of_their_file(tmp_path):
    source = tiny_pipelines.unet(seed=7)
    source.save_pretrained(tmp_path / "unet")
    unet = small(random_weights=False).unet
    parameters = dict(unet.named_parameters())
    tensors = read_part([tmp_path / "unet" / "diffusion_pytorch_model.safetensors"], "unet", {})
    fit("SD15UNet", unet.state_dict(keep_vars=True), tensors, "here")
    for name, parameter in unet.named_parameters():
        assert parameter is parameters[name]  # those that share it, or an optimiser that has it, see the new weights
        assert parameter.requires_grad
        assert parameter.data_ptr() == tensors[name].data_ptr()
        assert torch.equal(parameter, source.state_dict()[name])
    with torch.no_grad():
        unet.conv_in.weight.zero_()
    again = read_part([tmp_path / "unet" / "diffusion_pytorch_model.safetensors"], "unet", {})
    assert torch.equal(again["conv_in.weight"], source.conv_in.weight)  # what is written stays in this process
    half = {name: tensor.half() for name, tensor in again.items()}
    fit("SD15UNet", unet.state_dict(keep_vars=True), half, "here")
    assert unet.conv_in.weight.dtype == torch.float32
    assert torch.equal(unet.conv_in.weight, half["conv_in.weight"].float())


def test_a_pickle_is_not_opened(tmp_path):
    torch.save(small().unet.state_dict(), tmp_path / "model.bin")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        StableDiffusion(network=small(), weights=str(tmp_path / "model.bin")).load()


@pytest.mark.parametrize(("network", "sized"), [(SD15UNet, False), (SDXLUNet, True)])
def test_a_folder_s_own_configuration(tmp_path, network, sized):
    source = small(network, seed=3)
    (tmp_path / "config.json").write_text(
        json.dumps({**dict(source.unet.config), "_class_name": "UNet2DConditionModel"})
    )
    unet = UNetFromFolder(folder=str(tmp_path))
    unet.unet.load_state_dict(source.unet.state_dict())
    index, condition = torch.tensor([5.0, 9.0]), captions(sized=sized)
    found, expected = (u.decode(u.encode(latents(), index, condition)) for u in (unet, source))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        UNetFromFolder(folder=str(tmp_path))
    (tmp_path / "config.json").write_text('{"in_channels": 3}')
    with pytest.raises(ValueError, match="see its 'sample_size'"):
        UNetFromFolder(folder=str(tmp_path))


def test_nothing_imports_diffusers_before_it_is_used():
    code = (
        "import sys; from ratiograph import config; "
        "config.parse(['gin/papers/dmd2/sd15_without_gan.gin'], [], {}); "
        "assert 'ratiograph.networks.architectures.stable_diffusion_unets' in sys.modules; "
        "assert not {'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=300)


# --- guidance ---------------------------------------------------------------------------------------------------------


def empty_prompt(path, **parts):
    save_file(parts or {"text": torch.full((3, 12), 0.25)}, path)
    return str(path)


@pytest.mark.parametrize("scale", [1.0, 1.75, 8.0])
def test_guidance_is_away_from_the_empty_prompt(tmp_path, scale):
    held = StableDiffusion(network=small())
    unconditional = EmptyPrompt(file=empty_prompt(tmp_path / "empty.safetensors"))
    guided = Guided(denoiser=held, guidance_scale=scale, unconditional=unconditional)
    guided.load()
    noisy = DDPM.add_noise(latents(), torch.tensor([100.0, 800.0]), latents(seed=3))
    with_text = held.denoise(noisy, captions())
    without = held.denoise(noisy, Condition(text=torch.full((2, 3, 12), 0.25)))
    found = guided.denoise(noisy, captions())
    torch.testing.assert_close(found, without + scale * (with_text - without), rtol=1e-4, atol=1e-4)
    assert (with_text - without).abs().max() > 1e-3
    features = guided.encode(noisy, captions()).features
    torch.testing.assert_close(features[-1], held.encode(noisy, captions()).features[-1], rtol=1e-4, atol=1e-5)


def test_sdxl_is_guided_away_from_zeros_at_the_same_sizes():
    held, condition = StableDiffusion(network=small(SDXLUNet)), captions(sized=True)
    guided = Guided(denoiser=held, guidance_scale=8.0, unconditional=NoCaption())
    noisy = DDPM.add_noise(latents(), torch.tensor([100.0, 800.0]), latents(seed=3))
    zeros = Condition(text=torch.zeros(2, 3, 12), pooled=torch.zeros(2, 10), sizes=condition.sizes)
    with_text, without = held.denoise(noisy, condition), held.denoise(noisy, zeros)
    found = guided.denoise(noisy, condition)
    torch.testing.assert_close(found, without + 8 * (with_text - without), rtol=1e-4, atol=1e-3)


def test_an_empty_prompt_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="save the text encoder's states of the prompt ''"):
        EmptyPrompt(file=str(tmp_path / "none.safetensors")).load()
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        EmptyPrompt(file=str(tmp_path / "torn.safetensors")).load()
    other = EmptyPrompt(file=empty_prompt(tmp_path / "other.safetensors", text=torch.zeros(3, 16)))
    other.load()
    with pytest.raises(ValueError, match=r"has \[3, 16\] as text, captions \[3, 12\]"):
        other(captions())
    with pytest.raises(ValueError, match="Guided needs captions"):
        other(Condition())


# --- the shipped runs -------------------------------------------------------------------------------------------------


TINY = {
    "SD15UNet": {**SD15, "attention_heads": 2, "layers_per_block": 1},
    "SDXLUNet": {**SDXL, "layers_per_block": 1},
    "LatentStream": {"workers": 0},
    "Distillation": {"warm_start": None, "student_score_updates": 2, "critic_steps": 0},
    "TeacherFeatureRatio": {"width": 8},
    "StudentScoreHeadRatio": {"width": 8},
}


def tiny(file, folder, *more):
    """The run of ``file`` at a tiny size, on random latents and captions written to ``folder``."""
    generator = torch.Generator().manual_seed(11)
    shapes = {"latent": (4, 8, 8), "text": (3, 12), "pooled": (10,), "sizes": (6,)}
    parts = {name: torch.randn(12, *shape, generator=generator) for name, shape in shapes.items()}
    parts["sizes"] = torch.full((12, 6), 512)
    (shard,) = write_latents(folder / "shards", "tiny", parts)
    flat = config.to_dict(config.parse([file], [], {}))
    built = {name.partition(".")[0].rpartition("/")[2] for name in flat}
    bindings = [f"DATA = '{shard}'", *(f"{macro} = None" for macro in ("TEACHER", "STUDENT") if macro in flat)]
    if "EMPTY_PROMPT" in flat:
        bindings.append(f"EMPTY_PROMPT = '{empty_prompt(folder / 'empty.safetensors')}'")
    if "Distillation.ratio_updates" in flat:
        bindings.append(f"Distillation.ratio_updates = {min(2, flat['Distillation.ratio_updates'])}")
    sizes = {name: TINY[name] for name in TINY if name in built}
    bindings += [f"{name}.{key} = {value!r}" for name, values in sizes.items() for key, value in values.items()]
    torch.manual_seed(0)
    return config.build(config.parse([file], [*bindings, *more], {}))


def test_there_are_files():
    wanted = ("f_distill/sd15_jensen_shannon", "f_distill/sdxl_jensen_shannon", "dmd2/sdxl", "di_bregman/sd15_sba")
    assert {f"gin/papers/{name}.gin" for name in wanted} <= set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_takes_steps(file, tmp_path):
    experiment = tiny(file, tmp_path)
    task = experiment.task
    task.prepare(torch.device("cpu"), None)
    batches, generator = experiment.data.batches(4, 0, 0), torch.Generator().manual_seed(0)
    assert task.fit(batches, generator) == {}
    before = {name: [p.clone() for p in network.parameters()] for name, network in task.trained().items()}
    teacher = [p.clone() for p in task.teacher.parameters()]
    for _ in range(2):
        metrics = task.step(next(batches), 4, generator)
    assert all(value.isfinite() for value in metrics.values())
    assert all(torch.equal(a, b) for a, b in zip(teacher, task.teacher.parameters(), strict=True))
    for name in task.optimizers:
        pairs = zip(before[name], task.trained()[name].parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs), f"{name} stood still"
    # No published EMA: the average is the student.
    assert all(torch.equal(a, b) for a, b in zip(task.average.parameters(), task.student.parameters(), strict=True))
    assert task.preview(5, generator).shape == (5, 1, 8, 32)
    batches.close()


@pytest.mark.parametrize("file", ["f_distill/sd15_jensen_shannon", "dmd2/sdxl"])
def test_takes_steps_in_bf16(file, tmp_path):
    """R1's second derivative, checkpointing and both heads under autocast; the estimate stays near fp32's."""
    experiment = tiny(f"gin/papers/{file}.gin", tmp_path)
    task, generator = experiment.task, torch.Generator().manual_seed(0)
    task.prepare(torch.device("cpu"), torch.bfloat16)
    batches = experiment.data.batches(4, 0, 0)
    batch = next(batches)
    batches.close()
    noisy = DDPM.add_noise(latents(4), torch.tensor([5.0, 50.0, 200.0, 400.0]), latents(4, seed=3))
    held = task.teacher.denoiser
    single = copy.deepcopy(held).float()
    single.autocast_dtype = None
    found = [denoiser.denoise(noisy, batch.condition).detach() for denoiser in (held, single)]
    assert found[0].dtype == torch.float32
    assert 0 < (found[0] - found[1]).square().mean().sqrt() < 0.02 * found[1].std()
    assert all(value.isfinite() for value in task.step(batch, 4, generator).values())


def test_a_run_resumes_to_the_same_student(tmp_path):
    """Through the trainer: latents, captions and previews are those of the run that was not interrupted."""
    sizes = ("Experiment.steps = 3", "Experiment.batch_size = 4", "Experiment.checkpoint_every = 2")
    more = (*sizes, "Experiment.preview_samples = 6", "Experiment.precision = 'fp32'")
    whole = []
    for attempt in range(2):
        (tmp_path / str(attempt)).mkdir()
        experiment = tiny("gin/papers/dmd2/sd15_without_gan.gin", tmp_path / str(attempt), *more)
        trainer.train(experiment, workdir=tmp_path / "run", device="cpu")
        written = [tmp_path / "run" / "student.safetensors", tmp_path / "run" / "samples" / "step_00000003.png"]
        whole.append([path.read_bytes() for path in written])
        for path in (*written, *(tmp_path / "run" / "checkpoints").glob("step_00000003*")):
            path.unlink()
    assert whole[0] == whole[1]
    assert whole[0][1].startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("file", "network", "own"),
    [("f_distill/sd15_jensen_shannon", 859_520_964, 3), ("f_distill/sdxl_jensen_shannon", 2_567_463_684, 3)],
)
def test_full_size_on_the_meta_device(file, network, own):
    with torch.device("meta"):
        experiment = config.build(config.parse([f"gin/papers/{file}.gin"], [], {}))
    task = experiment.task
    nodes = (task.teacher, task.student, task.student_score)
    assert [sum(p.numel() for p in node.parameters()) for node in nodes] == own * [network]
    assert all(p.is_meta for p in task.parameters())
    assert torch.equal(task.noising.alpha_table, DDPM.alpha_table)


def test_reported_guidance_and_steps():
    """The numbers of the papers' tables, as each file resolves them."""
    rows = {
        "f_distill/sd15_jensen_shannon": (1.75, 1024, 6000, 10),
        "f_distill/sd15_reverse_kl_guidance5": (5.0, 1024, 6000, 10),
        "f_distill/sdxl_jensen_shannon": (8.0, 384, 5000, 5),
        "dmd2/sd15_without_gan": (1.75, 2048, 3900, 10),
        "dmd2/sd15_gan": (1.75, 2048, 200, 10),
        "dmd2/sdxl": (8.0, 128, 4800, 5),
    }
    for file, expected in rows.items():
        flat = config.to_dict(config.parse([f"gin/papers/{file}.gin"], [], {}))
        found = (
            flat["GUIDANCE"],
            flat["Experiment.batch_size"],
            flat["Experiment.steps"],
            flat["Distillation.student_score_updates"],
        )
        assert found == expected, file


# --- what the files of the teacher say --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "sd"
    tiny_pipelines.sd15(folder)
    return folder


def told(whole, tmp_path, **said):
    """A copy of the pipeline whose scheduler says so."""
    folder = tmp_path / "sd"
    shutil.copytree(whole, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    return str(folder)


@pytest.mark.parametrize("source", ["", "unet", "unet/diffusion_pytorch_model.safetensors"])
def test_prediction_and_betas_are_the_scheduler_files(whole, tmp_path, source):
    said = {"prediction_type": "v_prediction", "beta_end": 0.014, "num_train_timesteps": 500}
    folder = told(whole, tmp_path, **said)
    model = StableDiffusion(network=UNetFromFolder(folder=folder), weights=str(Path(folder) / source))
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    assert isinstance(model.prediction, VPrediction)
    assert torch.equal(model.native_alpha, scheduler.alphas_cumprod.sqrt())
    assert OneStepDDPM(denoiser=model, timestep=499).process is model.process


@pytest.mark.parametrize(
    ("said", "given", "message"),
    [
        ({"prediction_type": "v_prediction"}, {"prediction": EpsilonPrediction()}, "EpsilonPrediction.*v_prediction"),
        ({}, {"process": ScaledLinearDDPM(beta_end=0.02)}, r"beta_end=0\.02.*beta_end=0\.012"),
        ({"prediction_type": "flow"}, {}, "prediction_type flow"),
        ({"rescale_betas_zero_snr": True}, {}, "rescale_betas_zero_snr"),
        ({"beta_schedule": "linear"}, {}, "beta_schedule linear"),
        ({"beta_start": None}, {}, "states no num_train_timesteps"),
        ({"trained_betas": [0.1, 0.1, 0.4]}, {}, "trained_betas"),
    ],
)
def test_a_line_that_contradicts_the_folder_is_refused(whole, tmp_path, said, given, message):
    folder = told(whole, tmp_path, **said)
    with pytest.raises(ValueError, match=message) as error:
        StableDiffusion(network=UNetFromFolder(folder=folder), weights=folder, **given)
    assert "scheduler_config.json" in str(error.value)


def test_betas_of_an_export_are_their_process(whole, tmp_path):
    betas = ScaledLinearDDPM().betas[:400].tolist()
    folder = told(whole, tmp_path, num_train_timesteps=400, trained_betas=betas)
    model = StableDiffusion(network=UNetFromFolder(folder=folder), weights=folder)
    torch.testing.assert_close(model.process.alpha_table, ScaledLinearDDPM().alpha_table[:400])


@pytest.mark.parametrize(("name", "value"), [("attention_head_dim", 4), ("norm_num_groups", 8), ("sample_size", 16)])
def test_a_network_of_another_configuration_is_refused_though_its_tensors_fit(whole, tmp_path, name, value):
    folder = Path(told(whole, tmp_path))
    network = UNetFromFolder(folder=str(folder))
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=rf"UNetFromFolder has {name}=\d+, and .* says {value}: "):
        StableDiffusion(network=network, weights=str(folder))
