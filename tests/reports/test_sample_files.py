"""The files of generated samples, filled by one rank or by several."""

from __future__ import annotations

import os
import traceback

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from ratiograph.core.draws import SampleDraws
from ratiograph.data.stream import ShardStream
from ratiograph.reports.sample_files import ArrayFile, GridFile, ImageFolder, ShardFolder, batches, fill, pixels

SHAPE = (3, 4, 6)
SETTINGS = {"seed": 0}


def make(indices):
    return SampleDraws(0, indices).normal(SHAPE)


def labels_of(indices):
    return SampleDraws(0, indices).integers(10)


def destinations(folder):
    return {
        "a.npz": ArrayFile(folder / "a.npz"),
        "u.npz": ArrayFile(folder / "u.npz", uint8=True),
        "g.png": GridFile(folder / "g.png"),
        "images": ImageFolder(folder / "images", SETTINGS),
        "set": ShardFolder(folder / "set", 2),
    }


def fill_all(folder, samples=11, size=3):
    advanced = []
    for files in destinations(folder).values():
        told = []
        fill(files, batches(2, samples, size), make, labels_of, told.append)
        advanced.append(sum(told))
    return advanced


def in_processes(ranks, job):
    """Runs ``job(rank)`` in forked processes that know each other."""
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            try:
                job(rank)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * ranks


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_batches():
    assert batches(3, 7, 3) == [range(3, 6), range(6, 9), range(9, 10)]
    assert batches(0, 2, 5) == [range(2)]


def test_pixels_are_rounded_and_clipped():
    x0 = torch.tensor([-3.0, -1.0, 0.0, 1 / 255, 1.0, 9.0]).view(1, 1, 1, 6)
    assert pixels(x0)[0, 0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]
    with pytest.raises(ValueError, match=r"shape \[4, 2, 2\] are no images"):
        pixels(torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_number_of_ranks_does_not_matter(tmp_path, ranks):
    """Four batches: the last round is full for two ranks, and has one batch for three."""
    one, many = tmp_path / "one", tmp_path / "many"
    for folder in (one, many):
        folder.mkdir()
    assert fill_all(one) == [11] * 5

    def job(rank):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=ranks)
        assert fill_all(many) == [11] * 5
        dist.destroy_process_group()

    in_processes(ranks, job)
    assert content(one) == content(many)
    assert len(content(one)) == 3 + (11 + 1) + 3


def test_shards_are_read_back(tmp_path):
    fill_all(tmp_path)
    stream = ShardStream(urls=f"{tmp_path}/set/set-{{000000..000001}}.tar", channels=3, labels=True)
    batch = next(stream.batches(11, 0))
    expected = pixels(make(range(2, 13)))
    found = {
        pixels(image[None]).tobytes(): int(label)
        for image, label in zip(batch.images, batch.condition.labels, strict=True)
    }
    assert found == {
        image.tobytes(): int(label) for image, label in zip(expected, labels_of(range(2, 13)), strict=True)
    }


def test_only_missing_images_are_made(tmp_path):
    asked = []

    def noted(indices):
        asked.append(indices)
        return make(indices)

    parts = batches(0, 9, 3)
    fill(ImageFolder(tmp_path / "x", SETTINGS), parts, noted, labels_of)
    before = content(tmp_path / "x")
    (tmp_path / "x" / "000004.png").unlink()
    fill(ImageFolder(tmp_path / "x", SETTINGS), parts, noted, labels_of)
    assert asked == [*parts, parts[1]]
    assert content(tmp_path / "x") == before
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x" / "000004.png")), pixels(make([4]))[0])


def test_folders_of_something_else_are_left_alone(tmp_path):
    fill(ImageFolder(tmp_path / "x", SETTINGS), batches(0, 2, 2), make, labels_of)
    with pytest.raises(ValueError, match=r"other settings: seed=0 \(now 1\), sampler=None \(now heun\)"):
        ImageFolder(tmp_path / "x", {"seed": 1, "sampler": "heun"}).begin()
    (tmp_path / "x" / "samples.json").unlink()
    with pytest.raises(ValueError, match=r"no samples\.json"):
        ImageFolder(tmp_path / "x", SETTINGS).begin()
    with pytest.raises(ValueError, match="exists already"):
        ShardFolder(tmp_path / "x", 1).begin()
    assert len(content(tmp_path / "x")) == 2


def test_latents_are_shown_as_channels(tmp_path):
    fill(GridFile(tmp_path / "g.png"), [range(2)], lambda indices: torch.zeros(2, 4, 8, 8), lambda indices: None)
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    assert grid.shape == (2 + 16 + 2, 2 + 2 * (2 * 32 + 2), 3)  # 8 by 32 pixels, doubled to reach 56
    with pytest.raises(ValueError, match="are no images"):
        fill(ImageFolder(tmp_path / "x", {}), [range(2)], lambda i: torch.zeros(2, 4, 8, 8), lambda i: None)


def test_arrays_have_labels_only_where_there_are_any(tmp_path):
    fill(ArrayFile(tmp_path / "a.npz"), [range(2)], make, lambda indices: None)
    with np.load(tmp_path / "a.npz") as file:
        assert file.files == ["x0", "indices"]
        assert np.array_equal(file["x0"], make(range(2)).numpy())
