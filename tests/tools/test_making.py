"""Making shards: pixels against a plain resampler, bytes against every way of being interrupted, errors."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from preparation.cifar import CIFAR10
from preparation.cropping import Preparation, centre_crop, plain, upright
from preparation.parallel_map import in_order
from preparation.shard_maker import Watch, make_shards
from preparation.sources import COCO, EDMZip, Folder, ImageNet
from ratiograph.data.shards import read_shard, verify_shard
from ratiograph.data.stream import ShardStream

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_shards.py"


def image_file(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def photo(width: int, height: int) -> np.ndarray:
    """Smooth waves with noise, uint8 [height, width, 3]."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9 + k) + np.cos(y / (7 + k)) for k in range(3)], -1)
    return np.clip(128 + 50 * waves + noise(height, width, 3) / 8, 0, 255).astype(np.uint8)


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def numbered_folder(folder: Path, count: int, size: int = 4) -> Path:
    """Images in classes 0 to 4, of which number k is k everywhere (its class is k % 5)."""
    files = {f"{k % 5}/{k:04d}.png": image_file(np.full((size, size, 3), k % 256, np.uint8)) for k in range(count)}
    return write_folder(folder, files)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def samples(folder: Path):
    return [sample for path in sorted(folder.glob("*.tar")) for sample in read_shard(path)]


# --- one image ------------------------------------------------------------------------------------------------


def box(x):
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def cubic(x):
    """Keys' kernel with a = -1/2."""
    x = np.abs(x)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


def resampled_rows(pixels: np.ndarray, length: int, kernel, support: float) -> np.ndarray:
    """uint8 [N, ...] => uint8 [length, ...] along the first axis, antialiased, in fixed point of 22 bits."""
    scale = len(pixels) / length
    weights = np.zeros((length, len(pixels)))
    for k in range(length):
        centre = (k + 0.5) * scale
        first, last = max(int(centre - support * scale + 0.5), 0), min(int(centre + support * scale + 0.5), len(pixels))
        weights[k, first:last] = kernel((np.arange(first, last) + 0.5 - centre) / scale)
    weights /= weights.sum(1, keepdims=True)
    fixed = np.trunc(weights * 2**22 + np.copysign(0.5, weights)).astype(np.int64)
    return np.clip((np.tensordot(fixed, pixels.astype(np.int64), 1) + 2**21) >> 22, 0, 255).astype(np.uint8)


def resampled(pixels: np.ndarray, width: int, height: int, kernel, support: float) -> np.ndarray:
    """Columns first, then rows, each only where its number changes."""
    if pixels.shape[1] != width:
        pixels = resampled_rows(pixels.swapaxes(0, 1), width, kernel, support).swapaxes(0, 1)
    return pixels if pixels.shape[0] == height else resampled_rows(pixels, height, kernel, support)


def cropped(pixels: np.ndarray, resolution: int) -> np.ndarray:
    """Dhariwal & Nichol's centre crop, from its description."""
    while min(pixels.shape[:2]) // resolution >= 2:
        pixels = resampled(pixels, pixels.shape[1] // 2, pixels.shape[0] // 2, box, 0.5)
    height, width = (round(n * resolution / min(pixels.shape[:2])) for n in pixels.shape[:2])
    pixels = resampled(pixels, width, height, cubic, 2.0)
    top, left = (height - resolution) // 2, (width - resolution) // 2
    return pixels[top : top + resolution, left : left + resolution]


@pytest.mark.parametrize("size", [(500, 375), (333, 501), (128, 128), (130, 127), (64, 200), (97, 64), (1000, 70)])
def test_centre_crop_is_pixel_equal_to_a_plain_resampler(size):
    pixels = photo(*size)
    assert np.array_equal(np.asarray(centre_crop(Image.fromarray(pixels), 64)), cropped(pixels, 64))


def test_centre_crop_leaves_an_image_of_the_resolution_alone():
    pixels = noise(64, 64, 3)
    assert np.array_equal(np.asarray(centre_crop(Image.fromarray(pixels), 64)), pixels)


def preparation(**options) -> Preparation:
    defaults = {"resolution": None, "channels": 3, "format": None, "new_format": "png", "normalize": plain}
    return Preparation(**(defaults | options))


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_files_are_kept_byte_for_byte_where_nothing_changes():
    pixels = noise(16, 16, 3)
    png, jpg, grey = image_file(pixels), image_file(pixels, "JPEG"), image_file(pixels[..., 0])
    assert preparation()(png) == ("png", png, (16, 16))
    assert preparation(resolution=16)(jpg) == ("jpg", jpg, (16, 16))
    assert preparation(channels=1)(grey) == ("png", grey, (16, 16))
    suffix, data, _ = preparation(format="png")(jpg)
    assert suffix == "png"
    assert np.array_equal(decoded(data), decoded(jpg))
    suffix, data, size = preparation(resolution=8, new_format="jpg")(png)
    assert (suffix, size, decoded(data).shape) == ("jpg", (8, 8), (8, 8, 3))
    assert np.abs(decoded(data).astype(int) - cropped(pixels, 8)).mean() < 6
    assert np.array_equal(decoded(preparation()(image_file(pixels, "BMP"))[1]), pixels)
    assert np.array_equal(decoded(preparation()(pixels)[1]), pixels)
    assert np.array_equal(decoded(preparation()(grey)[1]), np.stack([pixels[..., 0]] * 3, -1))


def test_encoded_files_hold_pixels_and_no_metadata():
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "private")
    data = image_file(noise(16, 16, 3), pnginfo=text, icc_profile=b"profile" * 9, dpi=(300, 300))
    for format in ("png", "jpg"):
        made = preparation(resolution=8, format=format)(data)[1]
        assert made == image_file(
            cropped(noise(16, 16, 3), 8), **({"quality": 95, "subsampling": 0} if format == "jpg" else {}),
            kind={"png": "PNG", "jpg": "JPEG"}[format],
        )  # fmt: skip


def test_upright_turns_photographs_and_lays_transparency_on_white():
    pixels = photo(8, 16)
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned: the first row is the right side
    turned = image_file(pixels, "JPEG", exif=exif, quality=100, subsampling=0)
    data = preparation(normalize=upright, format="png")(turned)[1]
    assert np.array_equal(decoded(data), np.rot90(decoded(turned), -1))
    assert np.array_equal(decoded(data), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(turned)))))
    assert preparation(normalize=plain, format="png")(turned)[1] == data
    glass = np.concatenate([noise(4, 4, 3), np.full((4, 4, 1), 0, np.uint8)], -1)
    glass[:2, :, 3] = 255
    expected = glass[..., :3].copy()
    expected[2:] = 255
    assert np.array_equal(decoded(preparation(normalize=upright)(image_file(glass))[1]), expected)
    assert np.array_equal(decoded(preparation(normalize=plain)(image_file(glass))[1]), glass[..., :3])


# --- shards ---------------------------------------------------------------------------------------------------


def test_stream_gives_every_image_with_its_class(tmp_path):
    source = Folder(path=numbered_folder(tmp_path / "images", 60), labels="folders")
    index = make_shards(source, tmp_path / "out", shards=4)
    assert {k: v for k, v in index.items() if k not in ("shards", "settings")} == {
        "source": "folder",
        "samples": 60,
        "size": [4, 4],
        "members": ["cls"],
        "classes": 5,
        "class_names": None,
        "skipped": [],
    }
    assert index == json.loads((tmp_path / "out" / "index.json").read_text())
    assert sorted(contents(tmp_path / "out")) == [*(f"folder-{k:06d}.tar" for k in range(4)), "index.json"]
    assert all(verify_shard(path, contents=True) for path in (tmp_path / "out").glob("*.tar"))
    urls = str(tmp_path / "out" / "folder-{000000..000003}.tar")
    batch = next(ShardStream(urls=urls, resolution=4, channels=3).batches(60, seed=0))
    values = ((batch.images + 1) * 127.5).round().long()
    assert sorted(values[:, 0, 0, 0].tolist()) == list(range(60))
    assert (values == values[:, :1, :1, :1]).all()
    assert (values[:, 0, 0, 0] % 5).equal(batch.condition.labels)


def test_order_is_a_fixed_permutation_and_keys_count_in_the_sources_order(tmp_path):
    source = Folder(path=numbered_folder(tmp_path / "images", 60))
    orders = {}
    for seed in (0, 1, None):
        make_shards(source, tmp_path / f"{seed}", shards=3, shuffle_seed=seed)
        orders[seed] = [(int(s.key), decoded(s.image)[0, 0, 0]) for s in samples(tmp_path / f"{seed}")]
    names = [entry.name for entry in source.listing().entries]
    assert orders[None] == [(k, int(names[k][2:6])) for k in range(60)]
    assert sorted(orders[0]) == sorted(orders[1]) == orders[None]
    assert orders[0] != orders[1]
    firsts = [number for number, _ in orders[0][:20]]
    assert min(firsts) < 10  # the first of three shards has samples from everywhere
    assert max(firsts) >= 50


class Stop(Watch):
    """Interrupts when an image of a given number has been made."""

    def __init__(self, after: int):
        self.left = after

    def advance(self) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


class Count(Watch):
    def __init__(self):
        self.made, self.skipped = 0, []

    def begin(self, total: int, done: int) -> None:
        self.total, self.done = total, done

    def advance(self) -> None:
        self.made += 1

    def skip(self, skipped) -> None:
        self.skipped.append(skipped.name)


def test_workers_and_interruptions_leave_the_same_bytes(tmp_path):
    source = Folder(path=numbered_folder(tmp_path / "images", 120, size=12), labels="folders")
    (tmp_path / "images" / "0" / "0050.png").write_bytes(b"no image")
    options = {"shards": 6, "resolution": 8, "max_corrupt": 0.01}
    make_shards(source, tmp_path / "whole", **options)
    expected = contents(tmp_path / "whole")
    assert len(expected) == 7
    for workers in (2, 3):
        make_shards(source, tmp_path / f"{workers}", workers=workers, **options)
        assert contents(tmp_path / f"{workers}") == expected
    for after in (1, 20, 45, 61):  # 0, 0, 2 and 3 shards are finished before it
        with pytest.raises(KeyboardInterrupt):
            make_shards(source, tmp_path / "stopped", watch=Stop(after), **options)
    watch = Count()
    make_shards(source, tmp_path / "stopped", watch=watch, **options)
    assert contents(tmp_path / "stopped") == expected
    assert (watch.total, watch.done, watch.made) == (120, 100, 20)  # all but the last shard were finished


def test_lost_and_altered_shards_are_made_anew_and_others_left_alone(tmp_path):
    source = Folder(path=numbered_folder(tmp_path / "images", 40))
    (tmp_path / "images" / "0" / "0005.png").write_bytes(b"no image")
    options = {"shards": 4, "max_corrupt": 0.1}
    make_shards(source, tmp_path / "out", **options)
    expected = contents(tmp_path / "out")
    altered = bytearray(expected["folder-000001.tar"])
    altered[700] ^= 1
    (tmp_path / "out" / "folder-000001.tar").write_bytes(altered)
    (tmp_path / "out" / "folder-000002.tar").unlink()
    watch = Count()
    make_shards(source, tmp_path / "out", watch=watch, **options)
    assert (watch.done, watch.made) == (20, 20)
    assert contents(tmp_path / "out") == expected


def test_damaged_images_are_skipped_counted_and_named(tmp_path):
    folder = numbered_folder(tmp_path / "images", 50)
    cut = image_file(noise(32, 32, 3), "JPEG")[:-200]
    damage = {
        "0/0000.png": b"",
        "0/0005.png": b"text",
        "1/0001.png": cut,
        "2/0002.png": image_file(np.full((4, 4), 999, np.uint16)),
    }
    write_folder(folder, damage)
    watch = Count()
    index = make_shards(Folder(path=folder), tmp_path / "out", shards=2, max_corrupt=0.08, watch=watch)
    assert index["samples"] == 46 == len(samples(tmp_path / "out"))
    reasons = {one["name"]: one["reason"] for one in index["skipped"]}
    assert reasons.keys() == damage.keys() == set(watch.skipped)
    assert reasons["0/0005.png"] == "cannot be decoded (not an image file)"
    assert "truncated" in reasons["1/0001.png"]
    assert reasons["2/0002.png"] == "has more than 8 bits a channel (colour mode I;16): save it with 8"
    missing = {
        f"{number:08d}" for number, entry in enumerate(Folder(path=folder).listing().entries) if entry.name in damage
    }
    assert {f"{k:08d}" for k in range(50)} - {sample.key for sample in samples(tmp_path / "out")} == missing


def test_too_many_damaged_images_are_an_error_that_names_the_first(tmp_path):
    folder = numbered_folder(tmp_path / "images", 50)
    for k in range(0, 20, 5):
        (folder / "0" / f"{k:04d}.png").write_bytes(b"text")
    message = (
        r"3 of 50 images cannot be used, more than --max_corrupt=0.04 allows: "
        r"0/00\d\d.png: cannot be decoded \(not an image file\); 0/00"
    )
    with pytest.raises(ValueError, match=message):
        make_shards(Folder(path=folder), tmp_path / "out", shards=5, max_corrupt=0.04)
    index = make_shards(Folder(path=folder), tmp_path / "out", shards=5, max_corrupt=0.08)  # more are allowed: goes on
    assert len(index["skipped"]) == 4


def damaged_zip(path: Path) -> Path:
    """A zip of ten images of which number 4 has altered bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for k in range(10):
            archive.writestr(f"{k}.png", image_file(noise(8, 8, 3, seed=k)))
        offset = archive.getinfo("4.png").header_offset
    data = bytearray(path.read_bytes())
    data[offset + 100] ^= 1
    path.write_bytes(data)
    return path


def test_corrupt_zip_member_is_one_skipped_image(tmp_path):
    index = make_shards(EDMZip(path=damaged_zip(tmp_path / "a.zip")), tmp_path / "out", max_corrupt=0.1, workers=2)
    assert [(one["name"], one["shard"]) for one in index["skipped"]] == [("4.png", "edm_zip-000000.tar")]
    for sample in samples(tmp_path / "out"):
        assert np.array_equal(decoded(sample.image), noise(8, 8, 3, seed=int(sample.key)))


def test_coco_shards_hold_caption_and_facts(tmp_path):
    import webdataset as wds

    images = {f"val2017/{k}.jpg": image_file(photo(40 + k, 30), "JPEG") for k in range(6)}
    document = {
        "images": [{"id": k, "file_name": f"{k}.jpg"} for k in range(6)],
        "annotations": [
            {"image_id": k, "id": 10 * k + n, "caption": f"Nr. {k}.{n} ü"} for k in range(6) for n in (1, 0)
        ],
    }
    files = {**images, "annotations/captions_val2017.json": json.dumps(document).encode()}
    source = COCO(path=write_folder(tmp_path / "coco", files) / "val2017")
    for resolution, expected in ((None, None), (16, 16)):
        make_shards(source, tmp_path / f"{resolution}", resolution=resolution, name="coco", shards=1)
        shard = str(tmp_path / f"{resolution}" / "coco-000000.tar")
        for sample in wds.WebDataset(shard, shardshuffle=False):
            facts = json.loads(sample["json"])
            original = images[f"val2017/{facts['image_id']}.jpg"]
            assert sample["txt"].decode() == facts["caption"] == f"Nr. {facts['image_id']}.0 ü"
            assert int(sample["__key__"]) == facts["image_id"]
            if expected is None:
                assert sample["jpg"] == original
            else:
                difference = decoded(sample["jpg"]).astype(int) - cropped(decoded(original), 16)
                assert np.abs(difference).max() <= 12  # JPEG of quality 95 of the same pixels
    every = COCO(path=source.path, captions="all")
    assert make_shards(every, tmp_path / "all")["samples"] == 12


def test_imagenet_shards_are_the_centre_crop_without_loss(tmp_path):
    photos = {f"n0000000{k % 2}/{k}.JPEG": image_file(photo(90 + 7 * k, 70 + 11 * k), "JPEG") for k in range(6)}
    folder = write_folder(tmp_path / "train", photos)
    index = make_shards(ImageNet(path=folder), tmp_path / "out", resolution=32)
    assert list(index["shards"]) == ["imagenet32-000000.tar"]
    assert index["class_names"] == ["n00000000", "n00000001"]
    names = [entry.name for entry in ImageNet(path=folder).listing().entries]
    for sample in samples(tmp_path / "out"):
        name = names[int(sample.key)]
        assert np.array_equal(decoded(sample.image), cropped(decoded(photos[name]), 32))
        assert sample.label == name[8:9].encode()


# --- mistakes -------------------------------------------------------------------------------------------------


def test_other_settings_other_sources_and_other_files_are_refused(tmp_path):
    source = Folder(path=numbered_folder(tmp_path / "images", 20))
    make_shards(source, tmp_path / "done", shards=2)
    with pytest.raises(KeyboardInterrupt):
        make_shards(source, tmp_path / "begun", shards=2, watch=Stop(12))
    before = contents(tmp_path / "done"), contents(tmp_path / "begun")
    labelled = Folder(path=source.path, labels="folders")
    for folder in ("done", "begun"):
        for other, options, words in (
            (source, {"shards": 2, "resolution": 2}, r"name=folder .now folder2., resolution=None .now 2."),
            (source, {"shards": 3}, r"shards=2 .now 3."),
            (source, {"shards": 2, "shuffle_seed": 1}, r"shuffle_seed=0 .now 1."),
            (labelled, {"shards": 2}, r"labels=None .now folders., contents="),
        ):
            with pytest.raises(ValueError, match=f"{folder} holds shards made with other settings: {words}"):
                make_shards(other, tmp_path / folder, **options)
    (tmp_path / "images" / "0" / "9999.png").write_bytes(image_file(noise(4, 4, 3)))
    with pytest.raises(ValueError, match=r"images=20 .now 21., contents="):
        make_shards(source, tmp_path / "done", shards=2)
    assert (contents(tmp_path / "done"), contents(tmp_path / "begun")) == before
    write_folder(tmp_path / "thesis", {"chapter1.tex": b"", "chapter2.tex": b""})
    with pytest.raises(ValueError, match=r"thesis holds other files already \(chapter1.tex, chapter2.tex\)"):
        make_shards(source, tmp_path / "thesis")
    write_folder(tmp_path / "foreign", {"index.json": b'{"shards": {}}'})
    with pytest.raises(ValueError, match="other settings: they are of another data set"):
        make_shards(source, tmp_path / "foreign")
    with pytest.raises(ValueError, match="is a file: give a folder"):
        make_shards(source, tmp_path / "thesis" / "chapter1.tex")
    with pytest.raises(ValueError, match="--shards=50: the source has only 21 images"):
        make_shards(source, tmp_path / "new", shards=50)
    with pytest.raises(ValueError, match="--name=a/b"):
        make_shards(source, tmp_path / "new", name="a/b")


def kill(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_killed_worker_is_one_clear_error():
    with pytest.raises(ValueError, match="a worker process was killed"):
        list(in_order(kill, range(9), workers=2))


# --- the tool -------------------------------------------------------------------------------------------------


def tool(*arguments, **options) -> subprocess.Popen:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def cifar_folder(folder: Path, count: int) -> Path:
    """The python version of CIFAR-10 with ``count`` images a batch."""
    batches = {f"data_batch_{k}": {"data": noise(count, 3072, seed=k), "labels": [k % 10] * count} for k in range(1, 6)}
    names = {"batches.meta": {"label_names": [f"name{k}" for k in range(10)]}}
    return write_folder(folder, {name: pickle.dumps(data, 2) for name, data in (batches | names).items()})


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_killed_tool_leaves_no_process_and_rerun_gives_the_same_bytes(tmp_path):
    folder = cifar_folder(tmp_path / "cifar", 600)
    make_shards(CIFAR10(path=folder), tmp_path / "whole", shards=60)
    command = ("cifar10", folder, tmp_path / "out", "--shards=60", "--workers=2")
    killed = tool(*command)
    while len(list((tmp_path / "out").glob("*.tar"))) < 3:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.001)
    workers = children(killed.pid)
    killed.kill()
    killed.communicate()
    assert len(workers) == 2
    assert not (tmp_path / "out" / "index.json").exists()  # killed in the midst of it
    deadline = time.monotonic() + 20
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    again = tool(*command)
    output, errors = again.communicate()
    assert again.returncode == 0, errors
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    done = re.search(r"([\d,]+) of 3,000 images lie in finished shards already", errors)
    assert int(done[1].replace(",", "")) >= 100
    assert output.splitlines() == [
        f"3,000 images 32x32, 10 classes, 0 skipped, 60 shards in {tmp_path}/out",
        f"train with --data='{tmp_path}/out/cifar10-{{000000..000059}}.tar' --gin_param=ShardStream.channels=3 "
        "--gin_param=ShardStream.resolution=32",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar10"], "give SOURCE INPUT OUT_DIR, e.g. cifar10 cifar-10-python.tar.gz data/cifar10"),
        (["imagenet", "a", "b", "--split=test"], "--split is no flag of the source imagenet"),
    ],
)
def test_tool_says_what_is_wrong_in_one_line(arguments, message, tmp_path):
    process = tool(*arguments, cwd=tmp_path)
    output, errors = process.communicate()
    assert process.returncode == 1
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1
    assert not output
    assert not list(tmp_path.iterdir())


# --- speed ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ten_thousand_small_images_stream_at_3000_a_second_on_one_core(tmp_path):
    pixels = np.stack([photo(32, 32) ^ (noise(32, 32, 3, seed=k) >> 4) for k in range(100)])
    files = {f"{k % 10}/{k:05d}.png": image_file(np.roll(pixels[k % 100], k // 100, 1)) for k in range(10_000)}
    source = Folder(path=write_folder(tmp_path / "images", files), labels="folders")
    start = time.perf_counter()
    index = make_shards(source, tmp_path / "out", resolution=32, shards=10)
    print(f"made {10_000 / (time.perf_counter() - start):,.0f} images/s by one process")
    assert index["samples"] == 10_000
    stream = ShardStream(urls=str(tmp_path / "out" / "folder32-{000000..000009}.tar"), resolution=32, channels=3)
    speeds = []
    for _ in range(5):
        batches = stream.batches(250, seed=0)
        start = time.process_time()  # reading and decoding, whatever else the machine does meanwhile
        count = sum(len(batch.images) for batch in itertools.islice(batches, 40))
        speeds.append(count / (time.process_time() - start))
        batches.close()
    print(f"stream: {max(speeds):,.0f} images/s a core")
    assert max(speeds) >= 3000
    shutil.rmtree(tmp_path / "images")
