"""The files that a run left in its folder, read for a page; any of them may be missing or incomplete.

Notation: *records* are the objects of metrics.jsonl, ascending in their steps. A *note* is a sentence for the page on
a file that could not be read as a whole.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ratiograph.config.differences import read_bindings
from ratiograph.config.values import ConfigError
from ratiograph.core.foreign import shown
from ratiograph.data.images import BadImage, read_image
from ratiograph.reports.evaluation_file import finite, read_evaluation, read_object
from ratiograph.training.logs import duration, read_metrics, significant

__all__ = ["RESUME", "TEACHER", "RunFiles", "check_run", "grids", "read_run"]

FILES = ("config.gin", "metrics.jsonl", "evaluation.json")
"""The folder of a run has at least one of these."""
RESUME = "Resume the run, which writes it again"
"""What to do about a wrong diagnostics.json."""
TEACHER = Path("samples") / "teacher.png"
"""The teacher's samples at the noise of the student's grids, in a run's folder."""


@dataclass(frozen=True)
class RunFiles:
    """A run's folder.

    Args:
        workdir: the folder.
        records: of metrics.jsonl.
        evaluation: of evaluation.json, {} without it.
        diagnostics: of diagnostics.json, {} without it.
        bindings: of config.gin (`config.differences.read_bindings`), None without a readable one.
        notes: on what could not be read.
    """

    workdir: Path
    records: list[dict[str, Any]]
    evaluation: Mapping[str, Any]
    diagnostics: Mapping[str, Any]
    bindings: Mapping[str, object] | None
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.workdir.resolve().name

    @property
    def step(self) -> int:
        """The last step that was logged, 0 without any."""
        return self.records[-1]["step"] if self.records else 0

    @property
    def steps(self) -> int | None:
        """The step at which the run ends, where its configuration says so."""
        steps = (self.bindings or {}).get("Experiment.steps")
        return steps if isinstance(steps, int) else None

    @property
    def teacher_grid(self) -> Path | None:
        """Path of the teacher's samples at the noise of the student's grids, if there are any."""
        path = self.workdir / TEACHER
        return path if path.is_file() else None

    def teacher_name(self) -> str:
        """'teacher, 35 evaluations': what the teacher's grid shows."""
        try:
            evaluations = shown(read_image(self.workdir / TEACHER).info.get("evaluations") or "many", 20)
        except BadImage:
            evaluations = "unknown"
        return f"teacher, {evaluations} evaluation{'' if evaluations == '1' else 's'}"

    def state(self) -> str:
        """How far the run is, as a sentence; "" once it is done and evaluated."""
        known = self.steps is not None
        if not self.records:
            started = known or (self.workdir / "graph.svg").exists()
            return "This run has just begun: nothing has been measured yet." if started else ""
        if known and self.step < self.steps:
            return f"Not finished: {self.step:,} of {self.steps:,} steps."
        evaluator = (self.bindings or {}).get("Experiment.evaluator")
        if not self.evaluation and evaluator is not None:
            return "Not evaluated yet: the last step is done, and evaluation.json is not there."
        return ""

    def facts(self) -> dict[str, str]:
        """The run in a few numbers."""
        if not self.records:
            return {}
        last, facts = self.records[-1], {}
        unfinished = self.steps is not None and self.step < self.steps
        facts["steps"] = f"{self.step:,}{f' of {self.steps:,}' if unfinished else ''}"
        if finite(last.get("images")):
            facts["training images"] = f"{last['images']:,}"
        if finite(last.get("seconds")) and last["seconds"] > 0:
            facts["training time"] = f"{duration(last['seconds'])} {'h' if last['seconds'] >= 3600 else 'min'}"
            facts["steps per second"] = significant(last["step"] / last["seconds"], 3)
        return facts


def check_run(workdir: Path) -> None:
    """Raises an error if ``workdir`` is not the folder of a run.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds none of the files that every run leaves.
    """
    if not workdir.is_dir():
        raise FileNotFoundError(f"no run at {shown(workdir)}: give the --workdir of a run")
    if not any((workdir / name).exists() for name in FILES):
        raise ValueError(
            f"{shown(workdir)} is not the folder of a run: it has no {', '.join(FILES[:-1])} or {FILES[-1]}"
        )


def read_run(workdir: Path) -> RunFiles:
    """Reads the folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a file cannot be read, evaluation.json has another form, or diagnostics.json is no JSON object.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise FileNotFoundError(f"no run at {shown(workdir)}: give the --workdir of a run")
    notes = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = read_metrics(workdir / "metrics.jsonl")
    notes += [re.sub(r"^.*/(metrics\.jsonl)", r"\1", str(warning.message)) + "." for warning in caught]
    bindings = None
    if (workdir / "config.gin").exists():
        try:
            bindings = read_bindings(workdir / "config.gin")
        except ConfigError as error:
            notes.append(f"config.gin is not a configuration that can be read: {shown(error)}")
    evaluation, diagnostics = read_evaluation(workdir / "evaluation.json"), read_object(workdir / "diagnostics.json")
    by_step = {record["step"]: record for record in records}  # of a step the last one that was written
    records = [{name: _drawn(value) for name, value in by_step[step].items()} for step in sorted(by_step)]
    return RunFiles(workdir, records, evaluation, diagnostics, bindings, tuple(notes))


def _drawn(value: float | None) -> float | None:
    """A number that charts can reckon with: None for NaN and beyond 1e100, 0 below 1e-100."""
    if value is None or not abs(value) < 1e100:
        return None
    return value if abs(value) > 1e-100 else 0


def grids(workdir: Path) -> dict[int, Path]:
    """Sample grids by step, ascending; each as a path inside the run's folder."""
    names = [path.relative_to(workdir) for path in workdir.glob("samples/step_*.png")]
    found = {int(match[1]): name for name in names if (match := re.search(r"_(\d+)\.png$", name.name, re.ASCII))}
    return dict(sorted(found.items()))
