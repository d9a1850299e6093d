"""Sharded networks that no process ever has all whole: the same shards as from whole ones, to the bit."""

from __future__ import annotations

import ctypes
import gc
import json
import os
from pathlib import Path

import pytest
import torch

from ranks import together
from ratiograph.algebra.noising import VarianceExploding
from ratiograph.algebra.objective import Objective
from ratiograph.algebra.times import KarrasIndex
from ratiograph.networks.architectures.unet import UNet
from ratiograph.networks.denoisers import EDM
from ratiograph.networks.ratios import EncoderRatio
from ratiograph.networks.samplers import HeunSampler
from ratiograph.networks.students import OneStep
from ratiograph.networks.weights.weight_files import save_weights
from ratiograph.tasks.denoiser_training import DenoiserTraining
from ratiograph.tasks.distillation import Distillation
from ratiograph.training import checkpoints, parallel
from ratiograph.training.optim import EMA, Adam
from ratiograph.training.warm_start import WarmStart
from test_distillation import adversarial, edm, matching
from test_fsdp import CPU, advance, flat

pytestmark = pytest.mark.slow
STEPS = 3  # what begins at zero hides what lies behind it from the first ones
SMALL = {"resolution": 8, "channels": 16, "multipliers": (1, 2)}


def distillation(weights: str | None = None, run: str | None = None):
    """All networks random, or the teacher, the student and its score from a file and the ratio's encoder random.

    With ``run``, what learns starts from the end of that run.
    """
    torch.manual_seed(0)
    nodes = [EDM(network=UNet(**SMALL), weights=weights) for _ in range(3)]
    return Distillation(
        student=OneStep(denoiser=nodes[0]),
        teacher=nodes[1],
        student_score=nodes[2],
        student_score_times=KarrasIndex(),
        student_score_optimizer=Adam(),
        ratio=EncoderRatio(network=UNet(**SMALL)),
        ratio_times=KarrasIndex(),
        ratio_optimizer=Adam(),
        objective=Objective(terms={"matching": matching(), "adversarial": adversarial()}),
        noising=VarianceExploding(),
        times=KarrasIndex(high=0.8),
        student_optimizer=Adam(lr=1e-3),
        ema=EMA(),
        warm_start=run and WarmStart(run=run),
    )


def prepared(make, *arguments, mode: str, spared: bool, dtype: torch.dtype | None = None):
    with parallel.building(mode if spared else "none"):
        task = make(*arguments)
    task.parallel = parallel.choose(mode, task, CPU, held=float)
    task.prepare(CPU, dtype)
    return task


def one_rank(rank: int, ranks: int, folder: str, mode: str) -> None:
    found = {}
    os.environ["LOCAL_WORLD_SIZE"] = "2"  # as of two machines, where there are four processes
    for name, weights, dtype in CASES:
        file = f"{folder}/{weights}" if weights else None
        for spared in (False, True):
            task = prepared(distillation, file, mode=mode, spared=spared, dtype=dtype)
            assert not any(hasattr(module, "shares") for module in task.modules())
            before = task.training_state()
            teacher = parallel.full(task.teacher.state_dict())
            advance(task, range(STEPS), rank, ranks)
            found[name, spared] = before, teacher, task.training_state()
    task = prepared(distillation, None, f"{folder}/run", mode=mode, spared=True)
    found["warm"] = task.training_state()["networks"]
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")


CASES = [("random", None, None), ("from a file", "weights.safetensors", None), ("bf16", None, torch.bfloat16)]


def assert_equal(found: dict, expected: dict) -> int:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert not value.isnan().any(), name
    return len(expected)


@pytest.mark.parametrize(("ranks", "mode"), [(2, "fsdp"), (4, "hsdp")])
def test_shards_of_spared_networks_are_those_of_whole_ones(tmp_path, ranks, mode):
    torch.manual_seed(5)
    save_weights(tmp_path / "weights.safetensors", edm(3))
    earlier = prepared(distillation, mode="none", spared=False)
    advance(earlier, range(1))
    checkpoints.save(tmp_path / "run" / "checkpoints", 1, {"task": earlier.training_state()})
    together(one_rank, ranks, ranks, str(tmp_path), mode)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for name, _, _ in CASES:
        (before, teacher, after), (spared, spared_teacher, spared_after) = found[name, False], found[name, True]
        assert assert_equal(flat(spared), flat(before)) > 100
        assert assert_equal(spared_teacher, teacher) > 20
        assert_equal(flat(spared_after), flat(after))
        moved = sum(not torch.equal(value, flat(after)[key]) for key, value in flat(before).items())
        assert moved > 50
    for name in ("student", "student_average", "student_score", "ratio"):
        assert_equal(found["warm"][name], earlier.training_state()["networks"][name])
    file = found["from a file", True][1]
    assert not torch.equal(file["network.stem.weight"], found["random", True][1]["network.stem.weight"])


def big():
    """A denoiser, which has an average too."""
    return DenoiserTraining(
        denoiser=EDM(network=UNet(resolution=8, channels=192, multipliers=(1, 2))),
        noising=VarianceExploding(),
        times=KarrasIndex(),
        optimizer=Adam(lr=1e-3),
        ema=EMA(),
        sampler=HeunSampler(steps=2),
    )


def peak_of(rank: int, folder: str, mode: str) -> None:
    """The most memory, beyond what was there before, that building and sharding three tasks take."""
    ctypes.CDLL(None).mallopt(-3, 2**16)  # what is freed goes back to the system
    before = 0
    for count in (1, 3):  # the first time imports too
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
        before = memory("VmRSS")
        with parallel.building(mode):
            tasks = [big() for _ in range(count)]
        for task in tasks:
            task.parallel = parallel.Sharded(CPU)
            task.prepare(CPU, None)
        found = memory("VmHWM") - before, 4 * sum(p.numel() for p in tasks[0].denoiser.parameters())
        del tasks, task
        gc.collect()
    Path(folder, f"{mode} {rank}.json").write_text(json.dumps(found))


def memory(name: str) -> int:
    """Bytes of this process, as Linux tells them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_no_process_has_two_networks_whole(tmp_path):
    """Three denoisers by four processes: one whole, its quarter and two more; with averages six quarters in the end."""
    for mode in ("fsdp", "none"):
        together(peak_of, 4, str(tmp_path), mode)
    for rank in range(4):
        spared, size = json.loads((tmp_path / f"fsdp {rank}.json").read_text())
        whole, _ = json.loads((tmp_path / f"none {rank}.json").read_text())
        print(f"networks of {size / 1e6:.0f} MB: at most {spared / 1e6:.0f} MB spared, {whole / 1e6:.0f} MB whole")
        assert spared < 2.2 * size
        assert whole > 3 * size
