"""Reads a finished student from config.gin and the weights in its folder; the rest of its graph is not loaded.

The folder is a run's workdir, or one that `export` wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from ratiograph import config
from ratiograph.core.foreign import parse_json
from ratiograph.networks.conditions import Conditions
from ratiograph.networks.lora import LoRA
from ratiograph.networks.students import OneStep
from ratiograph.networks.weights.weight_files import load_weights, read_tensors
from ratiograph.tasks.distillation import Distillation
from ratiograph.training import checkpoints
from ratiograph.training.experiment import Experiment
from ratiograph.training.run_facts import NETWORK, check_facts, network_facts

__all__ = ["CONDITIONS", "WEIGHTS", "load_conditions", "load_student", "load_students", "read_experiment"]

WEIGHTS = "student.safetensors"
CONDITIONS = "conditions.safetensors"
"""The conditions of the run's previews, in an exported folder; in a workdir the checkpoint holds them."""


def read_experiment(folder: Path, *, memory: bool, bindings: Sequence[str] = ()) -> Experiment:
    """Builds the experiment of ``folder``/config.gin.

    Args:
        folder: holds config.gin.
        memory: whether networks have memory, initialised by the run's seed; if not, they are on the meta device.
        bindings: further lines of gin, applied after config.gin; ``import my.module`` for your own components.

    Raises:
        FileNotFoundError: there is no config.gin.
        ConfigError: config.gin or a binding is wrong.
    """
    if not (folder / "config.gin").is_file():
        raise FileNotFoundError(f"{folder} has no config.gin: give the folder of a run as --workdir")
    cfg = config.parse([str(folder / "config.gin")], bindings)
    torch.manual_seed(config.to_dict(cfg)["Experiment.seed"])
    with nullcontext() if memory else torch.device("meta"):
        return config.build(cfg)


def _give_memory(module: nn.Module) -> None:
    """Moves the meta tensors of ``module`` to uninitialised memory on the CPU."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    assert name not in part._non_persistent_buffers_set, name  # no file would fill it
                    empty = torch.empty_like(tensor, device="cpu")
                    tensors[name] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty


def _load(weights: Path, network: nn.Module) -> None:
    """Loads final weights, whose header and the files beside the teacher must agree on what the network means."""
    stated = parse_json(load_weights(weights, network).get(NETWORK, "{}"), weights)
    check_facts(network_facts(network), stated, weights, "name the folder that it was trained with")


def load_student(student: OneStep, weights: Path) -> OneStep:
    """``student`` with ``weights``, frozen and on the CPU; the base of a LoRA is loaded from its own file.

    Raises:
        FileNotFoundError, ValueError: there are none, as in a run that has not finished; they are another network's, or
            the files beside the teacher say of it something else than when it was trained.
    """
    if not weights.is_file() and weights.name == WEIGHTS and any(weights.parent.glob("checkpoints/*.pt")):
        raise FileNotFoundError(
            f"{weights} is written at the end of training: repeat the run's command, which resumes it"
        )
    _give_memory(student)
    if isinstance(getattr(student.denoiser, "network", None), LoRA):
        student.denoiser.load()
    _load(weights, student)
    return student.requires_grad_(False).eval()


def load_conditions(conditions: Conditions, folder: Path) -> Conditions:
    """``conditions`` with the state that they took from the run's data, if they need any.

    Raises:
        ValueError: neither an exported file nor a checkpoint in ``folder`` holds that state.
    """
    if not conditions.needs_data:
        return conditions
    if (folder / CONDITIONS).is_file():
        conditions.load_state_dict(read_tensors(folder / CONDITIONS)[0])
        return conditions
    found = checkpoints.latest(folder / "checkpoints")
    if found is None:
        raise ValueError(f"{folder}/checkpoints, which holds the conditions of the previews, has no checkpoint")
    conditions.load_state_dict(checkpoints.entry(found[1], "task", "conditions", source=folder / "checkpoints"))
    return conditions


def load_students(task: Distillation, workdir: Path, *, raw: bool = False) -> None:
    """Loads a run's student into ``task``: every average and, if they are evaluated, the weights of the last step.

    Args:
        task: prepared.
        workdir: of the run.
        raw: whether the weights of the last step are evaluated; they always are where the run keeps several averages.

    Raises:
        FileNotFoundError, ValueError: a file of weights is missing or does not fit; there is no checkpoint.
    """
    for name, network in task.weights().items():
        if name.startswith("student"):
            _load(workdir / f"{name}.safetensors", network)
    if not (raw or task.averaged):
        return
    found = checkpoints.latest(workdir / "checkpoints")
    if not found:
        raise ValueError(f"{workdir} has no checkpoint, which holds the student's weights of the last step (raw)")
    source = workdir / "checkpoints"
    last = {"student": checkpoints.entry(found[1], "task", "networks", "student", source=source)}
    checkpoints.load_strict({"student": task.student}, last, source=source)
