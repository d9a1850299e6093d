"""Sources: what is listed against what a test wrote, in every form; refused pickles; an error for every mistake."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from preparation import image_bytes
from preparation.cifar import CIFAR10, CIFAR100
from preparation.image_bytes import Damaged
from preparation.sources import COCO, EDMZip, Folder, ImageNet
from ratiograph.evaluation.image_sources import FolderStream


def png(value: int, size=(4, 4)) -> bytes:
    """A grey-valued RGB image file."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (value,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path | None, members: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    if path:
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def write_files(folder: Path, members: dict[str, bytes]) -> Path:
    for name, data in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def listed(source) -> list[tuple[str, bytes, dict[str, bytes]]]:
    return [(entry.name, entry.image.read(), dict(entry.members)) for entry in source.listing().entries]


# --- CIFAR ----------------------------------------------------------------------------------------------------


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes alike as Python 2's ``str``, as in the published files."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_text(self, text: str | bytes) -> None:
        data = text if isinstance(text, bytes) else text.encode("latin-1")
        small = len(data) < 256
        self.write(b"U" + struct.pack("<B", len(data)) if small else b"T" + struct.pack("<i", len(data)))
        self.write(data)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_text


def python2_pickle(document) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, 2).dump(document)
    return buffer.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def python3_pickle(document) -> bytes:
    return pickle.dumps(document, 2)


CIFAR = {
    # source: files of a split, label keys of the python version, class names' key, file and number, label bytes
    CIFAR10: (
        {"train": [f"data_batch_{k}" for k in range(1, 6)], "test": ["test_batch"]},
        ["labels"],
        ("label_names", "batches.meta", "batches.meta.txt", 10),
    ),
    CIFAR100: (
        {"train": ["train"], "test": ["test"]},
        ["coarse_labels", "fine_labels"],
        ("fine_label_names", "meta", "fine_label_names.txt", 100),
    ),
}


def cifar_files(source, dump, count=7):
    """(python files, binary files, {split: (pixels [N, 3, 32, 32], labels)}, class names)."""
    splits, keys, (key, meta, text, classes) = CIFAR[source]
    names = [f"name{k}" for k in range(classes)]
    python, binary, truth = {meta: dump({key: names})}, {text: "\n".join([*names, ""]).encode()}, {}
    for number, (split, files) in enumerate(splits.items()):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 256, (len(files), count, 3072), dtype=np.uint8)
        labels = rng.integers(0, classes, (len(files), count, len(keys)))
        for file, x, y in zip(files, pixels, labels, strict=True):
            python[file] = dump(
                {"data": x, **{key: y[:, k].tolist() for k, key in enumerate(keys)}, "batch_label": "b"}
            )
            binary[f"{file}.bin"] = np.concatenate([y.astype(np.uint8), x], 1).tobytes()
        truth[split] = pixels.reshape(-1, 3, 32, 32), labels[..., -1].reshape(-1)
    return python, binary, truth, names


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("dump", [python2_pickle, python3_pickle])
@pytest.mark.parametrize("source", CIFAR)
def test_cifar_is_read_from_pickles_and_records_folders_and_archives(source, dump, split, tmp_path):
    python, binary, truth, names = cifar_files(source, dump)
    assert dump is python3_pickle or b"_codecs" not in b"".join(python.values())
    places = [write_files(tmp_path / "p", python), write_files(tmp_path / "b", binary)]
    places.append(write_files(tmp_path / "parent" / "inner", python).parent)
    for kind, files in (("python", python), ("binary", binary)):
        places.append(tmp_path / f"{kind}.tar.gz")
        write_tar(places[-1], {f"cifar/{name}": data for name, data in files.items()}, "w:gz")
    pixels, labels = truth[split]
    for place in places:
        listing = source(path=place, split=split).listing()
        assert np.array_equal(np.stack([e.image.read() for e in listing.entries]), pixels.transpose(0, 2, 3, 1))
        assert [e.members for e in listing.entries] == [{"cls": str(label).encode()} for label in labels]
        assert listing.classes == len(names)
        assert listing.class_names == names
    assert listing.entries[3].name == f"{CIFAR[source][0][split][0]}, image 3"


class Evil:
    def __init__(self, call, *arguments):
        self.call = call, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("document", "refused"),
    [
        (Evil(os.system, "touch ran"), "posix.system"),
        (Evil(eval, "open('ran', 'w')"), "__builtin__.eval"),
        (Evil(Path, "ran"), "pathlib.Path"),
        ({"data": np.array([print], dtype=object), "labels": []}, "numpy.dtype('O8')"),
        ({"data": Evil(__import__("codecs").encode, "ran", "rot13"), "labels": []}, "_codecs.encode to 'rot13'"),
    ],
)
def test_what_no_cifar_pickle_holds_is_refused_by_name_and_not_run(document, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    python, *_ = cifar_files(CIFAR10, python2_pickle)
    folder = write_files(tmp_path / "cifar", {**python, "data_batch_2": pickle.dumps(document, 2)})
    with pytest.raises(ValueError, match=re.escape(f"data_batch_2: refused {refused}, ")):
        CIFAR10(path=folder).listing()
    assert not Path("ran").exists()


def test_damaged_cifar_is_named(tmp_path):
    python, binary, _, _ = cifar_files(CIFAR10, python2_pickle)
    wrong = {
        "data_batch_4 is damaged": {**python, "data_batch_4": python["data_batch_4"][:-500]},
        r"data_batch_1 holds pixels uint8 \[2, 5\]": {
            **python,
            "data_batch_1": python2_pickle({"data": np.zeros((2, 5), np.uint8), "labels": [1, 2]}),
        },
        "data_batch_3.bin is damaged": {**binary, "data_batch_3.bin": binary["data_batch_3.bin"][:-1]},
        "test_batch.bin has classes 10 to 10, not 0 to 9": {**binary, "test_batch.bin": b"\x0a" + bytes(3072)},
        "lacks the files data_batch_1, .*it has of them only batches.meta": {"batches.meta": python["batches.meta"]},
        "it has none .it is a folder of cat.png": {"cat.png": b""},
    }
    for number, (message, files) in enumerate(wrong.items()):
        folder = write_files(tmp_path / f"{number}", files)
        with pytest.raises(ValueError, match=message):
            CIFAR10(path=folder, split="test" if "test_batch.bin has" in message else "train").listing()
    archive = write_tar(None, python, "w:gz")
    (tmp_path / "cut.tar.gz").write_bytes(archive[: len(archive) // 2])
    with pytest.raises(ValueError, match=r"cut\.tar\.gz is damaged or truncated"):
        CIFAR10(path=tmp_path / "cut.tar.gz").listing()
    with pytest.raises(ValueError, match="is cifar10: give that as the source in place of cifar100"):
        CIFAR100(path=write_files(tmp_path / "c", python)).listing()
    with pytest.raises(ValueError, match="--split=val: cifar10 has the splits train and test"):
        CIFAR10(path=tmp_path / "c", split="val").listing()


# --- ImageNet -------------------------------------------------------------------------------------------------

SYNSETS = {"n02000003": 2, "n01000001": 3, "n01000002": 1}  # images of each, not in order


def imagenet_forms(folder: Path) -> dict[str, Path]:
    """The same images as class folders, as archives of classes, as the official tar of tars, as a tar of folders."""
    classes = {
        synset: {f"{synset}_{k}.JPEG": png(20 * k + len(synset) + index) for k in reversed(range(count))}
        for index, (synset, count) in enumerate(SYNSETS.items())
    }
    flat = {f"train/{synset}/{name}": data for synset, files in classes.items() for name, data in files.items()}
    tars = {f"{synset}.tar": write_tar(None, files) for synset, files in classes.items()}
    write_files(folder / "folders", flat)
    write_tar(folder / "flat.tar", flat)
    write_tar(folder / "official.tar", tars)
    return {
        "folders": write_files(folder / "folders" / "train", {"n01000001/notes.txt": b"no image", "README": b""}),
        "archives": write_files(folder / "archives", tars),
        "official": folder / "official.tar",
        "flat": folder / "flat.tar",
    }


@pytest.mark.parametrize("form", ["folders", "archives", "official", "flat"])
def test_imagenet_is_numbered_by_sorted_synset_in_every_form(form, tmp_path):
    source = ImageNet(path=imagenet_forms(tmp_path)[form])
    index = {synset: k for k, synset in enumerate(SYNSETS)}
    assert listed(source) == [
        (f"{synset}/{synset}_{k}.JPEG", png(20 * k + 9 + index[synset]), {"cls": str(label).encode()})
        for label, synset in enumerate(sorted(SYNSETS))
        for k in range(SYNSETS[synset])
    ]
    assert source.listing().classes == 3
    assert source.listing().class_names == sorted(SYNSETS)


def test_broken_off_imagenet_archives_are_errors(tmp_path):
    whole = imagenet_forms(tmp_path)["official"].read_bytes()
    used = whole.rstrip(b"\0")
    for end in (len(used) - 700, len(used) - 3000, 512 * (len(used) // 512 + 1)):
        (tmp_path / "cut.tar").write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"cut\.tar is damaged or truncated"):
            ImageNet(path=tmp_path / "cut.tar").listing()


def test_class_archive_without_end_does_not_run_into_the_next(tmp_path):
    endless = write_tar(None, {"a.JPEG": png(1)}).rstrip(b"\0")
    endless += bytes(-len(endless) % 512)  # the last block filled up, and no end mark
    write_tar(tmp_path / "t.tar", {"n00000001.tar": endless, "n00000002.tar": write_tar(None, {"b.JPEG": png(2)})})
    with pytest.raises(ValueError, match=r"t\.tar is damaged or truncated"):
        ImageNet(path=tmp_path / "t.tar").listing()


# --- zips and folders -----------------------------------------------------------------------------------------

IMAGES = {f"0000{k}/img{k:08d}.png": png(10 * k) for k in range(5)}
LABELS = {name: 3 * k % 4 for k, name in enumerate(IMAGES)}  # 0 3 2 1 0


def write_zip(path: Path, labels="none", compression=zipfile.ZIP_STORED, images=IMAGES) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name in reversed(images):
            archive.writestr(name, images[name])
        if labels != "none":
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_edm_zip_gives_its_images_sorted_with_their_labels(compression, tmp_path):
    source = EDMZip(path=write_zip(tmp_path / "a.zip", list(LABELS.items()), compression))
    assert listed(source) == [(name, IMAGES[name], {"cls": str(LABELS[name]).encode()}) for name in sorted(IMAGES)]
    assert source.listing().classes == 4
    for labels in (None, "none"):  # no labels in dataset.json, or no dataset.json
        plain = EDMZip(path=write_zip(tmp_path / "b.zip", labels, compression))
        assert listed(plain) == [(name, IMAGES[name], {}) for name in sorted(IMAGES)]
        assert plain.listing().classes is None


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_altered_bytes_in_a_zip_are_damage_of_one_image(compression, tmp_path):
    path = write_zip(tmp_path / "a.zip", None, compression)
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("00003/img00000003.png")
    data = bytearray(path.read_bytes())
    data[member.header_offset + 30 + len(member.filename) + 40] ^= 4
    path.write_bytes(data)
    for entry in EDMZip(path=path).listing().entries:
        if entry.name == member.filename:
            with pytest.raises(Damaged, match=r"checksum|compressed"):
                entry.image.read()
        else:
            assert entry.image.read() == IMAGES[entry.name]


FOLDER = {"cats/a.png": png(1), "cats/more/b.PNG": png(2), "Dogs/c.png": png(3), "Dogs/.d.png": b"", "list.txt": b""}


def label_file(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_folder_with_labels_of_every_kind(tmp_path):
    folder = write_files(tmp_path / "images", FOLDER)
    names = ["Dogs/c.png", "cats/a.png", "cats/more/b.PNG"]

    def labels(source):
        assert [(name, data) for name, data, _ in listed(source)] == [(name, FOLDER[name]) for name in names]
        listing = source.listing()
        return [e.members.get("cls") for e in listing.entries], listing.classes, listing.class_names

    assert labels(Folder(path=folder)) == ([None] * 3, None, None)
    assert labels(Folder(path=folder, labels="folders")) == ([b"0", b"1", b"1"], 2, ["Dogs", "cats"])
    pairs = [["cats/a.png", 5], ["Dogs/c.png", 0], ["cats/more/b.PNG", 2], ["elsewhere.png", 9]]
    document = label_file(tmp_path, "dataset.json", json.dumps({"labels": pairs}))
    assert labels(Folder(path=folder, labels=document)) == ([b"0", b"5", b"2"], 6, None)
    lines = label_file(tmp_path, "labels.csv", "cats/a.png,tabby\ncats/more/b.PNG, siam\n\nDogs/c.png  tabby\n")
    assert labels(Folder(path=folder, labels=lines)) == ([b"1", b"1", b"0"], 2, ["siam", "tabby"])


LEFT_BEHIND = (".ipynb_checkpoints/a.png", "__MACOSX/cats/a.png", "cats/._a.png", "cats/.git/a.png", ".a.png")


def test_what_systems_and_notebooks_leave_behind_is_no_image_and_no_class(tmp_path):
    files = FOLDER | dict.fromkeys(LEFT_BEHIND, png(9)) | dict.fromkeys(("cats/Thumbs.db", "desktop.ini"), b"")
    folder = write_files(tmp_path / "images", files)
    names = ["Dogs/c.png", "cats/a.png", "cats/more/b.PNG"]
    source = Folder(path=folder, labels="folders")
    assert [name for name, *_ in listed(source)] == names
    assert source.listing().class_names == ["Dogs", "cats"]
    assert [path.relative_to(folder).as_posix() for path in FolderStream(path=str(folder)).images] == names
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    assert [name for name, *_ in listed(EDMZip(path=tmp_path / "a.zip"))] == names
    members = {f"n00000001/{name}": png(1) for name in ("a.png", "._a.png")} | {"__MACOSX/n00000002/a.png": png(2)}
    write_tar(tmp_path / "a.tar", members)
    assert [name for name, *_ in listed(ImageNet(path=tmp_path / "a.tar"))] == ["n00000001/a.png"]


def test_byte_order_marks_and_separators_are_no_part_of_names_and_lines(tmp_path):
    folder = write_files(tmp_path / "images", {"a\u2028b.png": png(1), "c.png": png(2)})
    lines = label_file(tmp_path, "labels.csv", "\ufeffa\u2028b.png,1\r\nc.png,0\r\n")
    assert [members["cls"] for _, _, members in listed(Folder(path=folder, labels=lines))] == [b"1", b"0"]
    pairs = json.dumps({"labels": [["a\u2028b.png", 1], ["c.png", 0]]})
    document = label_file(tmp_path, "dataset.json", f"\ufeff{pairs}")
    assert [members["cls"] for _, _, members in listed(Folder(path=folder, labels=document))] == [b"1", b"0"]


def test_a_member_of_a_zip_that_unpacks_to_too_much_is_one_damaged_image(tmp_path, monkeypatch):
    monkeypatch.setattr(image_bytes, "LARGEST_MEMBER", 1000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(10**6))
    (entry,) = EDMZip(path=tmp_path / "a.zip").listing().entries
    with pytest.raises(Damaged, match="too many for an image"):
        entry.image.read()


# --- COCO -----------------------------------------------------------------------------------------------------


def write_coco(root: Path) -> Path:
    write_files(root / "val2017", {f"{k:012d}.jpg": png(k) for k in (7, 3, 9)})
    document = {
        "images": [{"id": k, "file_name": f"{k:012d}.jpg", "height": 4} for k in (7, 3, 9)],
        "annotations": [
            {"image_id": 7, "id": 5, "caption": "A cat. "},
            {"image_id": 3, "id": 2, "caption": "Ein Hündchen"},
            {"image_id": 7, "id": 1, "caption": "\nTwo cats."},
        ],
    }
    write_files(root, {"annotations/captions_val2017.json": json.dumps(document).encode()})
    return root / "val2017"


def test_coco_captions_are_in_the_order_of_their_ids(tmp_path):
    folder = write_coco(tmp_path)
    first = listed(COCO(path=folder))
    assert [(name, data, members["txt"].decode()) for name, data, members in first] == [
        ("000000000003.jpg", png(3), "Ein Hündchen"),
        ("000000000007.jpg", png(7), "Two cats."),  # the image without a caption is left out
    ]
    assert json.loads(first[1][2]["json"]) == {
        "image_id": 7,
        "file_name": "000000000007.jpg",
        "caption": "Two cats.",
        "captions": ["Two cats.", "A cat."],
    }
    all_captions = COCO(path=folder, captions="all", annotations=str(tmp_path / "annotations/captions_val2017.json"))
    assert [(data, members["txt"].decode()) for _, data, members in listed(all_captions)] == [
        (png(3), "Ein Hündchen"),
        (png(7), "Two cats."),
        (png(7), "A cat."),
    ]


# --- mistakes -------------------------------------------------------------------------------------------------


def truncated_zip(folder):
    path = write_zip(folder / "cut.zip", None)
    path.write_bytes(path.read_bytes()[:-300])
    return EDMZip(path=path)


def unlabelled_zip(folder):
    return EDMZip(path=write_zip(folder / "a.zip", list(LABELS.items())[:3]))


def instances(folder):
    write_coco(folder)
    (folder / "instances.json").write_text(json.dumps({"images": [], "annotations": [{"id": 1, "image_id": 3}]}))
    return COCO(path=folder / "val2017", annotations=str(folder / "instances.json"))


def of_bytes(source, data, name="file"):
    def make(folder):
        (folder / name).write_bytes(data)
        return source(path=folder / name)

    return make


def folder_with(labels):
    def make(folder):
        write_files(folder / "images", {**FOLDER, "top.png": png(4)})
        (folder / "lines.txt").write_text("cats/a.png 1\nDogs/c.png 0\n")
        (folder / "bare.txt").write_text("cats/a.png\n")
        (folder / "bad.json").write_text('{"label": []}')
        (folder / "minus.json").write_text(json.dumps({"labels": [[n, -1] for n in [*FOLDER, "top.png"]]}))
        (folder / "vectors.json").write_text(json.dumps({"labels": [["top.png", [0.5, 1]]]}))
        return Folder(path=folder / "images", labels=labels if labels == "folders" else str(folder / labels))

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: CIFAR10(path=f / "absent"), "no such file or folder: .*absent. CIFAR is at https://"),
        (of_bytes(CIFAR10, b"\x1f\x8b\x08\0not really"), "looks like a gzip file|damaged or truncated"),
        (of_bytes(CIFAR10, b"<!DOCTYPE html>"), r"looks like a web page \(the download failed\?\); cifar10 needs"),
        (of_bytes(CIFAR10, write_tar(None, {"a.png": png(1)})), r"it has none \(it is a tar archive\)"),
        (of_bytes(ImageNet, b""), "looks like an empty file; imagenet needs the official tar archive"),
        (of_bytes(ImageNet, b"PK\x03\x04abc"), "looks like a zip archive; imagenet needs the official tar"),
        (
            of_bytes(ImageNet, write_tar(None, {"ILSVRC2012_val_00000001.JPEG": b""})),
            "validation archive has no classes",
        ),
        (lambda f: ImageNet(path=write_files(f, {"train/x": b""})), "no class folders .* a folder of train"),
        (of_bytes(EDMZip, write_tar(None, {"a.png": png(1)})), "looks like a tar archive; edm_zip needs a zip"),
        (lambda f: EDMZip(path=f), "is a folder, edm_zip needs a file"),
        (truncated_zip, "cut.zip is a damaged or truncated zip"),
        (lambda f: EDMZip(path=write_zip(f / "a.zip", [], images={})), "a.zip holds no images"),
        (unlabelled_zip, "dataset.json of .*a.zip has no label for 2 of 5 images, the first is 00003/img00000003.png"),
        (of_bytes(Folder, b"\x89PNG"), "looks like a PNG image; folder needs a folder"),
        (lambda f: Folder(path=write_files(f, {"a.txt": b""})), "is a folder of a.txt and holds no images"),
        (lambda f: Folder(path=f), "is an empty folder and holds no images"),
        (folder_with("folders"), "--labels=folders: top.png lies in no sub-folder"),
        (folder_with("lines.txt"), "lines.txt has no label for 2 of 4 images, the first is cats/more/b.PNG"),
        (folder_with("bare.txt"), "bare.txt: line 1 of its text is 'cats/a.png', 'name label' was expected"),
        (folder_with("bad.json"), r"bad.json is not of the form \{\"labels\""),
        (folder_with("minus.json"), "minus.json has the label -1: classes are numbered from 0"),
        (folder_with("vectors.json"), "labels must be class indices"),
        (folder_with("absent.txt"), "absent.txt: no such file"),
        (lambda f: COCO(path=f), "no captions file .*captions_.*: give it as --annotations"),
        (instances, "instances.json is no captions file of COCO .*'caption'.*: give captions_"),
    ],
)
def test_one_clear_error_for_every_mistake(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path).listing()
