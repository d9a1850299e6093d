"""Damaged and hostile shards: never a crash, never a file outside, and what is lost is counted and named.

The shards of the tests hold ten samples; sample k is an image of 4 x 4 pixels of the value k with the label k.
"""

import gzip
import io
import itertools
import json
import logging
import random
import re
import struct
import tarfile
import zlib

import numpy as np
import pytest

from ratiograph.data import images, tars
from ratiograph.data.images import encode_png
from ratiograph.data.loader import PATIENCE
from ratiograph.data.raw_samples import DamagedSample, RawImage, decode, decode_label, raw_image
from ratiograph.data.shards import INDEX, count_items, read_shard, write_shards
from ratiograph.data.stream import ShardStream
from ratiograph.data.tars import Damage

SAMPLES = 10
BLOCK = tarfile.BLOCKSIZE


def png(value):
    return encode_png(np.full((4, 4), value, np.uint8))


def members(samples=SAMPLES):
    return [
        (f"{k:03d}.{suffix}", data) for k in range(samples) for suffix, data in (("png", png(k)), ("cls", b"%d" % k))
    ]


def header(name, size=0, kind=tarfile.REGTYPE, **fields):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def entry(name, data, **fields):
    return header(name, len(data), **fields) + data + bytes(-len(data) % BLOCK)


def tar(parts):
    return b"".join(parts) + bytes(2 * BLOCK)


def sound():
    return [entry(name, data) for name, data in members()]


def with_header(raw, **at):
    """A header with some bytes replaced and its checksum made right again."""
    raw = bytearray(raw)
    for place, value in at.items():
        raw[int(place[1:]) : int(place[1:]) + len(value)] = value
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def huge_png(width, height):
    """A file of some bytes that claims width x height grey pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(1000)))]
    parts = [
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in [*chunks, (b"IEND", b"")]
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def inserted(*parts):
    """A sound shard with ``parts`` in its middle."""
    return tar([*sound()[:10], *parts, *sound()[10:]])


def pax(text):
    record = b"%d path=%s\n" % (len(text) + 10, text)
    return entry("x", record, kind=tarfile.XHDTYPE)


HOSTILE = {
    "name that climbs": inserted(entry("../../../climbed.png", png(0))),
    "name that climbs inside": inserted(entry("a/../../climbed.png", png(0))),
    "absolute name": inserted(entry("/tmp/absolute.png", png(0))),
    "long absolute name": inserted(pax(b"/" + b"x" * 300 + b".png"), entry("a.png", png(0))),
    "symbolic link": inserted(header("link.png", kind=tarfile.SYMTYPE, linkname="/etc/passwd")),
    "hard link": inserted(header("link.png", kind=tarfile.LNKTYPE, linkname="../../etc/passwd")),
    "character device": inserted(header("null.png", kind=tarfile.CHRTYPE, devmajor=1, devminor=3)),
    "block device": inserted(header("disk.png", kind=tarfile.BLKTYPE, devmajor=8)),
    "pipe": inserted(header("pipe.png", kind=tarfile.FIFOTYPE)),
    "sparse file": inserted(
        with_header(header("s.png", kind=tarfile.GNUTYPE_SPARSE), _386=b"%011o\0%011o\0" % (0, 0), _483=b"7" * 11)
    ),
    "unknown kind": inserted(header("u.png", kind=b"Z")),
    "size of 8 GB": inserted(with_header(header("big.png"), _124=b"7" * 11 + b"\0")),
    "size of 2^80 bytes": inserted(with_header(header("big.png"), _124=b"\x80\0" + b"\xff" * 10)),
    "negative size": inserted(with_header(header("less.png"), _124=b"\xff" * 12)),
    "negative size of a long name": inserted(
        with_header(header("x", kind=b"L"), _124=b"\xff" * 12), entry("a.png", b"")
    ),
    "long name of 8 GB": inserted(with_header(header("x", kind=b"L"), _124=b"7" * 11 + b"\0")),
    "long names without end": inserted(*[entry("x", b"name\0", kind=b"L") for _ in range(3000)], entry("a.png", b"")),
    "attributes that are none": inserted(
        entry("x", b"99999999999 path=a.png\n", kind=tarfile.XHDTYPE), entry("a.png", b"")
    ),
    "attributes of a negative size": inserted(
        entry("x", b"11 size=-9\n", kind=tarfile.XHDTYPE), entry("a.png", png(0))
    ),
    "attributes of no size": inserted(entry("x", b"12 size=abc\n", kind=tarfile.XHDTYPE), entry("a.png", png(0))),
    "the same member twice": inserted(entry("a.png", png(0)), entry("a.png", png(1)), entry("a.cls", b"0")),
    "the same key twice": inserted(entry("000.png", png(0)), entry("000.cls", b"0")),
    "no image": inserted(entry("a.txt", b"seven"), entry("a.cls", b"7")),
    "a program for an image": inserted(entry("a.png", b"#!/bin/sh\ntouch /tmp/ran\n"), entry("a.cls", b"0")),
    "an image of another kind": inserted(entry("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")),
    "3.6 gigapixels": inserted(entry("a.png", huge_png(60000, 60000)), entry("a.cls", b"0")),
    "80 megapixels": inserted(entry("a.png", huge_png(10000, 8000)), entry("a.cls", b"0")),
    "an empty image": inserted(entry("a.png", b""), entry("a.cls", b"0")),
    "a name of control characters": inserted(entry("\x1b[2J\n\r.txt", b"")),
    "a name that is no text": inserted(with_header(header("x.txt"), _0=b"\xff\xfe\xfd.txt")),
    "a label that is no number": inserted(entry("a.png", png(0)), entry("a.cls", b"\xff" * 9)),
    "no label": inserted(entry("a.png", png(0))),
    "junk between members": inserted(b"\xa5" * 5 * BLOCK),
    "junk after the end": tar(sound()) + b"\xa5" * 3 * BLOCK,
    "no end": b"".join(sound()),
    "nothing": b"",
    "zeros": bytes(20 * BLOCK),
    "text": b"hello\n" * 1000,
    "compressed and cut": gzip.compress(tar(sound()))[:400],
}


def fuzzed(number):
    """A sound shard with up to four bits flipped or its end cut off."""
    rng = random.Random(number)
    data = bytearray(tar(sound()))
    if number % 3 == 0:
        return bytes(data[: rng.randrange(len(data) - 2 * BLOCK)])
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(2 * SAMPLES) * 2 * BLOCK + rng.randrange(2 * BLOCK)
        data[place] ^= 1 << rng.randrange(8)
    return bytes(data)


FUZZED = {f"fuzzed {number}": fuzzed(number) for number in range(200 - len(HOSTILE))}


def outcome(path):
    """(values of the pixels by label of the samples that can be used, the messages of those that cannot)."""
    used, lost = {}, []
    for sample in read_shard(path, tolerant=True):
        try:
            if isinstance(sample, Damage):
                raise DamagedSample(sample.message)
            pixels, label = decode(sample, channels=1, resolution=4, labels=True)
            used[label] = set(pixels.reshape(-1).tolist())
        except DamagedSample as error:
            lost.append(str(error))
    return used, lost


def strictly(path):
    for sample in read_shard(path):
        decode(sample, channels=1, resolution=4, labels=True)


def files_under(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def shard(tmp_path, monkeypatch):
    """Writes a shard into a folder of its own; the current folder is beside it."""
    (tmp_path / "here" / "deeper").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "here" / "deeper")

    def write(data):
        path = tmp_path / "data" / "shard.tar"
        path.write_bytes(data)
        return path

    return write


def test_two_hundred_shards():
    assert len(HOSTILE) + len(FUZZED) == 200


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_shard_is_named_and_its_sound_samples_are_used(shard, tmp_path, kind):
    path = shard(HOSTILE[kind])
    before = files_under(tmp_path)
    used, lost = outcome(path)
    assert lost
    assert all(str(path) in message for message in lost)
    assert all(message.isprintable() for message in lost)
    if kind not in ("nothing", "zeros", "text", "compressed and cut"):
        assert {label: pixels for label, pixels in used.items() if pixels == {label}}.keys() >= set(range(1, SAMPLES))
        assert len(lost) <= 2
    with pytest.raises(DamagedSample) as caught:
        strictly(path)
    assert str(caught.value) in lost
    assert files_under(tmp_path) == before


@pytest.mark.parametrize("kind", FUZZED)
def test_fuzzed_shard_loses_no_sample_unnoticed(shard, kind):
    path = shard(FUZZED[kind])
    used, lost = outcome(path)
    assert all(str(path) in message for message in lost)
    if not lost:
        assert len(used) == SAMPLES


@pytest.mark.parametrize("kind", [*HOSTILE, *FUZZED])
def test_items_are_counted_without_reading_them(shard, kind):
    path = shard((HOSTILE | FUZZED)[kind])
    assert count_items(path, raw_image) == len(list(read_shard(path, tolerant=True)))


def test_a_shard_is_the_same_number_of_items_however_it_is_damaged(shard, tmp_path):
    write_shards(
        tmp_path / "data", "shard", [{"__key__": f"{k}", "png": png(k), "cls": b"%d" % k} for k in range(10)], 1
    )
    path = tmp_path / "data" / "shard-000000.tar"
    whole = path.read_bytes()
    for place in range(0, len(whole) - 3 * BLOCK, BLOCK):  # one header or one member after another is made senseless
        path.write_bytes(whole[:place] + b"\xa5" * BLOCK + whole[place + BLOCK :])
        items = list(read_shard(path, tolerant=True))
        assert len(items) == 10
        kept = [int(sample.key) for sample in items if not isinstance(sample, Damage)]
        assert len(kept) >= 9
        assert kept == sorted(kept)


def test_a_shard_cut_short_counts_what_it_lost(shard, tmp_path):
    write_shards(
        tmp_path / "data", "shard", [{"__key__": f"{k}", "png": png(k), "cls": b"%d" % k} for k in range(10)], 1
    )
    path = tmp_path / "data" / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[: 4 * 4 * BLOCK])  # four samples of two members of two blocks
    *kept, lost = read_shard(path, tolerant=True)
    assert [int(sample.key) for sample in kept] == [0, 1, 2, 3]
    assert lost.lost == 6
    assert f"Shard {path} is damaged: 4 samples can be read of 10" in lost.message


def test_a_compressed_shard_that_grows_without_end_is_not_unpacked(shard, monkeypatch):
    monkeypatch.setattr(tars, "LARGEST_MEMBER", 10_000)
    bomb = gzip.compress(inserted(entry("a.png", bytes(1_000_000))))
    used, lost = outcome(shard(bomb))
    assert "claims 1000000 bytes" in lost[0]
    assert used.keys() >= set(range(5))


@pytest.mark.parametrize(
    ("compress", "parts", "lost"),
    [
        (bytes, [entry(f"a.{k}", bytes(9000)) for k in range(3)], "its sample 'a' holds more than 10000 bytes"),
        (
            gzip.compress,
            [entry(f"a.{k}", bytes(9000)) for k in range(30)],
            r"its member 'a\.\d+' claims 9000 bytes, more than the",
        ),
        (gzip.compress, [bytes(300 * BLOCK)], "it unpacks to more than"),
    ],
)
def test_many_members_and_zeros_that_make_much_of_little_are_refused(shard, monkeypatch, compress, parts, lost):
    monkeypatch.setattr(tars, "LARGEST_MEMBER", 10_000)
    path = shard(compress(tar([*sound(), *parts])))
    used, messages = outcome(path)
    assert used == {k: {k} for k in range(SAMPLES)}
    assert re.search(lost, messages[0])
    assert "max_damaged" in messages[0]
    with pytest.raises(DamagedSample, match=lost):
        strictly(path)


def test_what_systems_leave_beside_files_is_no_sample(shard):
    names = ["__MACOSX/a.png", "__MACOSX/._a.png", "._a.png", "x/.ipynb_checkpoints/a.png", "./.a/b.png"]
    used, lost = outcome(shard(tar([*[entry(name, b"junk") for name in names], *sound(), entry("Thumbs.db", b"")])))
    assert not lost
    assert used == {k: {k} for k in range(SAMPLES)}


@pytest.mark.parametrize("label", [b"-1", b"1_0", b"9" * 40, b"", b"7.0"])
def test_a_label_is_a_whole_number_from_0_on(label):
    with pytest.raises(DamagedSample, match=r"The class label of sample 'a'.*a whole number from 0 on was expected"):
        decode_label(RawImage("s.tar", "a", b"", label))
    assert decode_label(RawImage("s.tar", "a", b"", b"\xef\xbb\xbf7\n")) == 7


@pytest.mark.parametrize("compress", [gzip.compress, __import__("bz2").compress, __import__("lzma").compress])
def test_compressed_shards_are_read(shard, compress):
    used, lost = outcome(shard(compress(tar(sound()))))
    assert not lost
    assert used == {k: {k} for k in range(SAMPLES)}


def test_the_limit_of_pixels_is_on_what_is_claimed(monkeypatch):
    assert images.pixels_of(png(3))[1].shape == (1, 4, 4)
    monkeypatch.setattr(images, "MOST_PIXELS", 15)
    with pytest.raises(images.BadImage, match=r"claims 4x4 pixels, more than the 15 allowed"):
        images.pixels_of(png(3))


# ------------------------------------------------------------------------------------------- the stream


@pytest.fixture
def mixed(tmp_path):
    """Six shards of ten samples, labels 0 to 59, of which nine are damaged: label 7, 21 and all of 40 to 46."""
    samples = [{"__key__": f"{k:02d}", "png": png(k), "cls": b"%d" % k} for k in range(60)]
    samples[7]["png"] = samples[7]["png"][:-20]
    samples[21]["cls"] = b"?"
    paths = write_shards(tmp_path / "set", "set", samples, 6)
    data = bytearray(paths[4].read_bytes())
    for k in range(7):
        data[k * 4 * BLOCK + 2 * BLOCK] ^= 0xFF  # the header of the sample's second member, the image
    paths[4].write_bytes(data)
    return str(tmp_path / "set" / "set-{000000..000005}.tar")


DAMAGED = {7, 21, *range(40, 47)}


def taken(stream, size, count, **where):
    batches = stream.batches(size, 0, **where)
    found = [batch.condition.labels for batch in itertools.islice(batches, count)]
    batches.close()
    return [int(label) for labels in found for label in labels]


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_samples_are_skipped_counted_and_named_once(mixed, workers, caplog):
    stream = ShardStream(urls=mixed, shuffle_buffer=10, max_damaged=0.2, workers=workers)
    with caplog.at_level(logging.WARNING):
        order = taken(stream, 12, 10)  # two epochs
    assert not DAMAGED & set(order)
    assert set(order) == set(range(60)) - DAMAGED
    assert stream.skipped == stream.accounting()["damaged"] >= 2 * len(DAMAGED)
    assert stream.accounting()["used"] == 120
    named = [record.getMessage() for record in caplog.records]
    assert len(set(named)) == len(named)
    assert sum("sample '07' of shard" in message for message in named) == 1
    assert sum("label of sample '21'" in message for message in named) == 1
    assert sum("set-000004.tar" in message for message in named) >= 7


def test_a_damaged_sample_does_not_move_the_others(mixed, tmp_path):
    """The sound samples lie where they would without the damage, for any ranks, workers and start."""
    whole = ShardStream(urls=mixed, shuffle_buffer=10, max_damaged=0.2)
    expected = taken(whole, 12, 10)
    assert taken(ShardStream(urls=mixed, shuffle_buffer=10, max_damaged=0.2, workers=2), 12, 10) == expected
    resumed = taken(ShardStream(urls=mixed, shuffle_buffer=10, max_damaged=0.2), 12, 5, start=60)
    assert resumed == expected[60:]
    ranks = [taken(ShardStream(urls=mixed, shuffle_buffer=10, max_damaged=0.2), 6, 10, rank=r, ranks=2) for r in (0, 1)]
    rows = [ranks[r][6 * k : 6 * k + 6] for k in range(10) for r in (0, 1)]
    assert [label for row in rows for label in row] == expected


def test_a_stream_without_an_index_resumes_past_damage(mixed, tmp_path):
    (tmp_path / "set" / INDEX).unlink()
    stream = ShardStream(urls=mixed, shuffle_buffer=10, max_damaged=0.3)
    whole = taken(stream, 12, 12)
    for start in (24, 96):
        assert taken(stream, 12, 3, start=start) == whole[start : start + 36]


def test_by_default_damage_is_an_error(mixed):
    with pytest.raises(ValueError, match=r"damaged|cannot be decoded|class label"):
        taken(ShardStream(urls=mixed, shuffle_buffer=10), 60, 1)


def test_more_damage_than_allowed_is_an_error(mixed):
    """7.5 % are damaged: 1,000 samples may hold 10 of them at 1 %, which the second epoch passes."""
    stream = ShardStream(urls=mixed, shuffle_buffer=10, max_damaged=0.01)
    with pytest.raises(
        ValueError, match=r"samples are damaged, more than max_damaged=0\.01 allows; the last: .*set-00000"
    ):
        taken(stream, 12, 20)
    assert stream.skipped > 0.01 * PATIENCE
    assert stream.accounting()["used"] <= 120


def test_nothing_but_damage_ends(tmp_path):
    (tmp_path / "bad.tar").write_bytes(b"hello" * 1000)
    with pytest.raises(ValueError, match=r"1000 samples in a row are damaged, the last: Shard .*bad\.tar"):
        taken(ShardStream(urls=str(tmp_path / "bad.tar"), max_damaged=0.5), 4, 1)


def test_a_class_filter_meets_damage(mixed):
    stream = ShardStream(urls=mixed, shuffle_buffer=5, max_damaged=0.5, classes=(1, 21, 22))
    assert set(taken(stream, 3, 4)) == {1, 22}
    assert stream.accounting()["other class"] >= 40


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes_is_named(mixed, tmp_path, workers):
    batches = ShardStream(urls=mixed, max_damaged=0.3, memory_megabytes=0, workers=workers).batches(12, 0)
    (tmp_path / "set" / "set-000003.tar").unlink()
    with pytest.raises(ValueError, match=r"Shard .*set-000003\.tar has vanished: put it back"):
        list(itertools.islice(batches, 12))


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"shards": {"shard-000000.tar": {"samples": "many", "bytes": 1}}}', "[" * 99999]
)
def test_a_senseless_index_is_named(tmp_path, index):
    (path,) = write_shards(tmp_path / "s", "shard", [{"__key__": "0", "png": png(0), "cls": b"0"}], 1)
    (path.parent / INDEX).write_text(index)
    with pytest.raises(ValueError, match=r"The shard index .* is damaged"):
        taken(ShardStream(urls=str(path)), 1, 1)


def test_an_index_says_what_is_there_and_nothing_else(tmp_path):
    (path,) = write_shards(tmp_path / "s", "shard", [{"__key__": "0", "png": png(0), "cls": b"0"}], 1)
    index = json.loads((path.parent / INDEX).read_text())
    index["shards"][path.name]["url"] = f"pipe:touch {tmp_path}/ran"
    index["shards"]["pipe:touch " + str(tmp_path / "ran")] = {"samples": 1, "bytes": 1}
    (path.parent / INDEX).write_text(json.dumps(index))
    assert taken(ShardStream(urls=str(path)), 1, 1) == [0]
    assert not (tmp_path / "ran").exists()


def test_a_shard_read_from_memory_needs_its_bytes_only_once(tmp_path):
    (path,) = write_shards(tmp_path / "s", "shard", [{"__key__": "0", "png": png(9), "cls": b"0"}], 1)
    batches = ShardStream(urls=str(path), prefetch=1).batches(1, 0)
    next(batches)
    path.write_bytes(io.BytesIO().getvalue())
    assert all(
        float(batch.images[0, 0, 0, 0]) == pytest.approx(9 / 127.5 - 1) for batch in itertools.islice(batches, 9)
    )
    batches.close()
