"""What a run leaves at its end: final weights and the evaluation."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from ratiograph.core import distributed
from ratiograph.core.files import Missing, write_atomically
from ratiograph.core.foreign import read_json
from ratiograph.networks.weights import weight_files
from ratiograph.training import parallel
from ratiograph.training.experiment import Experiment
from ratiograph.training.run_facts import NETWORK, network_facts

__all__ = ["set_aside", "whole", "write_results"]


def whole(path: Path, kind: type, tell: Callable[[str], None]) -> object:
    """The value of a JSON file of the run; a torn one is removed, with a message. None without one."""
    try:
        found = read_json(path)
        if isinstance(found, kind):
            return found
        tell(f"{path} holds a {type(found).__name__}: removed")
    except Missing:
        return None
    except ValueError as error:
        tell(f"{error}. Removed")
    if distributed.is_main():
        path.unlink(missing_ok=True)
    return None


def set_aside(workdir: Path, step: int) -> None:
    """Keeps the evaluation of a run that ended at ``step`` and goes on, as evaluation_step_<8 digits>.json."""
    with suppress(FileNotFoundError):
        os.replace(workdir / "evaluation.json", workdir / f"evaluation_step_{step:08d}.json")


def write_results(
    experiment: Experiment, workdir: Path, device: torch.device, config: str, tell: Callable[[str], None], anew: bool
) -> None:
    """Writes the final weights and the evaluation; all ranks take part, the main one writes.

    Args:
        experiment: with its task trained.
        workdir: of the run.
        device: of the task.
        config: text of config.gin, which goes into the files of weights.
        tell: takes messages for people.
        anew: whether to write all of them, or what is missing or torn.

    Raises:
        ValueError: a file cannot be written.
    """
    for name, module in experiment.task.weights().items():
        path = workdir / f"{name}.safetensors"
        if distributed.from_main(anew or not weight_files.is_whole(path)):
            facts = network_facts(module)
            header = ({"config": config} if config else {}) | ({NETWORK: json.dumps(facts)} if facts else {})
            gathered = parallel.Gathered(module)
            if distributed.is_main():
                weight_files.save_weights(path, gathered, header)
    path = workdir / "evaluation.json"
    if experiment.evaluator and distributed.from_main(anew or whole(path, dict, tell) is None):
        tell("evaluating")
        before = distributed.from_main(whole(workdir / "before.json", list, tell) or [])
        with experiment.task.parallel.whole(), tempfile.TemporaryDirectory() as unused:
            folder = workdir if distributed.is_main() else Path(unused)
            document = experiment.evaluator.after(experiment.task, device, experiment.seed, before, folder)
        if distributed.is_main():
            write_atomically(path, json.dumps(document, indent=1).encode())
