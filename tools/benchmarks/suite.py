"""Many measurements, each in a process of its own, the most important first, until a time limit.

So each has a peak of memory of its own, and one that fails, for want of memory or of a package, does not stop the
others.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results_table import CONFIGURATIONS, Configuration

__all__ = ["Measurement", "plans", "run", "steps"]

TOOL = Path(__file__).parents[2] / "tools" / "bench.py"
SIZES = {
    "UNet": ["UNet.channels = 16"],
    "DDPMPP": ["DDPMPP.channels = 16", "DDPMPP.blocks = 1"],
    "NCSNPP": ["NCSNPP.channels = 16", "NCSNPP.blocks = 1"],
    "ADM": ["ADM.channels = 16", "ADM.blocks = 1", "ADM.head_channels = 16"],
    "SD15UNet": [
        *("SD15UNet.block_out_channels = (32, 32, 32, 32)", "SD15UNet.layers_per_block = 1"),
        *("SD15UNet.resolution = 16", "StudentScoreHeadRatio.width = 8"),
        *("SD15UNet.cross_attention_dim = 16", "SD15UNet.attention_heads = 2"),
    ],
    "SDXLUNet": [
        *("SDXLUNet.block_out_channels = (32, 32, 32)", "SDXLUNet.layers_per_block = 1", "SDXLUNet.resolution = 16"),
        *("SDXLUNet.cross_attention_dim = 16", "SDXLUNet.transformer_layers = (1, 1, 1)"),
        *("SDXLUNet.attention_heads = (2, 2, 2)", "SDXLUNet.pooled_width = 8", "SDXLUNet.size_embedding = 4"),
        "StudentScoreHeadRatio.width = 8",
    ],
}
"""What makes each network tiny, to try the suite where a full one would take hours."""
LATENT = ("SD15UNet", "SDXLUNet")
LARGE = ("ADM", *LATENT)
LONGEST = 3600.0


@dataclass(frozen=True)
class Measurement:
    """``arguments`` of tools/bench.py; the measurement is left out when fewer than ``seconds`` are left."""

    arguments: tuple[str, ...]
    seconds: float


def steps(tiny: bool = False) -> list[Measurement]:
    """A GPU's measurements: steps in bf16, compiled and recorded too; steps at eight times the batch; bare networks."""
    whole = [each for each in CONFIGURATIONS if not each.further]
    found = [take(each, tiny) for each in whole for take in (_step, _compiled)]
    found += [_recorded(each, tiny) for each in whole if each.network not in LARGE]  # whose kernels are long
    found += [_step(each, tiny) for each in CONFIGURATIONS if each.further]
    found += [_step(each, tiny, wide=8) for each in whole]
    for network, batch in () if tiny else (("DDPMPP", 64), ("ADM", 32), ("SD15UNet", 8), ("SDXLUNet", 2)):
        arguments = ("network", f"--network={network}", f"--batch_size={batch}", "--rounds=5", "--settings=all")
        found.append(Measurement(arguments, 120))
    return found


def _step(configuration: Configuration, tiny: bool, wide: int = 1) -> Measurement:
    arguments = ("step", *_named(configuration, SIZES[configuration.network] if tiny else ()))
    arguments += ("--rounds=5", "--precision=bf16", f"--batch_size={wide * (2 if tiny else configuration.batch_size)}")
    return Measurement(arguments, 60 if configuration.network in LARGE else 30)


def _compiled(configuration: Configuration, tiny: bool) -> Measurement:
    eager = _step(configuration, tiny)
    denoiser = "StableDiffusion" if configuration.network in LATENT else "EDM"
    return Measurement((*eager.arguments, f"--gin_param={denoiser}.compiled = True"), 2 * eager.seconds)


def _recorded(configuration: Configuration, tiny: bool) -> Measurement:
    eager = _step(configuration, tiny)
    return Measurement((*eager.arguments, "--gin_param=Distillation.cuda_graphs = True"), eager.seconds)


def plans(precision: str) -> list[Measurement]:
    """The plan of every configuration of the table."""
    return [
        Measurement(("plan", *_named(each, ()), f"--batch_size={each.batch_size}", f"--precision={precision}"), 0)
        for each in CONFIGURATIONS
    ]


def _named(configuration: Configuration, lines: Sequence[str]) -> tuple[str, ...]:
    files = (f"--gin_file={file}" for file in configuration.files)
    return (*files, *(f"--gin_param={line}" for line in lines))


def run(
    wanted: Sequence[Measurement], *, minutes: float, common: Sequence[str] = (), say: Callable[[str], None] = print
) -> dict[str, int]:
    """Takes measurements in order until the time is up.

    Args:
        wanted: in the order of what matters.
        minutes: the limit; a measurement that would likely pass it is left out, and none runs beyond it.
        common: further arguments of each, such as --device.
        say: gets a line before and after each.

    Returns:
        How many were "done", "failed" and "left out".
    """
    ends, counts = time.monotonic() + 60 * minutes, {"done": 0, "failed": 0, "left out": 0}
    for measurement in wanted:
        left = ends - time.monotonic()
        shown = " ".join(measurement.arguments)
        if left < measurement.seconds:
            counts["left out"] += 1
            say(f"left out, {left:.0f} s are left: {shown}")
            continue
        say(f"{left:.0f} s left: {shown}")
        counts[_take([*measurement.arguments, *common], left, say)] += 1
    return counts


def _take(arguments: Sequence[str], seconds: float, say: Callable[[str], None]) -> str:
    command = [sys.executable, str(TOOL), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=min(seconds, LONGEST))
    except subprocess.TimeoutExpired:
        say("failed: the time is up")
        return "failed"
    say(done.stdout.rstrip() if not done.returncode else f"failed: {done.stderr.strip()[-1500:]}")
    return "failed" if done.returncode else "done"
