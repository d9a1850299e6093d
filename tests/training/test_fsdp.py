"""Sharded networks take the steps of one process, leave its checkpoints, and go on from them in any mode."""

from __future__ import annotations

import copy
import importlib.util
import os

import pytest
import torch

from ranks import together
from ratiograph.algebra.normalization import MeanNormalized
from ratiograph.algebra.ratio_losses import LogisticLoss, R1Penalized
from ratiograph.core.randomness import BatchGenerator
from ratiograph.core.types import Batch, Condition, Noisy
from ratiograph.networks.architectures.stable_diffusion_unets import SD15UNet
from ratiograph.networks.architectures.unet import UNet
from ratiograph.networks.ratios import EncoderRatio, StudentScoreMeanRatio
from ratiograph.networks.teachers.stable_diffusion import StableDiffusion
from ratiograph.tasks.ratio_training import RatioTraining
from ratiograph.training import parallel
from test_accumulation import over_the_batch, teacher_training
from test_distillation import adversarial, matching, task_of

CPU = torch.device("cpu")
BATCH, STEPS = 8, 2
GRAPHS = {
    "teacher's features": lambda: task_of(
        {"matching": matching(), "normalised": over_the_batch(lambda held: MeanNormalized(weighting=held))},
        student_score_updates=2,
    ),
    "one pass for both losses": lambda: task_of(
        {"matching": matching(), "adversarial": adversarial()},
        ratio=StudentScoreMeanRatio(), ratio_times=None, ratio_optimizer=None,
    ),
    "an encoder of its own": lambda: task_of(
        {"adversarial": adversarial()}, ratio=EncoderRatio(network=UNet(resolution=8, channels=16, multipliers=(1, 2)))
    ),
    "a teacher's training": teacher_training,
}  # fmt: skip
FIRST = "teacher's features"


def prepared(name: str, how: parallel.Parallel, accumulation: int = 1, dtype: torch.dtype | None = None):
    torch.manual_seed(0)
    task = GRAPHS[name]()
    task = task if dtype else task.double()
    task.parallel, task.accumulation = how, accumulation
    task.prepare(CPU, dtype)
    return task


def advance(task, steps: range, part: int = 0, parts: int = 1) -> dict:
    """The metrics of the last of ``steps``, by the process ``part`` of ``parts``."""
    kind = next(task.parameters()).dtype
    for step in steps:
        images = torch.randn(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        own = Batch(images.to(kind).tensor_split(parts)[part], Condition())
        metrics = task.step(own, BATCH // parts, BatchGenerator(CPU, part, parts).manual_seed(step))
    return metrics


def in_each_mode(name: str, rank: int, ranks: int) -> dict:
    """By mode, the state and the gradients' norms after some steps of one graph."""
    found = {}
    os.environ["LOCAL_WORLD_SIZE"] = "2"  # as of two machines, where there are four processes
    for mode in ("fsdp", "ddp", "hsdp")[: ranks // 2 + 1]:
        task = prepared(name, parallel.choose(mode, GRAPHS[name](), CPU, held=float))
        norms = advance(task, range(STEPS), rank, ranks)
        found[mode] = task.training_state(), {k: v for k, v in norms.items() if "gradient" in k}
    return found


def sharded_rank(rank: int, folder: str) -> None:
    found = {FIRST: in_each_mode(FIRST, rank, 2), "seen": check_shards(rank), "refused": refusals()}
    before = torch.load(f"{folder}/one.pt", weights_only=True)
    task = prepared(FIRST, parallel.Sharded(CPU))
    task.load_training_state(before)
    advance(task, range(STEPS, 2 * STEPS), rank, 2)
    found["went on"] = task.training_state()
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")


def every_graph(rank: int, ranks: int, folder: str) -> None:
    found = {name: in_each_mode(name, rank, ranks) for name in GRAPHS}
    for mode in ("fsdp", "ddp"):
        task = prepared(FIRST, parallel.choose(mode, GRAPHS[FIRST](), CPU, held=float), 1, torch.bfloat16)
        found["bf16", mode] = advance(task, range(STEPS), rank, ranks)
    task = prepared(FIRST, parallel.Sharded(CPU), accumulation=2)
    advance(task, range(STEPS), rank, ranks)
    found["accumulated"] = task.training_state()
    found["captioned"] = captioned_error(rank, ranks)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")


def captioned_error(rank: int, ranks: int) -> float | None:
    """Largest relative error of a sharded, checkpointed SD 1.5's gradients; None without diffusers."""
    if importlib.util.find_spec("diffusers") is None:
        return None
    sizes = {"resolution": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 12}
    torch.manual_seed(0)
    network = SD15UNet(**sizes, attention_heads=2, norm_groups=4, gradient_checkpointing=True)
    sharded = StableDiffusion(network=network).double()
    alone = copy.deepcopy(sharded)
    parallel.Sharded(CPU).shard([sharded], None)
    x, text = torch.randn(4, *network.shape, dtype=torch.float64), torch.randn(4, 77, 12, dtype=torch.float64)
    t, alpha, sigma = (torch.full((4,), value, dtype=torch.float64) for value in (400.0, 0.6, 0.8))
    noisy, condition = Noisy(x, t, alpha, sigma), Condition(text=text)
    alone.denoise(noisy, condition).square().mean().backward()
    sharded.denoise(noisy.split(ranks)[rank], condition.split(ranks)[rank]).square().mean().backward()
    pairs = zip(sharded.parameters(), alone.parameters(), strict=True)
    return max(float((p.grad.full_tensor() - q.grad).abs().max() / q.grad.abs().max()) for p, q in pairs)


def check_shards(rank: int) -> dict:
    """What a process holds, and what it makes alone."""
    task = prepared(FIRST, parallel.Sharded(CPU))
    advance(task, range(1), rank, 2)
    parameters = list(task.student.parameters())
    held = sum(p.to_local().numel() for p in parameters)
    moments = sum(s["exp_avg_sq"].to_local().numel() for s in task.optimizers["student"].rule.state.values())
    averaged = sum(p.to_local().numel() for p in task.average.parameters())
    frozen = sum(p.to_local().numel() for p in task.teacher.parameters())
    whole = sum(p.numel() for p in parameters)
    samples = None
    with task.parallel.whole():
        if rank == 0:  # alone: any exchange would wait for the other for good
            samples = task.preview(4, torch.Generator().manual_seed(7))
    again = advance(task, range(1, 2), rank, 2)["gradient/student"]
    written = parallel.Gathered(task.average).state_dict()
    return {"shares": [n / whole for n in (held, moments, averaged, frozen)], "samples": samples, "next": again,
            "written": written}  # fmt: skip


def refusals() -> list[str]:
    """What the errors say."""
    told = []
    r1 = task_of({"adversarial": adversarial()}, ratio_loss=R1Penalized(loss=LogisticLoss()))
    r1.parallel = parallel.Sharded(CPU)
    adapted = copy.deepcopy(r1.teacher)
    adapted.network.stem = r1.teacher.network.stem
    alone = RatioTraining.__new__(RatioTraining)
    for refused in (
        lambda: r1.prepare(CPU, None),
        lambda: r1.parallel.shard([r1.teacher, adapted], None),
        lambda: parallel.choose("fsdp", alone, CPU, held=float),
        lambda: parallel.choose("none", r1, CPU, held=float),
        lambda: parallel.choose("fsdb", r1, CPU, held=float),
        lambda: parallel.choose("hsdp", r1, CPU, held=float),
    ):
        try:
            refused()
        except ValueError as error:
            told.append(str(error))
    return told


def flat(state: dict) -> dict[str, torch.Tensor]:
    networks = {f"{n}.{key}": v for n, tensors in state["networks"].items() for key, v in tensors.items()}
    for name, held in state["optimizers"].items():
        for k, moments in held["optimizer"]["state"].items():
            networks |= {f"{name} {k} {key}": v for key, v in moments.items()}
    return networks


def assert_same(found: dict, expected: dict, context: str) -> None:
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=f"{context}: {name}")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two processes found, with one process's checkpoint to go on from."""
    folder = tmp_path_factory.mktemp("fsdp")
    task = prepared(FIRST, parallel.Replicated())
    advance(task, range(STEPS))
    torch.save(task.training_state(), folder / "one.pt")
    together(sharded_rank, 2, str(folder))
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.fixture(scope="module", params=[2, 4])
def graphs(request, tmp_path_factory):
    """What so many processes found of every graph."""
    folder = tmp_path_factory.mktemp("graphs")
    together(every_graph, request.param, request.param, str(folder))
    return torch.load(folder / "found.pt", weights_only=True)


def assert_steps_of_one(name: str, found: dict) -> None:
    task = prepared(name, parallel.Replicated())
    metrics = advance(task, range(STEPS))
    for mode, (state, norms) in found.items():
        assert_same(state, task.training_state(), f"{name}, {mode}")
        for key, norm in norms.items():
            torch.testing.assert_close(norm, metrics[key], rtol=1e-9, atol=0)
    assert set(found) >= {"fsdp", "ddp"}


def test_two_processes_take_the_steps_of_one(found):
    assert_steps_of_one(FIRST, found[FIRST])


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
def test_two_and_four_processes_take_the_steps_of_one(graphs, name):
    assert_steps_of_one(name, graphs[name])


@pytest.mark.slow
def test_shards_in_bf16_follow_copies_in_bf16(graphs):
    """Weights travel in bf16 and gradients in float32; norms' weights are rounded too, so it is close, not equal."""
    shards, copies = (graphs["bf16", mode] for mode in ("fsdp", "ddp"))
    for name in ("loss/student_score", "loss/ratio", "gradient/student"):
        torch.testing.assert_close(shards[name], copies[name], rtol=0.05, atol=0)
        assert shards[name].dtype == torch.float32


@pytest.mark.slow
def test_a_captioned_network_that_recomputes_its_blocks(graphs):
    if graphs["captioned"] is None:
        pytest.skip("needs diffusers")
    assert graphs["captioned"] < 1e-9


@pytest.mark.slow
def test_accumulation_of_shards(graphs):
    assert_same(graphs["accumulated"], graphs[FIRST]["ddp"][0], "accumulated")


def test_a_checkpoint_moves_from_one_process_to_shards_and_back(found):
    task = prepared(FIRST, parallel.Replicated())
    advance(task, range(2 * STEPS))
    assert_same(found["went on"], task.training_state(), "one => fsdp")
    advance(task, range(2 * STEPS, 3 * STEPS))
    back = prepared(FIRST, parallel.Replicated())
    back.load_training_state(found["went on"])
    advance(back, range(2 * STEPS, 3 * STEPS))
    assert_same(back.training_state(), task.training_state(), "fsdp => one")


def test_a_process_holds_its_share_and_makes_samples_alone(found):
    seen = found["seen"]
    assert all(0.45 < share < 0.55 for share in seen["shares"]), seen["shares"]
    task = prepared(FIRST, parallel.Replicated())
    advance(task, range(1))
    torch.testing.assert_close(seen["samples"], task.preview(4, torch.Generator().manual_seed(7)))
    # Weights that were gathered for the samples are not those of the next step.
    torch.testing.assert_close(seen["next"], advance(task, range(1, 2))["gradient/student"])
    for key, value in task.average.state_dict().items():
        torch.testing.assert_close(seen["written"][key], value, rtol=1e-6, atol=1e-9)


def test_what_cannot_be_sharded_says_what_to_use(found):
    wanted = (
        "differentiate a network twice, which sharded ones cannot do: use --parallel=ddp",
        "shares weights with another network",
        "--parallel=fsdp: a RatioTraining is not sharded; use --parallel=ddp",
        "--parallel=none is for one process, and 2 were started",
        "--parallel=fsdb: choose one of auto, none, ddp, fsdp, hsdp",
        "more than one; here 2 of 2 processes are on this machine: use --parallel=fsdp",
    )
    for told, part in zip(found["refused"], wanted, strict=True):
        assert part in told


def test_one_process_is_never_sharded():
    for mode in ("auto", "none", "ddp", "fsdp", "hsdp"):
        assert type(parallel.choose(mode, GRAPHS["an encoder of its own"](), CPU, held=float)) is parallel.Replicated
