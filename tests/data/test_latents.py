"""Shards of captioned latents: what is written comes back, in an order that resumes, and damage is named."""

import io
import itertools

import numpy as np
import pytest
import torch

from ratiograph.data.captions import unpack
from ratiograph.data.latents import CachedCaptionStream, LatentStream, picture, write_latents
from ratiograph.data.shards import INDEX, count_samples, write_shards


def arrays(samples=10, seed=0):
    rng = np.random.default_rng(seed)
    parts = {
        "latent": rng.standard_normal((samples, 4, 8, 8)),
        "text": rng.standard_normal((samples, 3, 12)),
        "pooled": rng.standard_normal((samples, 5)),
        "sizes": rng.integers(0, 2048, (samples, 6)),
    }
    parts["latent"][:, 0, 0, 0] = np.arange(samples)  # says which sample it is
    return parts


def take(stream, size, count, seed=3, start=0):
    batches = stream.batches(size, seed, start)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def numbers(batches):
    return [int(k) for batch in batches for k in batch.images[:, 0, 0, 0]]


@pytest.fixture
def shards(tmp_path):
    write_latents(tmp_path / "data", "set", arrays(), 3)
    return f"{tmp_path}/data/set-{{000000..000002}}.tar"


def test_values_come_back_in_half_precision(shards):
    (batch,) = take(LatentStream(urls=shards, pooled=True), 10, 1)
    order, written = numbers([batch]), arrays()
    assert sorted(order) == list(range(10))
    condition = batch.condition
    for found, part in ((batch.images, "latent"), (condition.text, "text"), (condition.pooled, "pooled")):
        assert found.dtype == torch.float32
        assert np.array_equal(found.numpy(), written[part][order].astype(np.float16).astype(np.float32)), part
    assert np.array_equal(condition.sizes.numpy(), written["sizes"][order])
    assert condition.labels is None


def test_captions_alone_are_those_of_the_latents_in_the_same_order(shards):
    for pooled in (False, True):
        whole = take(LatentStream(urls=shards, pooled=pooled), 4, 5)
        alone = take(CachedCaptionStream(urls=shards, pooled=pooled), 4, 5)
        for one, other in zip(whole, alone, strict=True):
            assert other.images.shape == (4, 0)
            assert len(other) == 4
            parts, found = one.condition.parts(), other.condition.parts()
            assert parts.keys() == found.keys()
            assert all(torch.equal(parts[name], found[name]) for name in parts)
    later = take(CachedCaptionStream(urls=shards), 4, 2, start=8)
    assert all(torch.equal(a.condition.text, b.condition.text) for a, b in zip(later, alone[2:4], strict=True))
    assert "latents" not in CachedCaptionStream(urls=shards).describe()


def test_shards_without_latents_are_read_as_captions_only(tmp_path):
    parts, texts = arrays(6), [f"caption {k}" for k in range(6)]
    samples = []
    for k, text in enumerate(texts):
        buffer = io.BytesIO()
        np.save(buffer, parts["text"][k].astype(np.float16))
        samples.append({"__key__": str(k), "text.npy": buffer.getvalue(), "txt": text.encode()})
    write_shards(tmp_path / "data", "set", samples, 2)
    urls = f"{tmp_path}/data/set-{{000000..000001}}.tar"
    batches = take(CachedCaptionStream(urls=urls), 3, 2)
    told = [text for batch in batches for text in unpack(batch.condition.caption)]
    assert sorted(told) == texts
    states = torch.cat([batch.condition.text for batch in batches]).numpy()
    order = [texts.index(text) for text in told]
    assert np.array_equal(states, parts["text"][order].astype(np.float16).astype(np.float32))
    with pytest.raises(ValueError, match=r"'\d' of shard .* has no latent \('\d\.latent\.npy'\).*CachedCaptionStream"):
        take(LatentStream(urls=urls), 3, 1)
    with pytest.raises(ValueError, match=r"has no pooled .*LatentStream\.pooled"):
        take(CachedCaptionStream(urls=urls, pooled=True), 3, 1)


def test_only_what_is_asked_for_is_decoded(shards):
    (batch,) = take(LatentStream(urls=shards), 4, 1)
    assert batch.condition.parts().keys() == {"text"}
    (batch,) = take(LatentStream(urls=shards, captions=False), 4, 1)
    assert batch.condition.parts() == {}


def test_every_epoch_holds_every_sample_in_another_order(shards):
    order = numbers(take(LatentStream(urls=shards), 5, 4))
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    assert order == numbers(take(LatentStream(urls=shards), 5, 4))
    assert order != numbers(take(LatentStream(urls=shards), 5, 4, seed=4))


@pytest.mark.parametrize("start", [4, 12])
def test_a_resumed_stream_goes_on_where_it_was(shards, start):
    whole = numbers(take(LatentStream(urls=shards), 4, 6))
    resumed = numbers(take(LatentStream(urls=shards), 4, 2, start=start))
    assert resumed == whole[start : start + 8]


def test_workers_do_not_change_the_order(shards):
    alone, two = (numbers(take(LatentStream(urls=shards, workers=workers), 3, 4)) for workers in (0, 2))
    assert alone == two


def test_the_index_is_optional(shards, tmp_path):
    before = numbers(take(LatentStream(urls=shards), 4, 2, start=4))
    (tmp_path / "data" / INDEX).unlink()
    assert [count_samples(p) for p in sorted((tmp_path / "data").glob("*.tar"))] == [3, 3, 4]
    assert numbers(take(LatentStream(urls=shards), 4, 2, start=4)) == before


def test_a_shard_that_breaks_off_is_named(shards, tmp_path):
    path = tmp_path / "data" / "set-000001.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"Shard .*set-000001.tar is damaged"):
        take(LatentStream(urls=shards), 10, 1)


def test_a_missing_caption_is_named(tmp_path):
    (path,) = write_latents(tmp_path / "plain", "set", {"latent": arrays()["latent"]})
    with pytest.raises(ValueError, match=r"'000000000' of shard .* has no text .*LatentStream\.captions"):
        take(LatentStream(urls=str(path), shuffle_buffer=0), 2, 1)
    assert sorted(numbers(take(LatentStream(urls=str(path), captions=False), 10, 1))) == list(range(10))


def npy(value, **kwargs):
    buffer = io.BytesIO()
    np.save(buffer, value, **kwargs)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("latent", "message"),
    [
        (npy(np.array([{"code": print}], dtype=object), allow_pickle=True), "is no npy array of numbers"),
        (b"not an array", "is no npy array of numbers"),
        (npy(np.zeros((4, 8, 8), ">f8")).replace(b"(4, 8, 8), ", b"(99999999,)"), "is no npy array of numbers"),
        (npy(np.zeros((4, 8, 8), np.float16))[:-2], "is no npy array of numbers"),
        (npy(np.zeros((4, 8, 8), np.float16)).replace(b"(4, 8, 8)", b"(4, 8,9e)"), "is no npy array of numbers"),
        (npy(np.zeros((4, 8, 8), "f4,f4")), "is no npy array of numbers"),
        (npy(np.full((4, 8, 8), np.nan, np.float16)), "is not 3-d and finite"),
        (npy(np.full((4, 8, 8), -np.inf, np.float32)), "is not 3-d and finite"),
        (npy(np.full((4, 8, 8), 1e300)), "is not 3-d and finite"),
        (npy(np.zeros((8, 8), np.float16)), "is not 3-d and finite"),
    ],
)
def test_what_is_no_latent_is_refused_unread(tmp_path, latent, message):
    (path,) = write_shards(tmp_path / "bad", "set", [{"__key__": "7", "latent.npy": latent}], 1)
    with pytest.raises(ValueError, match=f"sample '7' of shard .* is damaged: its latent .*{message}"):
        take(LatentStream(urls=str(path), captions=False), 1, 1)


def test_sizes_that_differ_are_named(tmp_path):
    samples = [{"__key__": str(side), "latent.npy": npy(np.zeros((4, side, side), np.float16))} for side in (8, 16)]
    (path,) = write_shards(tmp_path / "mixed", "set", samples, 1)
    with pytest.raises(ValueError, match=r"the latent of sample .* is \(4, \d+, \d+\).*one shape"):
        take(LatentStream(urls=str(path), captions=False), 2, 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_captions_as_text_travel_along(tmp_path, workers):
    texts = [f"number {k}, ünï" for k in range(10)]
    write_latents(tmp_path / "data", "set", arrays(), 2, captions=texts)
    urls = f"{tmp_path}/data/set-{{000000..000001}}.tar"
    for stream in (LatentStream(urls=urls, workers=workers), LatentStream(urls=urls, captions=False, workers=workers)):
        batches = take(stream, 5, 4)
        assert [t for b in batches for t in unpack(b.condition.caption)] == [texts[k] for k in numbers(batches)]
    assert batches[0].condition.parts().keys() == {"caption"}


def test_texts_that_some_samples_lack_are_named(tmp_path):
    latent = npy(np.zeros((4, 8, 8), np.float16))
    samples = [{"__key__": "a", "latent.npy": latent, "txt": b"a"}, {"__key__": "b", "latent.npy": latent}]
    (path,) = write_shards(tmp_path / "some", "set", samples, 1)
    with pytest.raises(ValueError, match=r"sample 'b' of shard .* has no caption \('b\.txt'\)"):
        take(LatentStream(urls=str(path), captions=False), 2, 1)


@pytest.mark.parametrize(
    "stored",
    [
        np.asfortranarray(np.arange(256.0).reshape(4, 8, 8)),
        np.arange(256).reshape(4, 8, 8).astype(">f2"),
        np.arange(256, dtype=np.uint8).reshape(4, 8, 8),
        np.arange(256, dtype=np.int64).reshape(4, 8, 8),
        np.arange(256, dtype=np.float32).reshape(4, 8, 8),
        np.arange(256, dtype=np.float64).reshape(4, 8, 8),
    ],
)
def test_numbers_of_any_kind_are_read(tmp_path, stored):
    (path,) = write_shards(tmp_path / "kinds", "set", [{"__key__": "0", "latent.npy": npy(stored)}], 1)
    (batch,) = take(LatentStream(urls=str(path), captions=False), 1, 1)
    assert batch.images.dtype == torch.float32
    assert torch.equal(batch.images[0], torch.arange(256.0).reshape(4, 8, 8))


def test_damaged_latents_are_skipped_up_to_a_fraction(tmp_path):
    values = arrays(30)["latent"].astype(np.float16)
    samples = [{"__key__": f"{k:02d}", "latent.npy": npy(values[k])} for k in range(30)]
    samples[4]["latent.npy"] = npy(np.full((4, 8, 8), np.inf, np.float16))
    samples[9]["latent.npy"] = samples[9]["latent.npy"][:-1]
    (path,) = write_shards(tmp_path / "some", "set", samples, 1)
    stream = LatentStream(urls=str(path), captions=False, max_damaged=0.1)
    assert sorted(set(numbers(take(stream, 10, 3)))) == [k for k in range(30) if k not in (4, 9)]
    assert stream.skipped == 2


def test_ranks_share_one_sequence(shards):
    whole = numbers(take(LatentStream(urls=shards), 4, 6))
    halves = []
    for rank in (0, 1):
        batches = LatentStream(urls=shards).batches(2, 3, 0, rank, 2)
        halves.append(list(itertools.islice(batches, 6)))
        batches.close()
    assert numbers([half for pair in zip(*halves, strict=True) for half in pair]) == whole


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"LatentStream\.prefetch is 0"):
        LatentStream(urls="none", prefetch=0)
    with pytest.raises(ValueError, match=r"LatentStream\.captions = True"):
        LatentStream(urls="none", captions=False, pooled=True)
    assert LatentStream(urls="a.tar", pooled=True).describe() == "a.tar: latents, captions, sizes"


def test_latents_are_shown_with_their_channels_side_by_side():
    latents = torch.arange(2 * 4 * 3 * 5.0).reshape(2, 4, 3, 5)
    shown = picture(latents)
    assert shown.shape == (2, 1, 3, 20)
    assert shown[1, 0, 2, 2 * 5 + 4] == latents[1, 2, 2, 4] / 3
    images = torch.zeros(2, 3, 4, 4)
    assert picture(images) is images
    points = torch.zeros(7, 2)
    assert picture(points) is points
