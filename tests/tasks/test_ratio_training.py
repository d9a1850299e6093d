"""The learned ratio against the exact one on mixtures."""

import json
from pathlib import Path

import pytest
import torch

from ratiograph import config
from ratiograph.algebra.noising import VarianceExploding
from ratiograph.algebra.ratio_losses import LogisticLoss, R1Penalized
from ratiograph.algebra.times import KarrasIndex
from ratiograph.core.types import Condition, Noisy
from ratiograph.networks.architectures.unet import MLP
from ratiograph.networks.ratios import EncoderRatio
from ratiograph.networks.teachers.mixture import RingMixture
from ratiograph.tasks.ratio_training import RatioEvaluator, RatioTraining
from ratiograph.training import trainer
from ratiograph.training.optim import Adam

ROOT = Path(__file__).resolve().parents[2]


def task_of(loss=None):
    return RatioTraining(
        teacher=RingMixture(modes=2, std=0.3),
        student=RingMixture(modes=2, std=0.3, weights=(1.0, 3.0)),
        ratio=EncoderRatio(network=MLP(width=32, layers=4)),
        noising=VarianceExploding(sigma_min=0.05, sigma_max=1.0),
        times=KarrasIndex(sigma_min=0.05, sigma_max=1.0),
        optimizer=Adam(lr=3e-3),
        loss=loss,
    )


def test_the_exact_ratio_of_two_weighted_modes():
    """Modes at (1, 0) and (-1, 0) of q weigh 1/4 and 3/4: far out on either side l tends to log 2 and log 2/3."""
    task = task_of()
    x_t = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    level = torch.full((3,), 0.2, dtype=torch.float64)
    noisy = Noisy(x_t, level, torch.ones_like(level), level)

    class At:
        pass

    at = At()
    at.noisy, at.condition = noisy, Condition()
    expected = torch.tensor([2.0, 2 / 3, 1.0], dtype=torch.float64).log()
    torch.testing.assert_close(task.exact_log_ratio(at), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("loss", [None, R1Penalized(loss=LogisticLoss(), weight=1e-3)])
def test_a_short_training_finds_the_ratio(loss, tmp_path):
    torch.manual_seed(0)
    task, evaluator, generator = task_of(loss), RatioEvaluator(samples=4000, bins=2), torch.Generator()
    task.prepare(torch.device("cpu"), None)
    before = evaluator.during(task, torch.device("cpu"), 0)
    assert before["correlation"] == 0
    for k in range(300):
        task.step(None, 256, generator.manual_seed(k))
    document = evaluator.after(task, torch.device("cpu"), 0, [], tmp_path)
    row = document["rows"][-1]
    assert row["correlation"] > 0.95
    assert row["rms_error"] < 0.5 * row["exact_std"]
    assert row["mean_exp_student"] == pytest.approx(1, abs=0.05)
    assert (tmp_path / "figures" / "ratio.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_learned_ratio_at_convergence(tmp_path):
    """The shipped recipe: correlation with the exact l over all times, and E_q[e^l] within 5 % of 1 in every bin."""
    file = str(ROOT / "gin/mixture2d_ratio_training.gin")
    cfg = config.parse([file], [], {})
    torch.manual_seed(0)
    trainer.train(config.build(cfg), workdir=tmp_path)
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert rows[-1]["correlation"] >= 0.98
    for row in rows:
        assert row["mean_exp_student"] == pytest.approx(1, abs=0.05)
