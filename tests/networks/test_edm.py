"""The EDM networks against slow references written here, and their sizes against arithmetic on the architecture."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ratiograph.algebra.noising import RectifiedFlow, VarianceExploding, VariancePreserving
from ratiograph.core.types import Condition, Noisy, expand
from ratiograph.networks.architectures.edm import ADM, DDPMPP, NCSNPP
from ratiograph.networks.architectures.edm_blocks import (
    Attention,
    ClassEmbedding,
    CosineSine,
    RandomFourier,
    ScaleShiftBlock,
    ShiftBlock,
    SineCosine,
    binomial_down,
    binomial_up,
    box_down,
    box_up,
)
from ratiograph.networks.denoisers import EDM
from ratiograph.networks.preconditioning import VEPreconditioned, VPPreconditioned

SMALL = {"resolution": 8, "channels": 8, "multipliers": (1, 2), "blocks": 1, "attention_resolutions": (4,)}
MAKE = {
    "ddpmpp": lambda **given: DDPMPP(**{**SMALL, "classes": 3, "dropout": 0.0, **given}),
    "ncsnpp": lambda **given: NCSNPP(**{**SMALL, "multipliers": (1, 2, 2), "dropout": 0.0, **given}),
    "adm": lambda **given: ADM(**{**SMALL, "head_channels": 8, "classes": 3, "dropout": 0.0, **given}),
}


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights drawn anew, at which every branch counts; float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in (*module.named_parameters(), *module.named_buffers()):
            scale = 1 / math.sqrt(weight[0].numel()) if weight.ndim > 1 else 0.3
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            weight.copy_(centre + scale * torch.randn(weight.shape, generator=generator))
    return module.double().eval()


def inputs(batch: int = 3, size: int = 8, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)
    c_noise = torch.linspace(-1.5, 1.0, batch, dtype=torch.float64)
    augment = torch.randn(batch, 9, generator=generator, dtype=torch.float64)
    return x, c_noise, Condition(torch.arange(batch) % 3, augment)


def run(network, x, c_noise, condition):
    return network.decode(network.encode(x, c_noise, condition))


# --- layers ---------------------------------------------------------------------------------------------------


def kernel(taps):
    taps = torch.tensor(taps, dtype=torch.float64)
    return torch.outer(taps, taps)[None, None] / taps.sum() ** 2


@pytest.mark.parametrize(
    ("down", "up", "taps"), [(box_down, box_up, [1, 1]), (binomial_down, binomial_up, [1, 3, 3, 1])]
)
def test_resampling_is_a_strided_convolution_with_the_filter(down, up, taps):
    x, filters, padding = torch.randn(2, 3, 6, 8).double(), kernel(taps).repeat(3, 1, 1, 1), len(taps) // 2 - 1
    torch.testing.assert_close(down(x), F.conv2d(x, filters, groups=3, stride=2, padding=padding))
    torch.testing.assert_close(up(x), F.conv_transpose2d(x, 4 * filters, groups=3, stride=2, padding=padding))


def test_pyramid_filters_the_convolution_without_a_border():
    network = randomize(MAKE["ncsnpp"]())
    image, conv = torch.randn(2, 3, 8, 8).double(), network.pyramid[0]
    wide = F.conv2d(image, conv.weight, padding=2)
    filtered = F.conv2d(wide, kernel([1, 3, 3, 1]).repeat(8, 1, 1, 1), groups=8, stride=2)
    h, embedding = torch.randn(2, 8, 8, 8).double(), torch.randn(2, 32).double()
    joined, kept = network._descend(1, h, image, embedding)
    expected = (network.encoder[1].resample(h, embedding) + filtered + conv.bias[:, None, None]) / math.sqrt(2)
    torch.testing.assert_close(joined, expected)
    assert kept is joined  # the next level's image is this sum


def test_noise_embeddings_number_by_number():
    c_noise = torch.tensor([-1.3, 0.0, 0.9])
    fourier = RandomFourier(8)
    assert fourier.frequencies.std() > 1
    found = SineCosine(8)(c_noise), CosineSine(8)(c_noise), fourier(c_noise)
    for i, c in enumerate(c_noise.tolist()):
        a = [c * 10000 ** (-k / 3) for k in range(4)]
        b = [c * 10000 ** (-k / 4) for k in range(4)]
        f = [2 * math.pi * c * float(frequency) for frequency in fourier.frequencies]
        sines, cosines = (lambda v: [math.sin(u) for u in v]), (lambda v: [math.cos(u) for u in v])
        rows = sines(a) + cosines(a), cosines(b) + sines(b), sines(f) + cosines(f)
        for vector, expected in zip(found, rows, strict=True):
            assert vector[i].tolist() == pytest.approx(expected, abs=3e-5)


def test_class_embedding_is_a_linear_map_of_one_hot_vectors():
    embedding = randomize(ClassEmbedding(4, 6, scale=2.0, bias=True, dropout=0.0))
    labels = torch.tensor([2, 0, -1])
    one_hot = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    expected = 2 * one_hot @ embedding.table + embedding.bias
    torch.testing.assert_close(embedding(labels, 3), expected)
    with pytest.raises(ValueError, match="needs labels"):
        embedding(None, 3)


def test_label_dropout_trains_without_a_class_as_often_as_asked():
    torch.manual_seed(0)
    embedding = ClassEmbedding(2, 5, scale=1.0, bias=False, dropout=0.3).train()
    dropped = (embedding(torch.zeros(4000, dtype=torch.long), 4000) == 0).all(1).float()
    assert float(dropped.mean()) == pytest.approx(0.3, abs=0.03)
    embedding.eval()
    torch.testing.assert_close(embedding(torch.tensor([1, 0]), 2), embedding.table.flip(0))
    assert (embedding(None, 2) == 0).all()


def normalized(x: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
    """Group normalisation, group by group."""
    result, per_group = torch.empty_like(x), x.shape[1] // norm.num_groups
    for b in range(x.shape[0]):
        for c in range(0, x.shape[1], per_group):
            part = x[b, c : c + per_group]
            result[b, c : c + per_group] = (part - part.mean()) / torch.sqrt(part.var(correction=0) + norm.eps)
    return result * norm.weight[:, None, None] + norm.bias[:, None, None]


def attended(x: torch.Tensor, layer: Attention) -> torch.Tensor:
    """Attention, image by image, head by head, query by query."""
    batch, channels, height, width = x.shape
    qkv = layer.query_key_value(normalized(x, layer.norm)).reshape(batch, channels, 3, height * width)
    out, size = torch.empty(batch, channels, height * width, dtype=x.dtype), channels // layer.heads
    for b in range(batch):
        for head in range(layer.heads):
            part = slice(head * size, (head + 1) * size)
            q, k, v = (qkv[b, part, i] for i in range(3))
            for position in range(height * width):
                logits = torch.stack([(q[:, position] * k[:, j]).sum() / math.sqrt(size) for j in range(k.shape[1])])
                out[b, part, position] = v @ (logits.exp() / logits.exp().sum())
    return layer.project(out.reshape(batch, channels, height, width))


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_query_by_query(heads):
    layer = randomize(Attention(8, heads, 1e-6))
    x = 3 * torch.randn(2, 8, 2, 3).double()
    torch.testing.assert_close(layer(x), attended(x, layer))


def test_attention_survives_half_precision():
    """Logits of 1e5 overflow float16 unless they stay in float32."""
    layer = Attention(8, 1, 1e-6)
    with torch.no_grad():
        layer.query_key_value.weight.normal_(std=100)
        layer.project.weight.normal_()
        x = torch.randn(2, 8, 4, 4)
        qkv = layer.query_key_value(layer.norm(x)).reshape(2, 8, 3, 16)
        assert torch.einsum("bci,bcj->bij", qkv[:, :, 0], qkv[:, :, 1]).abs().max() > 65504
        with torch.autocast("cpu", torch.float16):
            found = layer(x).float()
        assert found.isfinite().all()


@pytest.mark.parametrize("kind", [ShiftBlock, ScaleShiftBlock])
@pytest.mark.parametrize("resample", [None, box_down, binomial_up])
def test_blocks_step_by_step(kind, resample):
    block = randomize(kind(8, 8, 6, heads=2, resample=resample))
    x, embedding = torch.randn(2, 8, 4, 4).double(), torch.randn(2, 6).double()
    change = resample or (lambda v: v)
    h = block.conv1(change(F.silu(normalized(x, block.norm1))))
    values = (embedding @ block.affine.weight.T + block.affine.bias)[:, :, None, None]
    if kind is ShiftBlock:
        h, scale = normalized(h + values, block.norm2), math.sqrt(0.5)
    else:
        h, scale = normalized(h, block.norm2) * (1 + values[:, :8]) + values[:, 8:], 1.0
    skip = change(x)
    if kind is ShiftBlock and resample is not None:  # ADM resamples its skip without a convolution
        skip = torch.einsum("oi,bihw->bohw", block.skip.weight[:, :, 0, 0], skip) + block.skip.bias[:, None, None]
    out = (skip + block.conv2(F.silu(h))) * scale
    expected = (out + attended(out, block.attention)) * scale
    torch.testing.assert_close(block(x, embedding), expected)


def test_blocks_change_their_width_by_a_convolution():
    block = randomize(ScaleShiftBlock(8, 12, 6))
    assert block.skip.weight.shape == (12, 8, 1, 1)
    assert block(torch.randn(1, 8, 4, 4).double(), torch.randn(1, 6).double()).shape == (1, 12, 4, 4)


def test_dropout_acts_in_training_only():
    block = randomize(ShiftBlock(8, 8, 6, dropout=0.5))
    x, embedding = torch.randn(1, 8, 4, 4).double(), torch.randn(1, 6).double()
    assert torch.equal(block(x, embedding), block(x, embedding))
    block.train()
    assert not torch.equal(block(x, embedding), block(x, embedding))


# --- networks -------------------------------------------------------------------------------------------------


def test_wiring_of_two_levels_written_out():
    """DDPM++ with one block a level: every skip goes where it belongs, newest first."""
    network = randomize(MAKE["ddpmpp"]())
    x, c_noise, condition = inputs()
    noise, one_hot = network.embedding.noise(c_noise).double(), F.one_hot(condition.labels, 3).double()
    e = noise + math.sqrt(3) * one_hot @ network.embedding.classes.table + network.embedding.classes.bias
    e = e + condition.augment @ network.embedding.augment.weight.T
    e = F.silu(network.embedding.layer2(F.silu(network.embedding.layer1(e))))
    (fine, coarse), (fine_out, coarse_out) = network.encoder, network.decoder
    s0 = network.stem(x)
    s1 = fine.blocks[0](s0, e)
    s2 = coarse.resample(s1, e)
    s3 = coarse.blocks[0](s2, e)
    middle = network.middle[1](network.middle[0](s3, e), e)
    h = coarse_out.blocks[0](torch.cat([middle, s3], 1), e)
    h = fine_out.resample(coarse_out.blocks[1](torch.cat([h, s2], 1), e), e)
    h = fine_out.blocks[1](torch.cat([fine_out.blocks[0](torch.cat([h, s1], 1), e), s0], 1), e)
    encoding = network.encode(x, c_noise, condition)
    for found, expected in zip(encoding.features, (s1, s3, middle), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(network.decode(encoding), network.out(F.silu(normalized(h, network.out_norm))))


def test_adm_adds_the_class_after_both_layers():
    network = randomize(MAKE["adm"](augment_labels=9))
    _, c_noise, condition = inputs()
    e = network.embedding.noise(c_noise).double() + condition.augment @ network.embedding.augment.weight.T
    e = network.embedding.layer2(F.silu(network.embedding.layer1(e)))
    expected = F.silu(e + network.embedding.classes.table[condition.labels])
    torch.testing.assert_close(network.embedding(c_noise, condition), expected)


def test_attention_is_where_the_papers_have_it():
    def heads(blocks):
        return [block.attention.heads if block.attention else 0 for block in blocks]

    def places(network):
        halves = [[block for level in half for block in level.blocks] for half in (network.encoder, network.decoder)]
        return [heads(blocks) for blocks in (*halves, network.middle)]

    with torch.device("meta"):
        ddpmpp, adm = DDPMPP(), ADM()
    assert places(ddpmpp) == [[0] * 4 + [1] * 4 + [0] * 4, [0] * 5 + [0] * 4 + [1] + [0] * 5, [1, 0]]
    assert places(adm) == [[0] * 3 + [6] * 3 + [9] * 3 + [12] * 3, [0] * 4 + [6] * 4 + [9] * 4 + [12] * 4, [12, 0]]


def conv(a, b, size=3):
    return a * b * size**2 + b


def block(a, b, embedding, modulations=1, project=False, attention=False):
    norms, qkv = 2 * a + 2 * b, conv(b, 3 * b, 1) + conv(b, b, 1) + 2 * b
    skip = conv(a, b, 1) if project or a != b else 0
    affine = conv(embedding, modulations * b, 1)
    return norms + conv(a, b) + conv(b, b) + affine + skip + attention * qkv


def counted(channels, widths, blocks, attended, noise, classes, augment, adm=False, pyramid=False):
    """Parameters of the architecture, level by level."""
    e, last, stem = 4 * channels, len(widths) - 1, widths[0] if adm else channels

    def make(a, b, attention=False, project=False):
        return block(a, b, e, 1 + adm, project and not adm, attention)

    total = conv(3, stem) + conv(noise, e, 1) + conv(e, e, 1) + augment * noise
    total += classes * e if adm else (classes + bool(classes)) * noise
    skips, width, image = [stem], stem, 3
    for k, b in enumerate(widths):
        if k:
            total += make(width, width, project=True)
            skips.append(width)
        if k and pyramid:
            total, image = total + conv(image, width), width
        for _ in range(blocks):
            total += make(width, b, k in attended)
            skips, width = [*skips, b], b
    total += make(width, width, True) + make(width, width)
    for k in range(last, -1, -1):
        if k < last:
            total += make(width, width, project=True)
        for i in range(blocks + 1):
            total += make(width + skips.pop(), widths[k], k in attended and (adm or i == blocks))
            width = widths[k]
    return total + 2 * width + conv(width, 3)


CIFAR = {"channels": 128, "widths": [256] * 3, "blocks": 4, "attended": [1], "augment": 9}
FACES = {**CIFAR, "widths": [128, 256, 256, 256], "attended": [2], "classes": 0}
FACES_ARGUMENTS = {"resolution": 64, "multipliers": (1, 2, 2, 2)}
IMAGENET = {"channels": 192, "widths": [192, 384, 576, 768], "blocks": 3, "attended": [1, 2, 3], "augment": 0}
SIZES = {
    "CIFAR-10 DDPM++": (DDPMPP, {}, {**CIFAR, "noise": 128, "classes": 0}, 55_733_891),
    "CIFAR-10 DDPM++, classes": (DDPMPP, {"classes": 10}, {**CIFAR, "noise": 128, "classes": 10}, 55_735_299),
    "CIFAR-10 NCSN++": (NCSNPP, {}, {**CIFAR, "noise": 256, "classes": 0, "pyramid": True}, 56_397_827),
    "CIFAR-10 NCSN++, classes": (
        NCSNPP,
        {"classes": 10},
        {**CIFAR, "noise": 256, "classes": 10, "pyramid": True},
        56_400_643,
    ),
    "FFHQ-64 DDPM++": (DDPMPP, FACES_ARGUMENTS, {**FACES, "noise": 128}, 61_805_571),
    "FFHQ-64 NCSN++": (NCSNPP, FACES_ARGUMENTS, {**FACES, "noise": 256, "pyramid": True}, 62_761_091),
    "ImageNet-64 ADM": (ADM, {}, {**IMAGENET, "noise": 192, "classes": 1000, "adm": True}, 295_899_267),
}


@pytest.mark.parametrize("name", SIZES)
def test_full_sizes(name):
    make, arguments, architecture, published = SIZES[name]
    with torch.device("meta"):
        network = make(**arguments)
    assert sum(parameter.numel() for parameter in network.parameters()) == published == counted(**architecture)


@pytest.mark.parametrize("name", MAKE)
def test_encoder_alone_gives_the_same_features(name):
    whole, half = randomize(MAKE[name]()), randomize(MAKE[name]())
    calls = []
    for module in (whole.decoder, whole.out_norm, whole.out):
        for layer in module.modules():
            layer.register_forward_hook(lambda *_: calls.append(1))
    half.drop_decoder()
    found, expected = half.encode(*inputs()), whole.encode(*inputs())
    assert not calls
    assert not any(key.startswith(("decoder", "out")) for key in half.state_dict())
    sizes = [8 >> k for k in range(len(whole.encoder))]
    sizes = [*sizes, sizes[-1]]  # the middle, last
    for a, b, channels, size in zip(found.features, expected.features, whole.feature_channels, sizes, strict=True):
        torch.testing.assert_close(a, b)
        assert a.shape[1:] == (channels, size, size)
    whole.decode(expected)
    assert calls


@pytest.mark.parametrize("name", MAKE)
def test_detached_encoding_decodes_the_same_without_a_graph(name):
    network = randomize(MAKE[name]())
    x, c_noise, condition = inputs()
    encoding = network.encode(x.requires_grad_(), c_noise, condition)
    detached = encoding.detach()
    assert not any(tensor.requires_grad for tensor in (*detached.features, *detached.skips, detached.embedding))
    network.requires_grad_(False)
    out = network.decode(detached)
    assert not out.requires_grad
    torch.testing.assert_close(out, network.decode(encoding))


@pytest.mark.parametrize("name", MAKE)
def test_gradient_to_the_image_by_finite_differences(name):
    network = randomize(MAKE[name]())
    x, c_noise, condition = inputs(batch=1)
    towards = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).double()

    def value(x):
        encoding = network.encode(x, c_noise, condition)
        return network.decode(encoding).square().sum() + encoding.features[-1].square().sum()

    (gradient,) = torch.autograd.grad(value(x.requires_grad_()), x)
    with torch.no_grad():
        slope = (value(x + 1e-5 * towards) - value(x - 1e-5 * towards)) / 2e-5
    torch.testing.assert_close((gradient * towards).sum(), slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", MAKE)
def test_channels_last_gives_the_same_and_stays(name):
    network = randomize(MAKE[name]())
    x, c_noise, condition = inputs()
    expected = network.encode(x, c_noise, condition)
    network = network.to(memory_format=torch.channels_last)
    found = network.encode(x.to(memory_format=torch.channels_last), c_noise, condition)
    for a, b in zip(found.features, expected.features, strict=True):
        torch.testing.assert_close(a, b)
        assert a.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network.decode(found), network.decode(expected))


@pytest.mark.parametrize("name", MAKE)
def test_bfloat16_autocast_stays_near(name):
    network = randomize(MAKE[name]()).float()
    x, c_noise, condition = inputs()
    x, c_noise = x.float(), c_noise.float()
    with torch.no_grad():
        expected = run(network, x, c_noise, condition)
        with torch.autocast("cpu", torch.bfloat16):
            found = run(network, x, c_noise, condition)
    assert float((found - expected).std() / expected.std()) < 0.03


def test_augmentation_labels_are_optional():
    x, c_noise, condition = inputs()
    network, without = randomize(MAKE["ddpmpp"]()), randomize(MAKE["ddpmpp"](augment_labels=0))
    plain = run(network, x, c_noise, Condition(condition.labels))
    torch.testing.assert_close(plain, run(network, x, c_noise, Condition(condition.labels, 0 * condition.augment)))
    assert (plain - run(network, x, c_noise, condition)).abs().amax((1, 2, 3)).min() > 1e-3
    assert torch.equal(run(without, x, c_noise, condition), run(without, x, c_noise, Condition(condition.labels)))


def test_condition_moves_and_repeats_augmentation_labels():
    _, _, condition = inputs()
    twice = condition.to(torch.device("cpu")).repeat(2)
    assert torch.equal(twice.labels, torch.cat([condition.labels] * 2))
    assert torch.equal(twice.augment, torch.cat([condition.augment] * 2))
    assert Condition(condition.labels).repeat(2).augment is None


def test_networks_start_as_nothing_with_xaviers_variance():
    torch.manual_seed(0)
    network = DDPMPP(resolution=16, channels=32, classes=4, multipliers=(1, 2), attention_resolutions=(8,))
    weight = network.encoder[1].blocks[1].conv1.weight.detach()
    assert float(weight.std()) == pytest.approx(math.sqrt(2 / (2 * 64 * 9)), rel=0.02)
    weight = network.encoder[1].blocks[1].attention.query_key_value.weight.detach()
    assert float(weight.std()) == pytest.approx(math.sqrt(0.2 * 2 / (64 + 192)), rel=0.03)
    adm = ADM(resolution=16, channels=32, classes=4, multipliers=(1, 2), attention_resolutions=())
    x, c_noise, condition = torch.randn(2, 3, 16, 16), torch.zeros(2), Condition(torch.tensor([0, 1]))
    with torch.no_grad():
        assert 0 < float(run(network, x, c_noise, condition).abs().max()) < 1e-3
        assert float(run(adm, x, c_noise, condition).abs().max()) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 10, "multipliers": (1, 1, 1), "attention_resolutions": ()}, "must be a multiple of"),
        ({"attention_resolutions": (5,)}, r"holds \[5\]; the levels have the resolutions \[8, 4\]"),
    ],
)
def test_sizes_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MAKE["ddpmpp"](**arguments)


def test_adm_names_a_width_that_its_heads_do_not_divide():
    with pytest.raises(ValueError, match="width 16 of an attended level is less than head_channels=64"):
        MAKE["adm"](head_channels=64)


# --- preconditioning --------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """A network that keeps what it is given and returns ``out``."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def encode(self, x, c_noise, condition):
        self.x, self.c_noise = x, c_noise
        return MAKE["ddpmpp"](classes=0).float().encode(torch.zeros(len(x), 3, 8, 8), torch.zeros(len(x)), condition)

    def decode(self, encoding):
        return self.out


def test_vp_preconditioning_is_noise_prediction():
    """F is the noise: mu = (x_t - sigma noise) / alpha, x_t itself goes in, and the time in thousandths."""
    process = VariancePreserving()
    t, x0, noise = torch.tensor([0.01, 0.4, 0.99]), torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8)
    noisy, network = process.add_noise(x0, t, noise), Recorder(noise)
    torch.testing.assert_close(VPPreconditioned(network=network).denoise(noisy, Condition()), x0, rtol=0, atol=2e-4)
    torch.testing.assert_close(network.x, noisy.x_t, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network.c_noise, 999 * t, rtol=1e-4, atol=0)


def test_ve_preconditioning_is_minus_noise_prediction():
    sigma, x0, noise = torch.tensor([0.01, 1.0, 50.0]), torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8)
    noisy, network = VarianceExploding().add_noise(x0, sigma, noise), Recorder(-noise)
    torch.testing.assert_close(VEPreconditioned(network=network).denoise(noisy, Condition()), x0, rtol=0, atol=2e-5)
    assert torch.equal(network.x, noisy.x_t)
    assert network.c_noise.tolist() == pytest.approx([math.log(0.005), math.log(0.5), math.log(25)], rel=1e-6)


@pytest.mark.parametrize("denoiser", [EDM, VPPreconditioned, VEPreconditioned])
@pytest.mark.parametrize("process", [VariancePreserving(), RectifiedFlow()])
def test_denoisers_are_the_same_under_every_process(denoiser, process):
    network = randomize(MAKE["ncsnpp"]())
    denoiser = denoiser(network=network)
    x, _, condition = inputs()
    sigma = torch.tensor([0.01, 0.7, 5.0], dtype=torch.float64)
    native = denoiser.denoise(Noisy(x, sigma, torch.ones_like(sigma), sigma), condition)
    t = process.time_of(sigma)
    alpha, scaled = process.alpha_sigma(t)
    found = denoiser.denoise(Noisy(expand(alpha, x) * x, t, alpha, scaled), condition)
    torch.testing.assert_close(found, native, rtol=0, atol=1e-6)
