"""Caches of latents against diffusers' own encoders: values, resuming, damage, prompts, and the tool's command line."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from transformers import CLIPTextModel

import tiny_pipelines
from preparation.input_shards import input_shards
from preparation.latent_cache import CachedImages, CachedPrompts, cache_shards, encoder_of, write_empty_prompt
from ratiograph.core.types import Condition
from ratiograph.data.captioned import CaptionedStream
from ratiograph.data.captions import unpack
from ratiograph.data.latents import CachedCaptionStream, LatentStream
from ratiograph.data.shards import count_samples, verify_shard
from ratiograph.networks.architectures.stable_diffusion_unets import UNetFromFolder
from ratiograph.networks.autoencoder import Autoencoder
from ratiograph.networks.guidance import EmptyPrompt
from ratiograph.networks.teachers.stable_diffusion import StableDiffusion
from ratiograph.networks.text_encoders import SD15CaptionEncoder, SDXLCaptionEncoder
from ratiograph.networks.weights import encoder_files
from ratiograph.networks.weights.encoder_files import model_facts
from ratiograph.training.encoder_check import check_encoders

TOOL = Path(__file__).resolve().parents[2] / "tools" / "cache_latents.py"
CAPTIONS = ["ab cab", "", "two CATS", "x" * 3000, "e"]


def picture(seed, size=(16, 16)):
    """PNG bytes of random pixels [H, W, 3], and the pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue(), pixels


def write_inputs(folder, sizes=(3, 2), size=(16, 16)):
    folder.mkdir(parents=True)
    number = 0
    for shard, samples in enumerate(sizes):
        with wds.TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for _ in range(samples):
                fields = {"key": f"{number:09d}", "original_width": 40, "original_height": 30}
                writer.write(
                    {
                        "__key__": f"{number:09d}",
                        "png": picture(number, size)[0],
                        "txt": CAPTIONS[number].encode(),
                        "json": json.dumps(fields).encode(),
                    }
                )
                number += 1
    return f"{folder}/{{00000..{len(sizes) - 1:05d}}}.tar"


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sd15"
    return folder, tiny_pipelines.sd15(folder)


def cached(pipeline_folder, urls, kind=SD15CaptionEncoder, resolution=16, max_damaged=0.0, **more):
    autoencoder, encoder = Autoencoder(weights=str(pipeline_folder)), kind(weights=str(pipeline_folder))
    autoencoder.load()
    encoder.load()
    stream = CaptionedStream(urls=urls, resolution=resolution, sizes=True, max_damaged=max_damaged)
    shards = [Path(path) for path in wds.shardlists.expand_urls(urls)]
    return CachedImages(stream, shards, autoencoder, encoder, batch_size=2, **more)


def members(path):
    """{key: {suffix: value}} of a shard, npy files as arrays."""
    found = {}
    for sample in wds.WebDataset(str(path), shardshuffle=False, empty_check=False):
        key = sample["__key__"]
        found[key] = {
            name: np.load(io.BytesIO(data)) if name.endswith("npy") else data
            for name, data in sample.items()
            if not name.startswith("_")
        }
    return found


def test_holds_what_diffusers_encodes(sd15, tmp_path):
    folder, pipeline = sd15
    urls = write_inputs(tmp_path / "in")
    index = cache_shards(cached(folder, urls), tmp_path / "out", {"a": 1})
    assert [entry["samples"] for entry in index["shards"].values()] == [3, 2]
    found = {}
    for name in index["shards"]:
        assert verify_shard(tmp_path / "out" / name, contents=True)
        assert count_samples(tmp_path / "out" / name) == index["shards"][name]["samples"]
        found |= members(tmp_path / "out" / name)
    assert list(found) == [f"{k:09d}" for k in range(5)]
    with torch.no_grad():
        text, _ = pipeline.encode_prompt(CAPTIONS, "cpu", 1, False)
        for k, sample in enumerate(found.values()):
            image = torch.from_numpy(picture(k)[1]).permute(2, 0, 1)[None] / 127.5 - 1
            latent = 0.18215 * pipeline.vae.encode(image).latent_dist.mean[0]
            assert sample["latent.npy"].dtype == np.float16
            np.testing.assert_allclose(sample["latent.npy"], latent, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(sample["text.npy"], text[k], rtol=1e-3, atol=1e-3)
            assert sample["txt"].decode() == CAPTIONS[k]
            assert sample.keys() == {"latent.npy", "text.npy", "txt"}


def test_trains_from_it(sd15, tmp_path):
    urls = write_inputs(tmp_path / "in")
    cache_shards(cached(sd15[0], urls), tmp_path / "out", {})
    stream = LatentStream(urls=f"{tmp_path}/out/shard-{{000000..000001}}.tar")
    batches = stream.batches(5, 0, 0)
    batch = next(batches)
    batches.close()
    assert batch.images.shape == (5, 4, 8, 8)
    assert batch.condition.text.shape == (5, tiny_pipelines.TOKENS, 12)
    assert sorted(unpack(batch.condition.caption)) == sorted(caption[:1024] for caption in CAPTIONS)


def test_sdxl_holds_pooled_captions_and_each_image_s_sizes(tmp_path):
    folder = tmp_path / "sdxl"
    pipeline = tiny_pipelines.sdxl(folder)
    urls = write_inputs(tmp_path / "in", (2,), size=(24, 16))
    cache_shards(cached(folder, urls, SDXLCaptionEncoder), tmp_path / "out", {})
    found = list(members(tmp_path / "out" / "shard-000000.tar").values())
    with torch.no_grad():
        _, _, pooled, _ = pipeline.encode_prompt(CAPTIONS[:2], device="cpu", do_classifier_free_guidance=False)
    for k, sample in enumerate(found):
        np.testing.assert_allclose(sample["pooled.npy"], pooled[k], rtol=1e-3, atol=1e-3)
        assert sample["sizes.npy"].tolist() == [30, 40, 0, 4, 16, 16]
        assert sample["text.npy"].shape == (tiny_pipelines.TOKENS, 12)


def test_a_sample_of_the_posterior_is_the_seed_s(sd15, tmp_path):
    urls = write_inputs(tmp_path / "in", (2,))
    latents = []
    for name, seed in {"a": None, "b": 1, "c": 1, "d": 2}.items():
        cache_shards(cached(sd15[0], urls, seed=seed), tmp_path / name, {})
        latents.append([m["latent.npy"] for m in members(tmp_path / name / "shard-000000.tar").values()])
    assert np.array_equal(latents[1], latents[2])
    assert all(not np.array_equal(latents[1], latents[k]) for k in (0, 3))


def test_goes_on_where_it_was_interrupted(sd15, tmp_path):
    urls, out = write_inputs(tmp_path / "in", (2, 2, 1)), tmp_path / "out"
    cache_shards(cached(sd15[0], urls), tmp_path / "whole", {})

    class Interrupted(Exception):
        pass

    def advance(done, total):
        if done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        cache_shards(cached(sd15[0], urls), out, {}, advance)
    assert sorted(p.name for p in out.iterdir()) == ["index.json", "shard-000000.tar", "shard-000001.tar"]
    before = (out / "shard-000000.tar").stat().st_mtime_ns
    (out / "shard-000001.tar").write_bytes(b"cut short")
    again = cached(sd15[0], urls)
    cache_shards(again, out, {})
    assert again.seen == 3
    assert (out / "shard-000000.tar").stat().st_mtime_ns == before
    names = [f"shard-{k:06d}.tar" for k in range(3)] + ["index.json"]
    assert all((out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)


def test_another_setting_or_folder_is_refused(sd15, tmp_path):
    urls = write_inputs(tmp_path / "in", (1,))
    cache_shards(cached(sd15[0], urls), tmp_path / "out", {"resolution": 16})
    with pytest.raises(ValueError, match="a cache with resolution = 16, here it is 32"):
        cache_shards(cached(sd15[0], urls), tmp_path / "out", {"resolution": 32})
    with pytest.raises(ValueError, match=r"holds 00000\.tar and is no cache"):
        cache_shards(cached(sd15[0], urls), tmp_path / "in", {})


def test_another_model_or_input_is_refused(sd15, tmp_path):
    urls = write_inputs(tmp_path / "in", (1, 1))
    cache_shards(cached(sd15[0], urls), tmp_path / "out", {})
    other = shutil.copytree(sd15[0], tmp_path / "other")
    tiny_pipelines.autoencoder(seed=4).save_pretrained(other / "vae")
    with pytest.raises(ValueError, match=r"a cache with autoencoder = '.{16}', here it is '.{16}'"):
        cache_shards(cached(other, urls), tmp_path / "out", {})
    with pytest.raises(ValueError, match=r"with input of shard-000000.tar = '00000.tar', here it is '00001.tar'"):
        cache_shards(cached(sd15[0], f"{tmp_path}/in/00001.tar"), tmp_path / "out", {})


# --- what encoded a cache ---------------------------------------------------------------------------------------------


def other_autoencoder(folder):
    tiny_pipelines.autoencoder(seed=4).save_pretrained(folder / "vae")


def other_factor(folder):
    tiny_pipelines.autoencoder(0.13025).save_pretrained(folder / "vae")


def other_text_encoder(folder):
    tiny_pipelines.text_encoder(CLIPTextModel, 12, seed=9).save_pretrained(folder / "text_encoder")


def other_words(folder):
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"ab":', '"cd":'))


def wider_captions(folder):
    tiny_pipelines.unet(cross_attention_dim=20).save_pretrained(folder / "unet")


def other_decoder(folder):
    vae = tiny_pipelines.autoencoder()
    vae.decoder.conv_out.weight.data.add_(1)
    vae.save_pretrained(folder / "vae")


def half_precision(folder):
    tiny_pipelines.autoencoder().half().save_pretrained(folder / "vae")
    tiny_pipelines.text_encoder(CLIPTextModel, 12, seed=1).half().save_pretrained(folder / "text_encoder")


def run_of(folder, data):
    teacher = StableDiffusion(network=UNetFromFolder(folder=str(folder)), weights=str(folder))
    stream = LatentStream(urls=f"{data}/shard-{{000000..000001}}.tar")
    return SimpleNamespace(data=stream, task=nn.ModuleDict({"teacher": teacher}))


@pytest.fixture(scope="module")
def cache(sd15, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    cache_shards(cached(sd15[0], write_inputs(folder / "in")), folder / "out", {})
    return folder / "out"


def test_a_cache_says_what_encoded_it(sd15, cache):
    facts = json.loads((cache / "index.json").read_text())["encoders"]
    assert {name: value for name, value in facts.items() if not isinstance(value, str)} == {
        "scaling_factor": 0.18215,
        "shift_factor": None,
        "text_tokens": tiny_pipelines.TOKENS,
        "text_width": 12,
    }
    assert {name for name, value in facts.items() if isinstance(value, str)} == {
        *("autoencoder", "text_encoder", "tokenizer")
    }
    assert check_encoders(run_of(sd15[0], cache)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_autoencoder, r"encoded with autoencoder \w{16}, and teacher \(StableDiffusion\) has autoencoder \w{16}"),
        (
            other_factor,
            r"encoded with scaling_factor 0.18215, and teacher \(StableDiffusion\) has scaling_factor 0.13025",
        ),
        (other_text_encoder, r"encoded with text_encoder \w{16}, .* run tools/cache_latents.py again"),
        (other_words, r"encoded with tokenizer \w{16}, "),
        (wider_captions, r"encoded with text_width 12, and teacher.network \(UNetFromFolder\) has text_width 20"),
        (other_decoder, None),
        (half_precision, None),
    ],
)
def test_a_run_of_another_model_is_refused_in_one_line(sd15, cache, tmp_path, change, message):
    folder = shutil.copytree(sd15[0], tmp_path / "model")
    change(folder)
    if message is None:
        assert check_encoders(run_of(folder, cache)) == []
        return
    with pytest.raises(ValueError, match=message) as caught:
        check_encoders(run_of(folder, cache))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_cache_that_does_not_say_it_is_used_with_a_warning(sd15, cache, tmp_path, indexed):
    data = shutil.copytree(cache, tmp_path / "data")
    index = json.loads((data / "index.json").read_text())
    del index["encoders"]
    (data / "index.json").unlink() if not indexed else (data / "index.json").write_text(json.dumps(index))
    (line,) = check_encoders(run_of(sd15[0], data))
    assert "does not say which autoencoder and text encoder made them" in line
    folder = shutil.copytree(sd15[0], tmp_path / "model")
    wider_captions(folder)
    with pytest.raises(ValueError, match=r"text_width 12, and teacher.network \(UNetFromFolder\) has text_width 20"):
        check_encoders(run_of(folder, data))
    wide, captions = run_of(folder, data).task["teacher"].network, Condition(text=torch.zeros(1, 12, 12))
    with pytest.raises(
        ValueError, match=r"have 12 numbers a word, and UNetFromFolder takes 20 \(cross_attention_dim\)"
    ):
        wide.encode(torch.zeros(1, 4, 8, 8), torch.zeros(1), captions)


def test_the_empty_prompt_is_of_the_same_encoder(sd15, cache, tmp_path):
    encoder, run = SD15CaptionEncoder(weights=str(sd15[0])), run_of(sd15[0], cache)
    encoder.load()
    write_empty_prompt(tmp_path / "empty.safetensors", encoder)
    run.task["empty"] = EmptyPrompt(file=str(tmp_path / "empty.safetensors"))
    assert check_encoders(run) == []
    folder = shutil.copytree(sd15[0], tmp_path / "model")
    other_text_encoder(folder)
    other = SD15CaptionEncoder(weights=str(folder))
    other.load()
    write_empty_prompt(tmp_path / "empty.safetensors", other)
    with pytest.raises(ValueError, match=r"text_encoder \w{16}, and empty \(EmptyPrompt\) has text_encoder"):
        check_encoders(run)


def test_two_caches_of_one_run_are_of_one_model(cache, tmp_path):
    data = shutil.copytree(cache, tmp_path / "data")
    index = json.loads((data / "index.json").read_text())
    index["encoders"]["scaling_factor"] = 0.5
    (data / "index.json").write_text(json.dumps(index))
    urls = f"{cache}/shard-000000.tar::{data}/shard-000000.tar"
    with pytest.raises(ValueError, match=r"were encoded with scaling_factor 0.18215, those of .* with 0.5"):
        LatentStream(urls=urls).encoder_facts()
    assert CachedCaptionStream(urls=urls).encoder_facts()["text_width"] == 12


def test_a_model_in_one_file(sd15, tmp_path, monkeypatch):
    folder, pipeline = sd15
    config = {name: value for name, value in pipeline.vae.config.items() if not name.startswith("_")}
    monkeypatch.setattr(encoder_files, "STANDARD", config)
    tensors = tiny_pipelines.whole_model({}, pipeline.vae.state_dict(), 1, 2)
    one, xl = str(tmp_path / "one.safetensors"), str(tmp_path / "xl.safetensors")
    save_file(tensors, one)
    save_file(tensors | {"conditioner.embedders.0.x": torch.zeros(1)}, xl)
    assert Autoencoder(weights=one).encoder_facts() == Autoencoder(weights=str(folder)).encoder_facts()
    assert model_facts(one) == Autoencoder(weights=one).encoder_facts()
    assert (Autoencoder(weights=xl).factor, model_facts(xl)["scaling_factor"]) == (0.13025, 0.13025)
    with pytest.raises(
        ValueError, match="one file, from which the autoencoder can be read but no tokenizer: add --text"
    ):
        encoder_of(one, "--teacher")
    words = shutil.copytree(folder, tmp_path / "words")
    shutil.rmtree(words / "unet")
    assert type(encoder_of(str(words), "--text_encoder")[0]) is SD15CaptionEncoder


def test_folders_and_patterns_are_their_tar_files(tmp_path):
    urls = write_inputs(tmp_path / "in")
    (tmp_path / "in" / ".hidden.tar").write_bytes(b"")
    named = [tmp_path / "in" / "00000.tar", tmp_path / "in" / "00001.tar"]
    for source in (urls, f"{tmp_path}/in", f"{tmp_path}/in/*.tar", f"{named[0]}::{tmp_path}/in/*1.tar"):
        assert input_shards(source) == named
    for source in (f"{tmp_path}/in/*.zip", str(tmp_path), f"{tmp_path}/none"):
        with pytest.raises(ValueError, match=r"no tar file|No such shard"):
            input_shards(source)


def test_damage_is_counted_and_limited(sd15, tmp_path):
    (tmp_path / "in").mkdir()
    with wds.TarWriter(str(tmp_path / "in" / "00000.tar")) as writer:
        for k in range(4):
            data = b"no image" if k == 1 else picture(k)[0]
            writer.write({"__key__": f"{k}", "png": data, "txt": CAPTIONS[k].encode()})
    urls = f"{tmp_path}/in/00000.tar"
    tolerant = cached(sd15[0], urls, max_damaged=0.25)
    cache_shards(tolerant, tmp_path / "out", {})
    assert (tolerant.seen, tolerant.damaged) == (4, 1)
    assert list(members(tmp_path / "out" / "shard-000000.tar")) == ["0", "2", "3"]
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["shards"]["shard-000000.tar"]["damaged"] == tolerant.damage
    assert ["sample '1' of shard" in line for line in tolerant.damage] == [True]
    with pytest.raises(
        ValueError, match=r"1 of 4 samples are damaged, more than --max_damaged=0\.2 allows; sample '1'"
    ):
        cache_shards(cached(sd15[0], urls, max_damaged=0.2), tmp_path / "few", {})
    with pytest.raises(ValueError, match=r"sample '1' of shard.* --max_damaged of tools/cache_latents"):
        cache_shards(cached(sd15[0], urls), tmp_path / "none", {})
    assert not list((tmp_path / "none").glob("*.tar"))


def test_prompts_and_the_empty_one(sd15, tmp_path):
    folder, pipeline = sd15
    encoder = SD15CaptionEncoder(weights=str(folder))
    encoder.load()
    index = cache_shards(CachedPrompts(CAPTIONS, encoder, size=3, batch_size=2), tmp_path / "out", {})
    assert [entry["samples"] for entry in index["shards"].values()] == [3, 2]
    found = {k: v for name in index["shards"] for k, v in members(tmp_path / "out" / name).items()}
    with torch.no_grad():
        text, _ = pipeline.encode_prompt([*CAPTIONS, ""], "cpu", 1, False)
    for k, sample in enumerate(found.values()):
        np.testing.assert_allclose(sample["text.npy"], text[k], rtol=1e-3, atol=1e-3)
        assert sample["txt"].decode() == CAPTIONS[k]
        assert sample.keys() == {"text.npy", "txt"}
    write_empty_prompt(tmp_path / "empty.safetensors", encoder)
    tensors = load_file(tmp_path / "empty.safetensors")
    assert tensors.keys() == {"text"}
    torch.testing.assert_close(tensors["text"], text[-1], rtol=0, atol=1e-6)


def run(*arguments):
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=600)


def test_the_tool(sd15, tmp_path):
    urls, empty = write_inputs(tmp_path / "in"), tmp_path / "empty.safetensors"
    flags = [f"--teacher={sd15[0]}", "--resolution=16", f"--empty_prompt={empty}", "--device=cpu"]
    done = run(urls, tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr
    assert "5 samples in 2 shards, 0 filtered out, 0 damaged" in done.stdout
    assert f"--data='{tmp_path}/out/shard-{{000000..000001}}.tar'" in done.stdout
    assert empty.is_file()
    assert json.loads((tmp_path / "out" / "index.json").read_text())["settings"]["resolution"] == 16


def test_the_tool_says_in_one_line_what_is_missing(tmp_path):
    done = run("prompts.txt", tmp_path / "out", f"--teacher={tmp_path / 'none'}", "--caption_only")
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: no unet at --teacher=")
    assert "hf download" in line
