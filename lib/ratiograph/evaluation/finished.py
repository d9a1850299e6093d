"""A finished run's student, for the tools that judge it again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ratiograph import checkpoints, weight_files

if TYPE_CHECKING:
    from ratiograph.distillation import Distillation

__all__ = ["load_students"]


def load_students(task: Distillation, workdir: Path, *, raw: bool = False) -> None:
    """Loads what a run left of its student: every average and, where they are judged, the weights of the last step.

    Args:
        task: prepared.
        workdir: of the run.
        raw: whether the weights of the last step are judged; they are where the run keeps several averages.

    Raises:
        FileNotFoundError, ValueError: a file of weights is missing or does not fit; there is no checkpoint.
    """
    for name, network in task.weights().items():
        if name.startswith("student"):
            weight_files.load_weights(workdir / f"{name}.safetensors", network)
    if not (raw or task.averaged):
        return
    found = checkpoints.latest(workdir / "checkpoints")
    if not found:
        raise ValueError(f"{workdir} has no checkpoint, which the student's weights of the last step lie in (raw)")
    last = {"student": found[1]["task"]["networks"]["student"]}
    checkpoints.load_strict({"student": task.student}, last, source=str(workdir / "checkpoints"))
