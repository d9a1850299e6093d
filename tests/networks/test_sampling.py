"""Random numbers that belong to a sample: the same in any batch, in any order, on any rank."""

import numpy as np
import pytest
import torch
from scipy import stats

from ratiograph.core.draws import SampleDraws
from ratiograph.networks.students import OneStep, OneStepDDPM


def drawn(indices, seed=3):
    draws = SampleDraws(seed, indices)
    return draws.normal((3, 8, 8)), draws.integers(10), draws.normal((5,)), draws.integers(1000)


def in_batches(size, indices):
    parts = [drawn(indices[k : k + size]) for k in range(0, len(indices), size)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def test_samples_do_not_depend_on_the_batch():
    indices = list(range(1000, 1064))
    whole = in_batches(64, indices)
    for size in (7, 1):
        for found, expected in zip(in_batches(size, indices), whole, strict=True):
            assert torch.equal(found, expected)
    assert [part.dtype for part in whole] == [torch.float32, torch.int64, torch.float32, torch.int64]
    assert [list(part.shape) for part in whole] == [[64, 3, 8, 8], [64], [64, 5], [64]]


def test_indices_come_in_any_order_and_again():
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for found, expected in zip(drawn(order.tolist()), drawn(range(64)), strict=True):
        assert torch.equal(found, expected[order])
    twice = SampleDraws(0, [5, 5]).normal((4,))
    assert torch.equal(twice[0], twice[1])


def test_a_stream_is_philox_of_seed_and_index():
    """Against NumPy's own, at the ends of the range, where a key made through floats would be another's."""
    top = 2**64 - 1
    for seed, index in ((0, 0), (top, 5), (5, top), (7, top - 1)):
        key = np.array([seed, index], dtype=np.uint64)
        normals = np.random.Generator(np.random.Philox(key=key))
        integers = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, 1]))
        draws = SampleDraws(seed, [index])
        assert draws.normal((3, 2)).flatten().tolist() == normals.standard_normal(6, dtype=np.float32).tolist()
        assert draws.integers(99).tolist() == [integers.integers(99)]


def test_noise_does_not_depend_on_the_label():
    plain, labelled = SampleDraws(0, range(5)), SampleDraws(0, range(5))
    labelled.integers(10)
    assert torch.equal(plain.normal((6,)), labelled.normal((6,)))


def test_draws_advance_and_seeds_differ():
    draws = SampleDraws(0, range(4))
    first, second = draws.normal((50,)), draws.normal((50,))
    assert (first == second).sum() == 0
    assert (first == SampleDraws(1, range(4)).normal((50,))).sum() == 0
    # The key is a pair, not a sum.
    assert (SampleDraws(1, [2]).normal((50,)) == SampleDraws(2, [1]).normal((50,))).sum() == 0


def test_neighbours_are_independent():
    """Samples i, i + 1 and i + 2, and neighbouring seeds, have correlations within 4.5 standard errors of 0."""
    size, count = 2000, 200
    first, other = (SampleDraws(seed, range(count)).normal((size,)) for seed in (11, 12))
    for a, b in ((first[1:], first[:-1]), (first[2:], first[:-2]), (first, other), (first[1:], other[:-1])):
        assert abs(float((a * b).mean())) < 4.5 / (a.numel() ** 0.5)
    correlations = torch.corrcoef(first)[~torch.eye(count, dtype=torch.bool)]
    assert float(correlations.std()) == pytest.approx(size**-0.5, rel=0.05)
    assert float(correlations.abs().max()) < 6 * size**-0.5


def test_normals_are_normal_across_samples():
    """The first number of each of 20,000 samples, where a poor seeding would show."""
    first = SampleDraws(0, range(20000)).normal((2,))
    for column in first.T:
        assert stats.kstest(column.numpy(), "norm").pvalue > 1e-3
    counts = torch.bincount(SampleDraws(0, range(20000)).integers(10), minlength=10)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_students_take_their_noise_from_the_draws():
    denoiser = torch.nn.Module()
    denoiser.shape = (2, 4, 4)
    denoiser.process = None
    for student in (OneStep(denoiser=denoiser), OneStepDDPM(denoiser=denoiser)):
        z = student.noise_of(SampleDraws(1, [4, 9]))
        assert torch.equal(z, SampleDraws(1, [4, 9]).normal((2, 4, 4)))


def test_refusals():
    with pytest.raises(ValueError, match="index -1 must be 0 to"):
        SampleDraws(0, [0, -1])
    with pytest.raises(ValueError, match="seed -2"):
        SampleDraws(-2, [0])
