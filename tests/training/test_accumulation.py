"""A step taken in micro-batches is the step taken at once: weights over the whole batch, gradients, statistics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ratiograph.algebra.directions import RatioGradient, ScoreDifference
from ratiograph.algebra.noising import VarianceExploding
from ratiograph.algebra.normalization import Clamped, MeanNormalized, RatioNormalized, TimeNormalized
from ratiograph.algebra.objective import AbsorbedTerm, RewardAscent, Term
from ratiograph.algebra.ratio_losses import LogisticLoss, R1Penalized
from ratiograph.algebra.rewards import LinearReward
from ratiograph.algebra.targets import RewardTilted
from ratiograph.algebra.times import InverseTeacherError, KarrasIndex
from ratiograph.algebra.weightings import JensenShannon, SoftenedReverseKL
from ratiograph.core.randomness import normal
from ratiograph.core.types import Batch, Condition
from ratiograph.networks.architectures.unet import UNet
from ratiograph.networks.ratios import EncoderRatio, StudentScoreHeadRatio, StudentScoreMeanRatio
from ratiograph.networks.samplers import HeunSampler
from ratiograph.tasks.denoiser_training import DenoiserTraining
from ratiograph.tasks.student_passes import KeptPass, ReplayedPass
from ratiograph.training.optim import EMA, Adam
from test_distillation import adversarial, edm, matching, task_of

CPU = torch.device("cpu")
BATCH, STEPS = 8, 3


def over_the_batch(wrap):
    weighting = wrap(Clamped(weighting=RatioNormalized(weighting=JensenShannon(), bins=3, decay=0.5), limit=2.0))
    return Term(direction=RatioGradient(), weighting=weighting)


def tilted(kind):
    target = RewardTilted(reward=LinearReward(slope=[0.01] * 64), log_normalizer=0.1)
    return kind(
        direction=ScoreDifference(),
        weighting=MeanNormalized(weighting=SoftenedReverseKL()),
        target=target,
        time_weight=InverseTeacherError(),
    )


GRAPHS = {
    "teacher's features, mean-normalised": lambda: task_of(
        {"matching": matching(), "normalised": over_the_batch(lambda held: MeanNormalized(weighting=held))}
    ),
    "time-normalised, a ratio with an encoder of its own": lambda: task_of(
        {"normalised": over_the_batch(lambda held: TimeNormalized(weighting=held, bins=3))},
        ratio=EncoderRatio(network=UNet(resolution=8, channels=16, multipliers=(1, 2))),
    ),
    "R1, student score's head, more critics": lambda: task_of(
        {"matching": matching(), "adversarial": adversarial()},
        ratio=StudentScoreHeadRatio(),
        ratio_loss=R1Penalized(loss=LogisticLoss(), weight=1.0),
        student_score_updates=2,
    ),
    "one pass for both losses": lambda: task_of(
        {"adversarial": adversarial()}, ratio=StudentScoreMeanRatio(), ratio_times=None, ratio_optimizer=None
    ),
    "one pass for both losses, R1": lambda: task_of(
        {"adversarial": adversarial()},
        ratio=StudentScoreHeadRatio(),
        ratio_loss=R1Penalized(loss=LogisticLoss(), weight=1.0),
        ratio_times=None,
    ),
    "tilted, absorbed and climbing": lambda: task_of(
        {
            "tilted": tilted(Term),
            "absorbed": tilted(AbsorbedTerm),
            "climb": RewardAscent(reward=LinearReward(slope=[0.02] * 64)),
        }
    ),
}


def stepped(make, accumulation: int, recompute: bool = False) -> tuple[dict, dict]:
    """(every network and statistic, the last step's metrics) after some float64 steps."""
    torch.manual_seed(0)
    task = make().double()
    task.accumulation, task.recompute = accumulation, recompute
    task.prepare(CPU, None)
    generator, data = torch.Generator(), torch.Generator().manual_seed(9)
    for step in range(STEPS):
        images = torch.randn(BATCH, 1, 8, 8, generator=data, dtype=torch.float64)
        metrics = task.step(Batch(images, Condition()), BATCH, generator.manual_seed(step))
    networks = task.training_state()["networks"]
    return {f"{name}.{key}": v for name, held in networks.items() for key, v in held.items()}, metrics


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("name", GRAPHS)
def test_micro_batches_take_the_steps_of_the_batch(name):
    expected, metrics = stepped(GRAPHS[name], 1)
    for accumulation in (2, 8):
        found, told = stepped(GRAPHS[name], accumulation)
        assert_same(found, expected)
        assert_same(told, metrics)
    started = {f"student.{key}": v for key, v in GRAPHS[name]().double().student.state_dict().items()}
    assert sum(not torch.equal(value, expected[key]) for key, value in started.items()) > 20


def test_recomputing_the_students_pass_changes_nothing():
    make = GRAPHS["teacher's features, mean-normalised"]
    for found, expected in zip(stepped(make, 1, recompute=True), stepped(make, 1), strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


class Dropping(nn.Module):
    """A student of one layer with dropout."""

    def __init__(self):
        super().__init__()
        self.layer, self.drop = nn.Linear(6, 6), nn.Dropout(0.5)

    def forward(self, z, condition):
        return self.drop(self.layer(z)).square()


def test_both_passes_drop_the_same_values():
    torch.manual_seed(0)
    student, z, field = Dropping(), torch.randn(8, 6), torch.randn(8, 6)
    passes = ReplayedPass(student, z, Condition(labels=torch.arange(8)), 4)
    torch.rand(100)  # other networks' dropout, between the two
    after = torch.get_rng_state()
    passes.backward(field)
    assert torch.equal(torch.get_rng_state(), after)
    found = student.layer.weight.grad.clone()
    # d x0 / d y = 2 y mask / (1 - rate) with y = mask(layer(z)) / (1 - rate), where x0 = y^2
    y = passes.x0.sqrt() * torch.where(student.layer(z) < 0, -1.0, 1.0)
    kept = 2.0 * (passes.x0 > 0)
    torch.testing.assert_close(found, (field * 2 * y * kept).T @ z, rtol=1e-4, atol=1e-5)
    assert 0.2 < (passes.x0 == 0).float().mean() < 0.8


def test_a_kept_pass_is_plain_autograd():
    torch.manual_seed(0)
    student, z, field = Dropping().eval(), torch.randn(8, 6), torch.randn(8, 6)
    passes = KeptPass(student, z, Condition())
    passes.backward(field)
    found = student.layer.weight.grad.clone()
    student.zero_grad()
    (student(z, None) * field).sum().backward()
    torch.testing.assert_close(found, student.layer.weight.grad)


def test_replayed_keeps_no_graph_and_the_batchs_order():
    torch.manual_seed(0)
    student, z = Dropping().eval(), torch.randn(8, 6)
    passes = ReplayedPass(student, z, Condition(), 4)
    assert not passes.x0.requires_grad
    torch.testing.assert_close(passes.x0, student(z, None))


def teacher_training():
    torch.manual_seed(0)
    return DenoiserTraining(
        denoiser=edm(0),
        noising=VarianceExploding(),
        times=KarrasIndex(),
        optimizer=Adam(lr=1e-3),
        ema=EMA(),
        sampler=HeunSampler(steps=2),
    )


def test_a_teacher_learns_the_same_in_micro_batches():
    expected, metrics = stepped(teacher_training, 1)
    found, told = stepped(teacher_training, 4)
    assert_same(found, expected)
    assert_same(told, metrics)


def test_pieces_of_values_that_travel():
    images = normal((6, 2), torch.Generator().manual_seed(0))
    condition = Condition(labels=torch.arange(6), caption=torch.arange(12).view(6, 2))
    pieces = Batch(images, condition).split(3)
    assert [piece.condition.labels.tolist() for piece in pieces] == [[0, 1], [2, 3], [4, 5]]
    assert torch.equal(torch.cat([piece.images for piece in pieces]), images)
    assert torch.equal(pieces[2].condition.caption, condition.caption[4:])
    assert Condition().split(2) == [Condition(), Condition()]
