"""The work of tools/evaluate.py: the evaluator that its flags ask for, and what it finds of a run or of folders."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from absl import flags
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ratiograph.command_line import progress_bar
from ratiograph.core import distributed
from ratiograph.core.files import write_atomically
from ratiograph.core.foreign import shown
from ratiograph.data.embedded import EMBEDDED
from ratiograph.data.stream import ShardStream
from ratiograph.evaluation import features, inception_features, metrics
from ratiograph.evaluation.alignment import ClipScore, RewardScore
from ratiograph.evaluation.documents import merged, read_document
from ratiograph.evaluation.feature_sets import array_names, write_statistics
from ratiograph.evaluation.image_evaluator import ImageEvaluator
from ratiograph.evaluation.image_sources import CaptionedSamples, FolderStream, StudentSamples, stream_images
from ratiograph.networks.autoencoder import Autoencoder
from ratiograph.networks.rewards.clip_rewards import AestheticReward
from ratiograph.networks.rewards.preference_rewards import HPSv2Reward
from ratiograph.networks.text_encoders import SD15CaptionEncoder, SDXLCaptionEncoder
from ratiograph.tasks import student_files
from ratiograph.training import devices

__all__ = ["judge"]

FLAGS = flags.FLAGS
FEATURES = {
    "lite0": features.EfficientNetLite0Features,
    "inception": inception_features.InceptionFeatures,
    "inception_legacy": inception_features.LegacyInceptionFeatures,
    "inception_tf": inception_features.TensorFlowInceptionFeatures,
}
METRICS = {
    "frechet": metrics.Frechet,
    "kid": metrics.KernelDistance,
    "kid_exact": metrics.ExactKernelDistance,
    "inception_score": metrics.InceptionScore,
    "neighbours": metrics.NearestNeighbours,
    "in_batch_similarity": metrics.InBatchSimilarity,
}


def extractors() -> dict[str, object]:
    """Feature extractors by name."""
    files = dict(line.partition("=")[::2] for line in FLAGS.weights)
    found = {}
    for name in FLAGS.features:
        weights = files.pop(name, None)
        if name in FEATURES:
            found[name] = FEATURES[name](weights=weights)
        elif name == "digits":
            found[name] = features.DigitFeatures()
        elif name.startswith("timm:"):
            found[name[5:]] = features.TimmFeatures(model=name[5:], weights=weights)
        else:
            raise ValueError(f"--features={name}: choose from {', '.join([*FEATURES, 'digits', 'timm:NAME'])}")
    if files:
        raise ValueError(f"--weights={next(iter(files))}=...: that is none of --features={','.join(FLAGS.features)}")
    return found


def scores() -> dict[str, object]:
    """Scores of single images by name."""
    found = {"clip": ClipScore(folder=FLAGS.clip)} if FLAGS.clip else {}
    if FLAGS.hps:
        found["hps"] = RewardScore(reward=HPSv2Reward(weights=FLAGS.hps), label="HPSv2")
    if FLAGS.aesthetic:
        if not FLAGS.clip:
            raise ValueError("--aesthetic needs --clip, the folder of CLIP ViT-L/14")
        reward = AestheticReward(weights=FLAGS.clip, head=FLAGS.aesthetic)
        found["aesthetic"] = RewardScore(reward=reward, label="aesthetic score")
    return found


def images(source: str) -> ShardStream | FolderStream:
    """The stream of the images of an embedded data set, of shards, of a folder or of an .npz."""
    if source in EMBEDDED:
        return ShardStream(urls=source, labels=False)
    if ".tar" in source:
        return ShardStream(urls=source, channels=3, labels=False)
    return FolderStream(path=source, size=FLAGS.size or None)


def evaluator(stream: object, source: object = None) -> ImageEvaluator:
    """The evaluator of the flags, against ``--reference`` or else ``stream``."""
    reference, statistics = FLAGS.reference, None
    if reference and reference.endswith(".npz") and Path(reference).is_file():
        statistics = reference if "mu" in array_names(Path(reference)) else None
    found = extractors()
    if reference and not statistics:
        stream = images(reference)
    if found and stream is None and not statistics:
        raise ValueError("the run has no data to compare with: give --reference")
    for name in FLAGS.metrics:
        if name not in METRICS:
            raise ValueError(f"--metrics={name}: choose from {', '.join(METRICS)}")
    return ImageEvaluator(
        data=None if statistics else stream,
        statistics=dict.fromkeys(list(found)[:1], statistics) if statistics else None,
        features=found,
        metrics=[METRICS[name]() for name in FLAGS.metrics],
        scores=scores(),
        source=source,
        samples=FLAGS.samples,
        real_samples=FLAGS.real_samples or None,
        batch_size=FLAGS.batch_size,
        raw=FLAGS.raw,
    )


def student_samples() -> StudentSamples | CaptionedSamples:
    """The student's samples under the captions of the flags, or under the run's own conditions."""
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


def start() -> torch.device:
    """The device of ``--device``; joins the other processes of a torchrun or srun launch."""
    device = devices.choose_device(FLAGS.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", distributed.local_rank())
        torch.cuda.set_device(device)
    distributed.start(device)
    return device


def with_bar(judge: ImageEvaluator, work: Callable[[], dict | None]) -> dict | None:
    """``work()`` while a bar shows how many images ``judge`` has seen, of the main process's part."""
    with progress_bar(transient=True, disable=not distributed.is_main()) as bar:
        tasks = {}

        def progress(what: str, done: int, samples: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(escape(shown(what)), total=samples)
            bar.update(tasks[what], completed=done)

        if distributed.is_main():
            judge.progress = progress
        return work()


def of_run(workdir: Path) -> dict:
    """The document of a finished run's student."""
    experiment = student_files.read_experiment(workdir, memory=True, bindings=FLAGS.gin_param)
    task = experiment.task
    if not hasattr(task, "student_samples"):
        raise ValueError(f"{workdir} trained a {type(task).__name__}, which has no one-step student to evaluate")
    judge, device = evaluator(experiment.data, student_samples()), start()
    task.prepare(device, devices.autocast_dtype(experiment.precision, device))
    if task.conditions.needs_data:
        task.conditions.remember(experiment.data.batches(experiment.batch_size, experiment.seed))
    student_files.load_students(task, workdir, raw=FLAGS.raw)

    def work() -> dict:
        judge.prepare(device)
        return judge.document(judge.student_rows(task, FLAGS.seed))

    return with_bar(judge, work)


def of_folders(samples: str, real: str) -> dict:
    """The document of one folder against another."""
    stream, judge, device = images(samples), evaluator(images(real)), start()

    def work() -> dict:
        judge.prepare(device)
        row = judge.measure(samples, stream_images(stream, FLAGS.batch_size), samples=min(len(stream), FLAGS.samples))
        return judge.document([row], title=f"{samples} against {real}")

    return with_bar(judge, work)


def statistics() -> None:
    """Writes the statistics of ``--data``, and prints how far one half of the images is from the other."""
    if not FLAGS.data or not FLAGS.out or not FLAGS.out.endswith(".npz"):
        raise ValueError("stats needs --data=IMAGES and --out=NAME.npz")
    judge = evaluator(images(FLAGS.data))
    if len(judge.features) > 1:
        raise ValueError(f"stats are of one kind of features, --features={','.join(FLAGS.features)} names several")
    device = start()
    with_bar(judge, lambda: judge.prepare(device))
    ((name, extractor),) = judge.extractors.items()
    if not distributed.is_main():
        return
    write_statistics(Path(FLAGS.out), judge.real[name], extractor)
    print_table(judge.document(judge.real_rows()))
    print(f"{FLAGS.out}: {len(judge.real[name]):,} images, features of '{extractor.name}'")


def print_table(document: dict) -> None:
    """A line a number: value, standard error, what it is."""
    for row in document["rows"]:
        table = Table(title=f"{escape(shown(row['name']))}: {row['samples']:,} samples", title_justify="left")
        for column in ("", "value", "± standard error"):
            table.add_column(column, justify="left" if not column else "right")
        for key, about in document["metrics"].items():
            if row.get(key) is not None and not about["label"].startswith("±"):
                error = next((row.get(k) for k, a in document["metrics"].items() if a.get("of") == key), None)
                table.add_row(escape(shown(about["label"])), f"{row[key]:.5g}", "" if error is None else f"{error:.2g}")
        Console().print(table)
    for note in document["notes"]:
        print(shown(note, 1000), file=sys.stderr)


def judge(mode: str, *folders: str) -> None:
    """Prints the numbers that are asked for and writes them to ``--out``.

    Args:
        mode: "stats", "folder", or the folder of a run.
        folders: of samples and of real images, for "folder".

    Raises:
        ValueError: flags contradict each other or the run.
        FileNotFoundError: the run or a file is not there.
    """
    try:
        if mode == "stats":
            statistics()
            return
        document = of_folders(*folders) if folders else of_run(Path(mode))
        if not distributed.is_main():
            return
        print_table(document)
        out = FLAGS.out if folders else FLAGS.out or Path(mode) / "evaluation.json"
        if out:
            whole = merged(read_document(Path(out)), document, (FLAGS.features or [""])[0].removeprefix("timm:"))
            write_atomically(Path(out), json.dumps(whole, indent=1).encode())
            print(out)
    finally:
        distributed.stop()
