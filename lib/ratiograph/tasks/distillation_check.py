"""Checks of a distillation graph, before it is built and before its networks are placed; one error message a fault.

The ``task`` of these functions is a `Distillation`, whose module imports this one.
"""

from __future__ import annotations

from ratiograph.core.contracts import Denoiser
from ratiograph.training.experiment import Task

__all__ = ["check_nodes", "check_parallel"]


def check_nodes(task: Task) -> None:
    """Raises a ValueError if a node that a term needs is missing, or the times or optimiser of a trained node."""
    task.conditions.check(task.student)
    for node, terms in task.objective.requires.items():
        if getattr(task, node) is None:
            raise ValueError(f"the term {terms[0]!r} needs a {node}: bind Distillation.{node}, or change the term")
    if task.student_score is not None and None in (task.student_score_times, task.student_score_optimizer):
        raise ValueError(
            "student_score is trained online: bind Distillation.student_score_times and student_score_optimizer"
        )
    if task.ratio is not None:
        _check_ratio(task)
    task.check_shapes()
    classes = max((each.class_count for each in task.student.modules() if isinstance(each, Denoiser)), default=0)
    for name in ("teacher", "student_score", "ratio"):
        known = getattr(task, name).class_count if getattr(task, name) is not None else 0
        if 0 < known < classes:
            raise ValueError(f"the student makes {classes} classes, of which the {name} knows {known}: give it as many")
    learning = (task.student_score, task.ratio)
    task.augmentation.check(*(node.network for node in learning if hasattr(node, "network")))


def _check_ratio(task: Task) -> None:
    task.positives.check(task.teacher)
    if not task.ratio.learns:
        return
    timeless = task.ratio_times is None and not task.ratio.on_student_score
    if timeless or (task.ratio.has_weights and task.ratio_optimizer is None):
        raise ValueError("ratio is trained online: bind Distillation.ratio_times and ratio_optimizer")
    if task.ratio_times is None and task.ratio_updates > task.student_score_updates:
        raise ValueError(
            "a ratio without times of its own shares the student score's samples: bind Distillation.ratio_times, "
            "or give no more ratio_updates than student_score_updates"
        )


def check_parallel(task: Task) -> None:
    """Raises a ValueError if the networks are to be sharded and the graph uses what sharded networks cannot do."""
    twice = task.objective.needs.curvature or (task.ratio is not None and task.ratio_loss.needs_gradient)
    if task.parallel.shards and twice:
        raise ValueError(
            "R1Penalized and second-order targets differentiate a network twice, which sharded ones cannot do: use "
            "--parallel=ddp, or leave them out"
        )
    if task.parallel.shards and task.cuda_graphs:
        raise ValueError(
            "CUDA graphs want weights that stay where they are, and sharded ones are gathered anew for every pass: use "
            "--parallel=ddp, or set Distillation.cuda_graphs = False"
        )
