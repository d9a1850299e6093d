"""Every kind of source that tools/make_shards.py can read, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from preparation.cifar import CIFAR10, CIFAR100
from preparation.sources import COCO, EDMZip, Folder, ImageNet, Source

__all__ = ["source_of"]

KINDS = {source.kind: source for source in (CIFAR10, CIFAR100, ImageNet, EDMZip, Folder, COCO)}


def source_of(kind: str, path: Path, options: Mapping[str, str]) -> Source:
    """The source of the name ``kind`` at ``path``, with the ``options`` that only some kinds take.

    Raises:
        ValueError: there is no such kind, or it does not take an option.
    """
    if kind not in KINDS:
        raise ValueError(f"no source '{kind}': choose one of {', '.join(KINDS)}")
    taken = {field.name for field in dataclasses.fields(KINDS[kind])}
    if foreign := [name for name in options if name not in taken]:
        raise ValueError(f"--{foreign[0]} is no flag of the source {kind}")
    return KINDS[kind](path=path, **options)
