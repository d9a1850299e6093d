"""The process's peak, and refusals of what would not fit."""

import subprocess
import sys

import pytest
import torch

from ratiograph.training.memory import available_memory, peak_memory, require_memory

CPU = torch.device("cpu")


def test_the_peak_is_of_this_process():
    """2 GB in this one, then 400 MB touched and given back in a process of its own."""
    torch.ones(500_000_000)
    code = (
        "import torch; from ratiograph.training.memory import peak_memory\n"
        "cpu = torch.device('cpu'); before = peak_memory(cpu)\n"
        "x = torch.ones(100_000_000); del x; print(before, peak_memory(cpu))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert before < 1
    assert 0.3 < after - before < 0.45


def test_what_is_left_is_what_the_system_says():
    psutil = pytest.importorskip("psutil")
    assert 0 < available_memory(CPU) <= 1.1 * psutil.virtual_memory().available / 1e9
    assert peak_memory(CPU) >= psutil.Process().memory_info().rss / 1e9 * 0.99


def test_too_much_is_refused_with_a_remedy():
    require_memory(0.001, CPU, "")
    with pytest.raises(ValueError, match=r"about 1000000.0 GB and .* GB are left: take a smaller network"):
        require_memory(1e6, CPU, "take a smaller network")
