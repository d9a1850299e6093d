"""Data sets as they are downloaded, listed image by image for the making of shards.

A *source* lists its *entries*. An entry is one image: a name to find it by, the place of its bytes, and the members
that go with it into a shard, which are ``cls`` (class index in ASCII digits), ``txt`` (caption) and ``json`` (further
facts). Listing reads no image and never executes code in a file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image

from preparation.cropping import plain, upright
from preparation.image_bytes import Pixels, Slice, ZipMember, looks_like, tar_members
from ratiograph.core.foreign import LARGEST_TEXT, lines_of, parse_json, read_json, read_text, shown
from ratiograph.data.images import is_hidden

__all__ = ["COCO", "EDMZip", "Entry", "Folder", "ImageNet", "Listing", "Source"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample: its name in the source, the place of its image, its other members by suffix."""

    name: str
    image: Slice | ZipMember | Pixels
    members: Mapping[str, bytes]


@dataclass(frozen=True)
class Listing:
    """Entries in the source's own order; number of classes and their names, None where there are none."""

    entries: Sequence[Entry]
    classes: int | None = None
    class_names: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """Base class: ``path`` is the file or folder, ``listing`` lists its entries."""

    path: Path

    kind: ClassVar[str]
    where: ClassVar[str] = ""  # how to get the files
    shard_samples: ClassVar[int] = 5000
    format: ClassVar[str] = "png"  # of images that are not kept as they are
    normalize: ClassVar[Callable[[Image.Image, str], Image.Image]] = staticmethod(upright)

    def listing(self) -> Listing:
        """What the source holds.

        Raises:
            ValueError: it does not exist, is of another kind, damaged, or holds no image; names what it looks like.
        """
        raise NotImplementedError

    def settings(self) -> dict[str, str | None]:
        """Kind, absolute path and options: what two attempts at the same shards must agree on."""
        options = {name: value for name, value in dataclasses.asdict(self).items() if name != "path"}
        return {"source": self.kind, "input": str(self.path.resolve()), **options}

    def require(self, *, folder: bool = True, file: bool = True) -> None:
        """ValueError unless the path exists as one of what is allowed."""
        if not self.path.exists():
            raise ValueError(f"no such file or folder: {self.path}. {self.where}".rstrip(". "))
        if self.path.is_dir() and not folder:
            raise ValueError(f"{self.path} is a folder, {self.kind} needs a file. {self.where}".rstrip(". "))
        if self.path.is_file() and not file:
            raise self.other_kind(f"{self.kind} needs a folder")

    def other_kind(self, expected: str) -> ValueError:
        return ValueError(f"{self.path} looks like {looks_like(self.path)}; {expected}. {self.where}".rstrip(". "))


# --- folders of classes ---------------------------------------------------------------------------------------


def class_member(label: int) -> dict[str, bytes]:
    """The member that carries a class index; the same object for the same class, as there are many entries."""
    return _CLASS_MEMBERS.setdefault(label, {"cls": str(label).encode()})


_CLASS_MEMBERS: dict[int, dict[str, bytes]] = {}


def _is_image(name: str) -> bool:
    """Whether the file of a name relative to the source is one of its images."""
    return name.lower().endswith(SUFFIXES) and not is_hidden(name)


@dataclass(frozen=True, kw_only=True)
class ImageNet(Source):
    """ImageNet's training images by class: folders nXXXXXXXX, archives nXXXXXXXX.tar, or the official tar of those.

    Classes are numbered in the order of their sorted WordNet ids, which are their names.
    """

    kind = "imagenet"
    where = "ILSVRC2012_img_train.tar is at https://image-net.org/download-images"
    shard_samples = 10_010  # 128 shards of the 1,281,167 images
    normalize = staticmethod(plain)

    def listing(self) -> Listing:
        self.require()
        if self.path.is_file() and looks_like(self.path) != "a tar archive":
            raise self.other_kind("imagenet needs the official tar archive, or a folder of class folders nXXXXXXXX")
        images = defaultdict(dict)
        for synset, name, place in self._in_folder() if self.path.is_dir() else self._in_archive():
            images[synset][name] = place
        if not images:
            raise ValueError(
                f"{self.path} has no class folders nXXXXXXXX with images: it is {looks_like(self.path)}; give the "
                "folder or archive of the training images; the validation archive has no classes"
            )
        names = sorted(images)
        entries = [
            Entry(f"{synset}/{name}", images[synset][name], class_member(label))
            for label, synset in enumerate(names)
            for name in sorted(images[synset])
        ]
        return Listing(entries, len(names), names)

    def _in_folder(self) -> Iterator[tuple[str, str, Slice]]:
        for path in self.path.iterdir():
            if re.fullmatch(r"n\d{8}", path.name) and path.is_dir():
                names = filter(_is_image, os.listdir(path))
                yield from ((path.name, name, Slice(str(path / name))) for name in names)
            elif re.fullmatch(r"n\d{8}\.tar", path.name):
                yield from _class_archive(path.stem, path, 0, None)

    def _in_archive(self) -> Iterator[tuple[str, str, Slice]]:
        for member in tar_members(self.path):
            begin, end = member.offset_data, member.offset_data + member.size
            if found := re.fullmatch(r"(?:.*/)?(n\d{8})\.tar", member.name):
                yield from _class_archive(found[1], self.path, begin, end)
            elif (found := re.fullmatch(r"(?:.*/)?(n\d{8})/([^/]+)", member.name)) and _is_image(member.name):
                yield found[1], found[2], Slice(str(self.path), begin, member.size)


def _class_archive(synset: str, path: Path, offset: int, end: int | None) -> Iterator[tuple[str, str, Slice]]:
    for member in tar_members(path, offset, end):
        if _is_image(member.name):
            yield synset, Path(member.name).name, Slice(str(path), member.offset_data, member.size)


# --- labels in a file -----------------------------------------------------------------------------------------


def _numbered(labels: Mapping[str, int | str]) -> tuple[dict[str, int], Sequence[str] | None]:
    """Class index by image, and class names: labels that are not all whole numbers are numbered in sorted order."""
    if all(re.fullmatch(r"-?\d+", str(label)) for label in labels.values()):
        return {name: int(label) for name, label in labels.items()}, None
    names = sorted({str(label) for label in labels.values()})
    numbers = {name: number for number, name in enumerate(names)}
    return {name: numbers[str(label)] for name, label in labels.items()}, names


def _labels_document(document: bytes | str, place: str) -> dict[str, int | str] | None:
    """Labels by image name of EDM's dataset.json, ``{"labels": [[name, label], ...]}``; None where it has none."""
    try:
        pairs = parse_json(document, place)["labels"]
        labels = None if pairs is None else dict(pairs)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{place} is not of the form {{"labels": [[name, label], ...]}} ({error!r})') from error
    if labels and not all(isinstance(label, int | str) for label in labels.values()):
        raise ValueError(f"{place}: labels must be class indices, one whole number an image")
    return labels


def _labelled(names: Sequence[str], labels: Mapping[str, int | str] | None, place: str) -> tuple[list[dict], Listing]:
    """The members of each image by its labels, and a Listing without entries."""
    if labels is None:
        return [{} for _ in names], Listing([])
    missing = [name for name in names if name not in labels]
    if missing:
        raise ValueError(f"{place} has no label for {len(missing)} of {len(names)} images, the first is {missing[0]}")
    numbers, class_names = _numbered({name: labels[name] for name in names})
    if (least := min(numbers.values())) < 0:
        raise ValueError(f"{place} has the label {least}: classes are numbered from 0")
    members = [class_member(numbers[name]) for name in names]
    return members, Listing([], 1 + max(numbers.values()), class_names)


@dataclass(frozen=True, kw_only=True)
class EDMZip(Source):
    """A zip written by EDM's dataset_tool (Karras et al. 2022): images in folders, labels in ``dataset.json``."""

    kind = "edm_zip"
    where = "EDM's dataset_tool.py writes such archives: https://github.com/NVlabs/edm#preparing-datasets"
    normalize = staticmethod(plain)

    def listing(self) -> Listing:
        self.require(folder=False)
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = {member.filename: member for member in archive.infolist() if _is_image(member.filename)}
                listed = [member for member in archive.infolist() if member.filename == "dataset.json"]
                if listed and listed[0].file_size > LARGEST_TEXT:
                    raise ValueError(f"dataset.json of {self.path} holds more than {LARGEST_TEXT:,} bytes")
                document = archive.read(listed[0]) if listed else None
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            with open(self.path, "rb") as file:
                if not file.read(4).startswith(b"PK"):
                    raise self.other_kind("edm_zip needs a zip archive") from error
            raise ValueError(f"{self.path} is a damaged or truncated zip ({error}): copy it again") from error
        if not members:
            raise ValueError(f"{self.path} holds no images")
        names, place = sorted(members), f"dataset.json of {self.path}"
        labels = None if document is None else _labels_document(document, place)
        others, listing = _labelled(names, labels, place)
        entries = [Entry(name, self._place(members[name]), other) for name, other in zip(names, others, strict=True)]
        return dataclasses.replace(listing, entries=entries)

    def _place(self, member: zipfile.ZipInfo) -> ZipMember:
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"{self.path}: {member.filename} is encrypted or compressed in an unusual way: zip it anew"
            )
        deflated = member.compress_type == zipfile.ZIP_DEFLATED
        return ZipMember(str(self.path), member.header_offset, member.compress_size, deflated, member.CRC)


@dataclass(frozen=True, kw_only=True)
class Folder(Source):
    """Images in a folder and its sub-folders, in the order of their names.

    Args:
        labels: None; ``folders``, an image's label is its first sub-folder; or a file: EDM's dataset.json, or lines
            ``name label`` (a comma may stand between) with names relative to the folder. Labels that are not all
            whole numbers are class names, numbered in sorted order.
    """

    labels: str | None = None

    kind = "folder"

    def listing(self) -> Listing:
        self.require(file=False)
        found = (
            (Path(folder) / name).relative_to(self.path).as_posix()
            for folder, _, files in os.walk(self.path, followlinks=True)
            for name in files
        )
        names = sorted(filter(_is_image, found))
        if not names:
            raise ValueError(f"{self.path} is {looks_like(self.path)} and holds no images ({', '.join(SUFFIXES)})")
        members, listing = _labelled(names, self._labels(names), str(self.labels))
        entries = [Entry(name, Slice(str(self.path / name)), other) for name, other in zip(names, members, strict=True)]
        return dataclasses.replace(listing, entries=entries)

    def _labels(self, names: Iterable[str]) -> Mapping[str, int | str] | None:
        if self.labels != "folders":
            return None if self.labels is None else _labels_file(Path(self.labels))
        folders = {name: name.partition("/")[0] if "/" in name else "" for name in names}
        for name, folder in folders.items():
            if not folder:
                raise ValueError(f"--labels=folders: {name} lies in no sub-folder of {self.path}, so it has no class")
        return folders


def _labels_file(path: Path) -> Mapping[str, int | str]:
    if not path.is_file():
        raise ValueError(f"--labels={path}: no such file (or write --labels=folders)")
    text = read_text(path)
    if path.suffix == ".json":
        return _labels_document(text, str(path)) or {}
    lines = [re.split(r"[\s,]+(?=[^\s,]+$)", line.strip()) for line in lines_of(text) if line.strip()]
    for number, line in enumerate(lines, 1):
        if len(line) != 2:
            raise ValueError(f"{path}: line {number} of its text is '{shown(line[0])}', 'name label' was expected")
    return dict(lines)


@dataclass(frozen=True, kw_only=True)
class COCO(Source):
    """MS COCO's captioned images (Lin et al. 2014): a folder of images and the file of their captions.

    A sample has the members ``txt`` (its caption) and ``json`` (image_id, file_name, caption, captions).

    Args:
        annotations: the captions file; None is COCO's own place for it, ``../annotations/captions_<folder>.json``.
        captions: first makes one sample an image, with its first caption; all makes one sample a caption.
    """

    annotations: str | None = None
    captions: str = "first"

    kind = "coco"
    where = "Images and captions are at https://cocodataset.org/#download"
    shard_samples = 1000
    format = "jpg"

    def listing(self) -> Listing:
        self.require(file=False)
        images, captions = self._captions()
        entries = []
        for image in sorted(images, key=lambda image: image["id"]):
            texts = captions[image["id"]]
            for number, text in enumerate(texts if self.captions == "all" else texts[:1]):
                facts = {"image_id": image["id"], "file_name": image["file_name"], "caption": text, "captions": texts}
                members = {"txt": text.encode(), "json": json.dumps(facts).encode()}
                name = f"{image['file_name']}, caption {number}" if self.captions == "all" else image["file_name"]
                entries.append(Entry(name, Slice(str(self.path / image["file_name"])), members))
        return Listing(entries)

    def _captions(self) -> tuple[list[dict], dict[int, list[str]]]:
        """Images that have captions, and the captions by image id in the order of their own ids."""
        name = f"captions_{self.path.resolve().name}.json"
        file = Path(self.annotations) if self.annotations else self.path.resolve().parent / "annotations" / name
        if not file.is_file():
            raise ValueError(f"no captions file {file}: give it as --annotations. {self.where}")
        document = read_json(file)
        try:
            captions = defaultdict(list)
            for annotation in sorted(document["annotations"], key=lambda annotation: annotation["id"]):
                captions[annotation["image_id"]].append(annotation["caption"].strip())
            images = [{"id": i["id"], "file_name": i["file_name"]} for i in document["images"] if i["id"] in captions]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} is no captions file of COCO ({type(error).__name__}: {error}): give captions_*.json"
            ) from error
        if not images:
            raise ValueError(f"{file} has captions for none of its images")
        return images, captions
