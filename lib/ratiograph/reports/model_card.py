"""The README.md of an exported student: how to sample it, what was measured, what made it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ratiograph.config.tree import describe, render_tree
from ratiograph.core.files import write_atomically
from ratiograph.core.foreign import lines_of, shown
from ratiograph.reports.evaluation_file import read_evaluation
from ratiograph.reports.markdown import plain, table
from ratiograph.training.logs import read_metrics

__all__ = ["USE_LORA", "USE_PIPELINE", "USE_PLAIN", "USE_PROMPTS", "numbers", "write_card"]

CARD = """---
library_name: {library}
tags: [{tags}]
---
# {name}

A one-step student{teacher}, distilled by ratiograph. {licence}

```{language}
{usage}
```

{remark}

## Numbers
{numbers}

## Recipe
`config.gin` beside this file repeats the run: `python launch/main.py --gin_file=config.gin`.

```
{tree}
```
"""
USE_PLAIN = """python tools/sample.py {out} --samples=64 --out=samples.png      # in a checkout of ratiograph"""
USE_PROMPTS = """
python tools/sample.py {out} --prompts=prompts.txt --out=samples.png     # a caption a line"""
USE_PIPELINE = """import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{out}", torch_dtype=torch.float16).to("cuda")
# Without guidance_scale=1.0 the pipeline guides by its own 7.5, which files cannot change and a student does not need.
image = pipeline("a photo of a cat", num_inference_steps=1, guidance_scale=1.0).images[0]"""
USE_LORA = """import torch
from diffusers import DDIMScheduler, DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{teacher}", torch_dtype=torch.float16).to("cuda")
pipeline.scheduler = DDIMScheduler.from_pretrained("{out}", subfolder="scheduler")
pipeline.load_lora_weights("{out}")
# Without guidance_scale=1.0 the pipeline guides by its own 7.5, which files cannot change and a student does not need.
image = pipeline("a photo of a cat", num_inference_steps=1, guidance_scale=1.0).images[0]"""


def write_card(folder: Path, workdir: Path, experiment: object, **words: str) -> None:
    """Writes ``README.md`` into the ``folder`` of an export of the run in ``workdir``.

    Args:
        folder: of the export.
        workdir: of the run, whose numbers the card shows.
        experiment: of the run, whose graph the card shows.
        words: the other fields of ``CARD``.

    Raises:
        ValueError: a file of the run cannot be read, or the card cannot be written.
    """
    lines = lines_of(render_tree(describe(experiment)).strip())
    graph = "\n".join(shown(line, 1000) for line in lines).replace("```", "'''")
    card = CARD.format(numbers=numbers(workdir), tree=graph, **words)
    write_atomically(folder / "README.md", card.encode(errors="replace"))


def numbers(workdir: Path) -> str:
    """The run's evaluation, or what its last logged step says, in Markdown."""
    document = read_evaluation(workdir / "evaluation.json")
    if document.get("rows"):
        return _table(document["rows"], document.get("metrics") or {})
    listed = document or next(reversed(read_metrics(workdir / "metrics.jsonl")), {})
    return "\n".join(_listed("", listed)) or "None were measured."


def _table(rows: Sequence[Mapping[str, object]], metrics: Mapping[str, Mapping[str, str]]) -> str:
    """One line a row of an evaluation, one column a metric, under its label."""
    columns = [*metrics, *(name for name in ("evaluations", "samples") if any(name in row for row in rows))]
    heads = ["", *(plain(metrics.get(name, {}).get("label") or name) for name in columns)]
    return table(
        heads, [[plain(row["name"]), *(_shown(row.get(name, "")) for name in columns)] for row in rows], left=1
    )


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else plain(value)


def _listed(prefix: str, value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _listed(f"{prefix}{name}.", inner)
    elif isinstance(value, int | float | str):
        yield f"- {plain(prefix[:-1])}: {f'{value:.6g}' if isinstance(value, float) else plain(value)}"
