"""The autoencoder against diffusers' own, its chunks, its gradient, and every way its weights can lie."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import tiny_pipelines
from ratiograph.networks.autoencoder import Autoencoder
from ratiograph.networks.weights.pipeline_files import read_part

FACTOR = 0.13025


@pytest.fixture(scope="module")
def theirs():
    return tiny_pipelines.autoencoder(FACTOR)


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    root = tmp_path_factory.mktemp("pipeline")
    theirs.save_pretrained(root / "vae")
    return root


def loaded(weights, **more):
    autoencoder = Autoencoder(weights=str(weights), **more)
    autoencoder.load()
    return autoencoder


def images(samples=5, seed=0):
    return torch.rand(samples, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def latents(samples=5, seed=1):
    return torch.randn(samples, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_equals_diffusers_both_ways(theirs, folder, chunk):
    autoencoder = loaded(folder, chunk=chunk)
    with torch.no_grad():
        expected = FACTOR * theirs.encode(images()).latent_dist.mean
        torch.testing.assert_close(autoencoder.encode(images()), expected, rtol=0, atol=1e-5)
        expected = theirs.decode(latents() / FACTOR).sample
        torch.testing.assert_close(autoencoder.decode(latents()), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.01


def test_a_generator_gives_a_sample_of_the_posterior(theirs, folder):
    found = loaded(folder).encode(images(), torch.Generator().manual_seed(3))
    noise = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        posterior = theirs.encode(images()).latent_dist
    torch.testing.assert_close(found, FACTOR * (posterior.mean + posterior.std * noise), rtol=1e-5, atol=1e-6)
    assert (found - FACTOR * posterior.mean).abs().max() > 1e-3


def test_an_explicit_factor_wins(folder):
    one, other = loaded(folder, scaling_factor=0.5), loaded(folder)
    torch.testing.assert_close(one.encode(images()), other.encode(images()) * 0.5 / FACTOR)


def test_the_checkpointed_gradient_is_that_of_one_pass(theirs, folder):
    direction = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    whole = latents().requires_grad_()
    (theirs.decode(whole / FACTOR).sample * direction).sum().backward()
    for checkpointing in (True, False):
        parts = latents().requires_grad_()
        (loaded(folder, chunk=2, checkpointing=checkpointing).decode(parts) * direction).sum().backward()
        torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_gradient_is_the_finite_difference(folder, checkpointing):
    autoencoder = loaded(folder, chunk=1, checkpointing=checkpointing).double()
    z, along = latents(2).double().requires_grad_(), latents(2, seed=9).double()
    autoencoder.decode(z).square().sum().backward()
    with torch.no_grad():
        ahead, behind = (autoencoder.decode(z + h * along).square().sum() for h in (1e-4, -1e-4))
    assert float((z.grad * along).sum()) == pytest.approx(float(ahead - behind) / 2e-4, rel=1e-6)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_second_derivative_where_attention_is_plain(folder, checkpointing):
    autoencoder = loaded(folder, double_backward=True, checkpointing=checkpointing).double()
    z, along = latents(1).double().requires_grad_(), latents(1, seed=9).double()

    def slope(at):
        return torch.autograd.grad(autoencoder.decode(at).square().sum(), at, create_graph=True)[0]

    (bent,) = torch.autograd.grad(slope(z), z, along)
    ahead, behind = (slope((z + h * along).detach().requires_grad_()).detach() for h in (1e-4, -1e-4))
    torch.testing.assert_close(bent, (ahead - behind) / 2e-4, rtol=1e-4, atol=1e-4)


def test_stays_in_float32_and_frozen(folder):
    autoencoder = loaded(folder).train()
    assert not autoencoder.training
    assert not any(parameter.requires_grad for parameter in autoencoder.parameters())
    assert autoencoder.state_dict() == {}
    autoencoder.load_state_dict({}, strict=True)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        inside = autoencoder.decode(latents())
        encoded = autoencoder.encode(images())
    assert inside.dtype == encoded.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(inside, autoencoder.decode(latents()))


# --- files ------------------------------------------------------------------------------------------------------------


def test_weights_in_every_place_and_naming(theirs, folder, tmp_path):
    state = theirs.state_dict()
    half = {name: tensor.half() for name, tensor in state.items()}
    config = json.dumps(dict(theirs.config))
    old = {}
    for name, tensor in state.items():
        for new, former in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        old[name] = tensor
    assert old.keys() != state.keys()
    for place, tensors in {"fp16": half, "old": old}.items():
        (tmp_path / place / "vae").mkdir(parents=True)
        (tmp_path / place / "vae" / "config.json").write_text(config)
        suffix = ".fp16.safetensors" if place == "fp16" else ".safetensors"
        save_file(tensors, tmp_path / place / "vae" / f"diffusion_pytorch_model{suffix}")
    for place in (folder, folder / "vae", tmp_path / "old"):
        found = loaded(place).vae.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    found = loaded(tmp_path / "fp16").vae.state_dict()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in half.items())


def test_one_file_of_the_whole_model(tmp_path):
    """The standard architecture at a tenth of its widths, as the authors of Stable Diffusion name its tensors."""
    source = tiny_pipelines.autoencoder(levels=4)
    save_file(tiny_pipelines.whole_model({}, source.state_dict(), 1, 4), tmp_path / "model.safetensors")
    tensors = read_part([tmp_path / "model.safetensors"], "vae", dict(source.config))
    assert tensors.keys() == source.state_dict().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in source.state_dict().items())


def test_no_weights_cost_no_memory_on_the_meta_device():
    with torch.device("meta"):
        autoencoder = Autoencoder(weights="nowhere")
    assert sum(p.numel() for p in autoencoder.parameters()) == 83_653_863
    assert all(p.is_meta for p in autoencoder.parameters())
    assert (autoencoder.factor, autoencoder.downsampling) == (0.18215, 8)


def test_bad_input_says_what_to_do(theirs, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no vae at Autoencoder.weights=.*hf download.*'vae/\*'") as caught:
        loaded(tmp_path / "none")
    assert "\n" not in str(caught.value)
    (tmp_path / "vae").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no safetensors file"):
        loaded(tmp_path)
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        loaded(tmp_path / "torn.safetensors")
    tensors = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    tensors.pop("decoder.conv_in.bias")
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking" / "config.json").write_text(json.dumps(dict(theirs.config)))
    save_file(tensors, tmp_path / "lacking" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.bias is not in the file"):
        loaded(tmp_path / "lacking")
    (tmp_path / "lacking" / "config.json").write_text(json.dumps({**theirs.config, "shift_factor": 0.1}))
    with pytest.raises(ValueError, match="not Stable Diffusion's: it has shift_factor"):
        Autoencoder(weights=str(tmp_path / "lacking"))
    with pytest.raises(ValueError, match="both sides must be multiples of 2"):
        loaded(folder).encode(torch.zeros(1, 3, 16, 15))
    with pytest.raises(ValueError, match="chunk=0"):
        Autoencoder(weights=None, chunk=0)
