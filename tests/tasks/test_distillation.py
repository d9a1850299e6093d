"""One training step: exact gradient, passes of each network, what is refused."""

import copy

import pytest
import torch

from ratiograph.algebra.directions import RatioGradient, ScoreDifference
from ratiograph.algebra.noising import VarianceExploding
from ratiograph.algebra.objective import Objective, Term
from ratiograph.algebra.ratio_losses import LogisticLoss, R1Penalized
from ratiograph.algebra.times import KarrasIndex, SigmaSquared
from ratiograph.algebra.weightings import KL, LR, JensenShannon, SoftenedReverseKL
from ratiograph.core.contracts import Denoiser, Evaluation, Needs
from ratiograph.core.types import Batch, Condition
from ratiograph.networks.architectures.unet import UNet
from ratiograph.networks.augmentation import Flips, NonLeaky
from ratiograph.networks.denoisers import EDM
from ratiograph.networks.ratios import EncoderRatio, StudentScoreHeadRatio, StudentScoreMeanRatio, TeacherFeatureRatio
from ratiograph.networks.samplers import HeunSampler
from ratiograph.networks.students import OneStep
from ratiograph.tasks.distillation import Distillation
from ratiograph.tasks.positives import TeacherSamples
from ratiograph.training import checkpoints
from ratiograph.training.optim import EMA, Adam
from ratiograph.training.warm_start import WarmStart


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


def test_a_ratio_on_the_student_score_shares_its_pass():
    """Without times of its own: one encoder pass over real samples, one whole pass over the student's, no other."""
    task = prepared(task_of({"matching": matching()}, ratio=StudentScoreMeanRatio(), ratio_times=None))
    calls = []
    for method in ("encode", "decode"):
        original = getattr(task.student_score, method)
        setattr(task.student_score, method, lambda *a, m=method, o=original: (calls.append(m), o(*a))[1])
    task.step(real(), 4, torch.Generator().manual_seed(0))
    # The objective's pass, the student score's own, and the encoder on real samples.
    assert calls == ["encode", "decode", "encode", "decode", "encode"]
    assert set(task.optimizers) == {"student", "student_score"}


def test_joint_training_adds_both_gradients():
    """The gradient of the shared encoder is the sum of what each loss gives alone."""
    found = {}
    for name in ("score", "ratio", "both"):
        task = prepared(task_of({"matching": matching()}, ratio=StudentScoreHeadRatio(width=16), ratio_times=None))
        for parameter in task.ratio.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
        generator, x0 = torch.Generator().manual_seed(3), torch.randn(4, 1, 8, 8, generator=torch.manual_seed(4))
        names = {"score": {"student_score"}, "ratio": {"ratio"}, "both": {"student_score", "ratio"}}[name]
        task.critics.learn(names, x0, Condition(), real(), generator)
        stem = task.student_score.network.stem.weight
        found[name] = stem.grad.clone()
    torch.testing.assert_close(found["score"] + found["ratio"], found["both"])
    assert found["ratio"].abs().max() > 1e-8


def test_r1_changes_what_the_ratio_learns():
    losses = {}
    for weight in (0.0, 2.0):
        task = task_of(
            {"matching": matching()},
            ratio_loss=R1Penalized(loss=LogisticLoss(), weight=weight),
            ratio_times=KarrasIndex(),
        )
        prepared(task)
        for parameter in task.ratio.parameters():
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(5)
        learnt = task.critics.learn({"ratio"}, torch.zeros(4, 1, 8, 8), Condition(), real(), generator)
        losses[weight] = learnt["loss/ratio"]
        images = real().images
        generator.manual_seed(5)
        t = task.ratio_times(task.noising, 4, generator)
        noisy = task.noising.add_noise(images, t, torch.empty_like(images).normal_(generator=generator))
        evaluation = Evaluation(noisy, images, Condition(), task.nodes, Needs(ratio_gradient=True))
        penalty = evaluation.log_ratio_gradient.square().flatten(1).sum(1).mean()
    torch.testing.assert_close(losses[2.0] - losses[0.0], penalty, rtol=1e-4, atol=1e-6)


def test_positives_may_be_the_teachers_samples():
    task = prepared(
        task_of({"matching": matching()}, positives=TeacherSamples(sampler=HeunSampler(steps=2)), ratio_updates=2)
    )
    assert not task.needs_data
    generator = torch.Generator().manual_seed(0)
    found = task.positives.draw(None, 4, task.teacher, task.student, generator)
    generator.manual_seed(0)
    noise = task.student.noise(4, generator)
    torch.testing.assert_close(found.images, HeunSampler(steps=2).sample(task.teacher, noise, Condition()))
    assert task.step(None, 4, generator)["loss/ratio"] > 0


def test_a_run_starts_from_another(tmp_path):
    first = prepared(task_of({"matching": matching()}))
    for k in range(2):
        first.step(real(), 4, torch.Generator().manual_seed(k))
    checkpoints.save(tmp_path / "checkpoints", 2, {"step": 2, "task": first.training_state()})
    second = prepared(task_of({"matching": matching()}, warm_start=WarmStart(run=str(tmp_path))))
    for name in ("student", "average", "student_score", "ratio"):
        pairs = zip(getattr(first, name).parameters(), getattr(second, name).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), name
    assert second.steps_done == 0
    some = prepared(task_of({"matching": matching()}, warm_start=WarmStart(run=str(tmp_path), nodes=("ratio",))))
    assert torch.equal(some.ratio.heads[0].out.weight, first.ratio.heads[0].out.weight)
    assert not torch.equal(some.student.denoiser.network.stem.weight, first.student.denoiser.network.stem.weight)


def test_a_warm_start_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        prepared(task_of({"matching": matching()}, warm_start=WarmStart(run=str(tmp_path))))
    alone = prepared(task_of({"matching": matching()}))
    checkpoints.save(tmp_path / "checkpoints", 1, {"step": 1, "task": alone.training_state()})
    with pytest.raises(ValueError, match="'critic' is not in this graph"):
        prepared(task_of({"matching": matching()}, warm_start=WarmStart(run=str(tmp_path), nodes=("critic",))))


def score_free(weighting):
    return Term(direction=RatioGradient(), weighting=weighting, time_weight=SigmaSquared())


@pytest.mark.parametrize("weighting", [KL, JensenShannon, SoftenedReverseKL])
def test_training_without_distillation_has_no_score(weighting):
    """DiKL, DiJS and DiRM: neither teacher nor student score anywhere in the graph."""
    ratio = EncoderRatio(network=UNet(resolution=8, channels=16, multipliers=(1, 2)))
    nodes = {"teacher": None, "student_score": None, "student_score_times": None, "student_score_optimizer": None}
    task = prepared(task_of({"distribution": score_free(weighting())}, ratio=ratio, **nodes))
    denoisers = [name for name, module in task.named_modules() if isinstance(module, Denoiser)]
    assert denoisers == ["student.denoiser", "average.denoiser"]
    metrics = task.step(real(), 4, torch.Generator().manual_seed(0))
    assert set(task.optimizers) == {"student", "ratio"}
    assert "loss/student_score" not in metrics
    assert metrics["divergence/distribution"] == pytest.approx(0, abs=1e-6)  # a new ratio says l = 0


def test_augmentation_is_of_the_critics_images_alone():
    """Flipping every image of the critics is training them on mirrored samples; the terms' field stays as it was."""
    plain, flipped = (
        prepared(task_of({"matching": matching()}, augmentation=augmentation))
        for augmentation in (None, Flips(probability=1.0))
    )
    x0 = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    losses = []
    for task, samples, positives in ((plain, x0.flip(3), real().images.flip(3)), (flipped, x0, real().images)):
        draw_coins = task is plain  # as many random numbers as the flips take
        generator = torch.Generator().manual_seed(1)
        if draw_coins:
            torch.rand(4, generator=generator)
        learnt = task.critics.learn({"student_score"}, samples, Condition(), None, generator)
        losses.append(learnt["loss/student_score"])
        if draw_coins:
            torch.rand(8, generator=generator)
        batch = Batch(positives, Condition())
        losses.append(task.critics.learn({"ratio"}, samples, Condition(), batch, generator)["loss/ratio"])
    assert losses[0] == losses[2]
    assert losses[1] == losses[3]
    fields = [
        task.objective.fields(task.evaluate(x0, Condition(), torch.Generator().manual_seed(2)))["matching"]
        for task in (plain, flipped)
    ]
    assert torch.equal(*fields)


def test_augmentation_that_a_critic_cannot_be_told_is_refused():
    with pytest.raises(ValueError, match="UNet has no augmentation labels and would learn to make augmented images"):
        task_of({"matching": matching()}, augmentation=NonLeaky())


def test_critics_may_learn_from_the_step_s_samples_alone():
    """Without fresh samples the student runs once a step, and its samples are noised anew for each update."""
    torch.manual_seed(3)
    task = prepared(task_of({"m": matching()}, student_score_updates=3, ratio_updates=3, fresh_samples=False))
    runs, seen = [], []
    task.student.register_forward_hook(lambda *_: runs.append(1))
    learn_student_score, noise = type(task.critics)._learn_student_score, []

    def watched(critics, student, *rest, **named):
        seen.append(student.x0)
        noise.append(student.noisy.x_t - student.x0)
        return learn_student_score(critics, student, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(task.critics), "_learn_student_score", watched)
        task.step(real(), 4, torch.Generator().manual_seed(0))
    assert len(runs) == 1
    assert len(seen) == 3
    for again in (1, 2):
        assert torch.equal(seen[0], seen[again])
        assert not torch.equal(noise[0], noise[again])


def test_a_lazy_penalty_is_taken_at_every_nth_update(monkeypatch):
    """Counted over steps: with two updates a step and every = 4, the first of every second step."""
    task = task_of({"m": matching()}, student_score_updates=2, ratio_updates=2)
    task.ratio_loss, taken = R1Penalized(loss=LogisticLoss(), weight=1.0, every=4), []
    prepared(task)
    penalised = R1Penalized.__call__
    monkeypatch.setattr(R1Penalized, "__call__", lambda self, *a: taken.append(self.weight) or penalised(self, *a))
    generator = torch.Generator().manual_seed(0)
    for expected in ([4.0], [4.0], [4.0, 4.0]):
        task.step(real(), 4, generator)
        assert taken == expected


def test_gradients_of_two_networks_never_exist_at_once(monkeypatch):
    """The student score is updated, and its gradients are gone, before a ratio on other features learns."""
    task, held = prepared(task_of({"m": matching()})), []
    loss = LogisticLoss.__call__

    def watched(self, *given):
        held.append(sum(p.grad is not None for node in (task.student, task.student_score) for p in node.parameters()))
        return loss(self, *given)

    monkeypatch.setattr(LogisticLoss, "__call__", watched)
    task.step(real(), 4, torch.Generator().manual_seed(0))
    assert held == [0]
