"""The published rows under gin/papers: every file builds at full size, holds the published values, and trains."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ratiograph import config
from ratiograph.algebra.ratio_losses import LogisticLoss, R1Penalized
from ratiograph.algebra.weightings import KL, SBA, ForwardKL, Jeffreys, JensenShannon, ReverseKL, SoftenedReverseKL
from ratiograph.algebra.weightings import SquaredHellinger as Hellinger
from ratiograph.core.types import Batch, Condition, Noisy
from ratiograph.tasks.denoiser_training import DenoiserTraining

ROOT = Path(__file__).resolve().parents[2]
PAPERS = ROOT / "gin" / "papers"
FILES = sorted(
    str(path.relative_to(PAPERS).with_suffix(""))
    for data_set in ("cifar10", "imagenet64")
    for path in PAPERS.glob(f"*/{data_set}_*.gin")
)

TINY = {
    "DDPMPP.channels": 16,
    "DDPMPP.blocks": 1,
    "NCSNPP.channels": 16,
    "NCSNPP.blocks": 1,
    "ADM.channels": 16,
    "ADM.blocks": 1,
    "ADM.head_channels": 16,
    "TeacherFeatureRatio.width": 16,
    "StudentScoreHeadRatio.width": 16,
    "EDM.weights": None,
    "Distillation.warm_start": None,
}


def build(name, bindings=()):
    return config.build(config.parse([str(PAPERS / f"{name}.gin")], bindings))


_built = {}


def on_meta(name):
    """The experiment of a file at full size, without memory for its weights."""
    if name not in _built:
        with torch.device("meta"):
            _built[name] = build(name)
    return _built[name]


def tiny(name, **more):
    """The prepared task of a file with narrow networks, random weights and ``more`` bindings where they apply."""
    used = {key.rpartition("/")[2] for key in config.to_dict(config.parse([str(PAPERS / f"{name}.gin")]))}
    torch.manual_seed(0)
    task = build(name, [f"{key} = {value}" for key, value in (TINY | more).items() if key in used]).task
    task.prepare(torch.device("cpu"), None)
    return task


def network_of(task):
    return task.denoiser.network if isinstance(task, DenoiserTraining) else task.student.denoiser.network


def real_batch(task, samples, generator):
    network = network_of(task)
    images = torch.rand((samples, *network.shape), generator=generator) * 2 - 1
    labels = torch.randint(network.classes, (samples,), generator=generator) if network.classes else None
    return Batch(images, Condition(labels))


# --- every file builds --------------------------------------------------------------------------------------


def test_there_are_the_published_rows():
    counts = {paper: sum(name.startswith(f"{paper}/") for name in FILES) for paper in ("f_distill", "di_bregman")}
    assert counts["f_distill"] >= 6 + 4 + 1 + 2 * 4
    assert counts["di_bregman"] >= 7
    assert {"score_free/cifar10_dijs", "score_free/imagenet64_dijs", "dmd2/imagenet64_gan"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_builds_on_the_meta_device(name):
    task = on_meta(name).task
    assert all(parameter.is_meta for parameter in task.parameters())
    assert sum(parameter.numel() for parameter in task.parameters()) > 1_000_000


def test_fid_is_one_more_file():
    """The 50,000-sample protocol on the runs' own data, as its file says it is added."""
    files = [str(PAPERS / "f_distill/cifar10_jensen_shannon.gin"), str(ROOT / "gin" / "base" / "fid50k.gin")]
    with torch.device("meta"):
        evaluator = config.build(config.parse(files)).evaluator
    assert (evaluator.samples, evaluator.during_samples, list(evaluator.features)) == (50_000, 5_000, ["inception"])


# EDM, Appendix F: 55.7M parameters of DDPM++ on CIFAR-10, 295.9M of ADM on ImageNet-64.
@pytest.mark.parametrize("name", FILES)
def test_the_student_has_the_size_of_the_official_network(name):
    millions = sum(parameter.numel() for parameter in network_of(on_meta(name).task).parameters()) / 1e6
    expected = 295.9 if "imagenet64" in name else 56.4 if name.startswith("di_bregman") else 55.7
    assert millions == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("name", FILES)
def test_the_table_of_rows_lists_the_file(name):
    assert f"`{name}.gin`" in (PAPERS / "README.md").read_text()


@pytest.mark.parametrize("name", FILES)
def test_opens_with_its_command(name):
    lines = (PAPERS / f"{name}.gin").read_text().splitlines()
    assert lines[1] == f"#   python launch/main.py --gin_file=gin/papers/{name}.gin"
    assert any(line.startswith("# Required: ") for line in lines)
    assert any(line.startswith("# Commonly overridden: --steps") for line in lines)


# --- published values ---------------------------------------------------------------------------------------


def at(experiment, path):
    """The value at a path of attributes and keys, e.g. 'task.objective.terms.gan.coefficient'."""
    value = experiment
    for part in path.split("."):
        value = value[part] if hasattr(value, "keys") else getattr(value, part)
    return value


ADAM_W = {"betas": (0.9, 0.999), "weight_decay": 0.01, "clip_norm": 10.0, "eps": 1e-8}
F_DISTILL = {
    "task.student.sigma_init": 80.0,
    "task.times.low": 0.002,
    "task.times.high": 0.998,
    "task.critic_steps": 0,
    **{f"task.student_optimizer.{name}": value for name, value in ADAM_W.items()},
    "task.student_optimizer.warmup_steps": 0,
}
F_DISTILL_CIFAR10 = {
    **F_DISTILL,
    "batch_size": 2048,
    "steps": 60_000 // 5,
    "task.student_optimizer.lr": 1e-4,
    "task.teacher.network.classes": 10,
}
F_DISTILL_IMAGENET64 = {
    **F_DISTILL,
    "batch_size": 512,
    "steps": 200_000 // 5,
    "task.student_optimizer.lr": 2e-6,
    "task.teacher.network.classes": 1000,
    "task.ratio.feature_maps": (3,),
    "task.ratio_updates": 5,
}
SECOND = {"steps": 180_000 // 5, "task.student_optimizer.lr": 5e-7, "task.ratio_optimizer.lr": 5e-7}
GAN_CIFAR10 = {
    "task.objective.terms.gan.coefficient": 1e-3,
    "task.ratio.feature_maps": (0, 1, 2),
    "task.ratio_loss.weight": 1.0,
    "task.ratio_updates": 5,
    "task.ratio_optimizer.lr": 1e-4,
}
SCORES = {"task.student_score_updates": 5}
SIDA = {
    "batch_size": 256,
    "precision": "fp32",
    "task.student.sigma_init": 2.5,
    "task.times.low": 0.0,
    "task.times.high": 0.8,
    "task.student_score_times.mean": -1.2,
    "task.student_score_times.std": 1.2,
    "task.student_optimizer.lr": 1e-5,
    "task.student_score_optimizer.lr": 1e-5,
    "task.student_optimizer.betas": (0.0, 0.999),
    "task.student_optimizer.weight_decay": 0.0,
    "task.student_score_updates": 1,
    "task.ema.half_life": 500_000,
    "task.ema.ramp_up": 0.05,
    "task.teacher.network.classes": 0,
    "task.augmentation.probability": 0.12,
}
SCORE_FREE = {
    "task.student.sigma_init": 2.5,
    "task.student_optimizer.lr": 1e-5,
    "task.ratio_optimizer.lr": 1e-5,
    "task.ratio_updates": 1,
    "task.ratio.encoder_weights": None,
}
SCORE_FREE_CIFAR10 = {
    **SCORE_FREE,
    "batch_size": 64,
    "task.ema.half_life": 500_000,
    "task.augmentation.probability": 0.12,
}
DMD2 = {
    "batch_size": 7 * 40,
    "precision": "bf16",
    "task.student.sigma_init": 80.0,
    **{f"task.student_optimizer.{name}": value for name, value in ADAM_W.items()},
    "task.student_score_updates": 5,
    "task.student_score_times.low": 0.0,
    "task.student_score_times.high": 1.0,
    "task.student_score_optimizer.warmup_steps": 500,
    "task.teacher.network.classes": 1000,
}
DMD2_GAN = {
    **DMD2,
    "task.objective.terms.gan.coefficient": 3e-3,
    "task.ratio.feature_maps": (3,),
    "task.ratio_updates": 5,
    "task.ratio_times.low": 0.0,
    "task.ratio_times.high": 1.0,
    "task.ratio_loss.weight": 0.01,
}
STAGE_1 = {
    "batch_size": 512,
    "steps": 200_000_000 // 512,
    "task.optimizer.lr": 1e-3,
    "task.ema.half_life": 500_000,
    "task.augmentation.probability": 0.12,
}

VALUES = {
    **{
        f"f_distill/cifar10_{row}": {**F_DISTILL_CIFAR10, **GAN_CIFAR10, **SCORES}
        for row in (
            "reverse_kl",
            "softened_reverse_kl",
            "squared_hellinger",
            "jensen_shannon",
            "jeffreys",
            "forward_kl",
        )
    },
    **{
        f"f_distill/cifar10_{row}_without_gan": {**F_DISTILL_CIFAR10, **SCORES}
        for row in ("reverse_kl", "squared_hellinger", "jensen_shannon", "forward_kl")
    },
    "f_distill/cifar10_adversarial": {**F_DISTILL_CIFAR10, **GAN_CIFAR10},
    **{
        f"f_distill/imagenet64_{row}": {**F_DISTILL_IMAGENET64, "task.objective.terms.gan.coefficient": 3e-3}
        for row in ("reverse_kl", "forward_kl", "jensen_shannon", "adversarial")
    },
    **{
        f"f_distill/imagenet64_{row}_second": {
            **F_DISTILL_IMAGENET64,
            **SECOND,
            "task.objective.terms.gan.coefficient": 3e-3,
        }
        for row in ("reverse_kl", "forward_kl", "jensen_shannon", "adversarial")
    },
    **{
        f"di_bregman/cifar10_sba_lambda_{row}": {
            **SIDA,
            "task.objective.terms.distribution.weighting.row.lam": lam,
            "task.ratio.feature_map": 2,
            "task.ratio_times": None,
        }
        for row, lam in {"minus_1": -1, "0_5": 0.5, "1": 1, "3": 3, "5": 5, "10": 10}.items()
    },
    "di_bregman/cifar10_sba_algorithm1_times": {
        **{key: value for key, value in SIDA.items() if "times" not in key},
        "task.times.high": 1.0,
        "task.student_score_times.high": 1.0,
        "task.ratio_times.high": 0.95,
        "task.objective.terms.distribution.weighting.row.lam": 5,
    },
    "di_bregman/cifar10_kl": {**SIDA, "task.ratio": None},
    **{
        f"score_free/cifar10_{row}": SCORE_FREE_CIFAR10
        for row in (
            "dirm",
            "dikl",
            "dijs",
            "dijs_from_nothing",
            "dijs_from_single_level",
            "dijs_from_cifar100_10_classes",
            "dijs_from_cifar100_50_classes",
            "dijs_from_cifar100_90_classes",
        )
    },
    "score_free/imagenet64_dijs": {
        **SCORE_FREE,
        "batch_size": 4096,
        "steps": math.ceil(2_500_000_000 / 4096),
        "task.ema.half_life": 50_000_000,
        "task.student.denoiser.network.classes": 1000,
    },
    "score_free/cifar10_stage1_single_level": {**STAGE_1, "task.times.sigma": 2.5},
    **{f"score_free/cifar10_stage1_cifar100_{n}_classes": {**STAGE_1, "task.times.mean": -1.2} for n in (10, 50, 90)},
    "dmd2/imagenet64_without_gan": {**DMD2, "steps": 410_000 // 5, "task.student_optimizer.lr": 2e-6},
    "dmd2/imagenet64_gan": {**DMD2_GAN, "steps": 200_000 // 5, "task.student_optimizer.lr": 2e-6},
    "dmd2/imagenet64_gan_finetuned": {
        **DMD2_GAN,
        "steps": 140_000 // 5,
        "task.student_optimizer.lr": 5e-7,
        "task.student_score_optimizer.lr": 5e-7,
        "task.ratio_optimizer.lr": 5e-7,
    },
}


def test_every_row_has_its_values_here():
    assert set(VALUES) == set(FILES)


@pytest.mark.parametrize("name", VALUES)
def test_holds_the_published_values(name):
    experiment = on_meta(name)
    found = {path: at(experiment, path) for path in VALUES[name]}
    assert found == VALUES[name]


ROWS = {
    "f_distill/cifar10_reverse_kl": ReverseKL,
    "f_distill/cifar10_reverse_kl_without_gan": ReverseKL,
    "f_distill/cifar10_softened_reverse_kl": SoftenedReverseKL,
    "f_distill/cifar10_squared_hellinger": Hellinger,
    "f_distill/cifar10_squared_hellinger_without_gan": Hellinger,
    "f_distill/cifar10_jensen_shannon": JensenShannon,
    "f_distill/cifar10_jensen_shannon_without_gan": JensenShannon,
    "f_distill/cifar10_jeffreys": Jeffreys,
    "f_distill/cifar10_forward_kl": ForwardKL,
    "f_distill/cifar10_forward_kl_without_gan": ForwardKL,
    "f_distill/imagenet64_reverse_kl_second": ReverseKL,
    "f_distill/imagenet64_forward_kl_second": ForwardKL,
    "f_distill/imagenet64_jensen_shannon_second": JensenShannon,
    "di_bregman/cifar10_sba_lambda_5": SBA,
    "di_bregman/cifar10_kl": KL,
    "score_free/cifar10_dirm": SoftenedReverseKL,
    "score_free/cifar10_dikl": KL,
    "score_free/cifar10_dijs": JensenShannon,
    "score_free/cifar10_dijs_from_nothing": JensenShannon,
    "score_free/imagenet64_dijs": JensenShannon,
    "dmd2/imagenet64_gan": ReverseKL,
}


@pytest.mark.parametrize("name", ROWS)
def test_has_its_divergence_and_a_gan_term_only_where_published(name):
    terms = on_meta(name).task.objective.terms
    assert type(terms["distribution"].weighting.row) is ROWS[name]
    gan = name.startswith(("f_distill", "dmd2")) and "without_gan" not in name
    assert set(terms) == ({"distribution", "gan"} if gan else {"distribution"})


@pytest.mark.parametrize("name", [n for n in FILES if n.endswith(("adversarial", "adversarial_second"))])
def test_adversarial_distillation_has_only_the_gan_term(name):
    task = on_meta(name).task
    assert set(task.objective.terms) == {"gan"}
    assert task.student_score is None
    assert type(task.objective.terms["gan"].weighting) is SoftenedReverseKL


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("score_free/") and "stage1" not in n])
def test_score_free_training_has_no_score(name):
    task = on_meta(name).task
    assert task.teacher is None
    assert task.student_score is None
    half = sum(p.numel() for p in task.ratio.parameters()) / sum(p.numel() for p in task.student.parameters())
    assert 0.35 < half < 0.5  # "approximately half the size of the full U-Net"


def test_r1_is_on_cifar10_only():
    assert isinstance(on_meta("f_distill/cifar10_jensen_shannon").task.ratio_loss, R1Penalized)
    assert isinstance(on_meta("f_distill/imagenet64_jensen_shannon").task.ratio_loss, LogisticLoss)


@pytest.mark.parametrize("name", ["cifar10_forward_kl", "imagenet64_forward_kl", "imagenet64_forward_kl_second"])
def test_one_step_of_the_average_is_five_published_iterations(name):
    experiment = on_meta(f"f_distill/{name}")
    beta = experiment.task.ema.beta(experiment.batch_size, images=1)
    assert beta == pytest.approx(0.9999**5, abs=1e-9)


def test_dmd2_has_no_average():
    experiment = on_meta("dmd2/imagenet64_gan")
    assert experiment.task.ema.beta(experiment.batch_size, images=10**9) == 0


def karras(index, count=1000, rho=7.0):
    """sigma at an index of the published table, 0 being the smallest."""
    start, end = 0.002 ** (1 / rho), 80 ** (1 / rho)
    return (start + index / (count - 1) * (end - start)) ** rho


def range_of(times):
    return tuple(
        (times.sigma_min ** (1 / times.rho) * (1 - u) + times.sigma_max ** (1 / times.rho) * u) ** times.rho
        for u in (times.low, times.high)
    )


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("dmd2/imagenet64_gan", 20, 980), ("f_distill/cifar10_forward_kl", 2, 997), ("di_bregman/cifar10_kl", 0, 799.2)],
)
def test_times_end_where_the_published_indices_do(name, low, high):
    assert range_of(on_meta(name).task.times) == pytest.approx((karras(low), karras(high)), rel=2e-3)


def test_sida_freezes_the_generator_for_the_first_hundred_thousand_images():
    experiment = on_meta("di_bregman/cifar10_sba_lambda_5")
    frozen = experiment.task.critic_steps
    assert (frozen - 1) * experiment.batch_size < 100_000 <= frozen * experiment.batch_size


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("di_bregman/cifar10_sba_lambda")])
def test_sba_weights_are_bounded_alike_for_every_lambda(name):
    clamped = on_meta(name).task.objective.terms["distribution"].weighting.weighting.weighting
    bounds = clamped.log_weight(torch.tensor([-100.0, 100.0]), torch.zeros(2))
    assert bounds.sort().values.tolist() == pytest.approx([-5, 5], abs=1e-3)


# --- units --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gan_weight"),
    [
        ("f_distill/cifar10_reverse_kl", 1e-3),
        ("f_distill/imagenet64_reverse_kl", 3e-3),
        ("dmd2/imagenet64_gan", 3e-3),
    ],
)
def test_the_field_is_the_gradient_of_the_published_loss(name, gan_weight):
    """0.5 mse(x0, sg(x0 - g)) + weight * mean softplus(-l), g = (mu_q - mu_p) / mean|x0 - mu_p|, as in DMD2's code."""
    task = tiny(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (*task.teacher.parameters(), *task.student_score.parameters(), *task.ratio.parameters()):
            parameter.add_(0.05 * torch.empty_like(parameter).normal_(generator=generator))
    task.eval()
    condition = task.student.condition(4, generator)
    x0 = torch.randn((4, *task.student.denoiser.shape), generator=generator)
    evaluation = task.evaluate(x0, condition, generator)
    fields = task.objective.fields(evaluation)
    noisy = evaluation.noisy

    x = x0.clone().requires_grad_()
    again = Noisy(x + (noisy.x_t.detach() - x0), noisy.t, noisy.alpha, noisy.sigma)
    encodings = SimpleNamespace(
        noisy=again,
        teacher_encoding=task.teacher.encode(again, condition),
        student_score_encoding=task.student_score.encode(again, condition),
    )
    real, fake = (net.denoise(again, condition).detach() for net in (task.teacher, task.student_score))
    g = (fake - real) / (x0 - real).abs().mean((1, 2, 3), keepdim=True)
    losses = {
        "distribution": 0.5 * F.mse_loss(x, (x - g).detach()),
        "gan": gan_weight * F.softplus(-task.ratio.log_ratio(encodings)).mean(),
    }
    for term, loss in losses.items():
        (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert expected.abs().max() > 0
        error = (fields[term] / 4 - expected).norm() / expected.norm()
        assert error < 1e-4, term


def test_networks_are_asked_without_their_dropout():
    """The objective sees the same scores whatever the dropout; the student score learns with it."""
    task = tiny("di_bregman/cifar10_sba_lambda_5")
    assert task.student_score.network.encoder[0].blocks[0].dropout == 0.13
    task.critic_steps, seen, fields = 0, [], task.objective.fields
    task.objective.fields = lambda e: seen.append((task.student_score.training, task.teacher.training)) or fields(e)
    generator = torch.Generator().manual_seed(0)
    task.step(real_batch(task, 2, generator), 2, generator)
    assert seen == [(False, False)]
    assert task.student_score.training


def test_the_discriminator_of_sida_counts_as_there():
    """SiDA's factor is half the mean of EDM's weight under p(t'), beside a denoising loss summed over dimensions."""
    task = on_meta("di_bregman/cifar10_sba_lambda_5").task
    sigma = task.student_score_times(task.noising, 2_000_000, torch.Generator().manual_seed(0)).double()
    mean = 4 + math.exp(2.4 + 2 * 1.2**2)
    assert (sigma**-2 + 4).mean() == pytest.approx(mean, rel=0.05)
    assert task.ratio_loss.weight == pytest.approx(mean / (2 * 3 * 32 * 32), rel=1e-3)


# --- what runs start from -----------------------------------------------------------------------------------


def folder_of_run(path):
    """The file whose default workdir ``path`` lies in."""
    (found,) = [name for name in FILES if Path(name).name == Path(path).parts[1]]
    return found


@pytest.mark.parametrize("name", [n for n in FILES if n.endswith(("_second", "_finetuned"))])
def test_second_stages_start_from_networks_they_share_with_the_first(name):
    task = on_meta(name).task
    first = on_meta(folder_of_run(task.warm_start.run)).task
    shapes = [{k: v.shape for k, v in t.student.state_dict().items()} for t in (task, first)]
    assert shapes[0] == shapes[1]
    assert task.warm_start.nodes is None


INITIAL = [n for n in FILES if "dijs_from_" in n and "nothing" not in n]


@pytest.mark.parametrize("name", INITIAL)
def test_students_start_from_the_weights_of_their_own_stage_1(name):
    denoiser = on_meta(name).task.student.denoiser
    stage1 = folder_of_run(denoiser.weights)
    assert Path(stage1).name.removeprefix("cifar10_stage1_") == Path(name).name.removeprefix("cifar10_dijs_from_")
    first = on_meta(stage1).task
    assert Path(denoiser.weights).stem in first.weights.__func__(SimpleNamespace(average=None))
    shapes = [{k: v.shape for k, v in d.state_dict().items()} for d in (denoiser, first.denoiser)]
    assert shapes[0] == shapes[1]


def test_a_student_may_start_from_nothing():
    assert on_meta("score_free/cifar10_dijs_from_nothing").task.student.denoiser.weights is None


def test_subsets_of_cifar100_grow_and_leave_out_ten_classes():
    subsets = [on_meta(f"score_free/cifar10_stage1_cifar100_{n}_classes").data.classes for n in (10, 50, 90)]
    assert [len(s) for s in subsets] == [10, 50, 90]
    assert subsets[0] < subsets[1] < subsets[2] < frozenset(range(100))
    assert not subsets[2] & {13, 58, 81, 89, 42, 43, 88, 97, 34, 19}


# --- steps --------------------------------------------------------------------------------------------------

ONE_OF_A_KIND = {
    "f_distill/cifar10_jensen_shannon",  # DDPM++, teacher features, R1
    "di_bregman/cifar10_sba_lambda_5",  # NCSN++, the student score's mean feature
    "dmd2/imagenet64_gan",  # ADM, a head on the student score
    "score_free/cifar10_dijs",  # an encoder of its own
    "score_free/cifar10_stage1_single_level",
}


@pytest.mark.parametrize("name", [n if n in ONE_OF_A_KIND else pytest.param(n, marks=pytest.mark.slow) for n in FILES])
def test_takes_steps(name):
    task = tiny(name, **{"ADM.resolution": 32})
    task.critic_steps = 0
    for updates in ("student_score_updates", "ratio_updates"):
        setattr(task, updates, min(getattr(task, updates, 1), 2))
    generator = torch.Generator().manual_seed(0)
    before = {key: [p.clone() for p in network.parameters()] for key, network in task.trained().items()}
    for _ in range(2):
        batch = real_batch(task, 2, generator) if task.needs_data else None
        metrics = task.step(batch, 2, generator)
    assert all(value.isfinite() for value in metrics.values())
    for key in task.optimizers:
        parameters = task.trained()[key].parameters()
        assert any(not torch.equal(a, b) for a, b in zip(before[key], parameters, strict=True)), f"{key} stood still"
