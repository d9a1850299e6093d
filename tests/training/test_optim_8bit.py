"""Moments in 8 bits: their rounding, the same training as with torch's AdamW, updates left out, resumption, bytes."""

import importlib.util
from copy import deepcopy

import pytest
import torch
from torch import nn

from ratiograph.training.optim import Adam
from ratiograph.training.optim_8bit import Adam8bit


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package torchao: pip install 'torchao>=0\.18'"):
        Adam8bit(adam=Adam())


pytest.importorskip("torchao")

RECIPE = {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.05}


def network(seed=0):
    """Two matrices of whole blocks, and biases that stay float32."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))


def samples():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 64, generator=generator)
    return x, network(seed=2)(x).detach()


def train(updater, module, steps):
    x, y = samples()
    losses = []
    for _ in range(steps):
        loss = (module(x) - y).square().mean()
        loss.backward()
        updater.step()
        losses.append(float(loss.detach()))
    return losses


def built(module, **more):
    return Adam8bit(adam=Adam(**RECIPE, **more)).build(module.parameters())


def moment(held, name, values):
    """The numbers that codes and scales stand for: ``values`` [256] in blocks."""
    codes, scale = held[f"{name}.codes"], held[f"{name}.scale"]
    return (values[codes.flatten().long()].view(len(scale), -1) * scale[:, None]).view(codes.shape)


def test_moments_are_rounded_to_the_nearest_of_the_map():
    """m = (1 - beta) g and v = (1 - gamma) g^2 after one update, with an error of 0.7 and 0.35 % of a block's most."""
    from torchao.optim.subclass_8bit import get_qmap_signed, get_qmap_unsigned

    torch.manual_seed(0)
    module = nn.Linear(64, 96)
    gradient = torch.randn(96, 64) * torch.logspace(-3, 0, 96)[:, None]
    updater = built(module, clip_norm=1e9)
    module.weight.grad, module.bias.grad = gradient.clone(), torch.zeros(96)
    updater.step()
    held = updater.rule.state[0]
    cases = [("exp_avg", get_qmap_signed(), 0.1 * gradient), ("exp_avg_sq", get_qmap_unsigned(), 0.01 * gradient**2)]
    for (name, table, exact), bound in zip(cases, (0.0071, 0.0036), strict=True):
        table = torch.tensor(table)
        found = moment(held, name, table)
        blocks = exact.reshape(-1, 256)
        most = blocks.abs().amax(1, keepdim=True)
        torch.testing.assert_close(held[f"{name}.scale"], most[:, 0], rtol=1e-5, atol=0)
        nearest = (blocks[:, :, None] / most[:, :, None] - table).abs().amin(2) * most
        error = (found.reshape(-1, 256) - blocks).abs()
        assert bool((error <= bound * most).all())
        torch.testing.assert_close(error, nearest, rtol=1e-4, atol=1e-7)
    bias = updater.rule.state[1]
    assert bias.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert bias["exp_avg"].dtype == torch.float32


def test_trains_as_torch_s_adamw():
    """100 updates: the same loss, and weights apart by a small part of the way that they have gone."""
    ours, theirs, started = network(), network(), network()
    losses = train(built(ours, clip_norm=1e9), ours, 100)
    reference, expected = torch.optim.AdamW(theirs.parameters(), **RECIPE), []
    x, y = samples()
    for _ in range(100):
        loss = (theirs(x) - y).square().mean()
        reference.zero_grad()
        loss.backward()
        reference.step()
        expected.append(float(loss.detach()))
    assert expected[-1] < 0.1 * expected[0]
    assert losses[-1] == pytest.approx(expected[-1], rel=0.05)
    assert losses[:2] == pytest.approx(expected[:2], rel=1e-5)  # the first update is by moments that nobody has rounded
    flat = [torch.cat([p.detach().flatten() for p in each.parameters()]) for each in (ours, theirs, started)]
    assert 1e-4 < (flat[0] - flat[1]).norm() / (flat[1] - flat[2]).norm() < 0.1


def test_rates_and_clip_are_the_recipe_s():
    told = {"warmup_steps": 4, "cooldown": (6, 10), "clip_norm": 0.25}
    module, plain = network(), network()
    updaters = built(module, **told), Adam(**RECIPE, **told).build(plain.parameters())
    assert [updaters[0].recipe.rate(k) for k in range(12)] == [updaters[1].recipe.rate(k) for k in range(12)]
    (x, y), norms = samples(), []
    for one, updater in zip((module, plain), updaters, strict=True):
        (one(x) - y).square().sum().backward()
        norms.append(float(updater.step()))
    assert norms[0] == pytest.approx(norms[1])
    assert norms[0] > 1  # clipped
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_without_a_finite_gradient_changes_nothing(first, bad):
    module, untouched = network(), network()
    updater, other = built(module), built(untouched)
    for each, one in ((updater, module), (other, untouched)):
        train(each, one, 0 if first else 3)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    module[0].weight.grad[3, 5] = bad
    before = {k: {name: t.clone() for name, t in held.items()} for k, held in updater.rule.state.items()}
    assert not updater.step().isfinite()
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), untouched.parameters(), strict=True))
    for k, held in before.items():
        assert all(torch.equal(held[name], tensor) for name, tensor in updater.rule.state[k].items())
    # What follows is what it would have been, the count of updates in the moments' correction too.
    assert train(updater, module, 3) == train(other, untouched, 3)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), untouched.parameters(), strict=True))
    assert {float(held["step"]) for held in updater.rule.state.values()} == {3.0 if first else 6.0}


def test_state_goes_on_to_the_bit_from_a_file(tmp_path):
    module = network()
    updater = built(module, warmup_steps=5)
    train(updater, module, 3)
    torch.save({"optimizer": updater.state_dict(), "network": module.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    again = network(seed=9)
    again.load_state_dict(saved["network"])
    resumed = built(again, warmup_steps=5)
    resumed.load_state_dict(saved["optimizer"])
    assert train(resumed, again, 3) == train(updater, module, 3)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), again.parameters(), strict=True))
    assert resumed.updates == 6


def test_moments_of_another_optimiser_are_refused():
    module = network()
    plain = Adam(**RECIPE).build(module.parameters())
    train(plain, module, 1)
    with pytest.raises(ValueError, match="resume with the optimiser"):
        built(module).load_state_dict(deepcopy(plain.state_dict()))


def test_a_parameter_without_a_gradient_stays():
    used, idle = network(), nn.Linear(64, 64)
    before = idle.weight.clone()
    updater = Adam8bit(adam=Adam(**RECIPE)).build([*used.parameters(), *idle.parameters()])
    train(updater, used, 2)
    assert torch.equal(idle.weight, before)
    assert set(updater.rule.state) == {0, 1, 2, 3}


def test_the_bytes_of_its_moments():
    """Those of all tensors that it holds, maps included; two bytes a weight and a thirty-second for the scales."""
    module = nn.ModuleList([nn.Linear(256, 512), nn.Linear(30, 20), nn.Conv2d(32, 16, 3)])
    updater = built(module)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    updater.step()
    tensors = [
        getattr(value, part)
        for optimizer in updater.rule.optimizers
        for name, value in next(iter(optimizer.state.values())).items()
        if name != "step"
        for part in (("codes", "scale", "qmap") if hasattr(value, "codes") else ("data",))
    ]
    assert sum(tensor.nbytes for tensor in tensors) == sum(map(Adam8bit.moment_bytes, module.parameters()))
    weight = module[0].weight
    assert Adam8bit.moment_bytes(weight) == pytest.approx(2.03125 * weight.numel(), rel=0.01)
