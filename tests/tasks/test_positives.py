"""Samples that stand for p: the data, exact ones, and those that a sampler makes of the teacher."""

import pytest
import torch

from ratiograph.core.types import Batch, Condition
from ratiograph.networks.architectures.unet import MLP, UNet
from ratiograph.networks.denoisers import EDM
from ratiograph.networks.samplers import EulerSampler, HeunSampler, StochasticHeunSampler
from ratiograph.networks.students import OneStep
from ratiograph.networks.teachers.mixture import RingMixture
from ratiograph.tasks.positives import ExactSamples, RealSamples, TeacherSamples

RING = RingMixture(std=0.05)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def student_of(classes=8):
    return OneStep(denoiser=EDM(network=MLP(dimension=2, width=8, layers=2, classes=classes)))


class Captioned(torch.nn.Module):
    """Stands for a teacher of captions: its samples end where the caption's states say."""

    def denoise(self, noisy, condition):
        return condition.text.mean(1).to(noisy.x_t)


def captioned_student():
    student = student_of(classes=0)
    student.denoiser.network.text_width = 2
    return student


def test_a_teachers_samples_have_the_labels_they_were_made_with():
    found = TeacherSamples(sampler=HeunSampler()).draw(None, 300, RING, student_of(), generator())
    assert torch.equal(torch.cdist(found.images.double(), RING.means).argmin(1), found.condition.labels)
    assert set(found.condition.labels.tolist()) == set(range(8))


def test_captioned_positives_have_the_batchs_captions():
    condition = Condition(
        text=torch.randn(5, 3, 2, generator=generator()), caption=torch.zeros(5, 4, dtype=torch.uint8)
    )
    batch = Batch(torch.full((5, 2), 9.0), condition)
    found = TeacherSamples(sampler=EulerSampler(steps=3)).draw(batch, 5, Captioned(), captioned_student(), generator(1))
    assert found.condition is condition
    torch.testing.assert_close(found.images, condition.text.mean(1))
    with pytest.raises(AssertionError):
        TeacherSamples(sampler=EulerSampler()).draw(batch, 4, Captioned(), captioned_student(), generator())


def test_a_stochastic_sampler_draws_from_the_generator():
    positives = TeacherSamples(sampler=StochasticHeunSampler(steps=6))
    found = []
    for seed, other in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(other)  # torch's own is not asked
        found.append(positives.draw(None, 6, RING, student_of(), generator(seed)).images)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    student, drawn = student_of(), generator(3)
    condition = student.condition(6, drawn)
    quiet = HeunSampler(steps=6).sample(RING, student.noise(6, drawn), condition)
    assert (quiet - found[0]).abs().max() > 1e-3


def test_data_and_exact_samples():
    batch = Batch(torch.zeros(2, 2), Condition())
    assert RealSamples().draw(batch, 2, None, None, generator()) is batch
    found = ExactSamples().draw(None, 50, RING, None, generator(2))
    assert torch.equal(found.images, RING.sample(50, generator(2)))


def test_teachers_that_cannot_are_refused():
    with pytest.raises(ValueError, match="use RealSamples or TeacherSamples"):
        ExactSamples().check(EDM(network=UNet(resolution=8, channels=16, multipliers=(1, 2))))
    with pytest.raises(ValueError, match=r"bind Distillation\.teacher"):
        TeacherSamples(sampler=HeunSampler()).check(None)
