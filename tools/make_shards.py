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

import os
import shlex
import sys
from pathlib import Path

from absl import flags

from ratiograph import command_line

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

OPTIONS = ("split", "labels", "annotations", "captions")  # flags of some sources only


def summary(index, folder):
    """What the shards hold, and the flags to train with."""
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
    """Flags for what differs from the images that a gin file expects."""
    values = {"channels": index["settings"]["channels"]}
    if not index["classes"]:
        values["labels"] = False
    if index["size"] and index["size"][0] == index["size"][1]:
        values["resolution"] = index["size"][0]
    return " ".join(f"--gin_param=ShardStream.{name}={value}" for name, value in values.items())


def main(arguments):
    command_line.exactly(arguments, 3, "give SOURCE INPUT OUT_DIR, e.g. cifar10 cifar-10-python.tar.gz data/cifar10")
    if FLAGS.shards and FLAGS.shard_samples:
        raise ValueError("give --shards or --shard_samples, not both")
    from preparation.shard_maker import make_shards
    from preparation.shard_progress import ShardProgress
    from preparation.source_kinds import source_of

    kind, path, folder = arguments
    given = {name: FLAGS[name].value for name in OPTIONS if FLAGS[name].value is not None}
    source, progress = source_of(kind, Path(path), given), ShardProgress()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"listing {path}", file=sys.stderr)
    try:
        index = make_shards(
            source,
            Path(folder),
            name=FLAGS.name,
            resolution=FLAGS.resolution,
            channels=int(FLAGS.channels),
            format=FLAGS.format,
            shards=FLAGS.shards,
            shard_samples=FLAGS.shard_samples,
            shuffle_seed=None if FLAGS.shuffle_seed < 0 else FLAGS.shuffle_seed,
            max_corrupt=FLAGS.max_corrupt,
            workers=FLAGS.workers or cores,
            watch=progress,
        )
    finally:
        progress.stop()
    print(summary(index, folder.rstrip("/")))


if __name__ == "__main__":
    command_line.run(main, interrupted="interrupted: the same command continues")
