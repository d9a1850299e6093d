"""Cache of measured results, under keys that hash all that they depend on.

A *result* is a row of the table in ``evaluation.json``. Results are looked up in the file shipped with the package
first and in the cache folder second; new ones are written to the cache folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ratiograph.config import tree
from ratiograph.core.files import write_atomically
from ratiograph.data.remote import cache_folder

__all__ = ["ResultCache", "component_identity", "file_identity", "settings_identity", "weights_identity"]

log = logging.getLogger(__name__)


def settings_identity(settings: object) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def file_identity(path: str | Path, settings: Mapping[str, object]) -> str:
    """A string that changes whenever the file's bytes or the settings do.

    Args:
        path: usually a weights file.
        settings: what else the result depends on; JSON values.
    """
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return settings_identity([digest, settings])


def weights_identity(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors of a ``state_dict()``, with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def component_identity(component: object) -> str:
    """A component's class, plain arguments and parts, as text that is the same in every process."""
    return _text(tree.describe(component))


def _text(node: tree.Node) -> str:
    arguments = ", ".join(f"{name}={value!r}" for name, value in sorted(node.params.items()))
    return f"{node.cls}({arguments})[{'; '.join(f'{part.name}: {_text(part)}' for part in node.children)}]"


class ResultCache:
    """Results by key, from the shipped file and the cache folder.

    Args:
        shipped: JSON file ``{key: result}`` inside the package; need not exist.
    """

    def __init__(self, shipped: Path):
        self.shipped = shipped

    @property
    def kept(self) -> Path:
        """The file in the cache folder that new results are added to."""
        return cache_folder() / self.shipped.name

    def get(self, key: str) -> dict | None:
        """The result, or None where it has to be measured."""
        return {**self._read(self.kept), **self._read(self.shipped)}.get(key)

    def put(self, key: str, result: dict) -> None:
        """Stores a result; a cache that cannot be written is logged and does not end the run."""
        try:
            text = json.dumps({**self._read(self.kept), key: result}, indent=1, sort_keys=True) + "\n"
            write_atomically(self.kept, text.encode())
        except ValueError as error:
            log.warning("The measured result is not kept for later runs: %s", error)

    @staticmethod
    def _read(path: Path) -> dict:
        try:
            results = json.loads(path.read_text())
        except (OSError, ValueError):
            return {}
        return results if isinstance(results, dict) else {}
