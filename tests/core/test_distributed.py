"""Several processes take the step that one would: gradients, statistics, noise, times."""

from __future__ import annotations

import copy
import os
import socket
from pathlib import Path

import pytest
import torch
from torch import nn

from ranks import together
from ratiograph.algebra.directions import RatioGradient
from ratiograph.algebra.normalization import Clamped, MeanNormalized, RatioNormalized
from ratiograph.algebra.objective import Term
from ratiograph.algebra.ratio_losses import LogisticLoss, R1Penalized
from ratiograph.algebra.weightings import JensenShannon
from ratiograph.core import averaging, distributed
from ratiograph.core.randomness import BatchGenerator
from ratiograph.core.types import Batch, Condition
from ratiograph.networks.ratios import StudentScoreHeadRatio
from test_distillation import adversarial, matching, task_of

CPU = torch.device("cpu")
BATCH, STEPS = 8, 4


def normalized():
    weighting = RatioNormalized(weighting=JensenShannon(), bins=3, decay=0.5)
    return Term(direction=RatioGradient(), weighting=MeanNormalized(weighting=Clamped(weighting=weighting, limit=2.0)))


GRAPHS = {
    "teacher's features": lambda: task_of({"matching": matching(), "adversarial": adversarial()}),
    "normalised": lambda: task_of({"normalised": normalized()}),
    "R1, student score's head, more critics": lambda: task_of(
        {"matching": matching(), "adversarial": adversarial()},
        ratio=StudentScoreHeadRatio(),
        ratio_loss=R1Penalized(loss=LogisticLoss(), weight=1.0),
        student_score_updates=2,
    ),
}


def trained(name: str, part: int, parts: int) -> dict:
    """All networks, statistics included, after some float64 steps of the process ``part`` of ``parts``."""
    torch.manual_seed(0)
    task = GRAPHS[name]().double()
    task.prepare(CPU, None)
    generator, data = BatchGenerator(CPU, part, parts), torch.Generator().manual_seed(9)
    for step in range(STEPS):
        images = torch.randn(BATCH, 1, 8, 8, generator=data, dtype=torch.float64)
        own = images.tensor_split(parts)[part]
        generator.manual_seed(step)
        metrics = task.step(Batch(own, Condition()), BATCH // parts, generator)
    return {"networks": task.training_state()["networks"], "norm": metrics["gradient/student"]}


def run_rank(rank: int, ranks: int, folder: str):
    torch.save({name: trained(name, rank, ranks) for name in GRAPHS}, f"{folder}/rank_{rank}.pt")


def flat(state) -> dict[str, torch.Tensor]:
    return {f"{node}.{key}": value for node, tensors in state["networks"].items() for key, value in tensors.items()}


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_take_the_steps_of_one_process(ranks, tmp_path):
    together(run_rank, ranks, ranks, str(tmp_path))
    found = [torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True) for rank in range(ranks)]
    for name in GRAPHS:
        expected = trained(name, 0, 1)
        moved = 0
        for key, value in flat(expected).items():
            for other in found:
                torch.testing.assert_close(flat(other[name])[key], value, rtol=1e-6, atol=1e-9, msg=f"{name}: {key}")
            assert all(torch.equal(flat(other[name])[key], flat(found[0][name])[key]) for other in found), key
            moved += value.is_floating_point() and bool(value.any())
        assert moved > 50
        torch.testing.assert_close(found[1][name]["norm"], expected["norm"], rtol=1e-9, atol=0)


def average_of_rank(rank: int, folder: str):
    averaging.BUCKET = 10  # so that there are several buckets
    parameters = [nn.Parameter(torch.zeros(n, dtype=kind)) for n, kind in KINDS]
    for k, parameter in enumerate(parameters[:-1]):
        parameter.grad = torch.full_like(parameter, (k + 1) * 3.0**rank)
    averaging.average_gradients(parameters)
    metrics = distributed.average_metrics({"a": 1.0 + rank, "b": 4.0}, CPU)
    torch.save({"gradients": [p.grad for p in parameters[:-1]], "metrics": metrics}, f"{folder}/{rank}.pt")
    assert parameters[-1].grad is None


KINDS = [(3, torch.float32), (9, torch.float32), (4, torch.float64), (1, torch.float64), (2, torch.float32)]


def test_gradients_and_metrics_become_means(tmp_path):
    together(average_of_rank, 2, str(tmp_path))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for k, gradient in enumerate(found["gradients"]):
            assert torch.equal(gradient, torch.full(KINDS[k][:1], 2.0 * (k + 1), dtype=KINDS[k][1]))
        assert found["metrics"] == {"a": 1.5, "b": 4.0}


def gradient_layouts() -> list[torch.Tensor]:
    """Channels last, transposed, with holes, without memory of their own."""
    numbers = torch.arange(24.0)
    return [
        numbers.view(2, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        numbers.view(4, 6).t(),
        numbers.view(4, 6)[:, ::2],
        numbers[:1].expand(5, 2),
    ]


def layouts_of_rank(rank: int, folder: str):
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradient_layouts()]
    for parameter, gradient in zip(parameters, gradient_layouts(), strict=True):
        parameter.grad = gradient if rank else 3 * gradient
    begun = averaging.Averaging(parameters)
    assert begun
    begun.finish()
    torch.save([(p.grad.clone(), p.grad.stride()) for p in parameters], f"{folder}/{rank}.pt")


def test_gradients_keep_their_layout(tmp_path):
    together(layouts_of_rank, 2, str(tmp_path))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for (gradient, stride), given in zip(found, gradient_layouts(), strict=True):
            assert torch.equal(gradient, 2 * given)
            assert stride == torch.zeros_like(given).stride()


def values_of_rank(rank: int) -> list[torch.Tensor]:
    """Three samples, of every kind that is gathered."""
    numbers = torch.arange(3) + 10 * rank
    rows = numbers.float()[:, None] + torch.arange(4)
    return [numbers, numbers.double() / 3, numbers > 1, rows, rows.t().contiguous().t(), numbers.to(torch.bfloat16)]


def gathered_of_rank(rank: int, folder: str):
    first, second = distributed.Gathering(*values_of_rank(rank)), distributed.Gathering(torch.full((1,), rank))
    torch.save([second.finish(), first.finish()], f"{folder}/{rank}.pt")


def test_values_of_several_types_travel_together(tmp_path):
    together(gathered_of_rank, 2, str(tmp_path))
    expected = [torch.cat(pair) for pair in zip(values_of_rank(0), values_of_rank(1), strict=True)]
    for rank in range(2):
        (ranks,), found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert ranks.tolist() == [0, 1]
        for value, whole in zip(found, expected, strict=True):
            assert value.dtype == whole.dtype
            assert torch.equal(value, whole)


def watched_of_rank(rank: int, folder: str):
    """Exchanges, passes of the critics and updates of a step, in order."""
    found = {}
    for name in GRAPHS:
        task = GRAPHS[name]()
        task.prepare(CPU, None)
        events = found[name] = []

        def write_down(owner, method, event, events=events):
            original = getattr(owner, method)

            def watched(*arguments, **named):
                events.append(event(*arguments))
                return original(*arguments, **named)

            setattr(owner, method, watched)
            return lambda: setattr(owner, method, original)

        undo = [
            write_down(distributed.dist, "all_reduce", lambda *_: "reduce"),
            write_down(distributed.dist, "all_gather_into_tensor", lambda *_: "gather"),
            write_down(type(task.critics), "learn", lambda _, names, *_rest: f"learn {' and '.join(names)}"),
        ]
        for node, updater in task.optimizers.items():
            write_down(updater, "step", lambda *_, node=node: f"update {node}")
        task.step(Batch(torch.randn(4, 1, 8, 8), Condition()), 4, BatchGenerator(CPU, rank, 2).manual_seed(0))
        for restore in undo:
            restore()
    torch.save(found, f"{folder}/{rank}.pt")


def test_exchanges_are_few_and_under_way_while_networks_run(tmp_path):
    together(watched_of_rank, 2, str(tmp_path))
    step = [
        "reduce", "learn student_score", "reduce", "learn ratio", "gather", "reduce",
        "update student", "update student_score", "update ratio",
    ]  # fmt: skip
    expected = {
        "teacher's features": step,
        "normalised": ["gather", *step],  # one for three wrappers
        "R1, student score's head, more critics": [
            "reduce", "learn student_score and ratio", "gather", "reduce", "reduce",
            "update student", "update student_score", "learn student_score", "reduce",
            "update ratio", "update student_score",
        ],
    }  # fmt: skip
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=True) == expected


def test_one_process_is_left_alone():
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    before = copy.deepcopy(layer.weight.grad)
    averaging.average_gradients(layer.parameters())
    assert torch.equal(layer.weight.grad, before)
    assert not averaging.Averaging(layer.parameters())
    assert distributed.average_metrics({"a": 1.0}, CPU) == {"a": 1.0}
    assert (distributed.rank(), distributed.ranks(), distributed.is_main()) == (0, 1, True)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu[03-05,9],cpu1", "gpu03"), ("node7", "node7"), ("a-b[1,3]", "a-b1"), ("n1,n2", "n1"), ("", "")],
)
def test_first_of_slurms_hosts(nodes, host):
    assert distributed._first_host(nodes) == host


@pytest.mark.parametrize(
    ("torchrun", "srun", "count"),
    [("4", "8(x2)", 4), (None, "8(x2)", 8), (None, "3", 3), (None, "8,4", 1), (None, None, 1)],
)
def test_processes_of_a_machine(monkeypatch, torchrun, srun, count):
    for name, value in {"LOCAL_WORLD_SIZE": torchrun, "SLURM_STEP_TASKS_PER_NODE": srun}.items():
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    assert distributed.ranks_here() == count


def test_processes_that_cannot_meet_are_told_how_to_start(monkeypatch):
    numbers = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
    for name, value in numbers.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "SLURM_JOB_NODELIST", "RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="rank 1 of 2 does not know where the others are: start with torchrun or srun"):
        distributed.start(CPU)


def refuse_zero(rank: int):
    if not rank:
        raise ValueError("two are needed")


def disagreeing_rank(rank: int, folder: str):
    found = {"here": 1} if rank == 0 else {}
    with pytest.raises(ValueError if rank == 0 else KeyError, match="here"), distributed.agreed():
        found["here"]
    with pytest.raises(ValueError, match="^rank 0: two are" if rank else "^two are"), distributed.agreed():
        refuse_zero(rank)
    with distributed.agreed():
        pass
    distributed.check_same({"Experiment.seed": 0, "torch": "2"})
    expected = "rank 1 runs something else: Experiment\\.seed is 1 there and 0 on rank 0\\. Start every rank"
    with pytest.raises(ValueError, match=expected):
        distributed.check_same({"torch": "2", "Experiment.seed": rank})
    with pytest.raises(ValueError, match=r"Adam\.lr is 0\.1 there and absent on rank 0"):
        distributed.check_same({"Adam.lr": 0.1} if rank else {})
    if rank == 0:
        os._exit(0)  # in the middle of what the other goes on with
    with pytest.raises(ValueError, match=r"^rank 1 ends because another rank has ended"), distributed.joined(CPU):
        distributed.wait_for_all()
    Path(folder, "reached").touch()
    os._exit(0)


def test_a_mistake_of_one_rank_ends_all_with_a_line(tmp_path):
    together(disagreeing_rank, 2, str(tmp_path))
    assert (tmp_path / "reached").exists()


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SLURM = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "localhost"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (TORCHRUN | {"RANK": "banana"}, "variable RANK='banana' is no number"),
        (TORCHRUN | {"WORLD_SIZE": ""}, "variable WORLD_SIZE='' is no number"),
        (TORCHRUN | {"LOCAL_RANK": "-1"}, "variable LOCAL_RANK='-1' is no number"),
        (TORCHRUN | {"RANK": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
        (TORCHRUN | {"MASTER_PORT": "x"}, "variable MASTER_PORT='x' is no number"),
        (TORCHRUN | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is no port"),
        (SLURM | {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7a"}, "variable SLURM_JOB_ID='7a' is no number"),
        (SLURM | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "x"}, "variable SLURM_PROCID='x' is no number"),
        (SLURM | {"SLURM_NTASKS": "two"}, "variable SLURM_NTASKS='two' is no number"),
    ],
)
def test_an_environment_that_makes_no_sense_is_named(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.start(CPU)


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "4294967290"}], ids=["sbatch", "salloc"])
def test_a_process_that_srun_did_not_start_runs_alone_and_says_so(monkeypatch, capsys, step):
    for name, value in (SLURM | step).items():
        monkeypatch.setenv(name, value)
    distributed.start(CPU)
    assert (distributed.ranks(), distributed.local_rank()) == (1, 0)
    assert capsys.readouterr().out == (
        "this process runs alone: the job has 2 tasks, and srun starts them (srun python ...)\n"
    )


def test_ranks_that_never_come_end_the_run_with_a_line(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in (TORCHRUN | {"MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"rank 0 of 2 did not meet the others at 127.0.0.1:{port} .*use srun"):
        distributed.start(CPU, patience=1 / 60)
