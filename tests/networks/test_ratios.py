"""Ratio estimators: features, heads, gradients, weights, and what they learn."""

import pytest
import torch

from ratiograph.algebra.noising import RectifiedFlow, VarianceExploding
from ratiograph.algebra.ratio_losses import LogisticLoss
from ratiograph.core.contracts import Evaluation, Needs, Nodes
from ratiograph.core.types import Condition
from ratiograph.networks.architectures.unet import MLP, UNet
from ratiograph.networks.denoisers import EDM
from ratiograph.networks.ratios import EncoderRatio, StudentScoreHeadRatio, StudentScoreMeanRatio, TeacherFeatureRatio
from ratiograph.networks.weights.weight_files import save_weights

NOTHING = Needs()


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


@pytest.mark.parametrize("estimator", [TeacherFeatureRatio, StudentScoreHeadRatio])
def test_a_new_estimator_knows_nothing(estimator):
    x0, network, ratio = torch.randn(6, 1, 8, 8), small_teacher(), estimator(width=16)
    ratio.connect(network, network)
    evaluation = evaluation_of(x0, Nodes(teacher=network, student_score=network, ratio=ratio))
    assert evaluation.log_ratio.tolist() == [0] * 6


def test_the_mean_feature_is_the_logit_of_sida():
    x0, network, ratio = torch.randn(6, 1, 8, 8), small_teacher(), StudentScoreMeanRatio()
    ratio.connect(None, network)
    evaluation = evaluation_of(x0, Nodes(student_score=network, ratio=ratio))
    bottleneck = network.encode(evaluation.noisy, Condition()).features[-1]
    torch.testing.assert_close(evaluation.log_ratio, bottleneck.mean((1, 2, 3)))
    assert evaluation.log_ratio.std() > 1e-4
    assert not ratio.has_weights


@pytest.mark.parametrize("estimator", [StudentScoreMeanRatio, StudentScoreHeadRatio])
def test_an_estimator_on_the_student_score_needs_one(estimator):
    with pytest.raises(ValueError, match=r"bind Distillation\.student_score"):
        estimator().connect(small_teacher(), None)


def test_an_encoder_starts_from_a_denoisers_encoder(tmp_path):
    denoiser = small_teacher()
    save_weights(tmp_path / "denoiser.safetensors", denoiser)
    network = UNet(resolution=8, channels=16, multipliers=(1, 2))
    ratio = EncoderRatio(network=network, encoder_weights=str(tmp_path / "denoiser.safetensors"))
    ratio.load()
    for name, value in ratio.network.state_dict().items():
        assert torch.equal(value, denoiser.network.state_dict()[name]), name
    wider = UNet(resolution=8, channels=32, multipliers=(1, 2))
    with pytest.raises(ValueError, match="does not fit UNet"):
        EncoderRatio(network=wider, encoder_weights=str(tmp_path / "denoiser.safetensors")).load()


def test_a_trained_estimator_is_loaded(tmp_path):
    torch.manual_seed(0)
    trained = TeacherFeatureRatio(width=16)
    trained.connect(small_teacher(), None)
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_weights(tmp_path / "ratio.safetensors", trained)
    loaded = TeacherFeatureRatio(width=16, weights=str(tmp_path / "ratio.safetensors"))
    loaded.connect(small_teacher(), None)
    loaded.load()
    x0, teacher = torch.randn(4, 1, 8, 8), small_teacher()
    found = []
    for ratio in (trained, loaded):
        torch.manual_seed(1)
        found.append(evaluation_of(x0, Nodes(teacher=teacher, ratio=ratio)).log_ratio)
    assert torch.equal(*found)
    assert found[0].std() > 1e-3


def test_heads_sum_over_the_maps_asked_for():
    torch.manual_seed(1)
    teacher, x0 = small_teacher(), torch.randn(4, 1, 8, 8)
    both = TeacherFeatureRatio(feature_maps=(0, 2), width=16)
    both.connect(teacher, None)
    for parameter in both.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    evaluation = evaluation_of(x0, Nodes(teacher=teacher))
    total = 0
    for position, k in enumerate((0, 2)):
        one = TeacherFeatureRatio(feature_maps=(k,), width=16)
        one.connect(teacher, None)
        one.noise_embedding, one.heads[0] = both.noise_embedding, both.heads[position]
        total = total + one.log_ratio(evaluation)
    torch.testing.assert_close(both.log_ratio(evaluation), total)
    assert both.log_ratio(evaluation).std() > 1e-3


@pytest.mark.parametrize("maps", [(3,), (0, -4)])
def test_a_feature_map_that_is_not_there_is_named(maps):
    with pytest.raises(ValueError, match="has 3 feature maps"):
        TeacherFeatureRatio(feature_maps=maps).connect(small_teacher(), None)


def test_a_teacher_without_features_is_refused():
    with pytest.raises(ValueError, match="EncoderRatio"):
        TeacherFeatureRatio().connect(None, None)


@pytest.mark.parametrize("estimator", ["teacher features", "own encoder", "student score", "mean"])
def test_gradient_in_x_equals_a_finite_difference(estimator):
    torch.manual_seed(2)
    teacher = small_teacher().double()
    ratio = {
        "teacher features": lambda: TeacherFeatureRatio(width=16),
        "own encoder": lambda: EncoderRatio(network=UNet(resolution=8, channels=16, multipliers=(1, 2))),
        "student score": lambda: StudentScoreHeadRatio(width=16),
        "mean": StudentScoreMeanRatio,
    }[estimator]()
    ratio.connect(teacher, teacher)
    for parameter in ratio.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ratio.double()
    x0 = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    nodes = Nodes(teacher=teacher, student_score=teacher, ratio=ratio)
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
    noising, real, nodes = VarianceExploding(), torch.arange(1024) < 512, Nodes(ratio=ratio)
    for _ in range(1000):
        x0 = torch.randn(1024, 1) + real[:, None].float()
        noisy = noising.add_noise(x0, torch.ones(1024), torch.randn(1024, 1))
        evaluation = Evaluation(noisy, x0, Condition(), nodes, Needs(training=True))
        l = evaluation.log_ratio_output  # noqa: E741
        loss = LogisticLoss()(l[real], l[~real], evaluation.noisy.x_t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x = torch.linspace(-2, 3, 50)[:, None]
    noisy = noising.add_noise(x, torch.ones(50), torch.zeros(50, 1))
    with torch.no_grad():
        learned = ratio.log_ratio(Evaluation(noisy, x, Condition(), Nodes()))
    assert (learned - (2 * x[:, 0] - 1) / 4).abs().max() < 0.1
