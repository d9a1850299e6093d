"""Images and captions turned into latents and text states once, so that training runs neither encoder.

Notation: a *cache* is a folder of shards ``shard-000000.tar`` ..., one for each input, in `LatentStream`'s format, and
their ``index.json`` with the settings that made them. It grows by whole shards, so the command of an interrupted cache
continues it. Prompts are lines of a text file; their shards hold text states and no latents.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import webdataset as wds
from safetensors.torch import save
from torch import Tensor

from ratiograph.core.files import write_atomically
from ratiograph.core.foreign import read_json, shown
from ratiograph.core.types import Condition
from ratiograph.data.captioned import CaptionedStream
from ratiograph.data.images import to_tensor
from ratiograph.data.latents import ENCODERS, npy_bytes, shapes
from ratiograph.data.raw_samples import DamagedSample
from ratiograph.data.shards import INDEX
from ratiograph.data.tars import Damage
from ratiograph.networks.autoencoder import Autoencoder
from ratiograph.networks.text_encoders import CaptionEncoder, SD15CaptionEncoder, SDXLCaptionEncoder
from ratiograph.networks.weights import pipeline_files

__all__ = ["CachedImages", "CachedPrompts", "cache_shards", "encoder_of", "write_empty_prompt"]

log = logging.getLogger(__name__)


def _text_facts(encoder: CaptionEncoder) -> dict[str, object]:
    """The facts of a loaded encoder with the shapes of its states."""
    return encoder.encoder_facts() | shapes(
        {name: part.shape[1:] for name, part in encoder.encode([""]).parts().items()}
    )


def _rows(condition: Condition, captions: Sequence[str]) -> list[dict[str, bytes]]:
    """The members of each caption: text states in float16, SDXL's sizes in int32, and the caption itself."""
    kinds = {"text": np.float16, "pooled": np.float16, "sizes": np.int32}
    arrays = {part: tensor.cpu().float().numpy().astype(kinds[part]) for part, tensor in condition.parts().items()}
    return [
        {**{f"{part}.npy": npy_bytes(rows[k]) for part, rows in arrays.items()}, "txt": caption.encode()}
        for k, caption in enumerate(captions)
    ]


@dataclass
class CachedPrompts:
    """The samples of a prompt list, ``size`` to a shard.

    Args:
        prompts: captions; empty ones are kept.
        encoder: loaded, on its device.
        size: prompts of one shard.
        batch_size: captions encoded at a time.
    """

    prompts: Sequence[str]
    encoder: CaptionEncoder
    size: int = 10_000
    batch_size: int = 64
    skipped: int = 0
    damage: Sequence[str] = ()

    def sources(self) -> list[Sequence[str]]:
        """What each shard is made from."""
        return [self.prompts[k : k + self.size] for k in range(0, len(self.prompts), self.size)]

    def named(self, source: Sequence[str]) -> str:
        """What the index calls the input of a shard."""
        return f"prompts {hashlib.sha256(json.dumps(list(source)).encode()).hexdigest()[:16]}"

    def encoder_facts(self) -> dict[str, object]:
        """As of `contracts.Encoded`."""
        return _text_facts(self.encoder)

    def samples(self, source: Sequence[str], number: int) -> Iterator[dict[str, object]]:
        """The webdataset samples of shard ``number``."""
        first = number * self.size
        for start in range(0, len(source), self.batch_size):
            captions = source[start : start + self.batch_size]
            for k, row in enumerate(_rows(self.encoder.encode(captions), captions)):
                yield {"__key__": f"{first + start + k:09d}", **row}


@dataclass
class CachedImages:
    """The samples of captioned images, in their own shards' order.

    Args:
        stream: says which images are taken, their size, and the fraction that may be damaged.
        shards: the input files.
        autoencoder: loaded, on its device.
        encoder: loaded, on its device.
        seed: of samples of the posterior; None takes its mean.
        batch_size: images encoded at a time.
        workers: threads that decode images ahead.
    """

    stream: CaptionedStream
    shards: Sequence[Path]
    autoencoder: Autoencoder
    encoder: CaptionEncoder
    seed: int | None = None
    batch_size: int = 16
    workers: int = 2
    seen: int = field(default=0, init=False)
    skipped: int = field(default=0, init=False)
    damaged: int = field(default=0, init=False)
    damage: list[str] = field(default_factory=list, init=False)

    def sources(self) -> Sequence[Path]:
        return self.shards

    def named(self, source: Path) -> str:
        return source.name

    def encoder_facts(self) -> dict[str, object]:
        return self.autoencoder.encoder_facts() | _text_facts(self.encoder)

    def samples(self, source: Path, number: int) -> Iterator[dict[str, object]]:
        """As `CachedPrompts.samples`; ``damage`` then has a line for each damaged sample of the shard."""
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed + 2**20 * number)
        self.damage = []
        with ThreadPoolExecutor(self.workers) as pool:
            raws = (pool.submit(self._prepared, raw) for raw in self._taken(source))
            for futures in _one_ahead(raws, self.batch_size):
                samples = [sample for sample in (future.result() for future in futures) if sample is not None]
                if samples:
                    yield from self._encoded(samples, generator)
        self._check()

    def _taken(self, source: Path) -> Iterator[object]:
        for raw in self.stream.read(source):
            self.seen += 1
            if isinstance(raw, Damage):
                self._note(raw.message)
            elif self.stream.rejects(raw) is not None:
                self.skipped += 1
            else:
                yield raw

    def _prepared(self, raw) -> tuple | None:
        try:
            return raw.key, *self.stream.prepared(raw)
        except DamagedSample as error:
            self._note(str(error))
            return None

    def _note(self, why: str) -> None:
        if not self.stream.tolerant:
            raise DamagedSample(why)
        self.damaged += 1
        self.damage.append(why)
        log.warning("Skipped (%d so far): %s", self.damaged, why)

    def _check(self) -> None:
        if self.damaged > self.stream.max_damaged * self.seen:
            raise ValueError(
                f"{self.damaged} of {self.seen} samples are damaged, more than --max_damaged={self.stream.max_damaged} "
                f"allows; {self.damage[-1] if self.damage else 'earlier shards name them'}"
            )

    def _encoded(self, samples: Sequence[tuple], generator: torch.Generator | None) -> Iterator[dict[str, object]]:
        keys, pixels, sizes, captions = zip(*samples, strict=True)
        device = next(self.autoencoder.parameters()).device
        latents = self.autoencoder.encode(to_tensor(pixels).to(device), generator)
        condition = self.encoder.encode(captions)
        if condition.sizes is not None:
            condition = Condition(text=condition.text, pooled=condition.pooled, sizes=torch.tensor(sizes))
        for key, latent, row in zip(keys, latents.cpu(), _rows(condition, captions), strict=True):
            if not latent.isfinite().all():
                raise ValueError(f"the latent of sample '{key}' is not finite: the autoencoder's weights are damaged")
            yield {"__key__": key, "latent.npy": npy_bytes(latent.numpy().astype(np.float16)), **row}


def _one_ahead(futures: Iterable[Future], size: int) -> Iterator[list[Future]]:
    """Groups of ``size``, of which the next is started before one is handed out."""
    futures, waiting = iter(futures), None
    while group := list(itertools.islice(futures, size)):
        if waiting is not None:
            yield waiting
        waiting = group
    if waiting is not None:
        yield waiting


class _Hashing:
    """Hashes and counts the bytes written to ``file``."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def cache_shards(
    samples: CachedImages | CachedPrompts,
    folder: Path,
    settings: Mapping[str, object],
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Writes the shards that ``folder`` does not hold yet, each whole or not at all, and the index after each.

    Args:
        samples: what the shards hold.
        folder: the cache.
        settings: plain values that say how it is made; must be those of the shards already there.
        advance: called with the shards done and their number, at first and after each.

    Returns:
        The index: ``shards`` by name with ``samples``, ``bytes``, ``sha256``, ``input`` and the ``damaged`` samples'
        messages, where there are any; ``settings``; and ``encoders``, facts as of `contracts.Encoded`.

    Raises:
        ValueError: the folder holds a cache of other inputs, settings or encoders or something else, or too many
            samples are damaged.
    """
    index = _earlier(folder, {"settings": dict(settings), ENCODERS: samples.encoder_facts()})
    sources = samples.sources()
    for number, source in enumerate(sources):
        advance(number, len(sources))
        path = folder / f"shard-{number:06d}.tar"
        entry, name = index["shards"].get(path.name), samples.named(source)
        if entry and entry.get("input", name) != name:
            raise _other(folder, f"input of {path.name}", entry["input"], name)
        if entry and path.is_file() and path.stat().st_size == entry["bytes"]:
            continue
        written = _write(path, samples.samples(source, number))
        damaged = {"damaged": sorted(samples.damage)} if samples.damage else {}
        index["shards"][path.name] = written | {"input": name} | damaged
        write_atomically(folder / INDEX, (json.dumps(index, indent=1) + "\n").encode())
    advance(len(sources), len(sources))
    return index


def _earlier(folder: Path, made: Mapping[str, dict]) -> dict:
    """The folder's index; a new one with what is ``made`` by where there is none."""
    if not (folder / INDEX).is_file():
        others = [] if not folder.is_dir() else sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        if others and not all(name.startswith("shard-") for name in others):
            raise ValueError(f"{folder} holds {others[0]} and is no cache of latents: give another folder")
        return {"shards": {}, **made}
    index = read_json(folder / INDEX)
    if not isinstance(index, dict) or not isinstance(index.get("shards"), dict):
        raise ValueError(f"{folder / INDEX} is no index of a cache of latents: give another folder, or delete that one")
    for kind, here in made.items():
        earlier = index.get(kind, here)  # an index that names no encoders is gone on with, and names none
        for name in {**earlier, **here}:
            if earlier.get(name) != here.get(name):
                raise _other(folder, name, earlier.get(name), here.get(name))
    return index


def _other(folder: Path, name: str, earlier: object, here: object) -> ValueError:
    return ValueError(
        f"{folder} holds a cache with {name} = {shown(repr(earlier))}, here it is {shown(repr(here))}: give another "
        "folder, or delete that one"
    )


def _write(path: Path, samples: Iterable[Mapping[str, object]]) -> dict:
    record = {"samples": 0}

    def write(file: BinaryIO) -> None:
        hashing = _Hashing(file)
        with wds.TarWriter(hashing, encoder=False, mtime=0) as writer:
            for sample in samples:
                writer.write(dict(sample))
                record["samples"] += 1
        record.update(bytes=hashing.size, sha256=hashing.digest.hexdigest())

    write_atomically(path, write)
    return record


def encoder_of(source: str, argument: str) -> tuple[CaptionEncoder, int]:
    """(the caption encoder of a pipeline, not loaded, and the pipeline's usual resolution): SDXL's if there are two.

    Args:
        source: the pipeline.
        argument: the flag that has this value, for errors.

    Raises:
        ValueError, FileNotFoundError: ``source`` is no pipeline in diffusers' format.
    """
    folder = pipeline_files.folder_of(source, "unet", argument, weights=False)
    if folder.is_file():
        raise ValueError(
            f"{argument}={source} is one file, from which the autoencoder can be read but no tokenizer: add "
            "--text_encoder, a folder in diffusers' format with this model's text_encoder and tokenizer"
        )
    unet = pipeline_files.config_of(source, "unet")
    if unet is None and not (folder / "text_encoder").is_dir():
        raise ValueError(f"{argument}={source} holds no text_encoder: give a pipeline in diffusers' format")
    second = (folder / "text_encoder_2").is_dir() if unet is None else unet.get("addition_embed_type") == "text_time"
    return (SDXLCaptionEncoder(weights=source), 1024) if second else (SD15CaptionEncoder(weights=source), 512)


def write_empty_prompt(path: Path, encoder: CaptionEncoder) -> None:
    """Writes `guidance.EmptyPrompt`'s file: the states of the prompt '', ``text`` [L, E] and SDXL's ``pooled`` [P]."""
    parts: dict[str, Tensor] = encoder.encode([""]).parts()
    kept = {name: parts[name][0].float().cpu().contiguous() for name in ("text", "pooled") if name in parts}
    write_atomically(Path(path), save(kept, {ENCODERS: json.dumps(encoder.encoder_facts())}))
