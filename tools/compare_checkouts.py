"""Shows whether training is the same to the last bit in two checkouts of the project.

  python tools/compare_checkouts.py record before.json                        this checkout, every run; takes minutes
  python tools/compare_checkouts.py record after.json --checkout=../other     another checkout
  python tools/compare_checkouts.py record few.json --only=scores,resumed     some of the runs
  python tools/compare_checkouts.py compare before.json after.json    one line a run; exit code 1 if any differs

`record` takes a few steps of small runs, of every task and family of objectives, and writes what they left: the logged
metrics, digests of all weights, optimiser moments, sample grids and arrays, and the numbers of evaluation.json; times,
rates, memory and texts are left out. A checkout is used by its command lines alone, so its modules may lie anywhere.
`compare` takes --only too. Records of different machines or libraries may differ by rounding.
"""

import hashlib
import io
import json
import os
import shlex
import string
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import flags

from ratiograph import command_line  # of this checkout; nothing else of the package is imported here

FLAGS = flags.FLAGS
flags.DEFINE_string("checkout", str(Path(__file__).resolve().parents[1]), "record: the checkout's folder.")
flags.DEFINE_list("only", None, "Names of runs, with commas; all by default.")

SHOWN, TAIL = 3, 30  # differing entries that a line names; lines that are shown of a run that failed
UNSTABLE = ("seconds", "rate/", "memory/", "data/wait")  # how metrics begin that differ from one time to the next

WORDS = {
    "every_run": "Experiment.log_every=1 Experiment.loggers=[] Experiment.preview_samples=4 "
    "Experiment.teacher_evaluations=0 --batch_size=8 --precision=fp32 --device=cpu",
    "digits": "DigitsEvaluator.samples=100 DigitsEvaluator.teacher_evaluations=(1,)",
    "mixture": "MixtureEvaluator.samples=100 MixtureEvaluator.repeats=2 --batch_size=32",
    "captions": "CaptionsEvaluator.samples=20 CaptionsEvaluator.teacher_evaluations=(1,)",
    "often": "Experiment.preview_every=2 Experiment.checkpoint_every=2 Experiment.evaluate_every=2",
    "extras": "Experiment.teacher_evaluations=5 Distillation.averages={'short':@short/EMA()} short/EMA.half_life=50",
    "edm": "DATA='$pictures/shards/tiny-000000.tar' EDM.weights=None DDPMPP.channels=16 DDPMPP.blocks=1",
    "sd15": "DATA='$latents/cache/shard-{000000..000001}.tar' TEACHER='$latents/pipeline' "
    "EMPTY_PROMPT='$latents/empty.safetensors' LatentStream.workers=0 SD15UNet.resolution=8 SD15UNet.norm_groups=4 "
    "SD15UNet.block_out_channels=(16,32) SD15UNet.layers_per_block=1 SD15UNet.cross_attention_dim=12 "
    "SD15UNet.attention_heads=2 --batch_size=4",
}
"""What stands in ``RUNS`` for several words; $pictures and $latents are folders that the functions below make."""
RUNS = {
    "scores": "mnist_sba $digits $often $extras DigitsEvaluator.during_samples=50",
    "scores_bf16": "mnist_sba $digits --precision=bf16",
    "scores_accumulated": "mnist_sba $digits Experiment.accumulation=2",
    "ratio": "mnist_js $digits",
    "ratio_normalized": "mnist_f_distill $digits",
    "ratio_on_student_score": "mnist_dmd2 $digits",
    "ratio_of_means": "mnist_sida $digits",
    "score_free": "mnist_dijs $digits",
    "reward_tilt": "mnist_reward_tilt $digits",
    "mixture_ratio": "mixture2d_ratio $mixture",
    "mixture_tilted": "mixture2d_tilted $mixture",
    "mixture_first_order": "mixture2d_first_order $mixture",
    "mixture_reward_weighted": "mixture2d_reward_weighted $mixture",
    "mixture_reward_ascent": "mixture2d_reward_ascent $mixture",
    "captions": "captions_distillation $captions",
    "captions_reward_tilt": "captions_reward_tilt $captions",
    "captions_teacher": "captions_teacher",
    "teacher": "mnist_teacher",
    "classifier": "mnist_classifier",
    "ratio_training": "mixture2d_ratio_training RatioEvaluator.samples=1000 --batch_size=64",
    "sd15": "sd15_reward_tilt $sd15 REWARD='$latents/clip'",
    "sd15_adapters": "sd15_reward_tilt base/sd15_lora $sd15 REWARD='$latents/clip' LoRA.rank=2 LoRA.alpha=4.0",
    "sd15_ratio": "papers/f_distill/sd15_reverse_kl $sd15 TeacherFeatureRatio.width=8",
    "edm": "papers/f_distill/cifar10_jensen_shannon $edm TeacherFeatureRatio.width=16",
    "edm_score_free": "papers/score_free/cifar10_dijs $edm",
    "ranks": "mnist_js $digits --nproc_per_node=2 --parallel=ddp",
    "ranks_mixture": "mixture2d_tilted $mixture --nproc_per_node=2 --parallel=ddp",
    "ranks_sharded": "mnist_sba $digits --nproc_per_node=2 --parallel=fsdp",
    "resumed": "mnist_f_distill $digits --steps=2 --steps=4",
}
"""Words by run: gin files in gin/ without their ending, lines of gin, flags. A run of several --steps is resumed."""
SAMPLED = {
    "scores": ("--samples=8", "--samples=4 --sampler=heun --steps=3"),
    "captions_reward_tilt": ("--samples=4",),
    "sd15": ("--pipeline=$latents/pipeline --prompts=$latents/prompts.txt --samples=2 --uint8",),
}
"""Flags of tools/sample.py by run, for each call of it at the end."""


def _png(seed: int, size: int) -> bytes:
    """A PNG of random pixels, size x size."""
    import numpy as np
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def make_pictures(folder: Path, tool: Callable) -> None:
    """A shard of pictures of ten classes."""
    for k in range(40):
        path = folder / "pictures" / f"class{k % 10}" / f"{k:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_png(k, 32))
    given = ("--name=tiny", "--labels=folders", "--workers=1")
    tool("make_shards", "folder", folder / "pictures", folder / "shards", *given)


def make_latents(folder: Path, tool: Callable) -> None:
    """Shards of latents, and the tiny random networks that they are for."""
    _write_networks(folder)
    (folder / "prompts.txt").write_text("ab cab\ntwo CATS\n")
    size = json.dumps({"original_width": 40, "original_height": 30}).encode()
    for k, caption in enumerate(("ab cab", "", "two CATS", "a red cat", "e", "ab")):
        with tarfile.open(folder / f"{k // 3:05d}.tar", "a") as archive:
            for ending, content in {"png": _png(k, 16), "txt": caption.encode(), "json": size}.items():
                member = tarfile.TarInfo(f"{k:09d}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    given = (f"--teacher={folder}/pipeline", f"--empty_prompt={folder}/empty.safetensors", "--resolution=16")
    tool("cache_latents", f"{folder}/{{00000..00001}}.tar", folder / "cache", *given, "--batch_size=2", "--device=cpu")


def _tokenizer(folder: Path):
    """Letters as tokens, and one merge."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "ab", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\na b</w>\n")
    return CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=12)


def _write_networks(folder: Path) -> None:
    """A pipeline of Stable Diffusion 1.5 in ``folder/pipeline`` and a CLIP model in ``folder/clip``."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    text = {"vocab_size": 192, "max_position_embeddings": 12, "bos_token_id": 190, "eos_token_id": 191}
    text |= {"hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    blocks = {"layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4, "block_out_channels": (8, 16)}
    blocks |= {"down_block_types": 2 * ("DownEncoderBlock2D",), "up_block_types": 2 * ("UpDecoderBlock2D",)}
    unet = {"layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 12, "attention_head_dim": 2}
    unet |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "block_out_channels": (16, 32)}
    unet |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    pipeline = StableDiffusionPipeline(
        AutoencoderKL(**blocks, sample_size=16),
        CLIPTextModel(CLIPTextConfig(**text, projection_dim=10, pad_token_id=191)),
        _tokenizer(folder),
        UNet2DConditionModel(**unet, sample_size=8),
        DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False),
        *(None, None, None, False),  # nothing checks images
    )
    pipeline.save_pretrained(folder / "pipeline")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=text | sizes, vision_config=vision, projection_dim=10))
    for parameter in clip.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    clip.save_pretrained(folder / "clip")
    pipeline.tokenizer.save_pretrained(folder / "clip")


def _digest(array) -> str:
    """SHA-256 of the type, shape and bytes of a tensor or array."""
    import torch

    tensor = torch.as_tensor(array).detach().contiguous()
    head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(head + tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def flattened(value, path: str) -> Iterator[tuple[str, str]]:
    """(path, digest or repr) of every tensor and number in nested containers; texts are left out."""
    if isinstance(value, dict):
        for key, item in value.items():
            if "seconds" not in str(key):
                yield from flattened(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from flattened(item, f"{path}/{index}")
    elif isinstance(value, bool | int | float | None):
        yield path, repr(value)
    elif hasattr(value, "shape"):
        yield path, _digest(value)


def _entries(workdir: Path) -> Iterator[tuple[str, str]]:
    """All that a run's folder says, by path."""
    import numpy as np
    import torch
    from PIL import Image
    from safetensors.torch import load_file

    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kept = {name: value for name, value in row.items() if not name.startswith(UNSTABLE)}
        yield from flattened(kept, f"metrics/step {row['step']}")
    for path in sorted(workdir.glob("samples/*.png")):
        yield f"samples/{path.name}", _digest(np.array(Image.open(path)))
    for path in sorted(workdir.glob("*.npz")):
        yield from flattened(dict(np.load(path)), path.name)
    for path in sorted(workdir.glob("*.safetensors")):
        yield from flattened(load_file(path), path.name)
    newest = max(workdir.glob("checkpoints/step_*.pt"))
    yield from flattened(torch.load(newest, map_location="cpu", weights_only=True), newest.stem)
    for path in sorted(workdir.glob("[de]*.json")):  # diagnostics and evaluation
        yield from flattened(json.loads(path.read_text()), path.stem)


class Recorder:
    """Runs the command lines of one checkout; everything they leave lies in ``folder``."""

    def __init__(self, checkout: Path, folder: Path):
        self.checkout, self.folder = checkout, folder
        paths = filter(None, (f"{checkout}/lib", os.environ.get("PYTHONPATH")))
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        self.environment |= {"RATIOGRAPH_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}

    def python(self, *words: object) -> None:
        """Runs python with these arguments in the checkout; a ValueError ends with what it said if it fails."""
        command, said = [sys.executable, *map(str, words)], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(command, cwd=self.checkout, env=self.environment, text=True, **said)
        if done.returncode:
            lines = "\n".join(done.stdout.splitlines()[-TAIL:])
            raise ValueError(f"{shlex.join(command)} exited with {done.returncode}:\n{lines}")

    def words(self, line: str) -> list[str]:
        """The words of a line of ``RUNS`` or ``SAMPLED``; folders that it names are filled first."""
        line = string.Template(line).safe_substitute(WORDS)
        for name, make in {"pictures": make_pictures, "latents": make_latents}.items():
            folder = self.folder / name
            if f"${name}" in line and not folder.exists():
                folder.mkdir()
                make(folder, lambda tool, *arguments: self.python(f"tools/{tool}.py", *arguments))
            line = line.replace(f"${name}", str(folder))
        return line.split()

    def record(self, name: str) -> dict[str, dict[str, str]]:
        """Trains the run ``name`` and samples from it; all that it left by section and path."""
        workdir, words = self.folder / "runs" / name, self.words(f"$every_run {RUNS[name]}")
        steps = [word for word in words if word.startswith("--steps=")] or ["--steps=4"]
        ranks = [word for word in words if word.startswith("--nproc_per_node=")]
        start = ("-m", "torch.distributed.run", "--standalone", *ranks) if ranks else ()
        given = [word for word in words if word[0] == "-" and word not in steps + ranks]
        lines = [f"--gin_param={word}" for word in words if word[0] != "-" and "=" in word]
        files = [f"--gin_file=gin/{word}.gin" for word in words if "=" not in word]
        command = (*start, "launch/main.py", *files, *lines, *given, f"--workdir={workdir}")
        entries = {}
        for last in steps:
            self.python(*command, last)
            for number, line in enumerate(SAMPLED.get(name, ())):
                out = (f"--out={workdir}/sampled{number}.npz", "--device=cpu", "--precision=fp32")
                self.python("tools/sample.py", workdir, *self.words(line), *out)
            prefix = f"{last.removeprefix('--')}/" if len(steps) > 1 else ""
            entries |= {f"{prefix}{path}": value for path, value in _entries(workdir)}
        judged = {path: value for path, value in entries.items() if "evaluation/" in path}
        return {"training": {path: entries[path] for path in entries if path not in judged}, "evaluation": judged}


def chosen(names) -> list[str]:
    """Those of ``names`` that --only asks for."""
    if unknown := [name for name in FLAGS.only or [] if name not in names]:
        raise ValueError(f"--only={unknown[0]}: choose from {', '.join(names)}")
    return [name for name in names if FLAGS.only is None or name in FLAGS.only]


def record(out: Path) -> None:
    """Writes the record of the checkout, and prints a line a run."""
    import torch

    checkout, runs = Path(FLAGS.checkout).resolve(), {}
    bf16 = any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(checkout, Path(folder))
        for name in chosen(RUNS):
            if "bf16" in RUNS[name] and not bf16:
                print(f"{name}: left out, this processor does not compute in bf16", flush=True)
                continue
            started = time.perf_counter()
            runs[name] = recorder.record(name)
            counts = " and ".join(f"{len(entries)} of {section}" for section, entries in runs[name].items())
            print(f"{name}: {time.perf_counter() - started:.0f} s, entries: {counts}", flush=True)
    basis = {"torch": torch.__version__, "instructions": torch.backends.cpu.get_cpu_capability()}
    out.write_text(json.dumps({"basis": basis, "runs": runs}, indent=1))


def _relative(before: str | None, after: str | None) -> float | None:
    """Relative difference of two numbers; None where one is absent or no number."""
    try:
        a, b = float(before), float(after)
    except (TypeError, ValueError):
        return None
    return abs(a - b) / (max(abs(a), abs(b)) or 1.0)


def differences(before: dict[str, str], after: dict[str, str]) -> str:
    """What differs between two sections, the first entries by name; '' for nothing."""
    paths = [path for path in {**before, **after} if before.get(path) != after.get(path)]
    if not paths:
        return ""
    sizes = [_relative(before.get(path), after.get(path)) for path in paths]
    largest = max((size for size in sizes if size is not None), default=None)
    measured = "" if largest is None else f", numbers by up to {largest:.1e} of their size"
    shown = zip(paths[:SHOWN], sizes[:SHOWN], strict=True)
    told = [path if size is None else f"{path} {before[path]} => {after[path]}" for path, size in shown]
    told += ["..."] if len(paths) > SHOWN else []
    return f"{len(paths)} of {len({**before, **after})} differ{measured}: {', '.join(told)}"


def compare(before: dict, after: dict) -> bool:
    """Prints a line a run; whether all are equal."""
    if before["basis"] != after["basis"]:
        print(f"note: the records were made with {before['basis']} and {after['basis']}")
    equal = True
    for name in chosen({**before["runs"], **after["runs"]}):
        told = []
        for section in ("training", "evaluation"):
            first, second = (document["runs"].get(name, {}).get(section, {}) for document in (before, after))
            found = differences(first, second)
            equal = equal and not found
            told.append(f"{section} {found or f'equal ({len(first)})'}")
        both = name in before["runs"] and name in after["runs"]
        print(f"{name}: {'; '.join(told) if both else 'only in one record'}")
    return equal


def main(arguments):
    if arguments[:1] == ["record"] and len(arguments) == 2:
        record(Path(arguments[1]))
        return 0
    if arguments[:1] == ["compare"] and len(arguments) == 3:
        return 0 if compare(*(json.loads(Path(path).read_text()) for path in arguments[1:])) else 1
    raise ValueError("give `record OUT.json` or `compare BEFORE.json AFTER.json`")


if __name__ == "__main__":
    command_line.run(main)
