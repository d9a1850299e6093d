"""What starting costs: which packages the modules import, and how long the program's own code takes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    *("diffusers", "transformers", "peft", "open_clip", "timm", "torchvision", "torchmetrics", "cleanfid"),
    *("matplotlib", "tensorboard", "scipy", "mlxtend", "pandas", "sklearn", "huggingface_hub", "torch_fidelity"),
}
"""What some component, figure or tool needs, and reading a configuration does not."""

PARTS_OF_TORCH = {
    *("sympy", "torch._dynamo", "torch._inductor"),  # its compiler
    *("torch.distributed.tensor", "torch.distributed.fsdp"),  # its sharding, which imports half of the compiler
}
"""Each takes longer to import than all our own modules together."""

OWN = """
import sys, time
import einops, gin, numpy, PIL.Image, rich.live, rich.table, safetensors.torch, torch, torch.distributed
import torch.utils.data, torch.utils.tensorboard, webdataset, yaml
from ratiograph import command_line
sys.path.insert(0, "launch")
others = time.process_time()
import main
from ratiograph.tasks.distillation import Distillation

take = Distillation.step


def step(self, *given):
    metrics = take(self, *given)
    print("seconds", others, time.process_time() - others)
    return metrics


Distillation.step = step
command_line.run(main.main)
"""


def output_of(code: str, *arguments: str) -> list[str]:
    """Lines that a fresh interpreter prints."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def imported():
    """Names of all modules that are there once a configuration is read and the trainer is at hand."""
    code = "import sys\nfrom ratiograph import config\nconfig.parse(['gin/mnist_sba.gin'])\n"
    code += "import ratiograph.training.trainer\n"
    return set(output_of(code + "print(*sys.modules)")[-1].split())


def test_all_components_are_registered(imported):
    assert {
        f"ratiograph.{name}" for name in ("algebra.weightings", "networks.teachers.mixture", "data.latents")
    } <= imported
    assert {"torch", "gin", "numpy"} <= imported


def test_no_package_is_imported_before_a_component_needs_it(imported):
    assert not imported & PACKAGES


def test_no_part_of_torch_is_imported_before_it_is_needed(imported):
    assert not imported & PARTS_OF_TORCH


def test_a_run_without_compiled_networks_imports_no_compiler(tmp_path):
    code = "import sys\nsys.path.insert(0, 'launch')\nimport main\nfrom ratiograph import command_line\n"
    code += "try:\n    command_line.run(main.main)\nfinally:\n    print(*sys.modules)"
    run = ["--gin_file=gin/mixture2d_ratio.gin", "--steps=2", "--batch_size=16", f"--workdir={tmp_path}"]
    imported = set(output_of(code, *run, "--gin_param=Experiment.evaluator=None")[-1].split())
    assert "ratiograph.training.optim" in imported
    assert not imported & {"sympy", "torch._dynamo", "torch._inductor"}


@pytest.mark.slow
def test_our_own_code_takes_three_seconds_to_the_end_of_the_first_step(tmp_path):
    """CPU seconds from the first of our imports; the libraries are there already."""
    arguments = ["--gin_file=gin/mnist_sba.gin", "--steps=1", "--gin_param=Experiment.evaluator=None"]
    (line,) = [x for x in output_of(OWN, *arguments, f"--workdir={tmp_path}") if x.startswith("seconds")]
    others, own = map(float, line.split()[1:])
    assert own <= 3
    assert others + own <= 12
