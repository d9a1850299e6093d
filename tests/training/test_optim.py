"""Optimiser recipe and weight averages, against their formulas and torch's own optimiser."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from ratiograph.training.optim import EMA, Adam


def test_average_follows_its_half_life():
    ema, module = EMA(half_life=1000, ramp_up=1e9), nn.Linear(3, 2)
    average = ema.copy_of(module)
    start = average.weight.clone()
    with torch.no_grad():
        module.weight.add_(1.0)
    for _ in range(10):
        ema.update(average, module, batch_size=100, images=10**9)
    # 1,000 images are one half-life.
    torch.testing.assert_close(average.weight, start + 0.5, rtol=0, atol=1e-6)
    assert not average.weight.requires_grad


def test_ramp_up_shortens_the_half_life_early():
    ema = EMA(half_life=500_000, ramp_up=0.05)
    assert ema.beta(100, 4000) == pytest.approx(0.5 ** (100 / 200))
    assert ema.beta(100, 10**9) == pytest.approx(0.5 ** (100 / 500_000))


def test_average_copies_buffers():
    module = nn.BatchNorm1d(2)
    ema = EMA()
    average = ema.copy_of(module)
    module.running_mean.fill_(3.0)
    ema.update(average, module, 1, 10**9)
    assert average.running_mean.tolist() == [3.0, 3.0]


def test_updates_equal_torch_with_warm_up_and_clip():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)
    theirs.load_state_dict(ours.state_dict())
    updater = Adam(lr=0.1, betas=(0.0, 0.999), warmup_steps=4, clip_norm=0.5, weight_decay=0.1).build(ours.parameters())
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.1, betas=(0.0, 0.999), weight_decay=0.1)
    x = torch.randn(8, 4)
    for step in range(1, 7):
        ours(x).square().mean().backward()
        norm = updater.step()
        theirs(x).square().mean().backward()
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.param_groups[0]["lr"] = 0.1 * min(1, step / 4)
        reference.step()
        reference.zero_grad()
        assert float(norm) == pytest.approx(float(expected), rel=1e-6)
        assert ours.weight.grad is None
    torch.testing.assert_close(ours.weight, theirs.weight)


def follow(updater, network, x, count):
    for _ in range(count):
        network(x).square().mean().backward()
        updater.step()


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.99)])
def test_updates_are_bit_equal_to_those_of_torch_s_class(betas):
    torch.manual_seed(0)
    ours, x = nn.Sequential(nn.Linear(40, 33), nn.SiLU(), nn.Linear(33, 1)), torch.randn(8, 40)
    theirs = deepcopy(ours)
    updater = Adam(lr=0.1, betas=betas, clip_norm=1e9, weight_decay=0.1).build(ours.parameters())
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.1, betas=betas, weight_decay=0.1, fused=True)
    for _ in range(5):
        follow(updater, ours, x, 1)
        theirs(x).square().mean().backward()
        reference.step()
        reference.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    # The moments of torch's class go on in ours, those that it holds for nothing too.
    updater = Adam(lr=0.1, betas=betas, clip_norm=1e9, weight_decay=0.1).build(ours.parameters())
    updater.load_state_dict({"updates": 5, "optimizer": deepcopy(reference.state_dict())})
    follow(updater, ours, x, 1)
    theirs(x).square().mean().backward()
    reference.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize(("betas", "held"), [((0.0, 0.999), 1), ((0.9, 0.999), 2)])
def test_no_first_moment_is_held_that_is_the_gradient(betas, held):
    module = nn.Linear(30, 20)
    updater = Adam(betas=betas).build(module.parameters())
    follow(updater, module, torch.randn(4, 30), 2)
    moments = [value for state in updater.state_dict()["optimizer"]["state"].values() for value in state.values()]
    assert sum(value.numel() for value in moments if value.ndim) == held * (600 + 20)


def test_a_parameter_without_a_gradient_stays_and_does_not_count():
    used, idle = nn.Linear(3, 2), nn.Linear(3, 2)
    before = idle.weight.clone()
    updater = Adam(weight_decay=0.1).build([*used.parameters(), *idle.parameters()])
    follow(updater, used, torch.randn(4, 3), 2)
    assert torch.equal(idle.weight, before)
    assert set(updater.rule.state) == {0, 1}
    assert [float(state["step"]) for state in updater.rule.state.values()] == [2, 2]


def test_state_goes_on_exactly():
    torch.manual_seed(0)
    module, x = nn.Linear(4, 1), torch.randn(8, 4)
    recipe = Adam(lr=0.05, warmup_steps=5)
    updater = recipe.build(module.parameters())
    follow(updater, module, x, 3)
    copy = nn.Linear(4, 1)
    copy.load_state_dict(module.state_dict())
    resumed = recipe.build(copy.parameters())
    resumed.load_state_dict(deepcopy(updater.state_dict()))
    follow(updater, module, x, 3)
    follow(resumed, copy, x, 3)
    assert torch.equal(module.weight, copy.weight)
    assert resumed.updates == 6


def test_moments_of_other_betas_are_refused():
    module, x = nn.Linear(4, 1), torch.randn(8, 4)
    updater = Adam(betas=(0.0, 0.999)).build(module.parameters())
    follow(updater, module, x, 1)
    with pytest.raises(ValueError, match="resume with the same betas"):
        Adam(betas=(0.9, 0.999)).build(module.parameters()).load_state_dict(updater.state_dict())


def test_the_rate_rises_stays_and_falls_to_zero():
    recipe = Adam(lr=0.4, warmup_steps=4, cooldown=(6, 10))
    expected = [0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0]
    assert [recipe.rate(update) for update in range(1, 12)] == pytest.approx(expected)
    module = nn.Linear(1, 1, bias=False)
    updater, sizes = recipe.build(module.parameters()), []
    for _ in range(11):
        before = module.weight.item()
        module.weight.grad = torch.ones(1, 1)
        updater.step()
        sizes.append(before - module.weight.item())
    assert sizes == pytest.approx(expected, abs=1e-6)  # Adam's step under a constant gradient is its rate


@pytest.mark.parametrize("cooldown", [(5, 5), (6, 3)])
def test_adam_refuses_a_cooldown_that_does_not_end(cooldown):
    with pytest.raises(ValueError, match="cooldown"):
        Adam(cooldown=cooldown)


def test_frozen_parameters_are_left_out():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    assert len(Adam().build(module.parameters()).parameters) == 1
