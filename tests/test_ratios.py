"""Ratio estimators: the loss against its definition, the heads' wiring, what learns what."""

import math

import pytest
import torch

from ratiograph.denoisers import EDM
from ratiograph.networks import MLP, UNet
from ratiograph.noising import RectifiedFlow, VarianceExploding
from ratiograph.ratios import EncoderRatio, RatioEstimator, TeacherFeatureRatio
from ratiograph.types import Condition, Evaluation, Needs, Nodes

NOTHING = Needs()


class FixedRatio(RatioEstimator):
    def __init__(self, values):
        super().__init__()
        self.values = values

    def log_ratio(self, evaluation):
        return self.values


def small_teacher():
    torch.manual_seed(0)
    teacher = EDM(network=UNet(resolution=8, channels=16, multipliers=(1, 2)))
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return teacher.requires_grad_(False)


def evaluation_of(x0, nodes, needs=NOTHING):
    noising = VarianceExploding()
    t = noising.time_of(torch.linspace(0.3, 2.0, len(x0), dtype=x0.dtype))
    noisy = noising.add_noise(x0, t, torch.randn_like(x0))
    return Evaluation(noisy, x0, Condition(), nodes, needs)


def test_loss_is_the_logistic_loss_and_reports_the_identities():
    values = torch.tensor([2.0, -0.5, 1.0, -3.0])
    real = torch.tensor([True, True, False, False])
    loss, metrics = FixedRatio(values).loss(None, real)
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    expected = (softplus(-2.0) + softplus(0.5)) / 2 + (softplus(1.0) + softplus(-3.0)) / 2
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert float(metrics["ratio/accuracy"]) == 0.5
    assert float(metrics["ratio/mean_exp_student"]) == pytest.approx((math.e + math.exp(-3)) / 2, rel=1e-6)
    assert float(metrics["ratio/mean_exp_real"]) == pytest.approx((math.exp(-2) + math.exp(0.5)) / 2, rel=1e-6)


def test_a_new_estimator_knows_nothing():
    x0 = torch.randn(6, 1, 8, 8)
    teacher, ratio = small_teacher(), TeacherFeatureRatio(width=16)
    ratio.connect(teacher)
    evaluation = evaluation_of(x0, Nodes(teacher=teacher, ratio=ratio))
    loss, _ = ratio.loss(evaluation, torch.arange(6) < 3)
    assert loss.item() == pytest.approx(2 * math.log(2), rel=1e-6)


def test_heads_sum_over_the_maps_asked_for():
    torch.manual_seed(1)
    teacher, x0 = small_teacher(), torch.randn(4, 1, 8, 8)
    both = TeacherFeatureRatio(feature_maps=(0, 2), width=16)
    both.connect(teacher)
    for parameter in both.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    evaluation = evaluation_of(x0, Nodes(teacher=teacher))
    total = 0
    for position, k in enumerate((0, 2)):
        one = TeacherFeatureRatio(feature_maps=(k,), width=16)
        one.connect(teacher)
        one.noise_embedding, one.heads[0] = both.noise_embedding, both.heads[position]
        total = total + one.log_ratio(evaluation)
    torch.testing.assert_close(both.log_ratio(evaluation), total)
    assert both.log_ratio(evaluation).std() > 1e-3


@pytest.mark.parametrize("maps", [(3,), (0, -4)])
def test_a_feature_map_that_is_not_there_is_named(maps):
    with pytest.raises(ValueError, match="has 3 feature maps"):
        TeacherFeatureRatio(feature_maps=maps).connect(small_teacher())


def test_a_teacher_without_features_is_refused():
    with pytest.raises(ValueError, match="EncoderRatio"):
        TeacherFeatureRatio().connect(None)


@pytest.mark.parametrize("estimator", ["teacher features", "own encoder"])
def test_gradient_in_x_equals_a_finite_difference(estimator):
    torch.manual_seed(2)
    teacher = small_teacher().double()
    if estimator == "teacher features":
        ratio = TeacherFeatureRatio(width=16)
        ratio.connect(teacher)
    else:
        ratio = EncoderRatio(network=UNet(resolution=8, channels=16, multipliers=(1, 2)))
    for parameter in ratio.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ratio.double()
    x0 = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    nodes = Nodes(teacher=teacher, ratio=ratio)
    evaluation = evaluation_of(x0, nodes, Needs(ratio_gradient=True))
    gradient = evaluation.log_ratio_gradient
    towards, step = torch.randn_like(x0), 1e-5
    noisy = evaluation.noisy

    def moved(sign):
        shifted = type(noisy)(noisy.x_t.detach() + sign * step * towards, noisy.t, noisy.alpha, noisy.sigma)
        return Evaluation(shifted, x0, Condition(), nodes).log_ratio

    difference = (moved(1) - moved(-1)) / (2 * step)
    torch.testing.assert_close((gradient * towards).flatten(1).sum(1), difference, rtol=1e-6, atol=1e-9)


def test_own_encoder_sees_the_same_under_any_noising():
    torch.manual_seed(3)
    ratio = EncoderRatio(network=MLP(dimension=2, width=32))
    torch.nn.init.normal_(ratio.out.weight)
    x0, noise, s = torch.randn(5, 2), torch.randn(5, 2), torch.linspace(0.2, 3.0, 5)
    values = []
    for noising in (VarianceExploding(), RectifiedFlow()):
        noisy = noising.add_noise(x0, noising.time_of(s), noise)
        values.append(ratio.log_ratio(Evaluation(noisy, x0, Condition(), Nodes())))
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)


def test_an_estimator_learns_the_exact_ratio_of_two_gaussians():
    """q = N(0, 1), p = N(1, 1) at sigma = 1: l = (2 x - 1) / 4."""
    torch.manual_seed(4)
    ratio = EncoderRatio(network=MLP(dimension=1, width=32, layers=2), sigma_data=1.0)
    optimizer = torch.optim.Adam(ratio.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    noising, real = VarianceExploding(), torch.arange(1024) < 512
    for _ in range(1000):
        x0 = torch.randn(1024, 1) + real[:, None].float()
        noisy = noising.add_noise(x0, torch.ones(1024), torch.randn(1024, 1))
        loss, _ = ratio.loss(Evaluation(noisy, x0, Condition(), Nodes()), real)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x = torch.linspace(-2, 3, 50)[:, None]
    noisy = noising.add_noise(x, torch.ones(50), torch.zeros(50, 1))
    with torch.no_grad():
        learned = ratio.log_ratio(Evaluation(noisy, x, Condition(), Nodes()))
    assert (learned - (2 * x[:, 0] - 1) / 4).abs().max() < 0.1
