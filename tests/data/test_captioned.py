"""Captioned images as img2dataset writes them: geometry, captions, filters, accounts, and what is missing is named."""

import io
import itertools
import json
import struct
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ratiograph.data.captioned import CaptionedStream, CaptionStream
from ratiograph.data.captions import pack, unpack
from ratiograph.data.images import BadImage, fitted, pixels_of, read_image
from ratiograph.data.shards import INDEX, count_samples, write_shards


def smooth(height, width, seed=0):
    """A picture uint8 [H, W, 3] of slow waves, as photographs mostly are."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 40
    waves = [np.sin(a * x + b * y + c) for a, b, c in rng.uniform(-1, 1, (3, 3)) * (1, 1, 6)]
    return np.uint8(np.stack(waves, -1) * 100 + 127)


def encoded(pixels, kind="PNG", **how):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **how)
    return buffer.getvalue()


def shards(folder, samples, count=1):
    """URLs of shards of {key: {suffix: bytes}}."""
    write_shards(folder / "set", "set", [{"__key__": key, **members} for key, members in samples.items()], count)
    return f"{folder}/set/set-{{000000..{count - 1:06d}}}.tar"


def sample(number, caption="", side=8, suffix="png", **fields):
    image = encoded(np.full((side, side, 3), number, np.uint8), {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[suffix])
    return {suffix: image, "txt": caption.encode(), "json": json.dumps({"key": number, **fields}).encode()}


def take(stream, size, count=1, seed=0, **where):
    batches = stream.batches(size, seed, **where)
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def captions(batches):
    return [caption for batch in batches for caption in unpack(batch.condition.caption)]


# ------------------------------------------------------------------------------------------------ pixels


def test_a_square_image_of_the_right_size_is_left_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    found, geometry = fitted(encoded(pixels), 64)
    assert np.array_equal(found, pixels.transpose(2, 0, 1))
    assert geometry == (64, 64, 0, 0)


@pytest.mark.parametrize(("height", "width"), [(200, 300), (300, 200), (257, 129)])
def test_shorter_side_is_resized_with_antialiasing_and_the_middle_is_cropped(height, width):
    """Against torch's own antialiased bicubic interpolation, to a level of rounding."""
    pixels, side = smooth(height, width), 48
    found, (h, w, top, left) = fitted(encoded(pixels), side)
    new = max(side, round(height * side / min(height, width))), max(side, round(width * side / min(height, width)))
    expected = F.interpolate(torch.tensor(pixels).permute(2, 0, 1)[None].float(), new, mode="bicubic", antialias=True)[
        0
    ]
    corner = (new[0] - side) // 2, (new[1] - side) // 2
    expected = expected[:, corner[0] : corner[0] + side, corner[1] : corner[1] + side].clamp(0, 255)
    assert (h, w, top, left) == (height, width, *corner)
    assert found.shape == (3, side, side)
    assert np.abs(found.astype(int) - expected.numpy()).max() <= 2


def test_a_small_image_is_enlarged():
    found, geometry = fitted(encoded(smooth(16, 24)), 32)
    assert found.shape == (3, 32, 32)
    assert geometry == (16, 24, 0, 8)


@pytest.mark.parametrize("scale", [2, 3, 4, 9])
def test_large_jpegs_are_decoded_small_and_look_the_same(scale, monkeypatch):
    """At least 40 dB from the antialiased resize of the whole image."""
    data = encoded(smooth(64 * scale, 96 * scale), "JPEG", quality=95)
    found, geometry = fitted(data, 64)
    sizes = []
    plain = Image.Image.resize
    monkeypatch.setattr(Image.Image, "draft", lambda *_: None, raising=False)
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *_: None)
    monkeypatch.setattr(Image.Image, "resize", lambda image, *how: sizes.append(image.size) or plain(image, *how))
    whole, same = fitted(data, 64)
    assert sizes == [(96 * scale, 64 * scale)]
    assert geometry == same == (64 * scale, 96 * scale, 0, 16)
    error = ((found.astype(float) - whole) ** 2).mean()
    assert 10 * np.log10(255**2 / error) >= 40


@pytest.mark.parametrize(
    ("mode", "expected"), [("L", (50, 50, 50)), ("P", (255, 0, 0)), ("RGBA", (255, 127, 127)), ("LA", (152, 152, 152))]
)
def test_other_colour_modes_become_rgb_on_white(mode, expected):
    image = {
        "L": Image.new("L", (8, 8), 50),
        "P": Image.new("RGB", (8, 8), (255, 0, 0)).convert("P"),
        "RGBA": Image.new("RGBA", (8, 8), (255, 0, 0, 128)),  # half of red on white
        "LA": Image.new("LA", (8, 8), (50, 128)),
    }[mode]
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    found, _ = fitted(buffer.getvalue(), 8)
    assert np.abs(found[:, 3, 3].astype(int) - expected).max() <= 1


def deep_png(colour, channels):
    """An 8 x 8 PNG of 16 bits a channel, zeros."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(8 * (1 + 16 * channels)))),
        (b"IEND", b""),
    ]
    parts = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
@pytest.mark.parametrize("read", [pixels_of, read_image, lambda data: fitted(data, 8)])
def test_sixteen_bits_a_channel_are_refused(read, colour, channels):
    with pytest.raises(BadImage, match="more than 8 bits a channel"):
        read(deep_png(colour, channels))


def test_text_in_a_png_is_unpacked_within_limits():
    png = encoded(smooth(8, 8))
    text = b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**27))
    chunk = struct.pack(">I", len(text[1])) + b"".join(text) + struct.pack(">I", zlib.crc32(b"".join(text)))
    with pytest.raises(BadImage, match="cannot be decoded"):
        read_image(png[:33] + chunk + png[33:])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_turned_photograph_is_turned_upright(kind):
    pixels = smooth(40, 80)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera stood on its side: to be turned clockwise by a quarter
    turned = encoded(pixels, kind, quality=95, exif=exif)
    found, geometry = fitted(turned, 40)
    upright, same = fitted(encoded(np.rot90(pixels, -1), kind, quality=95), 40)
    assert geometry == same == (80, 40, 20, 0)
    assert np.abs(found.astype(int) - upright).mean() < 1
    assert np.abs(pixels_of(turned)[1].transpose(1, 2, 0) - np.rot90(pixels, -1).astype(int)).mean() < 5


# ------------------------------------------------------------------------------------------------ the stream


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_images_and_captions_stay_together(tmp_path, suffix):
    urls = shards(tmp_path, {f"{k:09d}": sample(20 * k, f"number {k}", 16, suffix) for k in range(12)}, 3)
    (batch,) = take(CaptionedStream(urls=urls, resolution=8), 12)
    numbers = [int(caption.split()[1]) for caption in captions([batch])]
    assert sorted(numbers) == list(range(12))
    assert batch.images.dtype == torch.float32
    assert batch.images.shape == (12, 3, 8, 8)
    found = (batch.images + 1) * 127.5
    assert (found - 20 * torch.tensor(numbers)[:, None, None, None]).abs().max() <= (0.01 if suffix == "png" else 2)
    assert batch.condition.parts().keys() == {"caption"}


def test_captions_alone_come_in_the_same_order_without_their_images(tmp_path):
    urls = shards(tmp_path, {f"{k}": sample(k, f"number {k}") for k in range(20)}, 2)
    with_images = captions(take(CaptionedStream(urls=urls, resolution=8, shuffle_buffer=7), 5, 6))
    batches = take(CaptionStream(urls=urls, shuffle_buffer=7), 5, 6)
    assert captions(batches) == with_images
    assert {batch.images.shape for batch in batches} == {(5, 0)}
    (tmp_path / "only").mkdir()
    texts = {f"{k}": {"txt": f"number {k}".encode()} for k in range(20)}
    only = take(CaptionStream(urls=shards(tmp_path / "only", texts, 2), shuffle_buffer=7), 5, 6)
    assert captions(only) == with_images


def test_ranks_workers_and_filters_do_not_change_the_order(tmp_path):
    urls = shards(tmp_path, {f"{k}": sample(k, f"number {k}", pwatermark=k % 3 / 2) for k in range(30)}, 3)

    def stream(workers=0):
        return CaptionStream(urls=urls, maximum_watermark=0.6, shuffle_buffer=7, workers=workers)

    whole = captions(take(stream(), 4, 12))
    assert sorted(whole[:20]) == sorted(f"number {k}" for k in range(30) if k % 3 < 2)
    assert captions(take(stream(2), 4, 12)) == whole
    assert captions(take(stream(), 4, 3, start=28)) == whole[28:40]
    halves = [captions(take(stream(), 2, 12, rank=rank, ranks=2)) for rank in (0, 1)]
    assert [halves[r][2 * k + i] for k in range(12) for r in (0, 1) for i in (0, 1)] == whole


def test_empty_and_endless_captions(tmp_path):
    long = "ü" * 10_000
    urls = shards(tmp_path, {"0": sample(0, ""), "1": sample(1, long), "2": sample(2, " \n a\tb \n")})
    (batch,) = take(CaptionedStream(urls=urls, resolution=8), 3)
    assert sorted(captions([batch])) == sorted(["", "ü" * 512, "a\tb"])
    assert torch.equal(pack([long]), pack(["ü" * 512]))


def test_the_json_has_the_caption_where_there_is_no_text(tmp_path):
    members = [sample(k) for k in range(3)]
    for member, caption in zip(members, ["a cat", None, "half \ud83d"], strict=True):
        del member["txt"]
        member["json"] = json.dumps({"caption": caption}).encode()
    urls = shards(tmp_path, dict(zip("abc", members, strict=True)))
    assert sorted(captions(take(CaptionedStream(urls=urls, resolution=8), 3))) == ["", "a cat", "half ?"]


def test_sizes_are_what_sdxl_wants_to_know(tmp_path):
    wide, tall = encoded(smooth(100, 150)), encoded(smooth(150, 100))
    known = json.dumps({"original_height": 1200, "original_width": 800}).encode()
    urls = shards(tmp_path, {"0": {"png": wide, "txt": b"wide"}, "1": {"png": tall, "txt": b"tall", "json": known}})
    (batch,) = take(CaptionedStream(urls=urls, resolution=50, sizes=True), 2)
    rows = dict(zip(captions([batch]), batch.condition.sizes.tolist(), strict=True))
    assert not batch.condition.sizes.is_floating_point()
    assert rows == {"wide": [100, 150, 0, 12, 50, 50], "tall": [1200, 800, 12, 0, 50, 50]}


FIELDS = {
    "aesthetic": ("minimum_aesthetic", 5.5, [("AESTHETIC_SCORE", 5.5, True), ("aesthetic_score_laion_v2", 5.4, False)]),
    "watermark": ("maximum_watermark", 0.3, [("pwatermark", 0.3, True), ("watermark_score", 0.31, False)]),
    "nsfw": ("maximum_nsfw", "UNSURE", [("NSFW", "UNSURE", True), ("NSFW", "NSFW", False), ("nsfw", "UNLIKELY", True)]),
    "nsfw ": ("maximum_nsfw", 0.1, [("punsafe", 0.1, True), ("nsfw_score_opennsfw2", 0.11, False)]),
}


@pytest.mark.parametrize("reason", FIELDS)
def test_filters_by_fields(tmp_path, reason):
    argument, limit, cases = FIELDS[reason]
    samples = {f"{k}": sample(k, f"{k}", **{name: value}) for k, (name, value, _) in enumerate(cases)}
    samples["null"] = sample(0, "null", **{cases[0][0]: None})
    stream = CaptionedStream(urls=shards(tmp_path, samples), resolution=8, **{argument: limit})
    kept = {f"{k}" for k, (_, _, keeps) in enumerate(cases) if keeps}
    assert set(captions(take(stream, 1, 3))) == kept
    stream = CaptionStream(urls=stream.urls, shuffle_buffer=0, prefetch=1, **{argument: limit})
    take(stream, len(kept), 2)
    books = stream.accounting()
    assert (books["used"], books["damaged"]) == (2 * len(kept), 0)
    left_out = len(cases) - len(kept)
    assert left_out <= books[reason.strip()] <= 2 * left_out  # what follows the last one used has not been read
    assert 1 <= books[f"{reason.strip()} unknown"] <= 2


def test_accounts_of_two_epochs(tmp_path):
    samples = {
        f"{k:02d}": sample(
            k, "x" * k, original_height=k * 10, original_width=500, pwatermark=0.9 if k % 10 == 3 else 0.0
        )
        for k in range(40)
    }
    stream = CaptionStream(
        urls=shards(tmp_path, samples, 2),
        caption_length=(2, 30),
        minimum_side=100,
        maximum_watermark=0.5,
        shuffle_buffer=0,
        prefetch=1,
    )
    assert "captions, filtered" in stream.describe()
    found = captions(take(stream, 19, 2))  # 10 to 30, without 13 and 23
    assert sorted(map(len, found)) == sorted([k for k in range(10, 31) if k not in (13, 23)] * 2)
    books = stream.accounting()
    assert books["used"] == 38
    first_epoch = {"caption length": 2 + 9, "side": 8, "watermark": 2}
    for reason, count in first_epoch.items():
        assert count <= books[reason] <= 2 * count  # what follows the last sample used may not have been read


def test_filters_that_leave_nothing_are_named(tmp_path):
    stream = CaptionStream(urls=shards(tmp_path, {"0": sample(0, "a")}), caption_length=(5, 9))
    for start in (0, 3):
        with pytest.raises(ValueError, match=r"filters of CaptionStream leave no sample of .*set-"):
            take(stream, 1, start=start)


@pytest.mark.parametrize("said", [0, 3, 4, 9])
def test_img2datasets_statistics_are_not_believed(tmp_path, said):
    urls = shards(tmp_path, {f"{k}": sample(k, f"{k}") for k in range(8)}, 2)
    (tmp_path / "set" / INDEX).unlink()
    whole = captions(take(CaptionStream(urls=urls, shuffle_buffer=3), 4, 6))
    for path in (tmp_path / "set").glob("*.tar"):
        path.with_name(f"{path.stem}_stats.json").write_text(json.dumps({"count": 9, "successes": said}))
        assert count_samples(path) == 4
    assert captions(take(CaptionStream(urls=urls, shuffle_buffer=3), 4, 2, start=16)) == whole[16:]


def test_byte_order_marks_are_no_part_of_captions(tmp_path):
    png, mark = sample(0)["png"], "\ufeff"
    members = {
        "a": {"png": png, "txt": f"{mark}one\u2028two\r\n".encode()},
        "b": {"png": png, "json": f'{mark}{{"caption": "{mark}three"}}'.encode()},
    }
    found = captions(take(CaptionedStream(urls=shards(tmp_path, members), resolution=8, shuffle_buffer=0), 2))
    assert sorted(found) == ["one\u2028two", "three"]


# ------------------------------------------------------------------------------------------------ damage

PNG = sample(0)["png"]
BAD = {
    "no caption": ({"png": PNG}, {}, r"has no caption \('bad\.txt', or 'caption' in its \.json\)"),
    "caption of another kind": ({"png": PNG, "json": b'{"caption": [1]}'}, {}, "has no caption"),
    "caption that is no text": ({"png": PNG, "txt": b"\xff\xfe"}, {}, "caption is no UTF-8 text"),
    "json cut short": ({"png": PNG, "json": b'{"caption": "a'}, {}, r"its \.json is no JSON"),
    "json too deep": ({"png": PNG, "json": b"[" * 100_000}, {}, r"its \.json is no JSON"),
    "json without names": ({"png": PNG, "json": b"[1, 2]"}, {}, r"its \.json is no object"),
    "no image": ({"txt": b"a"}, {}, r"has no image: its files end in \['txt'\]"),
    "image cut short": ({"png": PNG[:-30], "txt": b"a"}, {}, "cannot be decoded"),
    "no such field": (
        {"png": PNG, "txt": b"a"},
        {"minimum_aesthetic": 5.0},
        r"no field 'aesthetic' or .*CaptionedStream\.minimum_aesthetic needs: leave this filter out",
    ),
    "field of another kind": (
        {"png": PNG, "txt": b"a", "json": b'{"punsafe": "high"}'},
        {"maximum_nsfw": 0.5},
        r"has 'high' as its nsfw, which CaptionedStream\.maximum_nsfw cannot judge",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sample_is_named_or_skipped(tmp_path, case):
    members, filters, message = BAD[case]
    good = {f"{k}": sample(k, "good", aesthetic=9, punsafe=0) for k in range(9)}
    urls = shards(tmp_path, {**good, "bad": members})
    with pytest.raises(ValueError, match=rf"ample 'bad' of shard {tmp_path}.*{message}"):
        take(CaptionedStream(urls=urls, resolution=8, **filters), 10)
    stream = CaptionedStream(urls=urls, resolution=8, max_damaged=0.2, **filters)
    assert captions(take(stream, 10)) == ["good"] * 10
    assert stream.skipped == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 0}, "resolution is 0"),
        ({"maximum_nsfw": "MAYBE"}, "maximum_nsfw is 'MAYBE'.*UNLIKELY"),
        ({"caption_length": (9, 3)}, r"caption_length is \(9, 3\)"),
        ({"caption_length": (9,)}, r"caption_length is \(9,\)"),
        ({"max_damaged": -0.1}, r"max_damaged is -0\.1"),
    ],
)
def test_arguments_outside_their_domain(arguments, message):
    with pytest.raises(ValueError, match=rf"CaptionedStream\.{message}"):
        CaptionedStream(urls="a.tar", **arguments)


def test_construction_touches_nothing():
    stream = CaptionedStream(urls="a.tar", sizes=True, caption_length=(1, 9))
    assert stream.describe() == "a.tar: 512x512, RGB, captions, sizes, filtered"
    assert CaptionStream(urls="a.tar").describe() == "a.tar: captions"
