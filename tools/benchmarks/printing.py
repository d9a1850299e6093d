"""A measurement's record as a small table."""

from __future__ import annotations

from collections.abc import Callable, Mapping

__all__ = ["shown"]

Record = Mapping[str, object]


def shown(record: Record) -> str:
    """The record and its machine, as text."""
    machine = record["hardware"]
    load = f", {record['load']:.1f} other processes before" if record.get("load", 0) >= 0.5 else ""
    return f"{_KINDS[record['bench']](record)}\n{machine['device']}, {machine['threads']} threads{load}"


def _what(record: Record) -> str:
    parts = [*record["gin_file"], *record["gin_param"], f"batch {record['batch_size']}", record.get("precision")]
    return ", ".join(str(part) for part in parts if part)


def _network(record: Record) -> str:
    head = f"{record['network']}, {record['parameters']:,} parameters, batch {record['batch_size']}, forward + backward"
    lines = [head, f"{'':30}{'seconds':>10}{'faster':>10}{'TFLOP/s':>10}{'difference':>12}"]
    for row in record["rows"]:
        lines.append(
            f"{row['variant']:30}{row['seconds']:>10.3f}{row['faster']:>9.2f}x{row['tflops']:>10.3f}"
            f"{row['relative_difference']:>12.1e}"
        )
    return "\n".join([*lines, f"peak memory {record['peak_memory_gb']:.2f} GB"])


def _step(record: Record) -> str:
    lines = [_what(record)]
    lines += [f"  {row['times']} x {row['pass']:44}{row['seconds']:>9.4f} s" for row in record["passes"]]
    lines += [] if record["floor"] is None else [f"  floor {record['floor']:>51.4f} s"]
    floors = "" if record["floor"] is None else f"   = {record['step_over_floor']:.3f} floors"
    lines += [f"  step  {record['seconds']:>51.4f} s{floors}"]
    speed = "" if record["tflops"] is None else f", {record['tflops']:.3f} TFLOP/s"
    if record["units"] is not None:
        lines += [f"  = {record['units']:.2f} forward and backward passes of the student in plain eager float32"]
    return "\n".join(
        [*lines, f"  {record['images_per_second']:.2g} images/s{speed}; peak memory {record['peak_memory_gb']:.2f} GB"]
    )


def _precisions(record: Record) -> str:
    rows = [f"  {row['variant']}{row['seconds']:>10.4f} s{row['faster']:>8.2f}x" for row in record["rows"]]
    return "\n".join([_what(record), *rows])


def _data(record: Record) -> str:
    return (
        f"{_what(record)}\n"
        f"  a step {record['step_seconds']:.4f} s, of its whole time {100 * record['wait_share']:.2f} % waiting\n"
        f"  a batch is delivered in {record['delivery_seconds']:.4f} s when nobody computes, "
        f"{record['samples_per_second']:.0f} samples/s"
    )


def _scaling(record: Record) -> str:
    rows = [
        f"  {row['processes']} processes{row['seconds']:>10.3f} s{row['images_per_second']:>10.1f} images/s"
        f"   efficiency {row['efficiency']:.3f}"
        for row in record["rows"]
    ]
    return "\n".join([f"{_what(record)} a process", *rows])


def _plan(record: Record) -> str:
    nodes = ", ".join(f"{name} {count:,}" for name, count in record["parameters"].items())
    return (
        f"{_what(record)}\n  parameters: {nodes}\n"
        f"  {record['flops'] / 1e12:.3f} TFLOP a step; tensors: {record['held_gb']:.2f} GB between steps, "
        f"{record['planned_memory_gb']:.2f} GB at most"
    )


_KINDS: dict[str, Callable[[Record], str]] = {
    "network": _network,
    "step": _step,
    "precisions": _precisions,
    "data": _data,
    "scaling": _scaling,
    "plan": _plan,
}
