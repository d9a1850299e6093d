"""What each family's step runs: which network how often, on how many samples, with a graph or without; and what never.

B samples a step. A pass is written (network, half, samples in units of B, whether it keeps a graph): a network never
runs more often than its row says, a frozen one never holds a gradient, and nothing in a step waits for the device.
"""

import itertools
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.inputs import made_up_batch, randomised
from ratiograph import config
from ratiograph.networks.architectures.classifier import DigitClassifier
from ratiograph.training.faults import Means, StepGuard

B = 4
TINY = {"UNet.channels": 8, "UNet.attention": False, "EDM.weights": None, "EncoderRatio.encoder_weights": None}
TINY |= {"TeacherFeatureRatio.width": 8, "StudentScoreHeadRatio.width": 8, "RewardTilted.normalizer_samples": 16}


def prepared(file, *lines):
    """(task ready for steps, its real batches or None, generator), at a tiny size."""
    torch.manual_seed(0)
    names = {name.rpartition("/")[2] for name in config.to_dict(config.parse([file], lines))}
    bindings = [f"{name} = {value}" for name, value in TINY.items() if name in names]
    experiment = config.build(config.parse([file], [*lines, *bindings]))
    task, generator = experiment.task, torch.Generator().manual_seed(0)
    task.prepare(torch.device("cpu"), None)
    batches = experiment.data.batches(B, 0, 0) if experiment.data else None
    task.fit(batches, generator)
    task.critic_steps = 0
    return task, batches, generator


def step(task, batches, generator):
    return task.step(next(batches) if batches else None, B, generator)


def networks(task):
    """The modules with ``encode`` and ``decode`` of each node."""
    nodes = {"student": task.student, "average": task.average, "teacher": task.teacher}
    nodes |= {"score": task.student_score, "ratio": task.ratio}
    held = {name: getattr(node, "denoiser", node) for name, node in nodes.items()}
    return {name: node.network for name, node in held.items() if hasattr(node, "network")}


def watched(task, monkeypatch):
    """A counter that fills with the passes of ``task``'s networks."""
    passes = Counter()

    def watch(name, network, half, first):
        run = getattr(network, half)

        def counted(*given):
            result = run(*given)
            tensor = first(result)
            passes[name, half, len(tensor) // B, tensor.requires_grad] += 1
            return result

        monkeypatch.setattr(network, half, counted)

    for name, network in networks(task).items():
        watch(name, network, "encode", lambda encoding: encoding.features[-1])
        watch(name, network, "decode", lambda output: output)
    for module in task.objective.modules():
        if isinstance(module, DigitClassifier):
            watch("reward", module, "forward", lambda logits: logits)
    return passes


def both(name, size, graph):
    return {(name, "encode", size, graph): 1, (name, "decode", size, graph): 1}


GRAPH, PLAIN = True, False

STUDENT = both("student", 1, GRAPH)
"""x0 = student(z), the one graph that is kept."""
SCORE_UPDATE = both("score", 1, GRAPH)
"""The denoising loss of the student score."""
SCORES = STUDENT | both("teacher", 1, PLAIN) | both("score", 1, PLAIN)
"""The score difference asks each network once; w(t) reads the teacher's same pass."""

FAMILIES = {
    # The gan term differentiates l, whose heads read the teacher's encoder: its half keeps a graph to x_t, and the
    # decoder goes on from there without one. The ratio's update encodes real and student samples in one batch, without
    # a graph, as only the heads learn.
    "mnist_sba": STUDENT
    | {("teacher", "encode", 1, GRAPH): 1, ("teacher", "decode", 1, PLAIN): 1, ("teacher", "encode", 2, PLAIN): 1}
    | both("score", 1, PLAIN)
    | SCORE_UPDATE,
    # l is the mean of the score's own features: it weighs without being differentiated, and its update shares the pass
    # of the score's update, so that only the real samples need one more encoder.
    "mnist_sida": SCORES | {**SCORE_UPDATE, ("score", "encode", 1, GRAPH): 2},
    # A head on the score's encoder, with times of its own: its update encodes both classes, and the weights behind
    # learn. The gan term differentiates l, so the encoder keeps a graph when it is asked too.
    "mnist_dmd2": STUDENT
    | both("teacher", 1, PLAIN)
    | {("score", "encode", 1, GRAPH): 2, ("score", "decode", 1, PLAIN): 1, ("score", "decode", 1, GRAPH): 1}
    | {("score", "encode", 2, GRAPH): 1},
    # Score-free: grad l at x_t, and the classifier's update on both classes at once; no teacher and no student score.
    "mnist_dikl": STUDENT | {("ratio", "encode", 1, GRAPH): 1, ("ratio", "encode", 2, GRAPH): 1},
    # R_t(x_t) = R(mu_p(x_t)) is differentiated through the whole teacher; the same pass gives the scores' difference.
    "mnist_reward_tilt": STUDENT
    | both("teacher", 1, GRAPH)
    | {("reward", "forward", 1, GRAPH): 1}
    | both("score", 1, PLAIN)
    | SCORE_UPDATE,
}
FAMILIES |= {"mnist_js": FAMILIES["mnist_sba"], "mnist_f_distill": FAMILIES["mnist_sba"]}
FAMILIES |= {"mnist_dijs": FAMILIES["mnist_dikl"], "mnist_dirm": FAMILIES["mnist_dikl"]}


@pytest.mark.parametrize("name", FAMILIES)
def test_passes_of_a_step(name, monkeypatch):
    task, *rest = prepared(f"gin/{name}.gin")
    passes = watched(task, monkeypatch)
    for steps in (1, 2):
        step(task, *rest)
        assert passes == {key: steps * count for key, count in FAMILIES[name].items()}


def test_passes_of_further_critic_updates(monkeypatch):
    """Each draws fresh samples without a graph; the objective is asked once."""
    lines = ["Distillation.student_score_updates = 3", "Distillation.ratio_updates = 2"]
    task, *rest = prepared("gin/mnist_sba.gin", *lines)
    passes = watched(task, monkeypatch)
    step(task, *rest)
    fresh = {("student", half, 1, PLAIN): 2 for half in ("encode", "decode")}
    critics = {**dict.fromkeys(SCORE_UPDATE, 3), ("teacher", "encode", 2, PLAIN): 2}
    assert passes == FAMILIES["mnist_sba"] | fresh | critics


SMALL = {"resolution": 8, "channels": 8, "multipliers": (1, 2), "blocks": 1, "attention_resolutions": (4,)}
NETWORKS = {name: SMALL | {"dropout": 0.0} for name in ("DDPMPP", "NCSNPP")}
NETWORKS["ADM"] = SMALL | {"channels": 16, "multipliers": (1, 1, 1, 1), "head_channels": 16, "classes": 3}


def published(file, *lines):
    """As ``prepared``, for a published row: its recipe with tiny networks, on made-up images."""
    torch.manual_seed(0)
    told = config.to_dict(config.parse([file], lines))
    built = {name.rpartition("/")[2].partition(".")[0] for name in told} | {
        str(value).strip("@()") for value in told.values()
    }
    sizes = [f"{name}.{key} = {value!r}" for name in NETWORKS.keys() & built for key, value in NETWORKS[name].items()]
    task = randomised(config.build(config.parse([file], [*lines, *sizes])).task)
    task.prepare(torch.device("cpu"), None)
    generator = torch.Generator().manual_seed(0)
    task.critic_steps = 0
    return task, itertools.repeat(made_up_batch(task.student.denoiser.network, B, generator)), generator


def samples(passes):
    """Samples in units of B that each half of each network took, however many at a time."""
    total = Counter()
    for (name, half, size, _), count in passes.items():
        total[name, half] += size * count
    return dict(total)


PUBLISHED = {
    # Five updates of both critics: four more batches of the student's, the score five times and once for the field,
    # the teacher's encoder on both classes at each of the ratio's updates and once for the field.
    "f_distill/cifar10_jensen_shannon": {"student": (5, 5), "teacher": (11, 1), "score": (6, 6)},
    "f_distill/imagenet64_jensen_shannon": {"student": (5, 5), "teacher": (11, 1), "score": (6, 6)},
    # Score-free: the classifier for the field and on both classes.
    "score_free/cifar10_dijs": {"student": (1, 1), "ratio": (3, 0)},
    # Algorithm 1: the mean feature of the score's own update weighs, so that real samples alone cost an encoder more.
    "di_bregman/cifar10_sba_lambda_3": {"student": (1, 1), "teacher": (1, 1), "score": (3, 2)},
    # A head on the score's encoder: both classes beside each of its five updates.
    "dmd2/imagenet64_gan": {"student": (5, 5), "teacher": (1, 1), "score": (16, 6)},
    "dmd2/imagenet64_without_gan": {"student": (5, 5), "teacher": (1, 1), "score": (6, 6)},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_passes_of_published_rows(name, monkeypatch):
    """Whole recipes, with R1 and several updates of the critics."""
    task, *rest = published(f"gin/papers/{name}.gin")
    passes = watched(task, monkeypatch)
    step(task, *rest)
    halves = {}
    for node, (encoded, decoded) in PUBLISHED[name].items():
        halves |= {(node, "encode"): encoded, (node, "decode"): decoded}
    assert samples(passes) == {key: count for key, count in halves.items() if count}


def test_passes_with_guidance(monkeypatch):
    """Each half of the guided estimate once; the conditional one gives the features too, and so runs by itself."""
    lines = [
        "Distillation.teacher = @teacher/Guided()",
        "Guided.denoiser = @teacher/EDM()",
        "Guided.guidance_scale = 2.0",
    ]
    classes = ["UNet.classes = 10", "UNet.label_dropout = 0.1"]
    task, *rest = prepared("gin/mnist_sida.gin", *lines, *classes)
    passes = watched(task, monkeypatch)
    step(task, *rest)
    rows = {key: count for key, count in passes.items() if key[0] == "teacher"}
    assert rows == dict.fromkeys(both("teacher", 1, PLAIN), 2)


def frozen(task):
    """Parameters that nothing in the step may move."""
    nodes = [task.teacher, task.average, task.objective]
    return [parameter for node in nodes if node is not None for parameter in node.parameters()]


def learning(task):
    """Parameters by the optimiser that moves them."""
    return {name: updater.parameters for name, updater in task.optimizers.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_of_the_network_whose_update_it_is(name, monkeypatch):
    task, *rest = prepared(f"gin/{name}.gin")
    own, seen = learning(task), []

    def check(updated):
        holding = {name for name, parameters in own.items() if any(p.grad is not None for p in parameters)}
        assert updated in holding, f"{updated} is updated without a gradient"
        assert "student" not in holding or holding == {"student"}, f"the student's backward reached {holding}"
        assert all(parameter.grad is None for parameter in frozen(task))
        seen.append(updated)

    for updated, updater in task.optimizers.items():
        run = updater.step
        monkeypatch.setattr(updater, "step", lambda updated=updated, run=run: (check(updated), run())[1])
    moving = {id(parameter) for parameters in own.values() for parameter in parameters}
    assert not moving & {id(parameter) for parameter in frozen(task)}
    assert not any(parameter.requires_grad for parameter in frozen(task))
    for _ in range(2):
        step(task, *rest)
        assert all(parameter.grad is None for parameter in task.parameters())
    assert seen == 2 * list(task.optimizers)


# --- nothing waits for the device ---------------------------------------------------------------------------


class Waits(AssertionError):
    """An operation whose result the host must have before it goes on."""


WAITING = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "bincount",
}
BY_MASK = ("index", "index_put", "index_put_", "_index_put_impl_")
READING = ("item", "tolist", "numpy", "cpu", "__array__", "__bool__", "__float__", "__int__", "__index__")


class NoWaiting(TorchDispatchMode):
    """Refuses operations that read a tensor's values, or whose result's size depends on them."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = [each for each in args[1] if each is not None and each.dtype == torch.bool] if name in BY_MASK else []
        # Filling by a mask is one kernel; picking by one counts it first.
        picks = masks and (name == "index" or args[2].numel() > 1)
        if name in WAITING or picks:
            raise Waits(f"{name} reads values of a tensor")
        return function(*args, **kwargs or {})


@contextmanager
def no_waiting(monkeypatch):
    """Raises ``Waits`` wherever a GPU would be waited for."""

    def refuse(name):
        def method(*_arguments, **_options):
            raise Waits(f"Tensor.{name}")

        return method

    with monkeypatch.context() as patched, NoWaiting():
        for name in READING:
            patched.setattr(torch.Tensor, name, refuse(name))
        yield


@pytest.mark.parametrize(
    "reading",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: float(x[0]),
        lambda x: bool(x.any()),
        lambda x: 1 if x[0] > 0 else 2,
        lambda x: range(x.long()[0]),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: x.detach().unique(),
        lambda x: torch.where(x > 0),
    ],
)
def test_reading_is_noticed(reading, monkeypatch):
    x = torch.ones(3)
    reading(x)
    with no_waiting(monkeypatch), pytest.raises(Waits):
        reading(x)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_waits_for_nothing(name, monkeypatch):
    """Neither a step nor the loop's bookkeeping round it, once the first step is done."""
    task, batches, generator = prepared(f"gin/{name}.gin")
    device = torch.device("cpu")
    means, guard = Means(device), StepGuard(task, device)
    real = [next(batches) if batches else None for _ in range(2)]
    task.step(real[0], B, generator)
    with no_waiting(monkeypatch), guard:
        means.add(task.step(real[1], B, generator))
    guard.remove()
    assert all(value == value for value in means.read()[0].values())
