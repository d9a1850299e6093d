"""Reads foreign files that ``torch.save`` wrote: nothing in them is run, and none takes more than it holds.

torch's own reader of tensors alone runs nothing, but unpacks whatever an archive claims to hold, and follows any
pickle.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch

from ratiograph.core.foreign import shown
from ratiograph.networks.weights.restricted_pickles import Refused, check_budget

__all__ = ["check_torch_file", "load_torch"]

LARGEST_PICKLE = 2**28
LEGACY_PICKLES = 5
"""In a file of torch before 1.6: a number, the protocol, the machine, the objects and the names of their storages."""


def load_torch(file: Path | BinaryIO) -> object:
    """What ``torch.save`` wrote into ``file``, if that is tensors, numbers, strings and containers of them, on the CPU.

    Raises:
        Refused: it holds something else, named in the message, or would take more time or memory than its size.
        Exception: the file is damaged; torch raises errors of many kinds.
    """
    check_torch_file(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise (Refused(shown(found[1])) if found else error) from error


def check_torch_file(file: Path | BinaryIO) -> None:
    """Refuses a file of ``torch.save`` that would take more time or memory than its size when it is read.

    Args:
        file: its path, or an open file, which is put back to its start.

    Raises:
        Refused: it would, or it is no such file.
        ValueError, zipfile.BadZipFile: it is damaged.
    """
    if isinstance(file, Path):
        with open(file, "rb") as opened:
            return check_torch_file(opened)
    start = file.read(4)
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if start == b"PK\x03\x04":
        _check_archive(file, size)
    elif start[:1] == b"\x80":
        for _ in range(LEGACY_PICKLES):
            check_budget(file)
    else:
        raise Refused("a file that torch.save did not write")
    file.seek(0)


def _check_archive(file: BinaryIO, size: int) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(file) as archive:
        warnings.simplefilter("ignore")  # of names that come twice, which torch does not mind
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise Refused("compressed members, which torch.save does not write")
        if sum(member.file_size for member in members) > size:
            raise Refused("members that are larger than the file")
        for member in members:
            if member.filename.endswith(".pkl"):
                if member.file_size > LARGEST_PICKLE:
                    raise Refused(f"a pickle of {member.file_size:,} bytes")
                check_budget(io.BytesIO(archive.read(member)))
