"""Pretrained rewards at tiny sizes against transformers, open_clip, and ImageReward's formulas written out."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

from ratiograph.algebra.rewards import BlackBoxReward, Reward, ScaledReward, SumReward
from ratiograph.algebra.second_order_targets import RewardTiltedCumulant
from ratiograph.algebra.targets import RewardTilted
from ratiograph.core.contracts import Evaluation, Nodes
from ratiograph.core.types import Condition, Noisy
from ratiograph.data import captions
from ratiograph.networks.architectures.unet import UNet
from ratiograph.networks.autoencoder import Autoencoder
from ratiograph.networks.denoisers import EDM
from ratiograph.networks.rewards.clip_rewards import AestheticReward, CLIPReward, PickScoreReward
from ratiograph.networks.rewards.image_rewards import (
    MEAN,
    STD,
    CaptionCache,
    DecodedReward,
    cropped,
    normalised,
    padded,
)
from ratiograph.networks.rewards.preference_rewards import HPSv2Reward, ImageReward
from tiny_pipelines import autoencoder, tokenizer

CAPTIONS = ["ab abc", "a longer one, cab", "ab abc"]
TOLD = Condition(caption=captions.pack(CAPTIONS))


def images(height: int = 40, width: int = 40, count: int = 3) -> Tensor:
    """Smooth images in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 3, 5, 5, generator=generator)
    return F.interpolate(coarse, (height, width), mode="bicubic").div(2).clamp(-0.95, 0.95)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP model in transformers' format."""
    folder = tmp_path_factory.mktemp("clip") / "model"
    text = {
        "vocab_size": 192,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "bos_token_id": 190,
        "eos_token_id": 191,
    }
    vision = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=10, logit_scale_init_value=4.6))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer(folder.with_name("words")).save_pretrained(folder)
    return folder


def loaded(reward: Reward) -> Reward:
    reward.load()
    return reward


# --- pixels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 40), (64, 48), (47, 90), (32, 32), (20, 29)])
def test_pixels_are_those_of_the_image_processor(shape):
    """Exactly on floats; within the rounding of 8-bit pixels, about 1/255/std, on images as they are saved."""
    x = images(*shape)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    found = normalised(cropped(x, 32))
    exact = processor(list((x + 1) / 2), do_rescale=False, return_tensors="pt").pixel_values
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)
    saved = [((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for image in x]
    rounded = processor(saved, return_tensors="pt").pixel_values
    assert (found - rounded).abs().max() < 2 / 255 / min(STD)
    assert (found - rounded).abs().mean() < 1e-2


def test_pixels_are_those_of_open_clip_where_it_pads():
    x = images(64, 48, 1)
    transform = open_clip.image_transform(32, is_train=False, mean=MEAN, std=STD, resize_mode="longest", fill_color=0)
    from PIL import Image

    saved = Image.fromarray(((x[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    assert (normalised(padded(x, 32))[0] - transform(saved)).abs().mean() < 1e-2


def test_what_lies_outside_is_clamped():
    torch.testing.assert_close(cropped(images() * 5, 32), cropped((images() * 5).clamp(-1, 1), 32), rtol=0, atol=0)


# --- captions -------------------------------------------------------------------------------------------------------


def test_each_batch_of_captions_is_embedded_once_until_it_is_the_oldest():
    asked: list[list[str]] = []

    def lengths(texts: list[str]) -> Tensor:
        asked.append(texts)
        return torch.tensor([[float(len(text))] for text in texts])

    store = CaptionCache(lengths, capacity=2)
    assert store(["a", "bb", "a"]).tolist() == [[1.0], [2.0], [1.0]]
    assert store(["a", "ccc"]).tolist() == [[1.0], [3.0]]
    assert store(["a", "bb", "a"]).tolist() == [[1.0], [2.0], [1.0]]
    assert store(["x"]).tolist() == [[1.0]]
    assert store(["a", "bb", "a"]).tolist() == [[1.0], [2.0], [1.0]]
    assert store(["a", "ccc"]).tolist() == [[1.0], [3.0]]
    assert asked == [["a", "bb"], ["a", "ccc"], ["x"], ["a", "ccc"]]


# --- each reward ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CLIPReward, PickScoreReward])
def test_clip_reward_is_the_logit_of_the_model(clip, kind):
    model, words = CLIPModel.from_pretrained(clip), tokenizer(clip.with_name(f"words-{kind.__name__}"))
    tokens = words(CAPTIONS, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=tokens.input_ids, pixel_values=normalised(cropped(images(), 32)))
    found = loaded(kind(weights=str(clip)))(images(), TOLD)
    torch.testing.assert_close(found, out.logits_per_image.diagonal(), rtol=1e-4, atol=1e-4)
    assert found.std() > 1


def test_captions_are_embedded_once_in_training(clip):
    reward, texts = loaded(CLIPReward(weights=str(clip))), []
    compute = reward.embed_captions.compute
    reward.embed_captions.compute = lambda new: texts.extend(new) or compute(new)
    for _ in range(3):
        reward(images(), TOLD)
    assert texts == CAPTIONS[:2]


def test_aesthetic_reward_is_the_head_on_the_normalised_embedding(clip, tmp_path):
    torch.manual_seed(0)
    sizes = (10, 1024, 128, 64, 16, 1)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    published = {
        f"layers.{n}.{name}": tensor
        for n, layer in zip((0, 2, 4, 6, 7), layers, strict=True)
        for name, tensor in layer.state_dict().items()
    }
    torch.save(published, tmp_path / "head.pth")
    found = loaded(AestheticReward(weights=str(clip), head=str(tmp_path / "head.pth")))(images(), Condition())
    with torch.no_grad():
        features = CLIPModel.from_pretrained(clip).get_image_features(normalised(cropped(images(), 32))).pooler_output
        state = features / features.norm(dim=1, keepdim=True)
        for layer in layers:
            state = layer(state)
    torch.testing.assert_close(found, state[:, 0], rtol=1e-4, atol=1e-5)
    assert found.std() > 1e-4


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    """(open_clip's name of a tiny model, a file of its weights in the published form, the model)."""
    folder = tmp_path_factory.mktemp("hps")
    config = {
        "embed_dim": 10,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 24, "head_width": 12, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    (folder / "tiny-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-hps.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-hps").eval()
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return "tiny-hps", folder, model


def test_hps_is_the_logit_of_open_clips_model(hps):
    name, folder, model = hps
    x = images(48, 64)
    with torch.no_grad():
        u = model.encode_image(normalised(padded(x, 32)), normalize=True)
        v = model.encode_text(open_clip.get_tokenizer(name)(CAPTIONS), normalize=True)
    expected = model.logit_scale.exp() * (u * v).sum(1)
    for weights in (folder, folder / "HPS_v2.1_compressed.pt"):
        found = loaded(HPSv2Reward(weights=str(weights), model=name))(x, TOLD)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


WIDTH, HEADS = 128, 2
"""Of the tiny ImageReward: heads 64 wide, as published."""


def published_image_reward() -> dict[str, Tensor]:
    """Random weights under the names of ImageReward.pt; the vision tower 64 wide, one head."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape, std=0.1: std * torch.randn(shape, generator=generator)  # noqa: E731
    vision, text, state = "blip.visual_encoder", "blip.text_encoder", {}

    def linear(name: str, wide: int, narrow: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = normal(wide, narrow, std=narrow**-0.5), normal(wide)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + normal(width), normal(width)

    state |= {f"{vision}.cls_token": normal(1, 1, 64), f"{vision}.pos_embed": normal(1, 5, 64)}
    state[f"{vision}.patch_embed.proj.weight"] = normal(64, 3, 16, 16)
    state[f"{vision}.patch_embed.proj.bias"] = normal(64)
    for block in (f"{vision}.blocks.{n}" for n in range(2)):
        norm(f"{block}.norm1", 64)
        linear(f"{block}.attn.qkv", 192, 64)
        linear(f"{block}.attn.proj", 64, 64)
        norm(f"{block}.norm2", 64)
        linear(f"{block}.mlp.fc1", 256, 64)
        linear(f"{block}.mlp.fc2", 64, 256)
    norm(f"{vision}.norm", 64)
    state |= {
        f"{text}.embeddings.position_ids": torch.arange(512)[None],
        f"{text}.embeddings.word_embeddings.weight": normal(30524, WIDTH),
        f"{text}.embeddings.position_embeddings.weight": normal(512, WIDTH),
        "blip.vision_proj.weight": normal(4, 64),
        "blip.text_proj.bias": normal(4),
    }
    norm(f"{text}.embeddings.LayerNorm", WIDTH)
    for layer in (f"{text}.encoder.layer.{n}" for n in range(2)):
        for kind, source in (("attention", WIDTH), ("crossattention", 64)):
            linear(f"{layer}.{kind}.self.query", WIDTH, WIDTH)
            linear(f"{layer}.{kind}.self.key", WIDTH, source)
            linear(f"{layer}.{kind}.self.value", WIDTH, source)
            linear(f"{layer}.{kind}.output.dense", WIDTH, WIDTH)
            norm(f"{layer}.{kind}.output.LayerNorm", WIDTH)
        linear(f"{layer}.intermediate.dense", 4 * WIDTH, WIDTH)
        linear(f"{layer}.output.dense", WIDTH, 4 * WIDTH)
        norm(f"{layer}.output.LayerNorm", WIDTH)
    sizes = (WIDTH, 1024, 128, 64, 16, 1)
    for n, wide, narrow in zip((0, 2, 4, 6, 7), sizes[1:], sizes[:-1], strict=True):
        linear(f"mlp.layers.{n}", wide, narrow)
    return state


class Formulas:
    """ImageReward of a state dict by its formulas: a pre-norm vision transformer, and a post-norm BERT looking at it.

    On these weights the network of the package image-reward 1.5 gives the same three numbers.
    """

    def __init__(self, state: dict[str, Tensor]):
        self.state = state

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Heads of 64, one after another."""
        outputs = []
        for head in range(q.shape[-1] // 64):
            part = slice(64 * head, 64 * head + 64)
            logits = q[..., part] @ k[..., part].mT / 8
            logits = logits if mask is None else logits.masked_fill(mask[:, None] == 0, -torch.inf)
            outputs.append(logits.softmax(-1) @ v[..., part])
        return torch.cat(outputs, -1)

    def patches(self, pixels: Tensor) -> Tensor:
        name = "blip.visual_encoder"
        kernel = self.state[f"{name}.patch_embed.proj.weight"]
        cut = F.unfold(pixels, 16, stride=16).mT @ kernel.flatten(1).T + self.state[f"{name}.patch_embed.proj.bias"]
        first = self.state[f"{name}.cls_token"].expand(len(cut), 1, -1)
        x = torch.cat([first, cut], 1) + self.state[f"{name}.pos_embed"]
        for block in (f"{name}.blocks.{n}" for n in range(2)):
            q, k, v = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
            x = x + self.linear(f"{block}.attn.proj", self.attention(q, k, v))
            hidden = F.gelu(self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6)))
            x = x + self.linear(f"{block}.mlp.fc2", hidden)
        return self.norm(f"{name}.norm", x, 1e-6)

    def look(self, name: str, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (self.linear(f"{name}.self.{n}", s) for n, s in (("query", x), ("key", source), ("value", source)))
        out = self.linear(f"{name}.output.dense", self.attention(q, k, v, mask))
        return self.norm(f"{name}.output.LayerNorm", out + x, 1e-12)

    def __call__(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        name, patches = "blip.text_encoder", self.patches(pixels)
        words = self.state[f"{name}.embeddings.word_embeddings.weight"][ids]
        x = words + self.state[f"{name}.embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self.norm(f"{name}.embeddings.LayerNorm", x, 1e-12)
        for layer in (f"{name}.encoder.layer.{n}" for n in range(2)):
            x = self.look(f"{layer}.attention", x, x, mask)
            x = self.look(f"{layer}.crossattention", x, patches, None)
            out = self.linear(f"{layer}.output.dense", F.gelu(self.linear(f"{layer}.intermediate.dense", x)))
            x = self.norm(f"{layer}.output.LayerNorm", out + x, 1e-12)
        state = x[:, 0]
        for n in (0, 2, 4, 6, 7):
            state = self.linear(f"mlp.layers.{n}", state)
        return (state[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """(folder with ImageReward.pt and vocab.txt, its state dict)."""
    folder = tmp_path_factory.mktemp("image-reward")
    words = ["[PAD]", *(f"[unused{n}]" for n in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ab", "a", "cab", ","]
    (folder / "vocab.txt").write_text("\n".join([*words, "longer", "##c"]) + "\n")
    state = published_image_reward()
    torch.save(state, folder / "ImageReward.pt")
    return folder, state


TINY = {"vision_width": 64, "vision_layers": 2, "text_width": WIDTH, "text_layers": 2, "image_size": 32}


def test_image_reward_is_its_formulas(judged):
    folder, state = judged
    reward = loaded(ImageReward(weights=str(folder), tokenizer=str(folder), **TINY))
    found = reward(images(), TOLD)
    words = BertTokenizer(vocab=str(folder / "vocab.txt"))
    tokens = words(CAPTIONS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    assert tokens.input_ids[1, :7].tolist() == [101, 105, 108, 100, 107, 106, 102]  # [CLS] a longer [UNK] , cab [SEP]
    expected = Formulas(state)(normalised(cropped(images(), 32)), tokens.input_ids, tokens.attention_mask)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, torch.tensor([-0.0064, -0.8470, -0.3443]), rtol=0, atol=6e-5)
    other = Condition(caption=captions.pack(["cab", "ab", "a ab a ab"]))
    assert (reward(images(), other) - found).abs().min() > 1e-3


def test_captions_of_any_length(clip, hps, judged):
    """Empty, and so long that it is cut: alike from there on."""
    rewards = [
        CLIPReward(weights=str(clip)),
        HPSv2Reward(weights=str(hps[1]), model=hps[0]),
        ImageReward(weights=str(judged[0]), tokenizer=str(judged[0]), **TINY),
    ]
    told = Condition(caption=captions.pack(["", "ab " * 3000, "ab " * 3000 + "cab"]))
    same = images()[:1].expand(3, -1, -1, -1)
    for reward in map(loaded, rewards):
        empty, long, longer = reward(same, told)
        assert empty.isfinite()
        assert (empty - long).abs() > 1e-4
        torch.testing.assert_close(long, longer)


def test_gradients_of_every_reward_against_finite_differences(clip, hps, judged, tmp_path):
    """In float64, along a random direction of the pixels."""
    torch.save({f"layers.{k}": v for k, v in CLIPHead().state_dict().items()}, tmp_path / "head.pth")
    rewards = [
        CLIPReward(weights=str(clip)),
        AestheticReward(weights=str(clip), head=str(tmp_path / "head.pth")),
        HPSv2Reward(weights=str(hps[1]), model=hps[0]),
        ImageReward(weights=str(judged[0]), tokenizer=str(judged[0]), **TINY),
    ]
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(3, 3, 40, 56, generator=generator, dtype=torch.float64)
    for reward in map(loaded, rewards):
        reward.double()
        x = images(40, 56).double().requires_grad_()
        (gradient,) = torch.autograd.grad(reward(x, TOLD).sum(), x)
        with torch.no_grad():
            up, down = (reward(x + s * direction, TOLD) for s in (1e-5, -1e-5))
        difference = (up - down) / 2e-5
        torch.testing.assert_close((gradient * direction).sum((1, 2, 3)), difference, rtol=1e-5, atol=1e-9)
        assert difference.abs().min() > 1e-6
        assert not any(parameter.requires_grad for parameter in reward.parameters())


class CLIPHead(nn.Sequential):
    """The aesthetic predictor's layers on 10 numbers."""

    def __init__(self):
        torch.manual_seed(3)
        linear = [nn.Linear(a, b) for a, b in ((10, 1024), (1024, 128), (128, 64), (64, 16), (16, 1))]
        super().__init__(linear[0], nn.Identity(), linear[1], nn.Identity(), linear[2], nn.Identity(), *linear[3:])


# --- through the decoder --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A tiny autoencoder in diffusers' format."""
    folder = tmp_path_factory.mktemp("autoencoder") / "vae"
    autoencoder().save_pretrained(folder)
    return folder


def decoded(clip, vae, **arguments) -> DecodedReward:
    clip_reward = ScaledReward(reward=CLIPReward(weights=str(clip)), beta=5.0)
    reward = DecodedReward(reward=clip_reward, autoencoder=Autoencoder(weights=str(vae), chunk=2), **arguments)
    return loaded(reward).requires_grad_(False)


def latents() -> Tensor:
    return 0.2 * torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))


def test_decoded_reward_is_the_reward_of_the_decoded_images(clip, vae):
    x = latents()
    with torch.no_grad():
        pictures = autoencoder().decode(x / 0.18215).sample
    expected = loaded(CLIPReward(weights=str(clip)))(pictures, TOLD) / 5
    for arguments in ({"chunk": 2}, {"chunk": 1, "checkpointing": False}, {}):
        reward = decoded(clip, vae, **arguments)
        torch.testing.assert_close(reward(x, TOLD), expected, rtol=1e-4, atol=1e-5)
        assert reward(x.clone().requires_grad_(), TOLD).requires_grad


def small_denoiser() -> EDM:
    torch.manual_seed(0)
    network = UNet(resolution=8, channels=16, image_channels=4)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.12)
    return EDM(network=network).requires_grad_(False)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradient_through_reward_decoder_and_denoiser(clip, vae, checkpointing):
    """grad_x log R(decode(mu(x_t))), as the tilted target takes it, against finite differences in float64."""
    target = RewardTilted(reward=decoded(clip, vae, chunk=2, checkpointing=checkpointing), log_normalizer=0.25).double()
    teacher = small_denoiser().double()
    x_t = latents().double() * 4
    full = lambda value: torch.full((3,), value, dtype=torch.float64)  # noqa: E731

    def log_target(x: Tensor) -> tuple[Tensor, Tensor]:
        noisy = Noisy(x, full(0.5), full(0.8), full(0.5))
        return target.log_target(Evaluation(noisy, x, TOLD, Nodes(teacher=teacher), target.needs))

    value, gradient = log_target(x_t)
    direction = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    up, down = (log_target(x_t + s * direction)[0] for s in (1e-5, -1e-5))
    difference = (up - down) / 2e-5
    found = (gradient * direction).sum((1, 2, 3))
    assert ((found - difference).abs() <= 1e-6 * difference.abs()).all()
    assert difference.abs().min() > 1e-4
    assert value.isfinite().all()


@pytest.mark.parametrize("checkpointing", [True, False])
def test_second_order_gradient_through_reward_and_decoder(clip, vae, checkpointing):
    """Three derivatives of CLIP's towers and the decoder, whose blocks are run again for each."""
    reward = DecodedReward(
        reward=ScaledReward(reward=CLIPReward(weights=str(clip)), beta=50.0),
        autoencoder=Autoencoder(weights=str(vae), chunk=2, checkpointing=checkpointing, double_backward=True),
        chunk=2,
        checkpointing=checkpointing,
    )
    target = RewardTiltedCumulant(reward=reward, log_normalizer=0.0)
    target.load()
    target, teacher, x_t = target.double(), small_denoiser().double(), 2 * latents().double()
    full = lambda value: torch.full((3,), value, dtype=torch.float64)  # noqa: E731

    def log_target(x: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)  # the same probes
        noisy = Noisy(x, full(0.5), full(0.8), full(0.5))
        return target.log_target(Evaluation(noisy, x, TOLD, Nodes(teacher=teacher), target.needs))

    direction = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    up, down = (log_target(x_t + s * direction)[0] for s in (1e-4, -1e-4))
    found = (log_target(x_t)[1] * direction).sum((1, 2, 3))
    torch.testing.assert_close(found, (up - down) / 2e-4, rtol=1e-3, atol=1e-4)
    assert found.abs().min() > 0.1


def test_black_box_runs_the_decoder_without_a_graph(clip, vae):
    inner = BlackBoxReward(reward=CLIPReward(weights=str(clip)))
    reward = loaded(DecodedReward(reward=SumReward(rewards=[inner]), autoencoder=Autoencoder(weights=str(vae))))
    x = latents().requires_grad_()
    assert not reward.differentiable
    assert not reward(x, TOLD).requires_grad
    with pytest.raises(ValueError, match="RewardWeighted"):
        RewardTilted(reward=reward)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_missing_weights_name_the_flag_the_size_and_the_command(clip, hps, judged, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    cases = [
        (CLIPReward(weights=nowhere), r"CLIPReward\.weights.*clip-vit-large-patch14.*1\.7 GB"),
        (AestheticReward(weights=str(clip), head=nowhere), r"AestheticReward\.head.*curl.*4 MB"),
        (ImageReward(weights=nowhere, tokenizer=str(judged[0]), **TINY), r"ImageReward\.weights.*hf download.*1\.8 GB"),
        (ImageReward(weights=str(judged[0]), tokenizer=nowhere, **TINY), r"ImageReward\.tokenizer.*vocab\.txt"),
        (HPSv2Reward(weights=nowhere, model=hps[0]), r"HPSv2Reward\.weights.*hf download xswu/HPSv2.*2 GB"),
        (HPSv2Reward(weights=str(clip), model=hps[0]), r"no HPS_v2\.1_compressed\.pt in HPSv2Reward\.weights"),
    ]
    for reward, message in cases:
        with pytest.raises(FileNotFoundError, match=message):
            reward.load()


def test_models_of_the_hub(clip, hps, monkeypatch):
    """What is asked for, that it is used, and what is said where the hub gives nothing."""
    asked = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(clip if name == "some/clip" else hps[1])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    local, hub = (loaded(CLIPReward(weights=weights)) for weights in (str(clip), "hf://some/clip"))
    torch.testing.assert_close(hub(images(), TOLD), local(images(), TOLD), rtol=0, atol=0)
    loaded(HPSv2Reward(weights="hf://xswu/HPSv2", model=hps[0]))
    assert asked == {"some/clip": ["*.json", "*.txt"], "xswu/HPSv2": ["HPS_v2.1_compressed.pt"]}, "last: its tokenizer"

    def unreachable(name: str, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r"cannot fetch CLIPReward\.weights='hf://some/clip'.*hf download.*1\.7 GB"):
        CLIPReward(weights="hf://some/clip").load()


def test_a_folder_without_tokenizer_or_weights(clip, tmp_path):
    shutil.copytree(clip, tmp_path / "bare")
    for path in (tmp_path / "bare").glob("*token*"):
        path.unlink()
    for path in (tmp_path / "bare").glob("vocab*"):
        path.unlink()
    reward = loaded(CLIPReward(weights=str(tmp_path / "bare")))
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.*vocab\.json"):
        reward(images(), TOLD)
    (tmp_path / "bare" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no safetensors file in CLIPReward\.weights"):
        CLIPReward(weights=str(tmp_path / "bare")).load()


def test_files_that_do_not_fit(clip, hps, judged, tmp_path):
    torch.save({"layers.0.weight": torch.zeros(3, 10)}, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=r"layers|0\.weight"):
        AestheticReward(weights=str(clip), head=str(tmp_path / "head.pth")).load()
    (tmp_path / "torn.pt").write_bytes((judged[0] / "ImageReward.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"torn\.pt is damaged or no file of tensors"):
        ImageReward(weights=str(tmp_path / "torn.pt"), tokenizer=str(judged[0]), **TINY).load()
    torch.save({"state_dict": CLIPHead}, tmp_path / "code.pt")  # a class: more than tensors
    with pytest.raises(ValueError, match=r"code\.pt is damaged or no file of tensors"):
        HPSv2Reward(weights=str(tmp_path / "code.pt"), model=hps[0]).load()
    with pytest.raises(ValueError, match="no model of open_clip"):
        HPSv2Reward(weights=str(hps[1]), model="tiny-hpz")


def test_use_before_load_latents_and_missing_captions(clip):
    reward = CLIPReward(weights=str(clip))
    with pytest.raises(ValueError, match="load"):
        reward(images(), TOLD)
    reward.load()
    with pytest.raises(ValueError, match="DecodedReward"):
        reward(latents(), TOLD)
    with pytest.raises(ValueError, match="needs captions"):
        reward(images(), Condition())


def test_published_sizes_on_the_meta_device():
    """Parameters of the published models."""
    with torch.device("meta"):
        counts = {
            "CLIP ViT-L/14": CLIPReward(weights="nowhere"),
            "CLIP ViT-H/14": PickScoreReward(weights="nowhere"),
            "open_clip ViT-H-14": HPSv2Reward(weights="nowhere"),
            "BLIP large and head": ImageReward(weights="nowhere", tokenizer="nowhere"),
        }
    found = {name: sum(p.numel() for p in reward.parameters()) for name, reward in counts.items()}
    assert found["CLIP ViT-L/14"] == 427_616_513
    assert found["CLIP ViT-H/14"] == found["open_clip ViT-H-14"] == 986_109_441
    vision = 1024 * (3 * 256 + 1) + 1024 * (1 + 197) + 24 * (12 * 1024**2 + 13 * 1024) + 2 * 1024
    text = (30524 + 512 + 2) * 768 + 12 * (12 * 768**2 + 13 * 768 + 2 * 768**2 + 2 * 768 * 1024 + 6 * 768)
    head = sum((a + 1) * b for a, b in ((768, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)))
    assert found["BLIP large and head"] == vision + text + head
    assert np.isclose(4 * found["BLIP large and head"] / 1e9, 1.8, atol=0.05)
