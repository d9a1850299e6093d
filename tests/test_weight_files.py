"""weight_files.py: safetensors in and out."""

import pytest
import torch
from torch import nn

from ratiograph.networks.weights import weight_files


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
