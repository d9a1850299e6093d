"""The coefficient of RewardAscent against Gaussians, where it is known, and against least squares by numpy."""

import re

import numpy as np
import pytest
import torch

from fits.coefficient import centred, groups_of
from ratiograph.core.types import Condition
from ratiograph.data.captions import pack
from tools_here import call as run_tool
from tools_here import tool

RING = "--gin_file=gin/mixture2d_reward_ascent.gin"
STD = 0.7
GAUSSIAN = [
    *("RingMixture.modes = 1", f"RingMixture.std = {STD}", "RingMixture.classes = (0,)"),
    *("RewardAscent.reward = @LinearReward()", "LinearReward.slope = (0.8, 0.3)"),
]


@pytest.fixture
def call():
    """Calls the tool with flags, in this process."""
    with tool("fit_coefficient") as module:

        def run(*arguments: str) -> int:
            return run_tool(module, "--device=cpu", *arguments)

        yield run


def test_a_gaussian_has_the_coefficient_of_the_docstring(call, capsys):
    """c = E_t[w s^2 / (s^2 + sigma^2)] of ``objective``, for which first order is exact; three times that of w = 3."""
    levels = np.linspace(0.05 ** (1 / 7), 3 ** (1 / 7), 20001) ** 7
    exact = float((STD**2 / (STD**2 + levels**2)).mean())
    lines = [f"--gin_param={line}" for line in GAUSSIAN]
    for coefficient in (1.0, 3.0):
        call(RING, *lines, f"--gin_param=Term.coefficient = {coefficient}", "--samples=6000", "--batch_size=3000")
        told, spread, line = capsys.readouterr().out.splitlines()
        assert told == f"# 6,000 samples in 1 conditions, 20 noise levels each; E[w] = {coefficient:g}"
        error = float(re.fullmatch(r"# standard error (\S+)", spread)[1])
        assert 0.001 < error / coefficient < 0.02
        found = float(line.removeprefix("RewardAscent.coefficient = "))
        assert found == pytest.approx(coefficient * exact, abs=4 * error)


def test_every_caption_has_a_constant_of_its_own():
    """Least squares with a column for each group, by numpy."""
    captions = ["a two", "a six", "a two", "a six", "a six", "a two", "a two"]
    groups = groups_of(Condition(caption=pack(captions)), 7)
    assert groups_of(Condition(labels=torch.tensor([4, 1, 4])), 3).tolist() == [1, 0, 1]
    assert groups_of(Condition(), 3).tolist() == [0, 0, 0]
    x, y = torch.randn(2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_free, y_free = centred(x, groups), centred(y, groups)
    columns = np.stack([x.numpy(), *(np.array([c == name for c in captions]) for name in set(captions))], 1)
    wanted = np.linalg.lstsq(columns.astype(float), y.numpy(), rcond=None)[0][0]
    assert float(x_free @ y_free / (x_free @ x_free)) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gin_file=gin/mixture2d_scores.gin"], "must be a Term and a RewardAscent"),
        (
            [RING, "--gin_param=RewardAscent.reward = @LinearReward()", "--gin_param=LinearReward.slope = (0.0, 0.0)"],
            "vary",
        ),
        ([], "no configuration"),
    ],
)
def test_mistakes_are_one_clear_line(call, capsys, arguments, said):
    assert call(*arguments) == 1
    found = capsys.readouterr().err
    assert found.startswith("error: ")
    assert said in found
