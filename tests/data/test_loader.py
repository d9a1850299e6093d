"""What lies pinned for a GPU, and that nothing does without one."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch
from torch import Tensor

from ratiograph.data.captions import pack
from ratiograph.data.latents import LatentStream, write_latents
from ratiograph.data.raw_samples import DamagedSample

CAPTIONS = [f"caption {number}" for number in range(12)]


@pytest.fixture
def urls(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"latent": (12, 4, 2, 2), "text": (12, 3, 5), "pooled": (12, 7), "sizes": (12, 6)}
    parts = {name: torch.randn(shape, generator=generator).mul(9).round() for name, shape in shapes.items()}
    return str(write_latents(tmp_path, "latents", parts, captions=CAPTIONS)[0])


@pytest.fixture
def pinned(monkeypatch):
    """Tensors that were pinned, and in which thread, where a GPU seems to be in use."""
    made: dict[int, tuple[Tensor, threading.Thread]] = {}

    def pin(tensor: Tensor) -> Tensor:
        copied = tensor.clone()
        made[copied.data_ptr()] = copied, threading.current_thread()
        return copied

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    return made


def taken(urls, workers, count=4):
    stream = LatentStream(urls=urls, pooled=True, workers=workers, prefetch=1)
    batches = stream.batches(5, seed=3)
    found = [next(batches) for _ in range(count)]
    batches.close()
    return found


def parts(batch):
    return {"latent": batch.images, **batch.condition.parts()}


@pytest.mark.parametrize("workers", [0, 2])
def test_all_but_the_caption_is_pinned_ahead_of_training(urls, workers, pinned):
    batches = taken(urls, workers)
    for batch in batches:
        assert parts(batch).keys() == {"latent", "text", "pooled", "sizes", "caption"}
        for name, tensor in parts(batch).items():
            assert (tensor.data_ptr() in pinned) == (name != "caption"), name
    assert all(thread is not threading.main_thread() for _, thread in pinned.values())
    texts = {bytes(row) for batch in batches for row in batch.condition.caption.numpy()}
    assert texts == {bytes(row) for row in pack(CAPTIONS).numpy()}


@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_batches_are_the_same(urls, workers, monkeypatch, request):
    plain = taken(urls, workers)
    request.getfixturevalue("pinned")
    for one, other in zip(taken(urls, workers), plain, strict=True):
        assert parts(one).keys() == parts(other).keys()
        assert all(torch.equal(tensor, parts(other)[name]) for name, tensor in parts(one).items())


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_pinned_without_a_gpu(urls, workers, monkeypatch):
    def refuse(tensor: Tensor) -> Tensor:
        raise AssertionError("pinned")

    monkeypatch.setattr(Tensor, "pin_memory", refuse)
    assert len(taken(urls, workers)) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_arrive_all_the_same(urls, workers, pinned):
    stream = LatentStream(urls=urls, pooled=True, workers=workers, prefetch=1)
    stream.prepared = lambda raw: (_ for _ in ()).throw(ValueError("no such sample"))
    with pytest.raises(ValueError, match="no such sample"):
        next(stream.batches(5, seed=3))


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [KeyError("a\nb"), RecursionError("deep"), DamagedSample("no such shard")])
def test_any_error_is_one_line(urls, workers, start, error):
    stream = LatentStream(urls=urls, pooled=True, workers=workers, prefetch=1)

    def fail(*_):
        raise error

    stream.read = stream.count = fail
    with pytest.raises(ValueError, match=str(error.args[0]).split("\n")[0]) as caught:
        next(stream.batches(5, seed=3, start=start))
    assert str(caught.value).isprintable()
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_threads_and_processes_end_with_the_iterator(urls, workers, pinned):
    before = len(multiprocessing.active_children())
    taken(urls, workers)
    assert all(thread.name != "ShardStream" for thread in threading.enumerate())
    assert len(multiprocessing.active_children()) == before
