"""The tool that estimates log Z once, against the exact normaliser of a mixture."""

from __future__ import annotations

import math
import re

import pytest
import torch

from ratiograph import config
from ratiograph.algebra.rewards import ClassReward
from ratiograph.core.types import Condition
from ratiograph.data.stream import load_all
from ratiograph.networks.architectures.classifier import DigitClassifier
from tools_here import call, tool

RING = "gin/mixture2d_first_order.gin"


@pytest.fixture
def run():
    """Calls the tool with flags, in this process."""
    with tool("fit_normalizer") as fit_normalizer:
        yield lambda *arguments: call(fit_normalizer, *arguments)


def test_estimates_every_tilted_target_of_a_run(run, tmp_path):
    """Two terms with rewards of their own: (e^b + 1) / 2 for half the mass on even modes, within the stated error."""
    terms = [
        "Objective.terms={'distribution': @Term(), 'second': @second/Term()}",
        "second/ClassReward.log_rewards=(2.0, 0.0)",
    ]
    out = tmp_path / "normalizer.gin"
    arguments = [f"--gin_file={RING}", *(f"--gin_param={line}" for line in terms)]
    run(*arguments, "--samples=40001", f"--out={out}")
    text = out.read_text()
    errors = [float(e) for e in re.findall(r"40,001 samples, .* standard error of log Z (\S+)", text)]
    objective = config.build(config.parse([RING, str(out)], terms)).task.objective
    for term, b, error in zip(objective.terms.values(), (1.0, 2.0), errors, strict=True):
        exact = math.log((math.exp(b) + 1) / 2)
        spread = (math.exp(b) - 1) / (math.exp(b) + 1)  # std(R) / mean(R) of a fair coin
        # The classifier is not quite certain, which the coin ignores.
        assert error == pytest.approx(spread / math.sqrt(40_001), rel=0.05)
        assert abs(float(term.target.log_normalizer) - exact) < 4 * error
        assert not term.target.needs_samples
    assert "exact samples of RingMixture" in text
    assert "log_rewards=(2, 0)" in text


def test_reads_no_sample_of_the_data_twice(run, tmp_path):
    """All 500 held-out digits, however many are asked for: log Z is of exactly those."""
    out = tmp_path / "normalizer.gin"
    data = ["--gin_file=gin/mnist_reward_tilt.gin", "--data=mnist-heldout"]
    run(*data, "--batch_size=300", "--samples=900", f"--out={out}")
    assert "500 samples" in out.read_text()
    reward = ClassReward(classifier=DigitClassifier(), log_rewards=(1.25, 0.0) * 5)
    reward.load()
    log_reward = reward.log_reward(load_all("mnist-heldout")[0], Condition()).double()
    found = float(re.search(r"^RewardTilted.log_normalizer = (\S+)$", out.read_text(), re.MULTILINE)[1])
    assert found == pytest.approx(float(torch.logsumexp(log_reward, 0) - math.log(500)), abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gin_file=gin/mixture2d_tilted.gin"], "no term of this run has a tilted target"),
        ([f"--gin_file={RING}", "--gin_param=ClassReward.log_reward=(1.0, 0.0)"], "log_rewards"),
    ],
)
def test_mistakes_are_one_line(arguments, message, run, tmp_path, capsys):
    assert run(*arguments, f"--out={tmp_path / 'normalizer.gin'}") == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "normalizer.gin").exists()
