"""Numbers without a meaning for every numeric parameter of every component: a graph, or one line that says why not.

The attacks are generated from the registry, so that a new component is attacked as soon as it exists.
"""

from __future__ import annotations

import contextlib
import functools
import resource
import signal
import typing
from pathlib import Path

import pytest
import torch

from ratiograph import config
from ratiograph.config.components import components, load_components
from ratiograph.config.values import Reference, expand, literal, parts, spell
from ratiograph.training import trainer

ROOT = Path(__file__).resolve().parents[2]
GIGABYTE = 2**20  # in the kilobytes of ru_maxrss
SECONDS = 10
"""Of one attack; most take milliseconds."""

NUMBERS = (
    *(-1, 0, 1, 3, 0.5, 1.5, -0.5, 1e999, -1e999, 2**31, 2**62, 2**70, -(2**62), -(2**70)),
    *(1e308, -1e308, 3e38, 1e15, 1e-30, 2e-38, 1e-320),
)
OTHERS = (True, "3", "", None, (), (1,), (0.5, 0.5), (1, 2, 3), [[1]], {"a": 1})

MIXTURE = "{}GaussianMixture.means = ((0.0, 0.0), (1.0, 1.0))\n{}GaussianMixture.std = 1.0".format
BY_HAND = {
    "CaptionStream": "CaptionStream.urls = 'x.tar'",
    "CachedCaptionStream": "CachedCaptionStream.urls = 'x.tar'",
    "CaptionedSamples": "CaptionedSamples.captions = 'x.txt'\nCaptionedSamples.encoder = @WordEncoder()",
    "Clipped": "Clipped.denoiser = @EDM()\nEDM.network = @MLP()",
    "CustomWeighting": "CustomWeighting.log_ratios = (-1.0, 1.0)\nCustomWeighting.weights = (1.0, 2.0)",
    "Filters": "\n".join(
        ["Filters.stream = 'x'"]
        + [f"Filters.{name} = None" for name in ("minimum_aesthetic", "minimum_side", "maximum_watermark")]
        + ["Filters.maximum_nsfw = None", "Filters.caption_length = (0, 9)"]
    ),
    "FolderStream": "FolderStream.path = 'x'",
    "GaussianMixture": MIXTURE("", ""),
    "ImageEvaluator": "ImageEvaluator.features = {}",
    "ImageReward": "ImageReward.weights = 'x'\nImageReward.tokenizer = 'x'\nImageReward.vision_layers = 1\n"
    "ImageReward.text_layers = 1",
    "LinearReward": "LinearReward.slope = (1.0, 0.0)",
    "LoRA": "LoRA.network = @SD15UNet()\nSD15UNet.block_out_channels = (32, 64)",
    "QuadraticReward": "QuadraticReward.curvature = -1.0\nQuadraticReward.slope = (1.0, 0.0)",
    "SDXLCaptionEncoder": "SDXLCaptionEncoder.weights = 'x'",
    "SumReward": "SumReward.rewards = [@LinearReward()]\nLinearReward.slope = (1.0, 0.0)\nSumReward.weights = (1.0,)",
    **{
        name: f"{name}.reward = @LinearReward()\nLinearReward.slope = (1.0, 0.0)"
        for name in ("RewardTiltedCumulant", "RewardTiltedSecondOrder", "RewardTiltedNoJacobian")
    },
    **{name: f"{name}.network = @MLP()" for name in ("VEPreconditioned", "VPPreconditioned")},
}
"""Lines for components that no shipped run names and that need values; others are built of their defaults."""
SMALL = {
    "SD15UNet": {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32},
    "SDXLUNet": {"block_out_channels": (32, 64), "transformer_layers": (1, 1), "attention_heads": (2, 2)},
    "ADM": {"channels": 64, "blocks": 1},
    "DDPMPP": {"blocks": 1},
    "NCSNPP": {"blocks": 1},
}


def numbers_in(annotation: object) -> bool:
    return annotation in (int, float) or any(map(numbers_in, typing.get_args(annotation)))


def attacked() -> dict[str, list[str]]:
    """The numeric parameters of every component; a Literal's choices are no numbers to attack."""
    load_components()
    found = {
        name: [p for p, parameter in component.parameters.items() if numbers_in(parameter.annotation)]
        for name, component in components.items()
        if component.make.__module__.startswith("ratiograph.")
    }
    return {name: parameters for name, parameters in found.items() if parameters}


@functools.cache
def shipped() -> dict[str, str]:
    """Lines that build a component as the root: its part of the first shipped run that names it."""
    texts = {}
    for file in sorted((ROOT / "gin").rglob("*.gin"), key=lambda path: (len(path.parts), path)):
        with contextlib.suppress(config.ConfigError):  # a building block is no run
            cfg = config.parse([str(file)])
            for scope, name in cfg.graph.instances:
                texts.setdefault(name, part(cfg, scope, name))
    return texts


def part(cfg: config.Config, scope: str, name: str) -> str:
    """The lines of one instance and of all below it, written for it as the root."""

    def own(value: object) -> object:
        if isinstance(value, Reference):
            return Reference("" if value.scope == scope else value.scope, value.name, value.build)
        if isinstance(value, dict):
            return {own(k): own(v) for k, v in value.items()}
        return type(value)(map(own, value)) if isinstance(value, list | tuple) else value

    lines, todo, seen = [], [(scope, name)], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        for parameter, statement in cfg.graph.instances[node].items():
            value = expand(statement.value, cfg.macros, statement.where)
            todo += [(p.scope or node[0], p.name) for p in parts(value) if isinstance(p, Reference)]
            value = SMALL.get(node[1], {}).get(parameter, value)
            inside = "" if node[0] == scope else node[0]
            lines.append(f"{spell(inside, node[1])}.{parameter} = {literal(own(value))}")
    small = {n for _, n in seen} & SMALL.keys()
    lines += [f"{n}.{p} = {literal(v)}" for n in sorted(small) for p, v in SMALL[n].items()]
    return "\n".join(lines)


def base(name: str) -> list[str]:
    text = BY_HAND.get(name) or shipped().get(name, "")
    text = text or "\n".join(f"{name}.{p} = {literal(v)}" for p, v in SMALL.get(name, {}).items())
    return text.splitlines()


def inserted(value: object, attack: object) -> object:
    """``value``, a nested list of numbers, with the first number replaced."""
    return (inserted(value[0], attack), *value[1:]) if isinstance(value, list | tuple) and value else attack


def attacks(annotation: object, value: object) -> list[object]:
    found = [*NUMBERS, *OTHERS]
    if "Sequence" in str(annotation):
        value = value if isinstance(value, list | tuple) and value else (1, 1)
        found += [inserted(value, number) for number in NUMBERS] + [(*value, value[0]), value[:-1], [*value] * 40]
    return found


class Late(BaseException):
    """No `Exception`, so that nobody takes it for a refusal."""


@contextlib.contextmanager
def budget():
    """Of time and memory for one attack."""

    def late(*_: object) -> None:
        raise Late(f"no answer within {SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < GIGABYTE, f"{grown} KB"


def outcome(files: list[str], lines: list[str], root: str = "Experiment") -> object:
    """What the lines build, or the message that refuses them."""
    try:
        with budget(), torch.device("meta"):
            return config.build(config.parse(files, lines, root=root))
    except config.ConfigError as error:
        return str(error)


def is_fault(found: object, name: str) -> bool:
    """Whether this is a message that is no line beginning with a place."""
    return isinstance(found, str) and ("\n" in found or not found.startswith(("flag --gin_param", f"{name}: ")))


@pytest.mark.parametrize("name", attacked())
def test_every_attack_builds_or_is_one_line(name):
    lines = base(name)
    with torch.device("meta"):
        cfg = config.parse([], lines, root=name)
        config.build(cfg)
    values = cfg.values()["", name]
    faults = []
    for parameter in attacked()[name]:
        for attack in attacks(components[name].parameters[parameter].annotation, values.get(parameter)):
            line = f"{name}.{parameter} = {literal(attack)}"
            try:
                found = outcome([], [*lines, line], root=name)
            except (Exception, Late) as error:
                found = f"\n{type(error).__name__}: {error}"
            if is_fault(found, name):
                faults.append((line, found))
    assert not faults, "\n".join(f"{line} => {found!r}"[:300] for line, found in faults)


def test_there_are_a_thousand_attacks():
    of_each = [len(attacks(components[n].parameters[p].annotation, None)) for n, ps in attacked().items() for p in ps]
    assert len(attacked()) > 80
    assert sum(of_each) > 1000


RUNS = sorted(str(path) for path in (ROOT / "gin").glob("mixture2d_*.gin"))
TINY = [
    *("Experiment.batch_size = 16", "Experiment.steps = 2", "Experiment.evaluator = None", "Experiment.loggers = []"),
    *("Experiment.preview_samples = 4", "Experiment.precision = 'fp32'", "Experiment.teacher_evaluations = 0"),
]
LABOUR = {"steps", "batch_size", "critic_steps", "normalizer_samples"}
"""Amounts of work, of which any is right for somebody with the time and memory: attacked with small values alone."""
TRAINED = (-1, 0, 1, 3, 0.5, 1e15, 1e-15, 3e38, -3e38, 2e-38)


def run_attacks() -> dict[str, tuple[str, str, object]]:
    """By parameter: the small run that has it, how a line names it there, and its value."""
    found = {}
    for file in RUNS:
        cfg = config.parse([file], TINY)
        for (scope, name), values in cfg.values().items():
            for parameter in attacked().get(name, ()):
                line = f"{spell(scope, name)}.{parameter}"
                found.setdefault(f"{name}.{parameter}", (file, line, values.get(parameter)))
    return found


@pytest.mark.parametrize("parameter", run_attacks())
def test_a_run_never_ends_well_with_weights_that_are_not_finite(parameter, tmp_path, capsys):
    file, spelled, value = run_attacks()[parameter]
    for number, attack in enumerate(TRAINED):
        if parameter.rpartition(".")[2] in LABOUR and abs(attack) > 16:
            continue
        line = f"{spelled} = {literal(inserted(value, attack))}"
        error, broken = "", []
        try:
            with budget():
                experiment = config.build(config.parse([file], [*TINY, line]))
                trainer.train(experiment, workdir=tmp_path / str(number), device="cpu")
            broken = [n for n, weights in experiment.task.named_parameters() if not weights.isfinite().all()]
        except ValueError as caught:
            error = str(caught)
        assert "\n" not in error, line
        assert not broken, line


def test_a_run_whose_weights_overflow_ends_with_an_error_and_saves_nothing(tmp_path):
    file = next(file for file in RUNS if file.endswith("_scores.gin"))
    lines = [*TINY, "Experiment.checkpoint_every = 1", "student/Adam.lr = 1e20", "student/Adam.weight_decay = 1e30"]
    message = "not finite: .*the weights of student, the weights of average; .*no checkpoint was due yet. Lower Adam.lr"
    with pytest.raises(ValueError, match=message):
        trainer.train(config.build(config.parse([file], lines)), workdir=tmp_path, device="cpu")
    assert not (tmp_path / "student.safetensors").exists()
    assert not list(tmp_path.glob("checkpoints/*.pt"))
