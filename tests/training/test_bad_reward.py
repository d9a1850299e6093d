"""A reward that gives NaN while a run trains: told by name and step, in one line, with the student intact."""

import json
import math

import pytest
import torch

from ratiograph import config
from ratiograph.algebra.rewards import Reward
from ratiograph.training import trainer


class NaNFrom(Reward):
    """log R = -|x0|^2 / 100 up to a number of calls, NaN after them."""

    def __init__(self, *, calls: int):
        super().__init__()
        self.calls = calls

    def log_reward(self, x0, condition):
        self.calls -= 1
        return -x0.square().sum(1) / 100 * (1.0 if self.calls >= 0 else math.nan)


def experiment(calls, steps=40):
    config.register(NaNFrom)
    lines = (
        *("TARGET = @RewardTilted()", "RewardTilted.reward = @NaNFrom()", f"NaNFrom.calls = {calls}"),
        *("RewardTilted.log_normalizer = 0.0", "WEIGHTING = @KL()", "Experiment.evaluator = None"),
        *(f"Experiment.steps = {steps}", "Experiment.batch_size = 16", "Experiment.log_every = 2"),
        "Experiment.max_bad_steps = 3",
    )
    torch.manual_seed(0)
    return config.build(config.parse(["gin/mixture2d_scores.gin"], lines))


def test_is_named_and_changes_no_weight(tmp_path, capsys):
    run = experiment(calls=4)  # a call a step
    with pytest.raises(ValueError, match=r"in a row up to step \d+ had no finite gradient; not finite: .*") as caught:
        trainer.train(run, workdir=tmp_path, device="cpu")
    message = str(caught.value)
    assert "the reward NaNFrom, the term 'distribution'" in message
    assert "updates of student" in message
    assert "the weights of" not in message
    assert "\n" not in message
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    finite = [line["step"] for line in lines if math.isfinite(line["reward/NaNFrom"] or math.nan)]
    assert finite == [2, 4]
    assert len(lines) > 2
    assert "reward/NaNFrom" in capsys.readouterr().out
    before = experiment(calls=4, steps=4)
    trainer.train(before, workdir=tmp_path / "before", device="cpu")
    for found, expected in zip(run.task.student.parameters(), before.task.student.parameters(), strict=True):
        assert torch.equal(found, expected)
