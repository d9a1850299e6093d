"""Losses of ratio estimators against their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F

from ratiograph.algebra.ratio_losses import LogisticLoss, R1Penalized, Scaled


def test_the_logistic_loss():
    real, student = torch.tensor([2.0, -0.5]), torch.tensor([1.0, -3.0])
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    expected = (softplus(-2.0) + softplus(0.5)) / 2 + (softplus(1.0) + softplus(-3.0)) / 2
    assert float(LogisticLoss()(real, student, torch.zeros(4, 1))) == pytest.approx(expected, rel=1e-6)
    assert float(LogisticLoss()(torch.zeros(3), torch.zeros(3), None)) == pytest.approx(2 * math.log(2))


def test_r1_of_a_linear_discriminator():
    """l = <a, x_t> + b has the gradient a everywhere: the penalty is weight |a|^2 / 2."""
    torch.manual_seed(0)
    a, x_t = torch.randn(3, 4, 4, dtype=torch.float64), torch.randn(10, 3, 4, 4, dtype=torch.float64)
    a.requires_grad_()
    x_t.requires_grad_()
    l = (x_t * a).flatten(1).sum(1) + 0.3  # noqa: E741
    plain = LogisticLoss()(l[:5], l[5:], x_t)
    penalised = R1Penalized(loss=LogisticLoss(), weight=3.0)(l[:5], l[5:], x_t)
    assert (penalised - plain).item() == pytest.approx(1.5 * a.square().sum().item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(penalised - plain, a)
    torch.testing.assert_close(gradient, 3.0 * a.detach(), rtol=1e-5, atol=1e-6)


def test_r1_looks_at_real_samples_only():
    """l = x^2 / 2 has the gradient x: the mean of |x|^2 over the real half."""
    x_t = torch.tensor([[1.0], [2.0], [5.0], [7.0]], requires_grad=True)
    l = x_t.square().sum(1) / 2  # noqa: E741
    difference = R1Penalized(loss=LogisticLoss(), weight=1.0)(l[:2], l[2:], x_t) - LogisticLoss()(l[:2], l[2:], x_t)
    assert difference.item() == pytest.approx((1 + 4) / 2 / 2)


def test_a_lazy_penalty_has_the_mean_of_the_diligent_one():
    """Every third update has three times the penalty, the others none and no need of a graph to x_t."""
    x_t = torch.tensor([[1.0], [2.0]], requires_grad=True)
    real, student = x_t.square().sum(1) / 2, torch.zeros(2)
    plain = LogisticLoss()(real, student, x_t).item()
    diligent = R1Penalized(loss=LogisticLoss(), weight=0.5)(real, student, x_t).item() - plain
    lazy = Scaled(loss=R1Penalized(loss=LogisticLoss(), weight=0.5, every=3), weight=1.0)
    assert [lazy.at(update).needs_gradient for update in range(6)] == [True, False, False] * 2
    added = [lazy.at(update)(x_t.square().sum(1) / 2, student, x_t).item() - plain for update in range(6)]
    assert added == pytest.approx([3 * diligent, 0, 0] * 2)
    assert sum(added) / 6 == pytest.approx(diligent)


def test_a_scaled_loss_has_scaled_gradients():
    real, student = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    plain = torch.autograd.grad(LogisticLoss()(real, student, None), (real, student))
    scaled = torch.autograd.grad(Scaled(loss=LogisticLoss(), weight=0.01)(real, student, None), (real, student))
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(b, 0.01 * a)
    assert Scaled(loss=R1Penalized(loss=LogisticLoss()), weight=2.0).needs_gradient


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_weights_of_real_samples_are_counts_of_them(scale):
    """A sample of weight 2 is two samples: against the plain loss of the longer batch, of which it is the mean of."""
    real, student = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([0.5, 0.1])
    loss = Scaled(loss=LogisticLoss(), weight=scale)
    weighted = loss(real, student, None, torch.tensor([2.0, 1.0, 0.0]))
    repeated = torch.tensor([0.3, 0.3, -1.0])
    torch.testing.assert_close(weighted, scale * (F.softplus(-repeated).mean() + F.softplus(student).mean()))
