"""Remote shards: fetched whole into a cache folder, verified, and kept there while there is room.

A remote shard is named by ``http(s)://...``, ``s3://...`` (read by ``aws s3 cp``) or ``pipe:COMMAND``, whose standard
output is the shard. Commands come from the user alone: an index holds names of shards and no addresses.

The cache is $RATIOGRAPH_CACHE/shards. It is shared by all processes of a machine and holds at most
$RATIOGRAPH_CACHE_GIGABYTES (200); the shards used longest ago are removed first.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import logging
import os
import re
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ratiograph.core.foreign import shown
from ratiograph.data.raw_samples import DamagedSample
from ratiograph.data.shards import INDEX, index_entry

__all__ = [
    "RemoteShard",
    "cache_folder",
    "fetch_ahead",
    "fetch_indexes",
    "forget_fetched",
    "forgetting",
    "is_remote",
    "local",
    "samples_in",
]

log = logging.getLogger(__name__)

REMOTE = re.compile(r"(https?|s3)://|pipe:")
TRIES = 5
FIRST_WAIT = 1.0  # seconds before the second try; every further one waits twice as long
TIMEOUT = 60  # seconds without a byte from a server
LARGEST_SHARD = 2**36  # bytes; a server that never stops must not fill the disk
IN_USE = 60  # seconds after its last use in which a cached shard is not removed: its reader may not have opened it yet
ABANDONED = 86400  # seconds after which an unfinished file is removed
CHUNK = 2**20


def cache_folder() -> Path:
    """The folder of generated and fetched files: $RATIOGRAPH_CACHE, or ~/.cache/ratiograph.

    Raises:
        ValueError: neither is known.
    """
    chosen = os.environ.get("RATIOGRAPH_CACHE") or "~/.cache/ratiograph"
    try:
        return Path(chosen).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"There is no home folder for the cache {chosen}: set the environment variable RATIOGRAPH_CACHE to a folder"
        ) from error


def cache_bytes() -> float:
    """Most bytes of the cache of shards: $RATIOGRAPH_CACHE_GIGABYTES, or 200e9.

    Raises:
        ValueError: the variable is no number of at least 0.
    """
    chosen = os.environ.get("RATIOGRAPH_CACHE_GIGABYTES") or "200"
    with suppress(ValueError):
        if float(chosen) >= 0:
            return float(chosen) * 1e9
    raise ValueError(f"RATIOGRAPH_CACHE_GIGABYTES is '{shown(chosen)}': give a number of gigabytes, such as 200")


def is_remote(url: str) -> bool:
    """Whether ``url`` names something that has to be fetched."""
    return REMOTE.match(url) is not None


class Unreachable(Exception):
    """A failed attempt to fetch; ``final`` if another attempt would fail too."""

    def __init__(self, message: str, final: bool = False):
        super().__init__(message)
        self.final = final


@dataclass(frozen=True)
class RemoteShard:
    """A shard that has to be fetched before it can be read."""

    url: str

    def __str__(self) -> str:
        if self.url.startswith("pipe:"):
            return self.url[:200]
        parts = urlsplit(self.url)  # neither password nor signature belongs in a message
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    @property
    def path(self) -> Path:
        """Its file in the cache, in one folder for each remote folder."""
        place, _, name = str(self).rpartition("/")
        if self.url.startswith("pipe:") or not re.fullmatch(r"\w[\w.+=-]*", name) or name == INDEX:
            place, name = self.url, "shard.tar"
        return cache_folder() / "shards" / hashlib.sha256(place.encode()).hexdigest()[:24] / name

    def local(self) -> Path:
        """The file in the cache, fetched if it is not there.

        Raises:
            ValueError: it cannot be fetched after several tries, or the cache cannot be written.
        """
        path = self.path
        with _kept(self, path):
            entry = index_entry(path) or {}
            if not path.is_file() or path.stat().st_size != entry.get("bytes", path.stat().st_size):
                _fetch(self, path, entry)
                _make_room(path)
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        return path


def local(shard: Path | RemoteShard) -> Path:
    """The file that holds a shard."""
    return shard if isinstance(shard, Path) else shard.local()


def samples_in(shard: Path | RemoteShard, count: Callable[[Path], int]) -> int:
    """The shard's number of samples: from a remote shard's index if there is one, else ``count(file)``."""
    entry = index_entry(shard.path) if isinstance(shard, RemoteShard) else None
    if entry:
        return entry["samples"]
    path = local(shard)
    with forgetting(path):
        return count(path)


def forget_fetched(path: Path | str) -> str:
    """Removes a damaged shard from the cache, so that it is fetched again; says so, or "" if it lies elsewhere."""
    with suppress(ValueError):  # there is no cache
        if cache_folder() / "shards" in Path(path).parents:
            Path(path).unlink(missing_ok=True)
            return " This copy was removed from the cache: the same command fetches the shard again."
    return ""


@contextmanager
def forgetting(path: Path) -> Iterator[None]:
    """`forget_fetched` where the body, which reads ``path``, raises DamagedSample."""
    try:
        yield
    except DamagedSample as error:
        raise DamagedSample(f"{error}{forget_fetched(path)}") from error


def fetch_ahead(shard: Path | RemoteShard) -> None:
    """Starts to fetch a shard in a thread; an error is raised later, by the call that needs the shard."""

    def fetch() -> None:
        with suppress(ValueError):
            shard.local()

    if isinstance(shard, RemoteShard):
        threading.Thread(target=fetch, name=f"fetch {shard}", daemon=True).start()


def fetch_indexes(shards: Iterable[Path | RemoteShard]) -> None:
    """Fetches the indexes beside remote shards, where there are any, to count and verify the shards.

    Raises:
        ValueError: a server cannot be reached.
    """
    remote = {shard.path.parent: shard for shard in shards if isinstance(shard, RemoteShard)}
    if remote:
        cache_bytes()  # a mistake shows at the start
    for folder, shard in remote.items():
        if shard.url.startswith("pipe:"):
            continue
        index, place = folder / INDEX, shard.url.partition("?")[0].rpartition("/")[0]
        with _kept(shard, index):
            try:
                _fetch(RemoteShard(f"{place}/{INDEX}"), index, {})
            except FileNotFoundError:
                index.unlink(missing_ok=True)
                log.warning(
                    "No %s beside the shards of %s: runs that resume read them all to count them.", INDEX, shard
                )
            except ValueError:
                if not index.is_file():
                    raise
                log.warning("The index beside %s cannot be fetched: its earlier copy is used.", shard)


@contextmanager
def _kept(shard: RemoteShard, path: Path) -> Iterator[None]:
    """Runs the body, which puts ``shard`` into the cache at ``path``, in one process at a time.

    Raises:
        ValueError: the cache cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f".{path.name}.lock"), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise ValueError(
            f"Shard {shard} cannot be kept in {path.parent}: {error.strerror or error}. Free some space, set "
            "RATIOGRAPH_CACHE_GIGABYTES to what there is, or RATIOGRAPH_CACHE to another folder."
        ) from error


def _fetch(shard: RemoteShard, path: Path, entry: dict) -> None:
    """Fetches ``shard`` to ``path``, whole or not at all, in up to ``TRIES`` attempts.

    Raises:
        FileNotFoundError: there is no such index.
        ValueError: the shard cannot be fetched.
    """
    for number in range(TRIES):
        time.sleep(FIRST_WAIT * 2 ** (number - 1) if number else 0)
        try:
            return _fetch_once(shard, path, entry)
        except Unreachable as error:
            reason, final = error, error.final
            log.warning("Fetching %s, try %d of %d: %s", shard, number + 1, TRIES, reason)
            if final:
                break
    if path.name == INDEX and (final or shard.url.startswith("s3:")):  # aws does not say why it failed
        raise FileNotFoundError(str(reason))
    raise ValueError(
        f"Shard {shard} cannot be fetched, after {number + 1} tries: {reason}. Check the address and the connection; "
        "the same command continues the run."
    )


def _fetch_once(shard: RemoteShard, path: Path, entry: dict) -> None:
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        digest, size = hashlib.sha256(), 0
        with os.fdopen(handle, "wb") as file, closing(_chunks(shard.url)) as chunks:
            for chunk in chunks:
                size += len(chunk)
                if size > LARGEST_SHARD:
                    raise Unreachable(f"more than {LARGEST_SHARD} bytes came", final=True)
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if size != entry.get("bytes", size):
            raise Unreachable(f"{size} bytes came, its index says {entry['bytes']}")
        if digest.hexdigest() != entry.get("sha256", digest.hexdigest()):
            raise Unreachable("its SHA-256 is not what its index says")
        os.replace(aside, path)
    finally:
        Path(aside).unlink(missing_ok=True)


def _chunks(url: str) -> Iterator[bytes]:
    """The bytes behind a URL.

    Raises:
        Unreachable: not all bytes can be fetched.
    """
    if url.startswith("pipe:"):
        return _output(["bash", "-o", "pipefail", "-c", url.removeprefix("pipe:")])
    if url.startswith("s3://"):
        return _output(["aws", "s3", "cp", url, "-"])
    return _download(url)


def _download(url: str) -> Iterator[bytes]:
    received = 0
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "ratiograph"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            while chunk := response.read(CHUNK):
                received += len(chunk)
                yield chunk
            expected = int(response.headers.get("Content-Length", received))
    except urllib.error.HTTPError as error:
        final = 400 <= error.code < 500 and error.code not in (408, 425, 429)  # time-outs and "too many requests" pass
        raise Unreachable(f"the server says {error.code} {error.reason}", final) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unreachable(str(getattr(error, "reason", error)) or type(error).__name__) from error
    if received != expected:
        raise Unreachable(f"{received} bytes came of {expected}")


def _output(command: Sequence[str]) -> Iterator[bytes]:
    """The standard output of a command.

    Raises:
        Unreachable: the command is not installed, or ends with an error.
    """
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        except FileNotFoundError as error:
            raise Unreachable(f"the command '{command[0]}' is not installed", final=True) from error
        with process:
            try:
                while chunk := process.stdout.read(CHUNK):
                    yield chunk
            except BaseException:  # the reader takes no more
                process.kill()
                raise
        if process.returncode:
            errors.seek(0)
            text = errors.read()[-300:].decode(errors="replace").strip()
            raise Unreachable(f"'{command[0]}' ended with code {process.returncode}: {text}")


def _make_room(newest: Path) -> None:
    """Removes cached shards, those used longest ago first, until the cache is within its size."""
    limit, states = cache_bytes(), {}
    for path in (cache_folder() / "shards").glob("*/*"):
        with suppress(FileNotFoundError):  # another process may be making room too
            state = path.stat()
            if path.suffix == ".part" and time.time() - state.st_mtime > ABANDONED:
                path.unlink()
            elif not path.name.startswith(".") and path.name != INDEX:
                states[path] = state
    total = sum(state.st_size for state in states.values())
    for path, state in sorted(states.items(), key=lambda item: item[1].st_atime_ns):
        if total > limit and path != newest and time.time() - state.st_atime > IN_USE:
            path.unlink(missing_ok=True)
            total -= state.st_size
