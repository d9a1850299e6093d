"""checkpoints.py: whatever interrupts or damages a save, the newest whole state is found, and it alone."""

import hashlib
import os
import resource
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from ratiograph.training import checkpoints


def state(seed: int, size: int = 64) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "student": {"weight": torch.randn(size, size, generator=generator)},
        "optimiser": {"state": {0: {"exp_avg": torch.randn(3, generator=generator)}}, "betas": (0.0, 0.99)},
        "flags": [True, None, "name", 1.5],
        "step": seed,
    }


def assert_same(found, expected):
    torch.testing.assert_close(found["student"], expected["student"], rtol=0, atol=0)
    torch.testing.assert_close(found["optimiser"]["state"][0], expected["optimiser"]["state"][0], rtol=0, atol=0)
    assert found["optimiser"]["betas"] == expected["optimiser"]["betas"]
    assert (found["flags"], found["step"]) == (expected["flags"], expected["step"])


def damage(path, offset_fraction=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * offset_fraction)] ^= 0xFF
    path.write_bytes(bytes(data))


def test_latest_returns_what_was_saved_and_the_last_two_are_kept(tmp_path):
    folder = tmp_path / "checkpoints"
    assert checkpoints.latest(folder) is None
    for step in (5, 100, 20_000):
        checkpoints.save(folder, step, state(step))
    assert checkpoints.steps(folder) == [100, 20_000]
    assert sorted(path.name for path in folder.iterdir()) == [
        "step_00000100.pt",
        "step_00000100.pt.sha256",
        "step_00020000.pt",
        "step_00020000.pt.sha256",
    ]
    step, found = checkpoints.latest(folder)
    assert step == 20_000
    assert_same(found, state(20_000))


def test_sidecar_is_the_sha256_of_the_file(tmp_path):
    path = checkpoints.save(tmp_path, 7, state(7))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.with_name("step_00000007.pt.sha256").read_text() == f"{digest}  step_00000007.pt\n"


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, fraction):
    checkpoints.save(tmp_path, 100, state(100))
    damage(checkpoints.save(tmp_path, 200, state(200)), fraction)
    with pytest.warns(UserWarning, match=r"step_00000200\.pt is damaged.*digest"):
        step, found = checkpoints.latest(tmp_path)
    assert step == 100
    assert_same(found, state(100))


def test_a_deleted_checkpoint_is_named_and_the_one_before_is_used(tmp_path):
    checkpoints.save(tmp_path, 100, state(100))
    checkpoints.save(tmp_path, 200, state(200)).unlink()
    with pytest.warns(UserWarning, match=r"step_00000200\.pt is missing.*trying the one before it"):
        step, found = checkpoints.latest(tmp_path)
    assert step == 100
    assert_same(found, state(100))
    checkpoints.save(tmp_path, 300, state(300))  # the digest that has no file goes with the old ones
    assert sorted(path.name for path in tmp_path.glob("*.sha256")) == [
        "step_00000100.pt.sha256",
        "step_00000300.pt.sha256",
    ]


def test_some_older_ones_may_be_kept(tmp_path):
    for step in range(10, 80, 10):
        checkpoints.save(tmp_path, step, state(step), keep=2, also=lambda old: old in (20, 40))
    assert checkpoints.steps(tmp_path) == [20, 40, 60, 70]


def test_a_truncated_checkpoint_without_digest_is_still_recognised(tmp_path):
    checkpoints.save(tmp_path, 100, state(100))
    path = checkpoints.save(tmp_path, 200, state(200))
    path.write_bytes(path.read_bytes()[:-100])
    path.with_name(path.name + ".sha256").unlink()
    with warnings.catch_warnings(record=True) as caught:
        assert checkpoints.latest(tmp_path)[0] == 100
    messages = [str(warning.message) for warning in caught]
    assert any("read without verification" in message for message in messages)
    assert any("step_00000200.pt is damaged" in message for message in messages)


def test_when_all_are_damaged_the_error_says_what_to_do(tmp_path):
    for step in (100, 200):
        path = checkpoints.save(tmp_path, step, state(step))
        path.write_bytes(b"")
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(ValueError, match=r"every checkpoint .* is damaged .*step_00000200.*Remove the folder"),
    ):
        checkpoints.latest(tmp_path)


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    path = tmp_path / "step_00000001.pt"
    torch.save({"x": Payload()}, path)
    with warnings.catch_warnings(action="ignore"), pytest.raises(ValueError, match="is damaged"):
        checkpoints.latest(tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [1, np.float64(2.0)]}, r"state\['a'\]\[1\] is a numpy.float64"),
        ({"a": {"f": print}}, r"state\['a'\]\['f'\] is a builtins"),
    ],
)
def test_what_could_not_be_read_back_is_refused_before_writing(tmp_path, value, where):
    with pytest.raises(ValueError, match=where):
        checkpoints.save(tmp_path, 1, value)
    assert checkpoints.steps(tmp_path) == []


def test_going_on_from_before_a_damaged_one_keeps_its_predecessors(tmp_path):
    for step in (100, 200):
        checkpoints.save(tmp_path, step, state(step))
    damage(tmp_path / "step_00000200.pt")
    checkpoints.save(tmp_path, 150, state(150))
    with pytest.warns(UserWarning, match="step_00000200"):
        assert checkpoints.latest(tmp_path)[0] == 150
    assert checkpoints.steps(tmp_path) == [100, 150, 200]
    checkpoints.save(tmp_path, 200, state(-200))  # the run comes by again and repairs it
    step, found = checkpoints.latest(tmp_path)
    assert step == 200
    assert_same(found, state(-200))


def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_temporary(tmp_path):
    """A limit on file size stands in for a full disk: the write fails half way with an OSError."""
    checkpoints.save(tmp_path, 100, state(100))
    before = sorted(path.name for path in tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ValueError, match=r"cannot write .*step_00000200\.pt: .*earlier files are intact"):
            checkpoints.save(tmp_path, 200, state(200, size=512))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    step, found = checkpoints.latest(tmp_path)
    assert step == 100
    assert_same(found, state(100))


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*step_00000001\.pt: Not a directory"):
        checkpoints.save(tmp_path / "file" / "checkpoints", 1, state(1))


@pytest.mark.parametrize("moment", ["before_rename", "while_writing"])
def test_a_kill_at_any_moment_leaves_the_earlier_checkpoint(tmp_path, moment):
    script = f"""
import os, signal, sys, torch
from ratiograph.training import checkpoints
folder = sys.argv[1]
checkpoints.save(folder, 100, {{"x": torch.arange(1000)}})
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if "{moment}" == "before_rename":
    replace = os.replace
    os.replace = lambda a, b: kill() if str(b).endswith(".pt") else replace(a, b)
else:
    write = checkpoints._HashingFile.write
    checkpoints._HashingFile.write = lambda s, d: write(s, d) and s.file.tell() > 4000 and kill() or len(d)
checkpoints.save(folder, 200, {{"x": torch.arange(1000) + 1}})
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in tmp_path.glob(".*.tmp")] != []
    step, found = checkpoints.latest(tmp_path)
    assert step == 100
    assert torch.equal(found["x"], torch.arange(1000))
    checkpoints.save(tmp_path, 200, state(200))
    assert list(tmp_path.glob(".*.tmp")) == []


def net(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))


def test_load_strict_copies_every_tensor():
    source, target = net(), net()
    source(torch.randn(8, 3))  # moves the batch statistics away from their defaults
    checkpoints.load_strict({"student": target}, {"student": source.state_dict()})
    for (name, found), expected in zip(target.state_dict().items(), source.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            {"student": net(5).state_dict(), "ratio": net().state_dict()},
            r"student\.0\.weight has shape \[4, 3\] here and \[5, 3\] in the file.*and 3 more",
        ),
        ({"student": net().state_dict()}, r"node ratio is not in the file"),
        (
            {"student": net().state_dict(), "ratio": net().state_dict(), "old": {}},
            r"node old is in the file and not",
        ),
        (
            {"student": net().state_dict(), "ratio": net()[0].state_dict()},
            r"ratio\.0\.weight is not in the file",
        ),
        (
            {"student": net().state_dict() | {"extra": torch.zeros(1)}, "ratio": net().state_dict()},
            r"student\.extra is in the file and not here",
        ),
    ],
)
def test_load_strict_names_the_first_difference_and_changes_nothing(found, message):
    modules = {"student": net(), "ratio": net()}
    before = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in modules.items()}
    with pytest.raises(ValueError, match=r"run/step_1\.pt is a checkpoint of another graph: .*" + message):
        checkpoints.load_strict(modules, found, source="run/step_1.pt")
    for name, module in modules.items():
        assert all(torch.equal(v, before[name][k]) for k, v in module.state_dict().items())
