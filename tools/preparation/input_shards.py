"""The tar files that a user names as the input of a tool: with braces, as a pattern, or as a folder."""

from __future__ import annotations

import glob
from pathlib import Path

from ratiograph.core.files import expanded
from ratiograph.data.embedded import resolve
from ratiograph.data.remote import is_remote

__all__ = ["input_shards"]


def input_shards(source: str) -> list[Path]:
    """The shards that ``source`` names, remote ones fetched.

    Args:
        source: parts joined by '::', each as ``ShardStream.urls``, a pattern such as 'laion/*.tar', or a folder, whose
            tar files are taken; files of a pattern or a folder are in the order of their names.

    Raises:
        ValueError: there is none.
    """
    return [shard for part in source.split("::") for shard in _shards(part)]


def _shards(part: str) -> list[Path]:
    path = expanded(part)
    if is_remote(part) or path.is_file():
        return resolve(part)
    if path.is_dir():
        found = [shard for shard in path.glob("*.tar") if not shard.name.startswith(".")]
    elif "{" not in part and glob.has_magic(part):
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
    else:
        return resolve(part)
    if not found:
        raise ValueError(f"no tar file {'in the folder' if path.is_dir() else 'has a name like'} {part}")
    return sorted(found)
