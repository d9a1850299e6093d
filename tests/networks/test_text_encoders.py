"""The caption encoders against diffusers' own pipelines."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import tiny_pipelines
from ratiograph.networks.text_encoders import SD15CaptionEncoder, SDXLCaptionEncoder

CAPTIONS = ["ab cab", "", "Two CATS", "x" * 10_000]


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sd15"
    return folder, tiny_pipelines.sd15(folder)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sdxl"
    return folder, tiny_pipelines.sdxl(folder)


def loaded(kind, folder, **more):
    encoder = kind(weights=str(folder), **more)
    assert not list(encoder.parameters())
    encoder.load()
    return encoder


def test_equals_the_sd15_pipeline(sd15):
    folder, pipeline = sd15
    found = loaded(SD15CaptionEncoder, folder).encode(CAPTIONS)
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(CAPTIONS, "cpu", 1, False)
    torch.testing.assert_close(found.text, expected, rtol=0, atol=1e-5)
    assert found.parts().keys() == {"text"}
    assert found.text.shape == (4, tiny_pipelines.TOKENS, 12)
    assert (found.text[0] - found.text[1]).abs().max() > 0.1


def test_equals_the_sdxl_pipeline(sdxl):
    folder, pipeline = sdxl
    sizes = (512, 640, 0, 16, 1024, 1024)
    found = loaded(SDXLCaptionEncoder, folder, sizes=sizes).encode(CAPTIONS)
    with torch.no_grad():
        text, _, pooled, _ = pipeline.encode_prompt(
            CAPTIONS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    torch.testing.assert_close(found.text, text, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.pooled, pooled, rtol=0, atol=1e-5)
    assert found.sizes.tolist() == 4 * [list(map(float, sizes))]
    ids = pipeline._get_add_time_ids((512, 640), (0, 16), (1024, 1024), torch.float32, 10)
    assert torch.equal(found.sizes[:1], ids)


def test_a_tokenizer_of_vocabulary_and_merges_alone(sd15, tmp_path):
    """As the published repositories hold it, without tokenizer.json."""
    folder, _ = sd15
    shutil.copytree(folder, tmp_path / "old")
    words = tmp_path / "old" / "tokenizer"
    (words / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(folder.with_name("sd15-words") / name, words / name)
    kept = json.loads((words / "tokenizer_config.json").read_text())
    kept = {name: kept[name] for name in ("model_max_length", "pad_token", "bos_token", "eos_token", "unk_token")}
    (words / "tokenizer_config.json").write_text(json.dumps({**kept, "tokenizer_class": "CLIPTokenizer"}))
    found, expected = (loaded(SD15CaptionEncoder, path) for path in (tmp_path / "old", folder))
    assert torch.equal(found.encode(CAPTIONS).text, expected.encode(CAPTIONS).text)


def test_half_precision_files(sd15, tmp_path):
    folder, _ = sd15
    shutil.copytree(folder, tmp_path / "half")
    plain = tmp_path / "half" / "text_encoder" / "model.safetensors"
    tensors = {name: t.half() if t.is_floating_point() else t for name, t in load_file(plain).items()}
    plain.unlink()
    save_file(tensors, plain.with_name("model.fp16.safetensors"), metadata={"format": "pt"})
    found, expected = (loaded(SD15CaptionEncoder, path).encode(CAPTIONS).text for path in (tmp_path / "half", folder))
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.02


def test_is_frozen_and_ignores_autocast(sd15):
    encoder = loaded(SD15CaptionEncoder, sd15[0]).train()
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    plain = encoder.encode(CAPTIONS).text
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder.encode(CAPTIONS).text, plain)
    assert not plain.requires_grad


def test_bad_input_says_what_to_do(sd15, tmp_path):
    encoder = SD15CaptionEncoder(weights=str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at SD15CaptionEncoder.weights=.*hf download") as caught:
        encoder.load()
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"call load\(\) first"):
        encoder.encode(["ab"])
    shutil.copytree(sd15[0], tmp_path / "torn")
    weights = tmp_path / "torn" / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("final_layer_norm.weight"))
    tensors.pop(name)
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks .*final_layer_norm.weight"):
        SD15CaptionEncoder(weights=str(tmp_path / "torn")).load()
    weights.write_bytes(b"torn")
    with pytest.raises(ValueError, match="not a text encoder that transformers can read"):
        SD15CaptionEncoder(weights=str(tmp_path / "torn")).load()
    (tmp_path / "torn" / "text_encoder").rename(tmp_path / "torn" / "other")
    with pytest.raises(FileNotFoundError, match="no text_encoder at"):
        SD15CaptionEncoder(weights=str(tmp_path / "torn")).load()


def test_a_tokenizer_without_a_length_takes_the_encoder_s(sd15, tmp_path):
    folder = tmp_path / "sd"
    shutil.copytree(sd15[0], folder)
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "model_max_length"}))
    captions = ["ab", "a b c " * 20]
    assert torch.equal(
        loaded(SD15CaptionEncoder, folder).encode(captions).text,
        loaded(SD15CaptionEncoder, sd15[0]).encode(captions).text,
    )
