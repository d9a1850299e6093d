"""What ``--teacher`` takes, what a wrong file is told, and what several networks of one file share."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from official import NETWORKS, SMALL, asked, official_pickle, official_state, random
from ratiograph.core.types import Noisy
from ratiograph.networks import edm_weights
from ratiograph.networks.architectures.edm import ADM, DDPMPP, NCSNPP
from ratiograph.networks.denoisers import EDM, freeze, set_precision
from ratiograph.networks.edm_weights import convert_file
from ratiograph.networks.preconditioning import VEPreconditioned, VPPreconditioned
from ratiograph.networks.weights.weight_files import load_weights, save_weights


@pytest.fixture(autouse=True)
def own_folder_and_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RATIOGRAPH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def expected(monkeypatch) -> torch.Tensor:
    """The output of the network of ``net.pkl`` in the working folder."""
    network = random(NETWORKS["ncsnpp"]())
    official_pickle(Path("net.pkl"), network, monkeypatch)
    with torch.no_grad():
        return EDM(network=network).eval().denoise(*asked())


def graph(weights: str, classes: int = 3) -> EDM:
    return EDM(network=NCSNPP(**SMALL, classes=classes, label_dropout=0.1), weights=weights).eval()


def test_an_official_pickle_is_converted_once(expected, monkeypatch):
    for _ in range(2):
        denoiser = graph("net.pkl")
        denoiser.load()
        with torch.no_grad():
            assert torch.equal(denoiser.denoise(*asked()), expected)
        monkeypatch.setattr(edm_weights, "convert_file", None)  # the second time it must not be called
    assert len(list(Path("cache/teachers").iterdir())) == 1


def test_another_file_of_the_same_name_is_converted_anew(expected, monkeypatch):
    graph("net.pkl").load()
    network = NETWORKS["ncsnpp"]()
    official_pickle(Path("net.pkl"), network, monkeypatch)
    denoiser = graph("net.pkl")
    denoiser.load()
    assert torch.equal(denoiser.network.stem.weight, network.stem.weight)


def test_a_converted_folder_is_its_weights(expected):
    convert_file("net.pkl", "teachers/net")
    denoiser = graph("teachers/net")
    denoiser.load()
    with torch.no_grad():
        assert torch.equal(denoiser.denoise(*asked()), expected)


def test_a_state_dict_takes_the_preconditioning_of_the_graph():
    network = random(NETWORKS["ddpmpp"]())
    torch.save(official_state(network), "net.pt")
    for kind in (VPPreconditioned, EDM):
        denoiser = kind(network=DDPMPP(**SMALL), weights="net.pt").eval()
        denoiser.load()
        with torch.no_grad():
            assert torch.equal(denoiser.denoise(*asked()), kind(network=network).eval().denoise(*asked()))


@pytest.mark.parametrize(
    ("denoiser", "message"),
    [
        (lambda: graph("net", classes=10), r"its classes is 3, here it is 10 \(NCSNPP\.classes\)"),
        (lambda: EDM(network=NETWORKS["ncsnpp"](), sigma_data=0.6, weights="net"), r"its sigma_data is 0\.5.*EDM\."),
        (
            lambda: EDM(network=NCSNPP(**{**SMALL, "resolution": 16}, classes=3), weights="net"),
            r"its resolution is 8, here it is 16 \(NCSNPP\.resolution\)",
        ),
        (
            lambda: EDM(network=DDPMPP(**SMALL, classes=3), weights="net"),
            r"its network is a NCSNPP, here it is a DDPMPP",
        ),
        (
            lambda: VEPreconditioned(network=NETWORKS["ncsnpp"](), weights="net"),
            r"its denoiser is a EDM, here it is a VEPreconditioned",
        ),
        (
            lambda: EDM(network=NCSNPP(**{**SMALL, "multipliers": (1, 2, 3)}, classes=3), weights="net"),
            r"does not fit EDM: network\.encoder\.2\.blocks\.0",
        ),
        (lambda: VPPreconditioned(network=DDPMPP(**SMALL), weights="net.pkl"), r"denoiser is EDM and not VPPrecond"),
        (lambda: EDM(network=ADM(**{**SMALL, "channels": 64}), weights="gone"), r"no weights at gone"),
    ],
)
def test_weights_of_another_network_are_refused(denoiser, message, expected):
    convert_file("net.pkl", "net")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        denoiser().load()


def anonymous_memory() -> int:
    """Bytes of this process that no file backs."""
    lines = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if "kB" in line)
    return 1024 * int(lines["Anonymous"].split()[0])


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux's account of memory")
def test_networks_of_one_file_share_its_memory_until_one_is_changed():
    size = 4 * 4_000 * 4_000
    save_weights(Path("net.safetensors"), torch.nn.Linear(4_000, 4_000, bias=False))
    with torch.device("meta"):
        nets = [torch.nn.Linear(4_000, 4_000, bias=False) for _ in range(3)]
    nets = [net.to_empty(device="cpu") for net in nets]  # no page of it is touched
    before = anonymous_memory()
    for net in nets:
        load_weights(Path("net.safetensors"), net)
    total = [net.weight.detach().sum() for net in nets]  # in its own type: malloc might keep a copy
    assert total[0] == total[1] == total[2]
    assert anonymous_memory() - before < size / 4
    with torch.no_grad():
        nets[0].weight.add_(1)
    assert size / 2 < anonymous_memory() - before < 1.5 * size
    fresh = torch.nn.Linear(4_000, 4_000, bias=False)
    load_weights(Path("net.safetensors"), fresh)
    assert torch.equal(fresh.weight, nets[1].weight)
    assert torch.equal(nets[0].weight, nets[1].weight + 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_frozen_network_computes_what_autocast_does(name):
    denoiser = EDM(network=random(NETWORKS[name]())).eval().requires_grad_(False)
    frozen = copy.deepcopy(denoiser)
    freeze(frozen, torch.bfloat16)
    noisy, condition = asked()
    found = []
    for each in (denoiser, frozen):
        set_precision(each, torch.bfloat16)
        x_t = noisy.x_t.clone().requires_grad_()
        output = each.denoise(Noisy(x_t, noisy.t, noisy.alpha, noisy.sigma), condition)
        found.append((output, *torch.autograd.grad(output.square().sum(), x_t)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    held = {type(module): {p.dtype for p in module.parameters(recurse=False)} for module in frozen.modules()}
    assert held[torch.nn.Conv2d] == held[torch.nn.Linear] == {torch.bfloat16}
    assert held[torch.nn.GroupNorm] == {torch.float32}


@pytest.mark.parametrize("described", ["[]", "{", 9000 * "[", '{"denoiser": 3}', '{"denoiser": "EDM"}'])
def test_a_header_that_describes_no_denoiser_is_one_line(described):
    denoiser = graph("net.safetensors")
    save_weights(Path("net.safetensors"), denoiser, {"denoiser": described})
    with pytest.raises(ValueError, match=r"^(the header of )?net\.safetensors"):
        denoiser.load()
