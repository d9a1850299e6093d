"""Guidance and clipping against exact mixtures, and through networks, features and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ratiograph.algebra.rewards import LinearReward
from ratiograph.algebra.targets import RewardTilted
from ratiograph.core.contracts import Denoiser, Evaluation, Needs, Nodes
from ratiograph.core.types import Condition, Noisy
from ratiograph.networks.architectures.unet import MLP, UNet
from ratiograph.networks.denoisers import EDM
from ratiograph.networks.guidance import Clipped, Guided
from ratiograph.networks.ratios import TeacherFeatureRatio
from ratiograph.networks.samplers import HeunSampler
from ratiograph.networks.teachers.mixture import GaussianMixture

MIXTURE = GaussianMixture(
    means=[[0.0, 1.0], [-1.0, 0.5], [2.0, -1.0]],
    covariances=[[[0.5, 0.2], [0.2, 0.3]], [[0.4, -0.3], [-0.3, 0.8]], [[0.2, 0.0], [0.0, 0.9]]],
    weights=[0.2, 0.5, 0.3],
    classes=[0, 1, 0],
)
ALPHA, SIGMA = 0.6, 0.4
LABELS = torch.tensor([0, 1]).repeat(20)


def noisy_points(shape=(2,), dtype=torch.float64) -> Noisy:
    x = torch.randn(len(LABELS), *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return Noisy(x, *(torch.full((len(x),), v, dtype=dtype) for v in (SIGMA, ALPHA, SIGMA)))


class Counting(Denoiser):
    """Counts the passes of what it holds, and their samples."""

    def __init__(self, held: Denoiser):
        super().__init__()
        self.held, self.encoded, self.decoded = held, [], []

    def encode(self, noisy, condition):
        self.encoded.append(len(noisy.x_t))
        return self.held.encode(noisy, condition)

    def decode(self, encoding):
        self.decoded.append(len(encoding.features[0]))
        return self.held.decode(encoding)


def network(kind: str, classes: int = 2) -> EDM:
    torch.manual_seed(0)
    inner = (
        MLP(dimension=2, width=16, classes=classes)
        if kind == "MLP"
        else UNet(resolution=8, channels=16, classes=classes)
    )
    for parameter in inner.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # zero-initialised layers would hide differences
    return EDM(network=inner).double()


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, -1.0])
def test_guided_score_of_a_mixture(scale):
    noisy = noisy_points()
    mu = Guided(denoiser=MIXTURE, guidance_scale=scale).denoise(noisy, Condition(LABELS))
    free, conditional = MIXTURE.score(noisy, Condition()), MIXTURE.score(noisy, Condition(LABELS))
    torch.testing.assert_close((ALPHA * mu - noisy.x_t) / SIGMA**2, free + scale * (conditional - free))
    assert (free - conditional).abs().max() > 0.1


def test_guided_score_is_that_of_the_density_times_a_power_of_the_class_posterior():
    x = noisy_points().x_t.requires_grad_()
    noisy = Noisy(x, *(v.expand(len(x)) for v in torch.tensor([SIGMA, ALPHA, SIGMA], dtype=x.dtype)))
    masses = MIXTURE.class_masses()[LABELS].log()
    log_free, log_class = MIXTURE.log_density(noisy, Condition()), MIXTURE.log_density(noisy, Condition(LABELS))
    guided = log_free + 2.5 * (log_class + masses - log_free)
    (score,) = torch.autograd.grad(guided.sum(), x)
    mu = Guided(denoiser=MIXTURE, guidance_scale=2.5).denoise(noisy_points(), Condition(LABELS))
    torch.testing.assert_close((ALPHA * mu - x.detach()) / SIGMA**2, score)


def test_mixture_takes_negative_labels_for_no_class_in_a_mixed_batch():
    noisy, mixed = noisy_points(), torch.where(torch.arange(len(LABELS)) < 10, LABELS, -1)
    found = MIXTURE.denoise(noisy, Condition(mixed))
    torch.testing.assert_close(found[:10], MIXTURE.denoise(noisy, Condition(LABELS))[:10])
    torch.testing.assert_close(found[10:], MIXTURE.denoise(noisy, Condition())[10:])


def test_each_half_runs_once_and_the_unconditional_one_only_for_the_estimate():
    counting = Counting(MIXTURE)
    evaluation = Evaluation(
        noisy_points(), noisy_points().x_t, Condition(LABELS), Nodes(Guided(denoiser=counting, guidance_scale=2.0))
    )
    assert evaluation.teacher_encoding.features[0].shape == (40, 3)
    assert (counting.encoded, counting.decoded) == ([40], [])
    for _ in range(2):
        assert evaluation.teacher_denoised.shape == (40, 2)
        assert evaluation.teacher_encoding.features[0].shape == (40, 3)
    assert counting.encoded == counting.decoded == [40, 40]


def test_a_whole_pass_is_one_of_twice_the_batch():
    counting = Counting(MIXTURE)
    guided = Guided(denoiser=counting, guidance_scale=2.0)
    found = guided.denoise(noisy_points(), Condition(LABELS))
    assert counting.encoded == counting.decoded == [80]
    torch.testing.assert_close(found, guided.decode(guided.encode(noisy_points(), Condition(LABELS))))


@pytest.mark.parametrize("kind", ["MLP", "UNet"])
def test_guided_network_is_the_combination_of_two_passes(kind):
    teacher = network(kind)
    noisy = noisy_points(teacher.shape)
    conditional, free = (teacher.denoise(noisy, Condition(labels)) for labels in (LABELS, torch.full_like(LABELS, -1)))
    guided = Guided(denoiser=teacher, guidance_scale=3.0)
    torch.testing.assert_close(guided.denoise(noisy, Condition(LABELS)), 3 * conditional - 2 * free)
    assert (conditional - free).abs().max() > 1e-3
    for found, expected in zip(
        guided.encode(noisy, Condition(LABELS)).features, teacher.encode(noisy, Condition(LABELS)).features, strict=True
    ):
        torch.testing.assert_close(found, expected)
    assert guided.feature_channels == teacher.feature_channels
    assert guided.shape == teacher.shape


@pytest.mark.parametrize("kind", ["MLP", "UNet"])
def test_no_class_is_a_zero_embedding(kind):
    teacher = network(kind)
    noisy, labels = noisy_points(teacher.shape), torch.full_like(LABELS, -1)
    found = teacher.denoise(noisy, Condition(labels))
    table = teacher.network.class_embedding
    with pytest.raises(ValueError, match="needs labels"):
        teacher.denoise(noisy, Condition())
    table.dropout = 0.5
    teacher.eval()
    torch.testing.assert_close(teacher.denoise(noisy, Condition()), found)
    with torch.no_grad():
        table.weight.zero_()
    torch.testing.assert_close(teacher.denoise(noisy, Condition(LABELS)), found)


def test_label_dropout_drops_its_share_in_training_only():
    table = MLP(dimension=2, width=16, classes=2, label_dropout=0.3).class_embedding
    labels = torch.randint(2, (20_000,), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    found = table(labels)
    kept = found.ne(0).any(1)
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=4 * (0.21 / 20_000) ** 0.5)
    torch.testing.assert_close(found, table.weight[labels] * kept[:, None])
    torch.testing.assert_close(table.eval()(labels), table.weight[labels])


@pytest.mark.parametrize("kind", ["MLP", "UNet"])
def test_gradient_of_a_tilt_goes_through_both_halves(kind):
    teacher = Guided(denoiser=network(kind), guidance_scale=2.0).requires_grad_(False)
    slope = torch.linspace(-1, 1, noisy_points(teacher.shape).x_t[0].numel()).tolist()
    target = RewardTilted(reward=LinearReward(slope=slope), log_normalizer=0.0).double()
    noisy = noisy_points(teacher.shape)
    _, gradient = target.log_target(
        Evaluation(noisy, noisy.x_t, Condition(LABELS), Nodes(teacher=teacher), target.needs)
    )
    direction, step = torch.randn_like(noisy.x_t), 1e-5

    def log_reward(x: Tensor) -> Tensor:
        mu = teacher.denoise(Noisy(x, noisy.t, noisy.alpha, noisy.sigma), Condition(LABELS))
        return target.reward.log_reward(mu, Condition())

    difference = (log_reward(noisy.x_t + step * direction) - log_reward(noisy.x_t - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).flatten(1).sum(1), difference, rtol=1e-5, atol=1e-7)


def test_ratio_on_the_guided_teachers_features_keeps_its_gradient():
    """l's graph reaches x_t through the conditional half although mu is decoded without one."""
    teacher, ratio = Guided(denoiser=network("UNet"), guidance_scale=2.0).requires_grad_(False), TeacherFeatureRatio()
    ratio.connect(teacher, None)
    torch.nn.init.normal_(ratio.heads[0].out.weight)
    noisy = noisy_points(teacher.shape)
    nodes = Nodes(teacher=teacher, ratio=ratio.double())
    evaluation = Evaluation(noisy, noisy.x_t, Condition(LABELS), nodes, Needs(ratio_gradient=True))
    assert not evaluation.teacher_output.requires_grad
    plain = Nodes(teacher=teacher.denoiser, ratio=ratio)
    expected = Evaluation(noisy, noisy.x_t, Condition(LABELS), plain, Needs(ratio_gradient=True))
    torch.testing.assert_close(evaluation.log_ratio_gradient, expected.log_ratio_gradient)
    assert evaluation.log_ratio_gradient.abs().max() > 0


def test_guidance_moves_samples_away_from_the_other_class():
    ring = GaussianMixture(means=[[-1.0], [1.0]], std=1.0)
    heun, labels = HeunSampler(), torch.ones(4000, dtype=torch.long)
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = [
        float(heun.sample(Guided(denoiser=ring, guidance_scale=s), noise, Condition(labels)).mean())
        for s in (0.0, 1.0, 3.0)
    ]
    assert means[0] == pytest.approx(0.0, abs=0.1)
    assert means[1] == pytest.approx(1.0, abs=0.1)
    assert means[2] > 1.3


def test_clipped_clamps_the_estimate_and_so_each_coordinate_of_the_score():
    noisy = noisy_points()
    mu = Clipped(denoiser=MIXTURE, limit=0.7).denoise(noisy, Condition())
    torch.testing.assert_close(mu, MIXTURE.denoise(noisy, Condition()).clamp(-0.7, 0.7))
    score = (ALPHA * mu - noisy.x_t) / SIGMA**2
    low, high = ((s * ALPHA * 0.7 - noisy.x_t) / SIGMA**2 for s in (-1, 1))
    torch.testing.assert_close(score, MIXTURE.score(noisy, Condition()).clamp(low, high))
    assert (mu.abs() == 0.7).any()
    assert (mu.abs() < 0.7).any()


def test_gradient_of_a_tilt_is_zero_where_the_estimate_is_clipped():
    """In one dimension, a clipped estimate cannot move with x_t."""
    line, x = GaussianMixture(means=[[0.0]], std=1.0), torch.linspace(-3, 3, 31, dtype=torch.float64)[:, None]
    noisy = Noisy(x, *(torch.full((31,), v, dtype=torch.float64) for v in (0.5, 1.0, 0.5)))
    target = RewardTilted(reward=LinearReward(slope=[0.7]), log_normalizer=0.0).double()
    nodes = Nodes(teacher=Clipped(denoiser=line, limit=1.0))
    _, gradient = target.log_target(Evaluation(noisy, x, Condition(), nodes, target.needs))
    inside = x.abs() / 1.25 < 1  # mu = x_t / (1 + sigma^2)
    torch.testing.assert_close(gradient, torch.where(inside, 0.7 / 1.25, 0.0).double())


def test_clipped_guidance_and_delegation():
    guided = Guided(denoiser=MIXTURE, guidance_scale=8.0)
    clipped = Clipped(denoiser=guided, limit=1.5)
    mu = clipped.denoise(noisy_points(), Condition(LABELS))
    torch.testing.assert_close(mu, guided.denoise(noisy_points(), Condition(LABELS)).clamp(-1.5, 1.5))
    assert clipped.shape == (2,)
    assert clipped.feature_channels == (3,)
    assert not guided.can_sample
    assert not clipped.can_sample
    exact = Clipped(denoiser=MIXTURE, limit=1.5)
    assert exact.can_sample
    draws = [m.sample(7, torch.Generator().manual_seed(0), Condition(LABELS[:7])) for m in (exact, MIXTURE)]
    torch.testing.assert_close(*draws)


def test_load_reaches_the_weights(tmp_path):
    class Loaded(Denoiser):
        loaded = False

        def load(self):
            self.loaded = True

    inner = Loaded()
    Clipped(denoiser=Guided(denoiser=inner, guidance_scale=2.0)).load()
    assert inner.loaded


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Guided(denoiser=MIXTURE, guidance_scale=2.0).denoise(noisy_points(), Condition()), "class labels"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
