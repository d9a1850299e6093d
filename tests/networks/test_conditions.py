"""What the student's samples are conditioned on, and that a run remembers it."""

import numpy as np
import pytest
import torch

from ratiograph.algebra.directions import ScoreDifference
from ratiograph.algebra.noising import VarianceExploding
from ratiograph.algebra.objective import Objective, Term
from ratiograph.algebra.times import KarrasIndex
from ratiograph.algebra.weightings import KL
from ratiograph.core.draws import SampleDraws
from ratiograph.core.types import Batch, Condition
from ratiograph.data.captions import unpack
from ratiograph.data.images import encode_png
from ratiograph.data.shards import write_shards
from ratiograph.data.stream import ShardStream
from ratiograph.networks.architectures.unet import UNet
from ratiograph.networks.conditions import BatchConditions, FixedLabels, Prompts, UniformLabels
from ratiograph.networks.denoisers import EDM
from ratiograph.networks.students import OneStep
from ratiograph.tasks.distillation import Distillation
from ratiograph.training import checkpoints
from ratiograph.training.experiment import Task
from ratiograph.training.optim import EMA, Adam


def edm(seed=0, classes=3):
    torch.manual_seed(seed)
    denoiser = EDM(network=UNet(resolution=8, channels=16, multipliers=(1, 2), classes=classes))
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return denoiser


def task_of(conditions=None, **changes):
    task = Distillation(
        student=OneStep(denoiser=edm(0)),
        teacher=edm(1),
        student_score=edm(2),
        student_score_times=KarrasIndex(),
        student_score_optimizer=Adam(),
        objective=Objective(terms={"matching": Term(direction=ScoreDifference(), weighting=KL())}),
        noising=VarianceExploding(),
        times=KarrasIndex(),
        student_optimizer=Adam(lr=1e-3),
        ema=EMA(),
        conditions=conditions,
        **changes,
    )
    task.prepare(torch.device("cpu"), None)
    return task


def batch(labels):
    return Batch(torch.zeros(len(labels), 1, 8, 8), Condition(torch.tensor(labels)))


def test_parts_of_a_condition_move_together():
    one = Condition(labels=torch.tensor([1, 2]), text=torch.ones(2, 3, 4), pooled=torch.ones(2, 5))
    other = Condition(labels=torch.tensor([0]), text=torch.zeros(1, 3, 4), sizes=torch.zeros(1, 6))
    joined = one.join(other)
    assert joined.parts().keys() == {"labels", "text"}
    assert joined.labels.tolist() == [1, 2, 0]
    assert torch.equal(joined.text, torch.cat([one.text, other.text]))
    twice = one.repeat(2)
    assert twice.labels.tolist() == [1, 2, 1, 2]
    assert twice.text.shape == (4, 3, 4)
    assert twice.pooled.shape == (4, 5)
    assert one.map(lambda part: part[1:]).labels.tolist() == [2]
    assert one.to(torch.device("meta")).text.is_meta
    assert Condition().parts() == {}


def test_uniform_labels_are_the_student_s_own_draw():
    student, conditions = OneStep(denoiser=edm()), UniformLabels()
    drawn = conditions.draw(None, 200, student, torch.Generator().manual_seed(4))
    assert torch.equal(drawn.labels, student.condition(200, torch.Generator().manual_seed(4)).labels)
    assert set(drawn.labels.tolist()) == {0, 1, 2}
    assert UniformLabels().draw(None, 2, OneStep(denoiser=edm(classes=0)), torch.Generator()).parts() == {}


def test_labels_of_a_sample_are_its_own():
    student, conditions = OneStep(denoiser=edm()), UniformLabels()
    together = conditions.sampled(SampleDraws(2, range(300)), student).labels
    alone = [conditions.sampled(SampleDraws(2, [k]), student).labels for k in range(300)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together, SampleDraws(2, range(300)).integers(3))
    assert (torch.bincount(together) - 100).abs().max() < 4 * (300 * 2 / 9) ** 0.5
    free = OneStep(denoiser=edm(classes=0))
    assert conditions.sampled(SampleDraws(2, [0]), free).parts() == {}


def test_fixed_labels_come_in_turn():
    student, conditions = OneStep(denoiser=edm()), FixedLabels(labels=[2, 0])
    conditions.check(student)
    assert conditions.sampled(SampleDraws(0, [0, 5, 1, 8]), student).labels.tolist() == [2, 0, 0, 2]
    assert conditions.preview(3, student, torch.Generator()).labels.tolist() == [2, 0, 2]
    with pytest.raises(ValueError, match="class 3 was asked for, but the student's network has classes 0 to 2"):
        FixedLabels(labels=[1, 3]).check(student)
    with pytest.raises(ValueError, match="has no classes"):
        FixedLabels(labels=[0]).check(OneStep(denoiser=edm(classes=0)))


def test_prompts_come_in_turn():
    class Encoder:
        def encode(self, captions):
            return Condition(text=torch.tensor([[[float(len(caption))]] for caption in captions]))

    student = OneStep(denoiser=edm())
    conditions = Prompts(captions=["a", "bcd"], encoder=Encoder())
    found = conditions.sampled(SampleDraws(0, [3, 0, 2]), student)
    assert found.text.flatten().tolist() == [3, 1, 1]
    assert unpack(found.caption) == ["bcd", "a", "a"]
    with pytest.raises(ValueError, match="not told captions"):
        conditions.check(student)
    student.denoiser.network.text_width = 768
    conditions.check(student)


def test_a_network_of_captions_is_not_given_labels():
    student = OneStep(denoiser=edm())
    student.denoiser.network.text_width = 768
    with pytest.raises(ValueError, match="conditions = @BatchConditions"):
        UniformLabels().check(student)
    BatchConditions().check(student)


def test_the_student_is_told_what_the_batch_says():
    task = task_of(BatchConditions(), student_score_updates=2)
    assert task.needs_data
    assert not task_of().needs_data
    told = []
    encode = task.student.denoiser.encode
    task.student.denoiser.encode = lambda noisy, condition: (
        told.append(condition.labels.tolist()),
        encode(noisy, condition),
    )[1]
    task.step(batch([2, 0, 2, 1]), 4, torch.Generator().manual_seed(0))
    assert told == [[2, 0, 2, 1]] * 2


def test_data_without_conditions_is_refused():
    with pytest.raises(ValueError, match="neither labels nor captions"):
        BatchConditions().draw(Batch(torch.zeros(2, 1, 8, 8), Condition()), 2, None, None)


def test_previews_take_the_first_conditions_in_turn():
    conditions = BatchConditions(kept=3)
    with pytest.raises(ValueError, match=r"call Distillation\.fit"):
        conditions.preview(2, None, torch.Generator())
    conditions.remember(iter([batch([2, 0, 1, 1]), batch([0, 0, 0, 0])]))
    assert conditions.preview(7, None, torch.Generator()).labels.tolist() == [2, 0, 1, 2, 0, 1, 2]
    assert conditions.preview(2, None, torch.Generator()).labels.tolist() == [2, 0]


def test_samples_take_the_first_conditions_by_their_index():
    conditions = BatchConditions(kept=3)
    with pytest.raises(ValueError, match=r"call Distillation\.fit"):
        conditions.sampled(SampleDraws(0, [0]), None)
    conditions.remember(iter([batch([2, 0, 1, 1])]))
    assert conditions.sampled(SampleDraws(0, [4, 0, 3_000_002]), None).labels.tolist() == [0, 2, 1]


def test_captions_stay_on_the_cpu():
    conditions = BatchConditions()
    captions = torch.arange(6, dtype=torch.uint8).view(2, 3)
    conditions.remembered = Condition(labels=torch.tensor([1, 2]), caption=captions)
    found = conditions.sampled(SampleDraws(0, [1, 2, 3]), None)
    assert torch.equal(found.caption, captions[[1, 0, 1]])
    assert conditions.sampled(SampleDraws(0, range(3), "meta"), None).labels.is_meta
    assert torch.equal(conditions.sampled(SampleDraws(0, range(3), "meta"), None).caption, captions[[0, 1, 0]])


def test_a_resumed_run_shows_the_same_conditions(tmp_path):
    first = task_of(BatchConditions())
    first.fit(iter([batch([2, 2, 1])]), torch.Generator())
    checkpoints.save(tmp_path, 1, {"task": first.training_state()})
    second = task_of(BatchConditions())
    second.load_training_state(checkpoints.latest(tmp_path)[1]["task"])
    shown = [task.preview(5, torch.Generator().manual_seed(1)) for task in (first, second)]
    assert torch.equal(*shown)
    assert second.conditions.preview(4, None, torch.Generator()).labels.tolist() == [2, 2, 1, 2]


def test_a_checkpoint_without_conditions_still_loads():
    task = task_of()
    state = task.training_state()
    del state["conditions"]
    task.load_training_state(state)
    assert task.preview(2, torch.Generator().manual_seed(0)).isfinite().all()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_class_that_no_network_has_is_named_in_any_batch(tmp_path, workers):
    image = encode_png(np.zeros((8, 8), np.uint8))
    samples = [{"__key__": f"{k}", "png": image, "cls": b"%d" % (k + 1)} for k in range(10)]  # counted from 1
    (path,) = write_shards(tmp_path / "s", "s", samples, 1)
    network = UNet(resolution=8, channels=16, multipliers=(1,), classes=10)
    task = Task()
    task.denoiser = EDM(network=network)
    batches = ShardStream(urls=str(path), shuffle_buffer=0, workers=workers).batches(5, 0)
    task.check_samples(next(batches))
    message = rf"sample '9' of shard {path} has the class label 10, and the networks know classes 0 to 9"
    with pytest.raises(ValueError, match=message):
        task.check_labels(next(batches))
    batches.close()
    task.check_labels(Batch(torch.zeros(2, 1, 8, 8), Condition(torch.tensor([-1, 9]))))
    task.check_labels(Batch(torch.zeros(2, 1, 8, 8), Condition()))
