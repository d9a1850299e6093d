"""randomness.py: processes together draw what one process would."""

import pytest
import torch

from ratiograph.algebra.noising import ScaledLinearDDPM, VarianceExploding
from ratiograph.algebra.times import DDPMSteps, KarrasIndex, LogitNormal, LogNormalSigma, Uniform
from ratiograph.core.randomness import BatchGenerator, integers, normal, uniform
from ratiograph.networks.teachers.mixture import GaussianMixture

CPU = torch.device("cpu")
MIXTURE = GaussianMixture(means=[[0.0, 1.0], [2.0, -1.0]], std=[0.1, 0.3], weights=[1.0, 3.0])
DRAWS = {
    "normal": lambda n, g: normal((n, 3, 2), g),
    "float64": lambda n, g: normal((n, 5), g, torch.float64),
    "uniform": lambda n, g: uniform((n,), g),
    "integers": lambda n, g: integers(2, 9, n, g),
    "Uniform": lambda n, g: Uniform()(VarianceExploding(), n, g),
    "KarrasIndex": lambda n, g: KarrasIndex()(VarianceExploding(), n, g),
    "LogNormalSigma": lambda n, g: LogNormalSigma()(VarianceExploding(), n, g),
    "LogitNormal": lambda n, g: LogitNormal()(VarianceExploding(), n, g),
    "DDPMSteps": lambda n, g: DDPMSteps()(ScaledLinearDDPM(), n, g),
    "mixture": lambda n, g: MIXTURE.sample(n, g),
}


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", DRAWS)
def test_parts_together_are_the_whole(name, parts):
    """Three draws in a row, so that the streams stay together too."""
    whole, alone = torch.Generator().manual_seed(5), [BatchGenerator(CPU, part, parts) for part in range(parts)]
    for generator in alone:
        generator.manual_seed(5)
    for _ in range(3):
        expected = DRAWS[name](8, whole)
        assert torch.equal(torch.cat([DRAWS[name](8 // parts, generator) for generator in alone]), expected)
        assert len(expected.unique()) > 1


def test_one_part_draws_what_torch_does():
    ours, theirs = BatchGenerator(CPU).manual_seed(0), torch.Generator().manual_seed(0)
    assert torch.equal(normal((3, 4), ours), torch.randn(3, 4, generator=theirs))
    assert torch.equal(uniform((5,), ours), torch.rand(5, generator=theirs))
    assert torch.equal(integers(3, 7, 6, ours), torch.randint(3, 7, (6,), generator=theirs))


def test_a_mixture_draws_what_torchs_multinomial_does():
    ours, theirs = (torch.Generator().manual_seed(0) for _ in range(2))
    mixture = GaussianMixture(means=[[0.0], [10.0], [20.0]], std=1e-6, weights=[1.0, 2.0, 3.0])
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).expand(500, -1) / 6
    expected = torch.multinomial(weights, 1, generator=theirs)[:, 0]
    assert torch.equal((mixture.sample(500, ours)[:, 0] / 10).round().long(), expected)
