"""Numbers of a finished run's student, of two folders of images, or the statistics of real ones, as the field has them.

  python tools/evaluate.py runs/mnist_sba --samples=5000                      the run's student against its own data
  python tools/evaluate.py runs/mnist_sba --features=digits --metrics=frechet,kid_exact --raw
  python tools/evaluate.py folder samples/ real/ --features=lite0             two folders of images, or .npz of them

CIFAR-10 and ImageNet-64, 50,000 samples of seed 0 against all training images, on the features that EDM and the papers
after it publish FID by; --features=inception is clean-fid's:

  python tools/evaluate.py stats --data='data/cifar10/cifar10-{000000..000009}.tar' --features=inception_tf
         --out=c10.npz
  python tools/evaluate.py runs/cifar --preset=cifar10 --reference=c10.npz

Zero-shot COCO-30k of a Stable Diffusion student: a fixed list of 30,000 captions of val2014, a sample each, resized to
256 x 256 as clean-fid does, against the images of val2014 at that size. The list is drawn from COCO's file (captions by
id, shuffled by seed 0), or is the first 30,000 lines of a text file with a caption a line:

  python tools/evaluate.py stats --data=coco/val2014 --size=256 --features=inception --out=coco256.npz
  python tools/evaluate.py runs/sd --preset=coco30k --reference=coco256.npz --pipeline=teachers/sd15
         --captions=coco/annotations/captions_val2014.json --clip=weights/clip-vit-large-patch14

In-batch similarity takes several samples a caption: --prompts=200 --repeats=8 --samples=1600
--metrics=in_batch_similarity --features=timm:vit_small_patch16_224.dino. What lacks its weights is named with the
command that fetches it, and left out. A run's numbers are added to its evaluation.json; --out writes them elsewhere.
On several GPUs: torchrun --nproc-per-node=8 tools/evaluate.py ..., with the same numbers.
"""

import json
import logging
import sys
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging

FEATURES = ("lite0", "inception", "inception_legacy", "inception_tf", "digits", "timm:NAME")
METRICS = ("frechet", "kid", "kid_exact", "inception_score", "neighbours", "in_batch_similarity")
PRESETS = {
    "cifar10": {"samples": 50_000, "features": ["inception_tf"]},
    "imagenet64": {"samples": 50_000, "features": ["inception_tf"]},
    "coco30k": {"samples": 30_000, "features": ["inception"], "prompts": 30_000},
}

FLAGS = flags.FLAGS
flags.DEFINE_list("metrics", ["frechet", "kid", "inception_score", "neighbours"], f"Some of {', '.join(METRICS)}.")
flags.DEFINE_list(
    "features", ["lite0"], f"One or several of {', '.join(FEATURES)}; the first one's numbers come first."
)
flags.DEFINE_multi_string("weights", [], "FEATURES=FILE: where the weights of one of --features are; repeatable.")
flags.DEFINE_enum("preset", None, sorted(PRESETS), "Samples and features of a published protocol; flags override it.")
flags.DEFINE_integer("samples", 5000, "Samples of the student.", lower_bound=4)
flags.DEFINE_integer("real_samples", 0, "Real images; 0 takes all.", lower_bound=0)
flags.DEFINE_string("reference", None, "Real images: shards, folder, .npz of images or of statistics; the run's data.")
flags.DEFINE_string("data", None, "stats: the images, as --reference.")
flags.DEFINE_integer("size", 0, "Crops and resizes image files of a folder to so many pixels a side.", lower_bound=0)
flags.DEFINE_string("out", None, "stats: the .npz; otherwise the JSON, WORKDIR/evaluation.json for a run.")
flags.DEFINE_bool("raw", False, "Also the weights of the newest checkpoint; done anyway where there are several EMAs.")
flags.DEFINE_string("clip", None, "Folder of a CLIP model: also CLIP scores.")
flags.DEFINE_string("hps", None, "HPS_v2.1_compressed.pt: also HPSv2 scores.")
flags.DEFINE_string("aesthetic", None, "Head of LAION's aesthetic predictor, on --clip: also its scores.")
flags.DEFINE_string("captions", None, "COCO's captions file, or one caption a line: what the student is asked for.")
flags.DEFINE_string("pipeline", None, "Folder of a Stable Diffusion pipeline: text encoder and autoencoder.")
flags.DEFINE_bool("sdxl", False, "The pipeline is SDXL's.")
flags.DEFINE_integer("prompts", 1000, "Captions of the list.", lower_bound=1)
flags.DEFINE_integer("repeats", 1, "Samples of each caption.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of the samples.", lower_bound=0)
flags.DEFINE_integer("batch_size", 64, "Images at a time.", lower_bound=1)
flags.DEFINE_multi_string("gin_param", [], "A line of gin on top of the run's config.gin; repeatable.")
flags.DEFINE_string("device", "auto", "auto, cpu, cuda, cuda:1, ...")


def apply_preset():
    """Sets the flags that --preset decides and the command line does not."""
    for name, value in PRESETS.get(FLAGS.preset, {}).items():
        if not FLAGS[name].present:
            setattr(FLAGS, name, value)


def extractors():
    """Feature extractors by name."""
    from ratiograph.evaluation import features

    plain = {
        "lite0": features.EfficientNetLite0Features,
        "inception": features.InceptionFeatures,
        "inception_legacy": features.LegacyInceptionFeatures,
        "inception_tf": features.TensorFlowInceptionFeatures,
    }
    files = dict(line.partition("=")[::2] for line in FLAGS.weights)
    found = {}
    for name in FLAGS.features:
        weights = files.pop(name, None)
        if name in plain:
            found[name] = plain[name](weights=weights)
        elif name == "digits":
            found[name] = features.DigitFeatures()
        elif name.startswith("timm:"):
            found[name[5:]] = features.TimmFeatures(model=name[5:], weights=weights)
        else:
            raise ValueError(f"--features={name}: choose from {', '.join(FEATURES)}")
    if files:
        raise ValueError(f"--weights={next(iter(files))}=...: that is none of --features={','.join(FLAGS.features)}")
    return found


def metrics():
    """The metrics asked for."""
    from ratiograph.evaluation import metrics

    classes = (
        metrics.Frechet,
        metrics.KernelDistance,
        metrics.ExactKernelDistance,
        metrics.InceptionScore,
        metrics.NearestNeighbours,
        metrics.InBatchSimilarity,
    )
    known = dict(zip(METRICS, classes, strict=True))
    for name in FLAGS.metrics:
        if name not in known:
            raise ValueError(f"--metrics={name}: choose from {', '.join(METRICS)}")
    return [known[name]() for name in FLAGS.metrics]


def scores():
    """Scores of single images by name."""
    from ratiograph.evaluation.alignment import ClipScore, RewardScore

    found = {"clip": ClipScore(folder=FLAGS.clip)} if FLAGS.clip else {}
    if FLAGS.hps:
        from ratiograph.networks.rewards.preference_rewards import HPSv2Reward

        found["hps"] = RewardScore(reward=HPSv2Reward(weights=FLAGS.hps), label="HPSv2")
    if FLAGS.aesthetic:
        from ratiograph.networks.rewards.clip_rewards import AestheticReward

        if not FLAGS.clip:
            raise ValueError("--aesthetic needs --clip, the folder of CLIP ViT-L/14")
        reward = AestheticReward(weights=FLAGS.clip, head=FLAGS.aesthetic)
        found["aesthetic"] = RewardScore(reward=reward, label="aesthetic score")
    return found


def images(place):
    """The stream of the images at ``place``: an embedded data set, shards, a folder or an .npz."""
    from ratiograph.data.embedded import EMBEDDED
    from ratiograph.data.stream import ShardStream
    from ratiograph.evaluation.image_sources import FolderStream

    if place in EMBEDDED:
        return ShardStream(urls=place, labels=False)
    if ".tar" in place:
        return ShardStream(urls=place, channels=3, labels=False)
    return FolderStream(path=place, size=FLAGS.size or None)


def evaluator(stream, source=None):
    """The evaluator of the flags, against ``--reference`` or else ``stream``."""
    import numpy as np

    from ratiograph.evaluation.image_evaluator import ImageEvaluator

    reference, statistics = FLAGS.reference, None
    if reference and reference.endswith(".npz") and Path(reference).is_file():
        with np.load(reference, allow_pickle=False) as file:
            statistics = reference if "mu" in file.files else None
    found = extractors()
    if reference and not statistics:
        stream = images(reference)
    if found and stream is None and not statistics:
        raise ValueError("the run has no data to compare with: give --reference")
    return ImageEvaluator(
        data=None if statistics else stream,
        statistics=dict.fromkeys(list(found)[:1], statistics) if statistics else None,
        features=found,
        metrics=metrics(),
        scores=scores(),
        source=source,
        samples=FLAGS.samples,
        real_samples=FLAGS.real_samples or None,
        batch_size=FLAGS.batch_size,
        raw=FLAGS.raw,
    )


def captioned():
    """The source of samples that the flags ask for, or None for the run's own conditions."""
    from ratiograph.evaluation.image_sources import CaptionedSamples, StudentSamples
    from ratiograph.networks.autoencoder import Autoencoder
    from ratiograph.networks.text_encoders import SD15CaptionEncoder, SDXLCaptionEncoder

    autoencoder = Autoencoder(weights=FLAGS.pipeline) if FLAGS.pipeline else None
    if not FLAGS.captions:
        return StudentSamples(autoencoder=autoencoder)
    if not FLAGS.pipeline:
        raise ValueError("--captions needs --pipeline, the folder with the text encoder and the autoencoder")
    encoder = (SDXLCaptionEncoder if FLAGS.sdxl else SD15CaptionEncoder)(weights=FLAGS.pipeline)
    return CaptionedSamples(
        captions=FLAGS.captions,
        encoder=encoder,
        autoencoder=autoencoder,
        prompts=FLAGS.prompts,
        repeats=FLAGS.repeats,
        size=FLAGS.size or 256,
    )


def place():
    """The device of ``--device``; joins the other processes of a torchrun or srun launch."""
    import torch

    from ratiograph.core import distributed
    from ratiograph.training import trainer

    device = trainer.choose_device(FLAGS.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", distributed.local_rank())
        torch.cuda.set_device(device)
    distributed.start(device)
    return device


def shown(judge, function):
    """``function()`` while a bar shows how many images the evaluator has seen, of rank 0's part."""
    from ratiograph.core import distributed

    if not distributed.is_main():
        return function()

    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks = {}

        def progress(what, done, samples):
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=samples)
            bar.update(tasks[what], completed=done)

        judge.progress = progress
        return function()


def of_run(workdir):
    """The document of a finished run's student."""
    if not (workdir / "config.gin").is_file():
        raise ValueError(f"{workdir} has no config.gin: give the folder of a run, 'stats' or 'folder A B'")

    from ratiograph import config
    from ratiograph.tasks.student_files import load_students
    from ratiograph.training import trainer

    experiment = config.build(config.parse([str(workdir / "config.gin")], FLAGS.gin_param))
    task = experiment.task
    if not hasattr(task, "student_samples"):
        raise ValueError(f"{workdir} trained a {type(task).__name__}, which has no one-step student to evaluate")
    judge, device = evaluator(experiment.data, captioned()), place()
    task.prepare(device, trainer.autocast_dtype(experiment.precision, device))
    if task.conditions.needs_data:
        task.conditions.remember(experiment.data.batches(experiment.batch_size, experiment.seed))
    load_students(task, workdir, raw=FLAGS.raw)

    def judged():
        judge.prepare(device)
        return judge.document(judge.student_rows(task, FLAGS.seed))

    return shown(judge, judged)


def of_folders(samples, real):
    """The document of one folder against another."""
    from ratiograph.evaluation.image_sources import stream_images

    made, judge, device = images(samples), evaluator(images(real)), place()

    def judged():
        judge.prepare(device)
        row = judge.measure(samples, stream_images(made, FLAGS.batch_size), samples=min(len(made), FLAGS.samples))
        return judge.document([row], title=f"{samples} against {real}")

    return shown(judge, judged)


def statistics():
    """Writes the statistics of ``--data``, and prints how far one half of the images is from the other."""
    from ratiograph.core.distributed import is_main
    from ratiograph.evaluation.feature_sets import write_statistics

    if not FLAGS.data or not FLAGS.out or not FLAGS.out.endswith(".npz"):
        raise ValueError("stats needs --data=IMAGES and --out=NAME.npz")
    judge = evaluator(images(FLAGS.data))
    if len(judge.features) > 1:
        raise ValueError(f"stats are of one kind of features, --features={','.join(FLAGS.features)} names several")
    device = place()
    shown(judge, lambda: judge.prepare(device))
    ((name, extractor),) = judge.extractors.items()
    if not is_main():
        return
    write_statistics(Path(FLAGS.out), judge.real[name], extractor)
    print_table(judge.document(judge.real_rows()))
    print(f"{FLAGS.out}: {len(judge.real[name]):,} images, features of '{extractor.name}'")


def print_table(document):
    """A line a number: value, standard error, what it is."""
    from rich.console import Console
    from rich.table import Table

    for row in document["rows"]:
        table = Table(title=f"{row['name']}: {row['samples']:,} samples", title_justify="left")
        for column in ("", "value", "± standard error"):
            table.add_column(column, justify="left" if not column else "right")
        for key, about in document["metrics"].items():
            if row.get(key) is not None and not about["label"].startswith("±"):
                error = next((row.get(k) for k, a in document["metrics"].items() if a.get("of") == key), None)
                table.add_row(about["label"], f"{row[key]:.5g}", "" if error is None else f"{error:.2g}")
        Console().print(table)
    for note in document["notes"]:
        print(note, file=sys.stderr)


def main(argv):
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("ratiograph").setLevel(logging.ERROR)  # what was left out is printed with the results

    from ratiograph.core import distributed
    from ratiograph.core.files import write_atomically
    from ratiograph.evaluation.documents import merged, read_document

    try:
        apply_preset()
        mode, *rest = argv[1:] or [""]
        if mode == "stats" and not rest:
            statistics()
            return
        if mode == "folder" and len(rest) == 2:
            document, out = of_folders(*rest), FLAGS.out and Path(FLAGS.out)
        elif mode and not rest and mode != "folder":
            document, out = of_run(Path(mode)), Path(FLAGS.out or Path(mode) / "evaluation.json")
        else:
            raise ValueError("give the folder of a run, 'stats', or 'folder A B'; --help explains")
        if not distributed.is_main():
            return
        print_table(document)
        if out:
            whole = merged(read_document(out), document, (FLAGS.features or [""])[0].removeprefix("timm:"))
            write_atomically(out, json.dumps(whole, indent=1).encode())
            print(out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        distributed.stop()


if __name__ == "__main__":
    app.run(main)
