"""The table of everything measured, from the records of the benchmark.

Notation: a *configuration* is a run by its gin files. Its row says what a step costs by arithmetic (`plan`); there is
one row for each machine, precision and batch at which a step of it was measured, from the last such record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ratiograph.reports.markdown import plain, table

__all__ = ["CONFIGURATIONS", "Configuration", "render"]

COLUMNS = (
    *("configuration", "student", "TFLOP an image", "where", "batch", "s a step", "step / floor", "TFLOP/s"),
    *("data wait", "memory, GB", "planned"),
)


@dataclass(frozen=True)
class Configuration:
    """A row.

    ``network``: the student's class; ``batch_size``: samples that the plan is made for; ``further``: gin files after
    the first.
    """

    name: str
    network: str
    gin_file: str
    batch_size: int
    further: tuple[str, ...] = ()

    @property
    def files(self) -> list[str]:
        """All gin files, in order."""
        return [self.gin_file, *self.further]


F_DISTILL, SD15, SDXL = "gin/papers/f_distill", "gin/sd15_di_bregman.gin", "gin/papers/dmd2/sdxl.gin"
CONFIGURATIONS = (
    Configuration("digits, Di-Bregman", "UNet", "gin/mnist_sba.gin", 64),
    Configuration("CIFAR-10 DDPM++, f-distill JS", "DDPMPP", f"{F_DISTILL}/cifar10_jensen_shannon.gin", 4),
    Configuration("CIFAR-10 DDPM++, DiJS", "DDPMPP", "gin/papers/score_free/cifar10_dijs.gin", 4),
    Configuration("CIFAR-10 NCSN++, Di-Bregman", "NCSNPP", "gin/papers/di_bregman/cifar10_sba_lambda_3.gin", 4),
    Configuration("ImageNet-64 ADM, f-distill JS", "ADM", f"{F_DISTILL}/imagenet64_jensen_shannon.gin", 4),
    Configuration("SD 1.5 512², Di-Bregman", "SD15UNet", SD15, 8),
    Configuration("SD 1.5 512², LoRA of rank 64", "SD15UNet", SD15, 8, ("gin/base/sd15_lora.gin",)),
    Configuration("SDXL 1024², DMD2", "SDXLUNet", SDXL, 4),
    Configuration("SDXL 1024², moments in 8 bits", "SDXLUNet", SDXL, 4, ("gin/base/adam_8bit.gin",)),
    Configuration("SDXL 1024², LoRA of rank 64", "SDXLUNet", SDXL, 4, ("gin/base/sdxl_lora.gin",)),
)

Record = Mapping[str, object]


def render(records: Sequence[Record]) -> str:
    """The Markdown table of the configurations that have a record, in their order."""
    return table(
        COLUMNS, [[*map(plain, row)] for configuration in CONFIGURATIONS for row in _rows(configuration, records)]
    )


def _rows(configuration: Configuration, records: Sequence[Record]) -> Iterator[list[str]]:
    own = [record for record in records if record.get("gin_file") == configuration.files]
    plans = [record for record in own if record["bench"] == "plan"]
    steps = {_place(record): record for record in own if record["bench"] == "step"}
    # A line of gin may have made the network small, so that loading shows.
    data = {_device(record): record for record in own if record["bench"] == "data" and not record["gin_param"]}
    plan = plans[-1] if plans else None
    first = [configuration.name, _millions(plan), _number(plan and plan["flops"] / plan["batch_size"] / 1e12)]
    for step in steps.values() or [None] * bool(plans):
        yield [*first, *_measured(step, data, plans)]
        first = ["", "", ""]


def _measured(step: Record | None, data: Mapping[str, Record], plans: Sequence[Record]) -> list[str]:
    """The columns from ``where`` on."""
    if step is None:
        last = plans[-1] if plans else None
        planned = f"{last['planned_memory_gb']:.2f}, {last['precision']}" if last else ""
        return ["–", str(last["batch_size"]) if last else "", *5 * [""], planned]
    wait = data.get(_device(step))
    same = [each for each in plans if all(each[k] == step[k] for k in ("batch_size", "precision", "gin_param"))]
    return [
        " ".join([_device(step), str(step["precision"]), *map(str, step["gin_param"])]),
        str(step["batch_size"]),
        _number(step["seconds"]),
        _number(step["step_over_floor"]),
        _number(_speed(step, same)),
        f"{100 * wait['wait_share']:.1f} %" if wait else "",
        f"{step['peak_memory_gb']:.2f}",
        f"{same[-1]['planned_memory_gb']:.2f}" if same else "",
    ]


def _speed(step: Record, plans: Sequence[Record]) -> float | None:
    """TFLOP/s; by the plan's operations for a step that was taken only once, as that one does not count its own."""
    if step["tflops"] is None and plans:
        return plans[-1]["flops"] / step["seconds"] / 1e12
    return step["tflops"]


def _place(record: Record) -> str:
    return repr([_device(record), record.get("precision"), record.get("batch_size"), record.get("gin_param")])


def _device(record: Record) -> str:
    hardware = record["hardware"]
    device = str(hardware["device"])
    return device if not hardware["instructions"] else f"{device}, {hardware['threads']} threads"


def _millions(plan: Record | None) -> str:
    return "" if plan is None else f"{plan['parameters']['student'] / 1e6:,.1f} M"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
