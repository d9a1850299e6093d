"""workdir.py: one process at a time, whatever happened to the one before."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from ratiograph.training.workdir import locked

HOLDER = """
import sys, time
from ratiograph.training.workdir import locked
with locked(sys.argv[1]):
    if "fork" in sys.argv:
        import os
        if os.fork() == 0:
            time.sleep(60)
    print(flush=True)
    time.sleep(60)
"""


def holder(folder, *words):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, folder, *words], stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def test_a_second_run_is_refused_by_name_and_a_dead_one_locks_nothing(tmp_path):
    folder = tmp_path / "runs" / "a"
    process = holder(folder)
    expected = rf"using .*runs/a: process {process.pid} on {socket.gethostname()}, since 20.*another --workdir"
    try:
        with pytest.raises(ValueError, match=expected), locked(folder):
            pass
        with locked(tmp_path / "runs" / "b"):
            pass
    finally:
        process.kill()
        process.wait()
    with locked(folder):
        assert f'"pid": {os.getpid()}' in (folder / ".lock").read_text()
    with locked(folder):
        pass


def test_what_a_killed_run_started_does_not_keep_its_lock(tmp_path):
    """A loader's worker may outlive the run it belongs to."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path, "fork"], stdout=subprocess.PIPE, start_new_session=True
    )
    process.stdout.readline()
    try:
        process.kill()
        process.wait()
        with locked(tmp_path):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_lock_that_was_removed_is_no_longer_held(tmp_path, replaced):
    with locked(tmp_path) as check_held:
        check_held()
        (tmp_path / ".lock").rename(tmp_path / "elsewhere")
        if replaced:
            (tmp_path / ".lock").write_text("")
        with pytest.raises(ValueError, match=r"\.lock was removed, replaced or taken while this run held it"):
            check_held()


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*\.lock: File exists"), locked(tmp_path / "file"):
        pass


CLAIM = """
import sys, time
from pathlib import Path
from ratiograph import config
from ratiograph.training.run_folder import claimed
cfg = config.parse(["gin/mixture2d_scores.gin"])
with claimed(Path(sys.argv[1]), cfg) as check_held:
    check_held()
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def test_a_claimed_folder_is_refused_to_a_second_run(tmp_path):
    command = [sys.executable, "-c", CLAIM, tmp_path / "run"]
    first = subprocess.Popen([*command, "60"], stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"held\n"
    try:
        second = subprocess.run([*command, "0"], capture_output=True, text=True)
        assert f"run: process {first.pid} on {socket.gethostname()}" in second.stderr
        assert second.stdout == ""
    finally:
        first.kill()
        first.wait()


def test_a_lock_that_another_process_has_taken_is_no_longer_held(tmp_path):
    with locked(tmp_path) as check_held:
        open(tmp_path / ".lock").close()  # which frees the lock
        process = holder(tmp_path)
        try:
            with pytest.raises(ValueError, match="taken while this run held it"):
                check_held()
        finally:
            process.kill()
            process.wait()
