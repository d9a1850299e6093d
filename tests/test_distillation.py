"""One training step: exact gradient, passes of each network, what is refused."""

import copy

import pytest
import torch

from ratiograph.denoisers import EDM
from ratiograph.directions import RatioGradient, ScoreDifference
from ratiograph.distillation import Distillation
from ratiograph.networks import UNet
from ratiograph.noising import VarianceExploding
from ratiograph.objective import Objective, Term
from ratiograph.optim import EMA, Adam
from ratiograph.ratios import TeacherFeatureRatio
from ratiograph.students import OneStep
from ratiograph.times import KarrasIndex, SigmaSquared
from ratiograph.types import Batch, Condition
from ratiograph.weightings import KL, LR, SoftenedReverseKL


def edm(seed):
    torch.manual_seed(seed)
    denoiser = EDM(network=UNet(resolution=8, channels=16, multipliers=(1, 2)))
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return denoiser


def task_of(terms, **changes):
    nodes = {
        "student": OneStep(denoiser=edm(0)),
        "teacher": edm(1),
        "student_score": edm(2),
        "student_score_times": KarrasIndex(),
        "student_score_optimizer": Adam(),
        "ratio": TeacherFeatureRatio(width=16),
        "ratio_times": KarrasIndex(),
        "ratio_optimizer": Adam(),
    }
    nodes.update(changes)
    return Distillation(
        objective=Objective(terms=terms),
        noising=VarianceExploding(),
        times=KarrasIndex(high=0.8),
        student_optimizer=Adam(lr=1e-3),
        ema=EMA(),
        **nodes,
    )


def matching():
    return Term(direction=ScoreDifference(), weighting=LR(), time_weight=SigmaSquared())


def adversarial():
    return Term(direction=RatioGradient(), weighting=SoftenedReverseKL(), coefficient=0.1)


def prepared(task):
    task.prepare(torch.device("cpu"), None)
    return task


def real(seed=9):
    return Batch(torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed)), Condition())


def test_each_network_runs_as_often_as_the_graph_says():
    task = prepared(task_of({"matching": matching(), "adversarial": adversarial()}))
    counts = {}

    def count(network, name):
        for method in ("encode", "decode"):
            original = getattr(network, method)

            def counted(*arguments, _original=original, _key=f"{name}.{method}"):
                counts[_key] = counts.get(_key, 0) + 1
                return _original(*arguments)

            setattr(network, method, counted)

    for name in ("teacher", "student_score"):
        count(getattr(task, name), name)
    count(task.student.denoiser, "student")
    task.step(real(), 4, torch.Generator().manual_seed(0))
    assert counts == {
        "student.encode": 1,
        "student.decode": 1,
        "teacher.encode": 2,  # once for both terms; once for real and student samples of the ratio's loss together
        "teacher.decode": 1,
        "student_score.encode": 2,  # once asked, once trained
        "student_score.decode": 2,
    }


def test_the_gradient_is_the_jacobian_transposed_times_the_field():
    """Against d/de of sum(x0(theta + e dtheta) . field) / B, the field held fixed."""
    task = prepared(task_of({"matching": matching()}).double())
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=generator)
    fields = task.objective.fields(task.evaluate(task.student(z, Condition()), Condition(), generator))
    x0 = task.student(z, Condition())
    x0.backward(fields["matching"] / 4)
    parameters = [p for p in task.student.parameters() if p.grad is not None]
    towards = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]
    analytic = sum((p.grad * d).sum() for p, d in zip(parameters, towards, strict=True))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, towards, strict=True):
                p.add_(d, alpha=sign * 1e-6)
            values.append((task.student(z, Condition()) * fields["matching"]).sum() / 4)
            for p, d in zip(parameters, towards, strict=True):
                p.add_(d, alpha=-sign * 1e-6)
    assert analytic.item() == pytest.approx(((values[0] - values[1]) / 2e-6).item(), rel=1e-6)


def test_terms_add_at_the_image():
    torch.manual_seed(5)
    both = prepared(task_of({"matching": matching(), "adversarial": adversarial()}))
    for parameter in both.ratio.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x0 = torch.randn(4, 1, 8, 8)
    fields = both.objective.fields(both.evaluate(x0, Condition(), torch.Generator().manual_seed(1)))
    for name, make in (("matching", matching), ("adversarial", adversarial)):
        alone = prepared(task_of({name: make()}))
        alone.ratio.load_state_dict(both.ratio.state_dict())
        field = alone.objective.fields(alone.evaluate(x0, Condition(), torch.Generator().manual_seed(1)))[name]
        torch.testing.assert_close(fields[name], field)
        assert field.abs().mean() > 1e-6


def test_the_same_seed_takes_the_same_step_and_critics_first_leaves_the_student():
    first, second = (prepared(task_of({"matching": matching()}, critic_steps=1)) for _ in range(2))
    before = copy.deepcopy(first.student.state_dict())
    for k in range(2):
        for task in (first, second):
            task.step(real(), 4, torch.Generator().manual_seed(k))
        moved = any(not torch.equal(before[key], value) for key, value in first.student.state_dict().items())
        assert moved == (k == 1)
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_teacher_stands_still():
    task = prepared(task_of({"matching": matching(), "adversarial": adversarial()}))
    before = copy.deepcopy(task.teacher.state_dict())
    task.step(real(), 4, torch.Generator().manual_seed(0))
    assert all(torch.equal(value, before[key]) for key, value in task.teacher.state_dict().items())
    assert all(p.grad is None for p in task.teacher.parameters())


def test_more_updates_draw_fresh_samples():
    task = prepared(task_of({"matching": matching()}, student_score_updates=3, ratio_updates=2))
    task.step(real(), 4, torch.Generator().manual_seed(0))
    assert {name: updater.updates for name, updater in task.optimizers.items()} == {
        "student": 1,
        "student_score": 3,
        "ratio": 2,
    }


def test_kl_needs_no_ratio():
    kl = Term(direction=ScoreDifference(), weighting=KL(), time_weight=SigmaSquared())
    task = prepared(task_of({"matching": kl}, ratio=None))
    assert not task.needs_data
    metrics = task.step(None, 4, torch.Generator().manual_seed(0))
    assert set(task.optimizers) == {"student", "student_score"}
    assert metrics["field/matching"] > 0


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ({"ratio": None}, "'matching' needs a ratio: bind Distillation.ratio"),
        ({"teacher": None}, "'matching' needs a teacher"),
        ({"student_score": None}, "'matching' needs a student_score"),
        ({"ratio_optimizer": None}, "bind Distillation.ratio_times and ratio_optimizer"),
        ({"student_score_times": None}, "bind Distillation.student_score_times"),
    ],
)
def test_a_graph_with_a_hole_is_refused(missing, message):
    with pytest.raises(ValueError, match=message):
        task_of({"matching": matching()}, **missing)
