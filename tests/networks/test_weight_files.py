"""weight_files.py: safetensors in and out."""

import json
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ratiograph.networks.weights import weight_files
from ratiograph.networks.weights.pipeline_files import weights_of


def net(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))


def test_weights_go_through_safetensors_unchanged(tmp_path):
    source, target = net(), net()
    source[0].bias = source[1].bias  # tied weights are legal in a module
    weight_files.save_weights(tmp_path / "student.safetensors", source, {"gin": "a = 1"})
    assert weight_files.load_weights(tmp_path / "student.safetensors", target) == {"gin": "a = 1"}
    x = torch.randn(5, 3)
    assert torch.equal(source.eval()(x), target.eval()(x))


def test_wrong_torn_and_missing_weights_are_clear_errors(tmp_path):
    path = tmp_path / "teacher.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no weights at .*teacher\.safetensors"):
        weight_files.load_weights(path, net())
    weight_files.save_weights(path, net(5))
    with pytest.raises(ValueError, match=r"does not fit Sequential: 0\.weight has shape \[4, 3\] here and \[5, 3\]"):
        weight_files.load_weights(path, net(4))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"teacher\.safetensors is not a whole safetensors file"):
        weight_files.load_weights(path, net(5))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "ema.", "state_dict.model."])
def test_names_of_wrappers_are_taken_off(prefix, tmp_path):
    source, target = net(), net()
    save_file({f"{prefix}{name}": t.clone() for name, t in source.state_dict().items()}, tmp_path / "w.safetensors")
    weight_files.load_weights(tmp_path / "w.safetensors", target)
    assert torch.equal(target[0].weight, source[0].weight)


def test_the_middle_of_a_name_and_nested_dicts():
    tensor = torch.ones(2)
    assert [*weight_files.plain_names({"network._orig_mod.a": tensor, "b": tensor})] == ["network.a", "b"]
    assert [*weight_files.plain_names({"ema.a": tensor, "model.a": tensor})] == ["a"]
    assert [*weight_files.plain_names({"model.a": tensor}, here=["model.a"])] == ["model.a"]
    for wrapped in ({"ema": {"a": tensor}, "step": 3}, {"state_dict": {"model": {"module.a": tensor}}}):
        assert weight_files.state_dict(wrapped) == {"a": tensor}


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_with_file_and_tensor(name, value, tmp_path):
    tensors = {"a": torch.zeros(3), "b": torch.tensor([0.0, value, 1.0], dtype=torch.bfloat16)}
    (save_file if name.endswith("s") else torch.save)(tensors, tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} holds NaN or infinity, first in its tensor b"):
        weight_files.read_state(tmp_path / name)


def test_packed_archives_of_torch_are_refused_before_torch_reads_them(tmp_path):
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "plain.pt")
    assert weight_files.read_state(tmp_path / "plain.pt")["a"].shape == (10**6,)
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in plain.namelist():
            packed.writestr(member, plain.read(member))
    with pytest.raises(ValueError, match=r"packed\.pt is damaged or no file of tensors: refused compressed members"):
        weight_files.read_state(tmp_path / "packed.pt")


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1).expand(10**12)}, tmp_path / "wide.pt")
    with pytest.raises(ValueError, match="the tensor a, which is larger than its storage"):
        weight_files.read_state(tmp_path / "wide.pt")


# --- which files of a pipeline's part ---------------------------------------------------------------------------------

STEM = "diffusion_pytorch_model"
PLAIN, HALF = ([f"{STEM}-0000{k}-of-00002{variant}.safetensors" for k in (1, 2)] for variant in ("", ".fp16"))
OLD_HALF = [f"{STEM}.fp16-0000{k}-of-00002.safetensors" for k in (1, 2)]
NON_EMA = [f"{STEM}.non_ema-0000{k}-of-00002.safetensors" for k in (1, 2)]
WHOLE = [f"{STEM}.safetensors"]


def part(folder, files, indexes):
    folder.mkdir(exist_ok=True)
    for name in files:
        save_file({name: torch.zeros(1)}, folder / name)
    for name, weight_map in indexes.items():
        (folder / f"{STEM}.safetensors.index{name}.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    ("files", "indexes", "taken"),
    [
        (PLAIN + HALF + OLD_HALF + NON_EMA, {}, PLAIN),
        (HALF + NON_EMA, {}, HALF),
        (OLD_HALF + NON_EMA, {}, OLD_HALF),
        (NON_EMA, {}, []),
        (PLAIN + WHOLE, {}, WHOLE),
        (PLAIN + WHOLE, {"": {"a": PLAIN[1], "b": PLAIN[0], "c": PLAIN[1]}}, PLAIN),
        (PLAIN + NON_EMA, {"": {"a": NON_EMA[0]}}, NON_EMA[:1]),
        (HALF + OLD_HALF, {".fp16": dict(enumerate(OLD_HALF))}, OLD_HALF),
        (PLAIN + HALF, {".fp16": dict(enumerate(HALF))}, PLAIN),
        ([], {}, []),
    ],
)
def test_one_variant_of_a_part_is_taken(tmp_path, files, indexes, taken):
    assert [path.name for path in weights_of(part(tmp_path, files, indexes))] == taken


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": PLAIN[0], "b": "gone.safetensors"}, r"index\.json names gone\.safetensors, which is no file beside it"),
        ({"a": "../outside.safetensors"}, r"names \.\./outside\.safetensors, which"),
        ({"a": 5}, "names 5, which"),
        ({"a": "b\nc.safetensors"}, r"names b\\nc\.safetensors, which"),
        ({}, "names no files"),
        ([PLAIN[0]], "names no files"),
    ],
)
def test_an_index_that_names_other_than_files_beside_it_is_refused(tmp_path, weight_map, message):
    save_file({"a": torch.zeros(1)}, tmp_path / "outside.safetensors")
    with pytest.raises(ValueError, match=message):
        weights_of(part(tmp_path / "unet", PLAIN, {"": weight_map}))
