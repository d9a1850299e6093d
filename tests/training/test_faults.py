"""Faults: what a step with a NaN leaves behind is nothing, and a hang says where it hangs."""

import itertools
import json
import math
import time

import pytest
import torch
from torch import nn

from ratiograph import config
from ratiograph.training import checkpoints, trainer
from ratiograph.training.experiment import Task
from ratiograph.training.faults import Means, StepGuard, Watchdog
from ratiograph.training.optim import Adam

CPU = torch.device("cpu")


class Tiny(Task):
    """Two networks and a statistic; ``poison`` says what each step does to the gradients of which network."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.statistic = nn.Linear(5, 3), nn.Linear(4, 2), nn.BatchNorm1d(5)
        self.optimizers = {name: Adam(betas=(0.9, 0.99)).build(getattr(self, name).parameters()) for name in "ab"}

    def trained(self):
        return {"a": self.a, "b": self.b, "statistic": self.statistic}

    def step(self, poison: dict[str, float], generator: torch.Generator):
        x = torch.randn(6, 5, generator=generator)
        for name, network in (("a", self.a), ("b", self.b)):
            factor = poison.get(name, 1.0)
            network(self.statistic(x * factor)[:, : network.in_features].detach() * factor).square().sum().backward()
        return {f"gradient/{name}": updater.step() for name, updater in self.optimizers.items()}


def state(task):
    networks = {f"{n}.{k}": v.clone() for n, m in task.trained().items() for k, v in m.state_dict().items()}
    moments = {
        f"{n}.{k}.{key}": value.clone()
        for n, updater in task.optimizers.items()
        for k, slots in updater.rule.state_dict()["state"].items()
        for key, value in slots.items()
    }
    return networks | moments


def run(poisons, guarded=True):
    """The task after one step for each of ``poisons``, and what the guard saw."""
    task = Tiny()
    guard = StepGuard(task, CPU) if guarded else None
    states = [state(task)]
    for k, poison in enumerate(poisons):
        generator = torch.Generator().manual_seed(k)
        if guard:
            with guard:
                task.step(poison, generator)
        else:
            task.step(poison, generator)
        states.append(state(task))
    return task, guard, states


def same(a, b):
    return {key for key in a if key in b and torch.equal(a[key], b[key])}


def test_a_guard_changes_no_bit_of_finite_steps():
    _, _, plain = run([{}] * 4, guarded=False)
    _, guard, guarded = run([{}] * 4)
    assert same(plain[-1], guarded[-1]) == set(plain[-1])
    assert guard.read().skipped == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_poisoned_step_leaves_no_trace(value):
    """Weights, moments, their counters and statistics are those of the step before; the next step goes on."""
    _, guard, states = run([{}, {"a": value, "b": value}, {}])
    assert same(states[1], states[2]) == set(states[1])
    assert all(tensor.isfinite().all() for tensor in states[3].values())
    assert not same(states[2], states[3]) & {"a.weight", "b.weight", "statistic.running_mean"}
    assert guard.read().skipped == 1


def test_only_the_network_with_the_bad_gradient_stands_still():
    _, guard, states = run([{}, {"b": math.nan}])
    unchanged = same(states[1], states[2])
    assert {"b.weight", "b.bias", "b.0.exp_avg", "statistic.running_mean"} <= unchanged
    assert not unchanged & {"a.weight", "a.0.exp_avg"}
    assert "left out: 1 updates of b" in guard.report({})


def test_bad_steps_are_counted_in_all_since_the_last_look_and_in_a_row():
    bad, good = {"a": math.nan}, {}
    task, guard, _ = run([bad, good, bad, bad, bad, good, bad])
    found = guard.read()
    assert (found.skipped, found.new, found.longest) == (5, 5, 3)
    with guard:
        task.step(bad, torch.Generator().manual_seed(9))
    found = guard.read()
    assert (found.skipped, found.new, found.longest) == (6, 1, 3)


def test_a_removed_guard_lets_updates_through_again():
    task, guard, _ = run([{"a": math.nan}])
    guard.remove()
    before = state(task)
    task.step({}, torch.Generator().manual_seed(1))
    assert not same(before, state(task)) & {"a.weight", "b.weight"}


def test_the_report_names_terms_losses_and_networks_whose_weights_are_broken():
    task, guard, _ = run([{"a": math.nan}])
    with torch.no_grad():
        task.b.bias[1] = math.inf
    found = guard.report({"field/gan": 3, "loss/ratio": 1, "gradient/a": 1})
    assert found == "not finite: the term 'gan', the loss/ratio, the weights of b; left out: 1 updates of a"


def test_means_are_over_finite_values_and_the_others_are_counted():
    means = Means(CPU)
    values = [(1.0, math.nan), (2.0, 5.0), (math.inf, 7.0), (6.0, math.nan)]
    for a, b in values:
        means.add({"loss/a": torch.tensor(a), "loss/b": torch.tensor(b)})
    means.add({"loss/b": torch.tensor(3.0), "ratio/c": torch.tensor(math.inf)})
    found, bad = means.read()
    assert found["loss/a"] == 3.0
    assert found["loss/b"] == 5.0
    assert math.isnan(found["ratio/c"])
    assert bad == {"loss/a": 1, "loss/b": 2}
    assert means.read() == ({}, {})


SMALL = [
    "Experiment.evaluator = None",
    "Experiment.batch_size = 16",
    "Experiment.log_every = 2",
    "Experiment.checkpoint_every = 3",
    "MLP.width = 8",
]


def experiment(steps, *changes):
    torch.manual_seed(0)
    return config.build(config.parse(["gin/mixture2d_scores.gin"], [*SMALL, *changes], {"Experiment.steps": steps}))


def poisoned(made, bad_steps):
    """``made`` with the objective's field NaN at the given steps."""
    counter, fields = itertools.count(1), made.task.objective.fields

    def broken(evaluation):
        factor = math.nan if next(counter) in bad_steps else 1.0
        return {name: field * factor for name, field in fields(evaluation).items()}

    made.task.objective.fields = broken
    return made


def test_a_run_goes_on_over_a_few_bad_steps_and_says_so(tmp_path, capsys):
    trainer.train(poisoned(experiment(8, "Experiment.max_bad_steps = 3"), {3, 4, 6}), workdir=tmp_path, device="cpu")
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    counts = {record["step"]: record.get("faults/skipped_steps", 0) for record in records}
    assert counts == {2: 0, 3: 1, 4: 2, 5: 2, 6: 3, 7: 3, 8: 3}  # checkpoints of 3 and 6 wait for a good step
    assert checkpoints.steps(tmp_path / "checkpoints") == [7, 8]
    assert records[-1]["field/distribution"] > 0
    shown = capsys.readouterr().out
    assert "step 6: 1 steps without a finite gradient since the last line; not finite: the term 'distribution'" in shown
    _, saved = checkpoints.latest(tmp_path / "checkpoints")
    assert all(value.isfinite().all() for value in saved["task"]["networks"]["student"].values())


def test_too_many_in_a_row_end_the_run_at_the_last_checkpoint(tmp_path):
    made = poisoned(experiment(20, "Experiment.max_bad_steps = 4"), range(5, 21))
    expected = (
        r"4 steps in a row up to step 8 had no finite gradient; not finite: the term 'distribution'; "
        r"left out: 4 updates of student; the checkpoint of step 3 is intact\. Lower Adam\.lr.*--allow_change=Adam\.lr"
    )
    with pytest.raises(ValueError, match=expected):
        trainer.train(made, workdir=tmp_path, device="cpu")
    trainer.train(experiment(4), workdir=tmp_path, device="cpu")  # goes on from before the bad steps
    trainer.train(experiment(4), workdir=tmp_path / "good", device="cpu")
    ends = [checkpoints.latest(folder / "checkpoints") for folder in (tmp_path, tmp_path / "good")]
    assert [step for step, _ in ends] == [4, 4]
    students = [state["task"]["networks"]["student"] for _, state in ends]
    for name, value in students[0].items():
        assert torch.equal(value, students[1][name]), name


def test_a_run_that_ends_without_one_finite_gradient_is_not_done(tmp_path):
    with pytest.raises(ValueError, match="2 steps in a row up to step 2 had no finite gradient"):
        trainer.train(poisoned(experiment(2), {1, 2}), workdir=tmp_path, device="cpu")
    assert not (tmp_path / "student.safetensors").exists()


def test_weights_that_are_not_finite_are_not_saved_nor_gone_on_from(tmp_path):
    made = experiment(3, "Experiment.checkpoint_every = 1")
    step, weights = made.task.step, next(made.task.student.parameters())

    def overflow(*arguments):
        metrics = step(*arguments)
        weights.data.fill_(math.inf)
        return metrics

    made.task.step = overflow
    with pytest.raises(ValueError, match=r"the weights of student.* at step 1 are not finite; no checkpoint was due"):
        trainer.train(made, workdir=tmp_path, device="cpu")
    assert checkpoints.steps(tmp_path / "checkpoints") == []
    trainer.train(experiment(3), workdir=tmp_path, device="cpu")
    _, state = checkpoints.latest(tmp_path / "checkpoints")
    next(iter(state["task"]["networks"]["student"].values())).fill_(math.inf)
    checkpoints.save(tmp_path / "checkpoints", 3, state)
    with pytest.raises(ValueError, match="the weights of student at step 3 are not finite; delete that checkpoint"):
        trainer.train(experiment(3), workdir=tmp_path, device="cpu")


def test_samples_that_are_not_finite_are_not_done(tmp_path):
    made = experiment(1)
    made.task.preview = lambda samples, generator: torch.full((samples, 2), math.nan)
    with pytest.raises(ValueError, match="the samples of step 1 are not finite; no checkpoint was due yet"):
        trainer.train(made, workdir=tmp_path, device="cpu")


def test_a_hang_is_told_once_with_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "3")
    path = tmp_path / "stderr"
    with open(path, "w") as file, Watchdog(0.1 / 60, file) as watchdog:
        watchdog.beat(17)
        time.sleep(0.5)  # the hang
        assert path.read_text().count("no step for") == 1
        watchdog.beat(18)
        time.sleep(0.3)
    text = path.read_text()
    assert text.startswith("no step for 0.00166667 minutes after step 17 (rank 3, process ")
    assert "test_a_hang_is_told_once_with_where_it_is" in text
    assert text.count("after step 18") == 1


def test_no_hang_no_word(tmp_path):
    path = tmp_path / "stderr"
    with open(path, "w") as file, Watchdog(1 / 60, file) as watchdog:
        for step in range(10):
            time.sleep(0.02)
            watchdog.beat(step)
    assert path.read_text() == ""
