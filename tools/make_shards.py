"""Makes training shards of a data set as it was downloaded: tar files of images with their labels or captions.

  python tools/make_shards.py cifar10 cifar-10-python.tar.gz data/cifar10        also the binary version, and folders
  python tools/make_shards.py imagenet ILSVRC2012_img_train.tar data/imagenet64 --resolution=64
  python tools/make_shards.py edm_zip ffhq-64x64.zip data/ffhq64                 written by EDM's dataset_tool.py
  python tools/make_shards.py folder photos/ data/photos --resolution=256 --labels=folders
  python tools/make_shards.py coco coco/val2017 data/coco --resolution=512       captions: coco/annotations/

The last line printed is what a training command needs. Interrupted in any way, the same command continues, and the
shards are the same to the last byte however often it was interrupted and whatever --workers is. --resolution crops to
the centre as Dhariwal & Nichol (2021) do; files that need no change are kept byte for byte. A damaged image is skipped
and named, on the screen and in index.json beside the shards.
"""

import dataclasses
import os
import shlex
import sys
import time
from pathlib import Path

from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_string("name", None, "Stem of the shard files; default: the source, and the resolution if given.")
flags.DEFINE_integer("resolution", None, "Height and width in pixels; default: every image's own.", lower_bound=1)
flags.DEFINE_enum("channels", "3", ["1", "3"], "1 makes grey images, 3 RGB.")
flags.DEFINE_enum("format", None, ["png", "jpg"], "Of the images; default: kept as they are, and else png (coco: jpg).")
flags.DEFINE_integer("shards", None, "Number of shards.", lower_bound=1)
flags.DEFINE_integer("shard_samples", None, "Samples a shard, at most; default: 5,000 (coco: 1,000).", lower_bound=1)
flags.DEFINE_integer(
    "shuffle_seed", 0, "Seed of the samples' random order; -1 keeps the source's order.", lower_bound=-1
)
flags.DEFINE_float("max_corrupt", 1e-3, "Fraction of the images that may be damaged.", lower_bound=0, upper_bound=1)
flags.DEFINE_integer("workers", None, "Processes; default: one a CPU core.", lower_bound=1)
flags.DEFINE_string("split", None, "cifar10, cifar100: train (default) or test.")
flags.DEFINE_string(
    "labels", None, "folder: folders (sub-folders are classes), or a file: dataset.json, or lines 'name label'."
)
flags.DEFINE_string("annotations", None, "coco: captions file; default: ../annotations/captions_<folder>.json.")
flags.DEFINE_enum("captions", None, ["first", "all"], "coco: a sample an image (default), or a sample a caption.")

LOG_SECONDS = 30  # between two lines of a log that is no terminal
OPTIONS = ("split", "labels", "annotations", "captions")  # flags of some sources only


def source_of(kind, path):
    """The source that the command line names."""
    from preparation import cifar, sources

    kinds = (cifar.CIFAR10, cifar.CIFAR100, sources.ImageNet, sources.EDMZip, sources.Folder, sources.COCO)
    kinds = {source.kind: source for source in kinds}
    if kind not in kinds:
        raise ValueError(f"no source '{kind}': choose one of {', '.join(kinds)}")
    taken = {field.name for field in dataclasses.fields(kinds[kind])}
    given = {name: FLAGS[name].value for name in OPTIONS if FLAGS[name].value is not None}
    if foreign := [name for name in given if name not in taken]:
        raise ValueError(f"--{foreign[0]} is no flag of the source {kind}")
    return kinds[kind](path=Path(path), **given)


def progress_bar():
    """A `Watch` that shows a bar with images/s and the time left, and names what is skipped."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from preparation.shard_maker import Watch

    class Bar(Watch):
        def __init__(self):
            columns = ("{task.description}", BarColumn(), MofNCompleteColumn())
            speed = TextColumn("{task.fields[speed]}")
            self.progress = Progress(*columns, speed, TimeRemainingColumn(), console=Console(stderr=True))
            self.pending = 0
            self.next_line = time.monotonic() + LOG_SECONDS

        def begin(self, total, done):
            if done:
                self.progress.console.print(f"{done:,} of {total:,} images lie in finished shards already")
            self.task = self.progress.add_task("images", total=total, completed=done, speed="")

        def advance(self):
            self.progress.start()  # only now: the worker processes, forked before, must not inherit its thread
            self.pending += 1
            if self.pending == 16:
                self.flush()

        def flush(self):
            task = self.progress.tasks[self.task]
            shown = f"{task.speed:,.0f} images/s" if task.speed else ""
            self.progress.update(self.task, advance=self.pending, speed=shown)
            self.pending = 0
            if not self.progress.console.is_terminal and time.monotonic() > self.next_line:  # a log file
                self.next_line = time.monotonic() + LOG_SECONDS
                left = f", {task.time_remaining:,.0f} s left" if task.time_remaining else ""
                self.progress.console.print(f"{task.completed:,.0f} of {task.total:,} images, {shown}{left}")

        def skip(self, skipped):
            self.progress.console.print(f"skipped {skipped.name}: {skipped.reason}", markup=False, highlight=False)

        def stop(self):
            if self.progress.live.is_started:
                self.flush()
                self.progress.stop()

    return Bar()


def summary(index, folder):
    """What was made, and the flags to train with."""
    kinds = f"{index['classes']:,} classes" if index["classes"] else "no classes"
    if "txt" in index["members"]:
        kinds = "captions"
    size = "{}x{}".format(*index["size"]) if index["size"] else "of different sizes"
    last = len(index["shards"]) - 1
    urls = f"{folder}/{index['settings']['name']}-{{000000..{last:06d}}}.tar"
    skipped = len(index["skipped"])
    return (
        f"{index['samples']:,} images {size}, {kinds}, {skipped:,} skipped, {last + 1:,} shards in {folder}\n"
        f"train with --data={shlex.quote(urls)} {'' if 'txt' in index['members'] else stream_flags(index)}".rstrip()
    )


def stream_flags(index):
    """Flags for what a recipe may not expect of its images."""
    values = {"channels": index["settings"]["channels"]}
    if not index["classes"]:
        values["labels"] = False
    if index["size"] and index["size"][0] == index["size"][1]:
        values["resolution"] = index["size"][0]
    return " ".join(f"--gin_param=ShardStream.{name}={value}" for name, value in values.items())


def cores():
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def make(kind, path, folder):
    """The index of the shards, written."""
    from preparation.shard_maker import make_shards

    bar, source = progress_bar(), source_of(kind, path)
    print(f"listing {path}", file=sys.stderr)
    try:
        return make_shards(
            source,
            folder,
            name=FLAGS.name,
            resolution=FLAGS.resolution,
            channels=int(FLAGS.channels),
            format=FLAGS.format,
            shards=FLAGS.shards,
            shard_samples=FLAGS.shard_samples,
            shuffle_seed=None if FLAGS.shuffle_seed < 0 else FLAGS.shuffle_seed,
            max_corrupt=FLAGS.max_corrupt,
            workers=FLAGS.workers or cores(),
            watch=bar,
        )
    finally:
        bar.stop()


def main(argv):
    try:
        if len(argv) != 4:
            raise ValueError("give SOURCE INPUT OUT_DIR, e.g. cifar10 cifar-10-python.tar.gz data/cifar10")
        if FLAGS.shards and FLAGS.shard_samples:
            raise ValueError("give --shards or --shard_samples, not both")
        kind, path, folder = argv[1:]
        print(summary(make(kind, path, Path(folder)), folder.rstrip("/")))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    app.run(main)
