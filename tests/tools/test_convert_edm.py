"""Conversion of official networks: the reference files, files of the same format made here, and hostile ones.

The files made here are written by torch's own pickling, as the official ones are: records of modules with the source of
their classes, which their own loader would run.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tools_here
from official import (
    MARKER,
    NETWORKS,
    SMALL,
    asked,
    official_pickle,
    official_state,
    random,
)
from ratiograph import config
from ratiograph.algebra.noising import RectifiedFlow, VarianceExploding, VariancePreserving
from ratiograph.core.types import Condition, Noisy, expand
from ratiograph.networks.architectures.edm import ADM
from ratiograph.networks.denoisers import EDM
from ratiograph.networks.edm_weights import Description, convert_file, our_name
from ratiograph.networks.preconditioning import VEPreconditioned, VPPreconditioned
from ratiograph.networks.weights.edm_pickles import read_network

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = Path(os.environ.get("RATIOGRAPH_EDM_REFERENCE", ROOT.parent / "shared" / "reference" / "edm"))
needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(),
    reason=f"no networks in {REFERENCE}: give their folder as RATIOGRAPH_EDM_REFERENCE",
)
PROCESSES = {"ve": VarianceExploding(), "vp": VariancePreserving(), "flow": RectifiedFlow()}


def rebuilt(folder: Path) -> EDM:
    """The denoiser that a converted folder describes, with its weights."""
    document = json.loads((folder / "network.json").read_text())
    parts = (document[key] for key in ("denoiser", "denoiser_arguments", "network", "network_arguments"))
    denoiser = Description(*parts).build()
    denoiser.weights = str(folder / "weights.safetensors")
    denoiser.load()
    return denoiser.eval()


# --- reference files ------------------------------------------------------------------------------------------


@needs_reference
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", ["ddpmpp_uncond", "ncsnpp_cond", "adm_cond"])
def test_reference_networks_give_the_stored_outputs(name, process, tmp_path):
    convert_file(REFERENCE / f"{name}.pkl", tmp_path)
    denoiser, process = rebuilt(tmp_path), PROCESSES[process]
    with np.load(REFERENCE / f"{name}.npz") as stored:
        stored = {key: torch.from_numpy(stored[key]) for key in stored.files}
    labels = stored["labels"].argmax(1) if stored["labels"].numel() else None
    augment = stored["augment"] if stored["augment"].numel() else None
    t = process.time_of(stored["sigma"].double())
    alpha, sigma = (scale.float() for scale in process.alpha_sigma(t))
    noisy = Noisy(expand(alpha, stored["x"]) * stored["x"], t, alpha, sigma)
    with torch.no_grad():
        plain = denoiser.denoise(noisy, Condition(labels))
        augmented = denoiser.denoise(noisy, Condition(labels, augment))
    for found, key in ((plain, "denoised"), (augmented, "denoised_augmented")):
        torch.testing.assert_close(found, stored[key], rtol=0, atol=2e-6)
    if augment is not None:
        assert (plain - augmented).abs().max() > 1e-3


# --- files of the official format -----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Whatever a file would write when run lands here, and must not."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path(MARKER).exists()


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_pickles_give_back_the_network(name, old, tmp_path, monkeypatch):
    network = random(NETWORKS[name]())
    official_pickle(tmp_path / "net.pkl", network, monkeypatch, old=old, sigma_data=0.6)
    description = convert_file("net.pkl", "out")
    assert description.denoiser_arguments == {"sigma_data": 0.6}
    arguments = {**SMALL, "image_channels": 3, "classes": network.classes, "augment_labels": network.augment_labels}
    arguments |= {"dropout": 0.1 if name == "adm" else 0.13, "label_dropout": 0.1 if name == "ncsnpp" else 0.0}
    assert description.network_arguments == {**arguments, "channels": 64 if name == "adm" else 8}
    with torch.no_grad():
        expected = EDM(network=network, sigma_data=0.6).eval().denoise(*asked())
        assert torch.equal(rebuilt(Path("out")).denoise(*asked()), expected)


@pytest.mark.parametrize(("suffix", "prefix"), [(".pt", ""), (".pth", "model.")])
def test_plain_state_dicts_give_back_the_network(suffix, prefix):
    network = random(NETWORKS["ncsnpp"]())
    state = {prefix + name: tensor for name, tensor in official_state(network).items()}
    torch.save(state, f"net{suffix}")
    convert_file(f"net{suffix}", "out", "VEPreconditioned")
    with torch.no_grad():
        expected = VEPreconditioned(network=network).eval().denoise(*asked())
        assert torch.equal(rebuilt(Path("out")).denoise(*asked()), expected)


def test_score_networks_before_edm_keep_their_preconditioning(monkeypatch):
    network = random(NETWORKS["ddpmpp"]())
    path = Path("net.pkl")
    official_pickle(path, network, monkeypatch, denoiser="VPPrecond", beta_min=0.2, beta_d=9.8, M=500, epsilon_t=1e-5)
    convert_file(path, "out")
    with torch.no_grad():
        expected = VPPreconditioned(network=network, beta_min=0.2, beta_max=10.0, steps=500).eval().denoise(*asked())
        assert torch.equal(rebuilt(Path("out")).denoise(*asked()), expected)
    with pytest.raises(ValueError, match="its denoiser is VPPreconditioned and not EDM"):
        convert_file(path, "out", "EDM")


def test_gin_lines_build_the_same_denoiser(monkeypatch):
    network = random(NETWORKS["adm"]())
    official_pickle(Path("net.pkl"), network, monkeypatch)
    convert_file("net.pkl", "out")
    Path("run.gin").write_text("import ratiograph.networks.architectures.edm\ninclude 'out/network.gin'\n")
    denoiser = config.build(config.parse(["run.gin"], root="EDM"))
    denoiser.load()
    with torch.no_grad():
        expected = EDM(network=network).eval().denoise(*asked())
        assert torch.equal(denoiser.eval().denoise(*asked()), expected)


# --- refusals -------------------------------------------------------------------------------------------------


class Runs:
    """A pickle that runs a command when it is loaded."""

    def __reduce__(self):
        return os.system, (f"touch {MARKER}",)


class Storage:
    """Tensor bytes that are a pickle of something else."""

    def __init__(self, data: bytes):
        self.data = data

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.data,)


def torch_file(value: object, zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


HOSTILE = {
    "a command": (pickle.dumps({"ema": Runs()}), r"(posix|nt)\.system"),
    "a command in a list": (pickle.dumps([1, Runs()]), r"(posix|nt)\.system"),
    "a command, protocol 0": (pickle.dumps(Runs(), protocol=0), r"(posix|nt)\.system"),
    "a command in tensor bytes": (pickle.dumps(Storage(torch_file(Runs(), False))), r"(posix|nt)\.system"),
    "a command in a zip of tensors": (pickle.dumps(Storage(torch_file(Runs(), True))), r"(posix|nt)\.system"),
    "a bare pickle in tensor bytes": (pickle.dumps(Storage(pickle.dumps(Runs()))), "no EDM network"),
    "eval": (b"cbuiltins\neval\n(V1\ntR.", r"builtins\.eval"),
    "an unknown class": (pickle.dumps({"ema": subprocess.Popen}), r"subprocess\.Popen"),
    "a way round through attributes": (b"cbuiltins\ngetattr\n.", r"builtins\.getattr"),
    "a nested name": (b"\x80\x04\x8c\x05numpy\x8c\x0ctesting.main\x93.", r"numpy\.testing\.main"),
    "a persistent object": (b"Pid\n.", "the persistent object 'id'"),
    "state for a function": (b"ctorch._utils\n_rebuild_tensor_v2\n}b.", "state for Function"),
    "slots of a function": (b"ctorch._utils\n_rebuild_tensor_v2\n(N}V_call\nNstb.", "state for Function"),
    "state for a class": (b"ctorch.nn.modules.container\nModuleDict\n}b.", "no EDM network"),
    "a record of a function": (
        b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n(}(Vtype\nVfunction\nVclass_name\nVx\nVstate\n}utR.",
        "a record of type 'function'",
    ),
    "an object array": (b"cnumpy\ndtype\n(VO\ntR.", r"numpy\.dtype\('O'\)"),
    "no network": (pickle.dumps({"ema": {"weight": 1.0}}), "a dict in place of a network"),
    "something else": (b"not a pickle at all", "damaged, or no EDM network"),
    "nothing": (b"", "damaged, or no EDM network"),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_by_name_and_not_run(name):
    data, message = HOSTILE[name]
    Path("net.pkl").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_network("net.pkl")


def test_the_command_would_have_run():
    """What the refusals above are worth: the standard loader runs these bytes."""
    code = f"import pickle; pickle.loads({HOSTILE['a command'][0]!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert Path(MARKER).exists()
    Path(MARKER).unlink()


@pytest.mark.parametrize("zipped", [False, True])
def test_hostile_state_dicts_are_refused_by_name_and_not_run(zipped):
    Path("net.pt").write_bytes(torch_file({"enc.8x8_conv.weight": Runs()}, zipped))
    with pytest.raises(ValueError, match=r"refused (posix|nt)\.system"):
        read_network("net.pt")


def test_refused_inside_a_network(monkeypatch):
    """A whole network with one command among the attributes of a block."""
    network = NETWORKS["ddpmpp"]()
    official_pickle(Path("net.pkl"), network, monkeypatch, harmless=Runs())
    with pytest.raises(ValueError, match=r"refused (posix|nt)\.system, which no EDM network needs; nothing was run"):
        convert_file("net.pkl", "out")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("size", "stride", "message"),
    [
        ((1000, 1000), (0, 0), "larger than its storage"),  # a small file that asks for much memory
        ((2, 2), (3, 1), "out of bounds"),
    ],
)
def test_tensors_stay_inside_their_storage(size, stride, message):
    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (STORAGE, 0, size, stride, False, {})

    Path("net.pkl").write_bytes(pickle.dumps({"ema": Tensor()}))
    with pytest.raises(ValueError, match=message):
        read_network("net.pkl")


STORAGE = Storage(torch_file(torch.arange(4.0)._typed_storage(), False))


def test_truncated_files_are_damaged_wherever_they_end(monkeypatch):
    official_pickle(Path("whole.pkl"), NETWORKS["ddpmpp"](), monkeypatch)
    data = Path("whole.pkl").read_bytes()
    for share in (0.001, 0.1, 0.5, 0.9, 0.9999):
        Path("net.pkl").write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError, match="is damaged"):
            read_network("net.pkl")


def test_tensor_bytes_that_end_early_are_damaged():
    Path("net.pkl").write_bytes(pickle.dumps({"ema": Storage(STORAGE.data[:-8])}))
    with pytest.raises(ValueError, match="is damaged"):
        read_network("net.pkl")


def test_unknown_denoisers_are_named(monkeypatch):
    official_pickle(Path("net.pkl"), NETWORKS["ddpmpp"](), monkeypatch, denoiser="iDDPMPrecond")
    with pytest.raises(ValueError, match="its network is a iDDPMPrecond; only EDMPrecond"):
        convert_file("net.pkl", "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("enc.4x4_block1.conv0.weight"), "encoder.1.blocks.1.conv1.weight is not in the file"),
        (lambda s: s.pop("map_layer0.weight"), r"embedding\.layer1\.weight is not in the file"),
        (lambda s: s.update({"enc.4x4_aux_skip.weight": torch.zeros(1)}), "enc.4x4_aux_skip.weight has no place"),
        (lambda s: s.update({"head.weight": torch.zeros(1)}), "head.weight has no place"),
        (lambda s: s.update({"map_noise.freqs": torch.zeros(4)}), "none of DDPM"),
        (lambda s: s.update({"dec.8x8_up.conv0.resample_filter": torch.ones(1, 1, 2, 2)}), "neither"),
        (lambda s: s.clear(), "none of DDPM"),
    ],
)
def test_tensors_that_make_no_network_are_named(change, message):
    state = official_state(NETWORKS["ddpmpp"]())
    change(state)
    torch.save(state, "net.pt")
    with pytest.raises(ValueError, match=message):
        convert_file("net.pt", "out")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("official", "ours"),
    [
        ("enc.32x32_conv.bias", "stem.bias"),
        ("enc.8x8_block3.norm2.weight", "encoder.2.blocks.3.attention.norm.weight"),
        ("enc.16x16_aux_residual.weight", "pyramid.0.weight"),
        ("dec.16x16_up.skip.weight", "decoder.1.resample.skip.weight"),
        ("dec.8x8_in1.conv1.weight", "middle.1.conv2.weight"),
        ("dec.32x32_aux_norm.weight", "out_norm.weight"),
        ("map_noise.freqs", "embedding.noise.frequencies"),
    ],
)
def test_names(official, ours):
    assert our_name(official, 32) == ours


# --- the tool -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tool():
    """tools/convert_edm.py as a function of its arguments."""
    spec = importlib.util.spec_from_file_location("convert_edm", ROOT / "tools" / "convert_edm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments):
        return tools_here.call(module, *arguments)

    return call


def test_tool_converts(tool, capsys):
    network = random(NETWORKS["ncsnpp"]())
    torch.save(official_state(network), "net.pt")
    tool("--preconditioning=VEPreconditioned", "net.pt", "out")
    assert "VEPreconditioned with NCSNPP" in capsys.readouterr().out
    document = json.loads(Path("out/network.json").read_text())
    assert document["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    lines = Path("out/network.gin").read_text().splitlines()
    assert "VEPreconditioned.network = @NCSNPP()" in lines
    assert f"TEACHER = '{Path('out').resolve() / 'weights.safetensors'}'" in lines
    assert "NCSNPP.multipliers = (1, 2, 2)" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["net.pkl"], "error: give the official file and the folder"),
        (["missing.pkl", "out"], "error: no file missing.pkl"),
        (["net.zip", "out"], "error: net.zip is neither a pickle"),
        (["net.pkl", "out"], "error: net.pkl: refused builtins.eval"),
    ],
)
def test_tool_reports_one_line(tool, arguments, message, capsys):
    Path("net.pkl").write_bytes(HOSTILE["eval"][0])
    Path("net.zip").write_bytes(b"")
    assert tool("--preconditioning=EDM", *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


# --- budgets ----------------------------------------------------------------------------------------------------------


def endless(levels: int = 60) -> bytes:
    """{t: 1} of tuples t = (u, u), whose hash takes 2^levels steps."""
    pairs = b"".join(b"h%ch%c\x86q%c0" % (k, k, k + 1) for k in range(levels))
    return b"\x80\x02}K\x01\x85q\x000" + pairs + b"h%cK\x01s." % levels


BOMBS = {
    "tuples of tuples": (endless(), "builds more than it holds"),
    "a memo": (b"\x80\x02}r\x00\x00\x00\x7f.", "a memo of 2,130,706,432 places"),
    "a deep tuple": (b"\x80\x02)" + 100_000 * b"\x85" + b".", "more than 500 deep"),
    "opcodes": (b"\x80\x02" + 300_000 * b"N0" + b"N.", "more than 400,000 opcodes"),
    "bytes again": (b"\x80\x03B\x00\x00\x10\x00" + 2**20 * b"a" + b"q\x000" + 300 * b"h\x000" + b"N.", "builds more"),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("suffix", [".pkl", ".pt"])
def test_bombs_are_refused_before_anything_is_built(name, suffix):
    data, message = BOMBS[name]
    Path(f"net{suffix}").write_bytes(data)
    with pytest.raises(ValueError, match=f"net{suffix}: refused .*{message}"):
        read_network(f"net{suffix}")


@pytest.mark.parametrize(("width", "heads"), [(96, 1), (160, 2), (32, 0)])
def test_adm_of_any_width_has_the_heads_of_the_official_code(width, heads):
    ours = random(ADM(**{**SMALL, "channels": width, "attention_resolutions": (4,) if heads else ()}))
    torch.save(official_state(ours), "net.pt")
    convert_file("net.pt", "out")
    network = rebuilt(Path("out")).network
    assert [block.attention.heads if block.attention else 0 for block in network.middle] == [2 * width // 64, 0]
    if not heads:
        return
    # The official attention, written out: channels // 64 heads, channels ordered (head, channel, query-key-value).
    layer, x = network.encoder[1].blocks[0].attention, torch.randn(2, 2 * width, 4, 4)
    heads = 2 * width // 64
    q, k, v = layer.query_key_value(layer.norm(x)).reshape(2 * heads, 2 * width // heads, 3, -1).unbind(2)
    weights = torch.einsum("ncq,nck->nqk", q, k / k.shape[1] ** 0.5).softmax(2)
    expected = layer.project(torch.einsum("nqk,nck->ncq", weights, v).reshape(x.shape))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_foreign_names_do_not_reach_the_terminal_or_gin(monkeypatch):
    torch.save(official_state(random(NETWORKS["ddpmpp"]())), "a\n\x1b[2Jb.pt")
    convert_file("a\n\x1b[2Jb.pt", "out")
    assert (Path("out") / "network.gin").read_text().startswith("# The network of a\\n\\x1b[2Jb.pt, ")
