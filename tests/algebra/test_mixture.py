"""The exact world against torch.distributions, autograd, quadrature and sampling."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, distributions

from ratiograph.algebra.directions import RatioGradient, ScoreDifference
from ratiograph.algebra.noising import RectifiedFlow, VariancePreserving
from ratiograph.algebra.rewards import ClassReward, LinearReward, QuadraticReward, Reward, ScaledReward, SumReward
from ratiograph.algebra.targets import MatchTeacher, RewardTilted
from ratiograph.core.contracts import Evaluation, Needs, Nodes
from ratiograph.core.types import Batch, Condition, Noisy
from ratiograph.evaluation.mixture_evaluator import MixtureEvaluator
from ratiograph.networks.teachers.exact_tilting import ExactTilted, MixtureClassifier, tilt
from ratiograph.networks.teachers.mixture import ExactRatio, GaussianMixture, RingMixture

WEIGHTS = [0.2, 0.5, 0.3]
MEANS = [[0.0, 1.0], [-1.0, 0.5], [2.0, -1.0]]
COVARIANCES = [[[0.5, 0.2], [0.2, 0.3]], [[0.4, -0.3], [-0.3, 0.8]], [[0.2, 0.0], [0.0, 0.9]]]
CLASSES = [0, 1, 0]
FREE = Condition()


def mixture() -> GaussianMixture:
    return GaussianMixture(means=MEANS, covariances=COVARIANCES, weights=WEIGHTS, classes=CLASSES)


def reference(alpha: float, sigma: float, weights=WEIGHTS) -> distributions.Distribution:
    """p_t by torch.distributions."""
    means, covariances = (torch.tensor(v, dtype=torch.float64) for v in (MEANS, COVARIANCES))
    noisy = alpha**2 * covariances + sigma**2 * torch.eye(2, dtype=torch.float64)
    return distributions.MixtureSameFamily(
        distributions.Categorical(torch.tensor(weights, dtype=torch.float64)),
        distributions.MultivariateNormal(alpha * means, noisy),
    )


def noisy_points(alpha: float, sigma: float, count: int = 200, dimension: int = 2) -> Noisy:
    x = 1.5 * torch.randn(count, dimension, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scales = torch.tensor([sigma, alpha, sigma], dtype=torch.float64)[:, None].expand(3, count)
    return Noisy(x, *scales)


def evaluation_of(noisy: Noisy, needs: Needs = Needs(ratio_gradient=True), **nodes) -> Evaluation:  # noqa: B008
    return Evaluation(noisy, noisy.x_t, FREE, Nodes(**nodes), needs)


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.0), (1.0, 0.7), (0.6, 0.4), (0.1, 3.0)])
def test_density_and_score(alpha, sigma):
    noisy, exact = noisy_points(alpha, sigma), reference(alpha, sigma)
    x = noisy.x_t.clone().requires_grad_()
    log_density = exact.log_prob(x)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    torch.testing.assert_close(mixture().log_density(noisy, FREE), log_density.detach())
    torch.testing.assert_close(mixture().score(noisy, FREE), score)


def test_component_posteriors():
    noisy = noisy_points(0.6, 0.4)
    exact = reference(0.6, 0.4)
    joint = torch.tensor(WEIGHTS) * exact.component_distribution.log_prob(noisy.x_t[:, None]).exp()
    found = mixture().log_joint(noisy, FREE).softmax(1)
    torch.testing.assert_close(found, joint / joint.sum(1, keepdim=True))
    torch.testing.assert_close(mixture().encode(noisy, FREE).features[0].softmax(1), found)


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.7), (0.6, 0.4), (0.1, 3.0)])
def test_denoiser_obeys_tweedie(alpha, sigma):
    noisy = noisy_points(alpha, sigma)
    tweedie = (noisy.x_t + sigma**2 * mixture().score(noisy, FREE)) / alpha
    torch.testing.assert_close(mixture().denoise(noisy, FREE), tweedie, rtol=1e-8, atol=1e-8)


ONE = GaussianMixture(means=[[-1.0], [0.8]], std=[0.6, 0.5], weights=[0.4, 0.6])


def posterior_mean(noisy: Noisy, function) -> Tensor:
    """E_p[function(x0) | x_t] [B] in one dimension, by quadrature."""
    x0 = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    prior = sum(
        w * distributions.Normal(m, s).log_prob(x0).exp()
        for w, m, s in zip([0.4, 0.6], [-1.0, 0.8], [0.6, 0.5], strict=True)
    )
    likelihood = torch.exp(-((noisy.x_t - noisy.alpha[0] * x0) / noisy.sigma[0]).square() / 2)
    joint = prior * likelihood
    return (joint * function(x0)).sum(1) / joint.sum(1)


def test_denoiser_is_the_posterior_mean():
    noisy = noisy_points(0.6, 0.4, dimension=1)
    torch.testing.assert_close(ONE.denoise(noisy, FREE)[:, 0], posterior_mean(noisy, lambda x0: x0))


def responsibility_of_second(x0: Tensor) -> Tensor:
    """P(y = 1 | x0) of the 1-D mixture, written out."""
    log_odds = math.log(0.6 / 0.5) - ((x0 - 0.8) / 0.5).square() / 2
    log_odds = log_odds - math.log(0.4 / 0.6) + ((x0 + 1) / 0.6).square() / 2
    return torch.sigmoid(log_odds)


REWARDS = {
    "linear": (LinearReward(slope=[0.7]), lambda x0: torch.exp(0.7 * x0)),
    "classes": (
        ClassReward(classifier=MixtureClassifier(mixture=ONE), log_rewards=[0.3, 1.5]),
        lambda x0: math.exp(0.3) + (math.exp(1.5) - math.exp(0.3)) * responsibility_of_second(x0),
    ),
    "attraction": (QuadraticReward(curvature=-4.0, slope=[2.0]), lambda x0: torch.exp(-2 * x0**2 + 2 * x0)),
    "repulsion": (QuadraticReward(curvature=0.1, slope=[-0.5]), lambda x0: torch.exp(x0**2 / 20 - 0.5 * x0)),
    "scaled": (ScaledReward(reward=QuadraticReward(curvature=-4.0), beta=4.0), lambda x0: torch.exp(-(x0**2) / 2)),
    "sum": (
        SumReward(rewards=[LinearReward(slope=[0.7]), QuadraticReward(curvature=-2.0)], weights=[-1.0, 0.5]),
        lambda x0: torch.exp(-0.7 * x0 - x0**2 / 2),
    ),
}


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_are_what_the_quadrature_integrates(name):
    reward, function = REWARDS[name]
    x0 = torch.linspace(-4, 4, 99, dtype=torch.float64)
    found = reward.log_reward(x0[:, None], FREE).double().exp()
    torch.testing.assert_close(found, function(x0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", REWARDS)
def test_expected_reward_normaliser_and_gradient(name):
    reward, function = REWARDS[name]
    noisy = noisy_points(0.6, 0.4, dimension=1)
    target = ExactTilted(reward=reward)
    evaluation = evaluation_of(noisy, Needs(), teacher=ONE)
    expected = posterior_mean(noisy, function)
    torch.testing.assert_close(target.log_expected_reward(evaluation).exp(), expected)

    # At overwhelming noise x_t says nothing about x0: the posterior mean of R is Z.
    everything = noisy_points(1e-9, 1.0, count=1, dimension=1)
    normalizer = posterior_mean(everything, function)
    log_target, gradient = target.log_target(evaluation)
    torch.testing.assert_close(log_target.exp(), expected / normalizer)
    torch.testing.assert_close(tilt(reward, ONE)[1].exp(), normalizer[0])

    step = 1e-5
    up, down = (
        posterior_mean(Noisy(noisy.x_t + d, noisy.t, noisy.alpha, noisy.sigma), function).log() for d in (step, -step)
    )
    torch.testing.assert_close(gradient[:, 0], (up - down) / (2 * step), rtol=1e-6, atol=1e-7)


def test_expected_reward_under_a_class():
    """At overwhelming noise E[R | x_t, y] is the class's own normaliser: Z of the mixture of its components."""
    teacher, reward = mixture(), QuadraticReward(curvature=[[-2.0, 0.7], [0.7, 0.5]], slope=[0.9, -0.4])
    of_class = {
        0: GaussianMixture(means=MEANS[::2], covariances=COVARIANCES[::2], weights=WEIGHTS[::2]),
        1: GaussianMixture(means=MEANS[1:2], covariances=COVARIANCES[1:2]),
        -1: teacher,
    }
    noisy, labels = noisy_points(1e-9, 1.0), torch.tensor([0, 1, -1, 1]).repeat(50)
    evaluation = Evaluation(noisy, noisy.x_t, Condition(labels), Nodes(teacher=teacher))
    expected = torch.stack([tilt(reward, of_class[int(label)])[1] for label in labels])
    torch.testing.assert_close(ExactTilted(reward=reward).log_expected_reward(evaluation), expected)
    assert (expected[0] - expected[1]).abs() > 0.1


@pytest.mark.parametrize("kind", ["linear", "classes", "quadratic", "sum"])
def test_tilted_mixture_is_reward_times_density(kind):
    """p* = R p / Z pointwise, for full covariances in two dimensions."""
    teacher = mixture()
    reward = {
        "linear": LinearReward(slope=[0.9, -0.4]),
        "classes": ClassReward(classifier=MixtureClassifier(mixture=teacher), log_rewards=[-1.0, 0.5]),
        "quadratic": QuadraticReward(curvature=[[-2.0, 0.7], [0.7, 0.5]], slope=[0.9, -0.4]),
        "sum": SumReward(rewards=[QuadraticReward(curvature=-2.0), LinearReward(slope=[1.0, 2.0])], weights=[1.0, 0.3]),
    }[kind]
    tilted, log_normalizer = tilt(reward, teacher)
    clean = noisy_points(1.0, 0.0)
    found = tilted.log_density(clean, FREE) - teacher.log_density(clean, FREE) + log_normalizer
    torch.testing.assert_close(found, reward.log_reward(clean.x_t, FREE).double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(teacher.log_density(clean, FREE), reference(1.0, 0.0).log_prob(clean.x_t))


def test_tilting_twice_is_tilting_by_the_product():
    """Linear then quadratic, by the two separate formulas, against their sum at once; also log Z adds up."""
    linear, quadratic = LinearReward(slope=[0.9, -0.4]), QuadraticReward(curvature=[[-2.0, 0.7], [0.7, 0.5]])
    once, log_z = tilt(SumReward(rewards=[linear, quadratic]), mixture())
    between, first = tilt(linear, mixture())
    twice, second = tilt(quadratic, between)
    torch.testing.assert_close(first + second, log_z)
    noisy = noisy_points(0.6, 0.4)
    torch.testing.assert_close(once.log_density(noisy, FREE), twice.log_density(noisy, FREE))
    torch.testing.assert_close(tilt(QuadraticReward(curvature=0.0, slope=[0.9, -0.4]), mixture())[1], first)


def test_class_masses_before_and_after_a_tilt():
    teacher = mixture()
    assert teacher.class_masses().tolist() == pytest.approx([0.5, 0.5])
    reward = ClassReward(classifier=MixtureClassifier(mixture=teacher), log_rewards=[math.log(3), 0.0])
    assert tilt(reward, teacher)[0].class_masses().tolist() == pytest.approx([0.75, 0.25])


def test_fitted_normaliser_agrees_with_the_exact_one():
    reward, generator = LinearReward(slope=[0.7]), torch.Generator().manual_seed(0)
    target = RewardTilted(reward=reward, normalizer_samples=40_000)
    target.fit(Batch(ONE.sample(10_000, generator), FREE) for _ in range(10))
    # Var[R] / Z^2 = Z(2b) / Z(b)^2 - 1 gives the standard error of the mean of R.
    log_z, log_square = tilt(reward, ONE)[1], tilt(LinearReward(slope=[1.4]), ONE)[1]
    error = math.sqrt(math.expm1(float(log_square - 2 * log_z)) / 40_000)
    assert abs(float(target.log_normalizer - log_z)) < 4 * error < 0.02


def test_labels_restrict_to_a_class():
    teacher, noisy = mixture(), noisy_points(0.6, 0.4)
    labels = torch.arange(200) % 2
    restricted = teacher.log_density(noisy, Condition(labels))
    only = {0: reference(0.6, 0.4, [0.2, 0.0, 0.3]), 1: reference(0.6, 0.4, [0.0, 1.0, 0.0])}
    for label, exact in only.items():
        torch.testing.assert_close(restricted[labels == label], exact.log_prob(noisy.x_t[labels == label]))
    x = Noisy(noisy.x_t.clone().requires_grad_(), noisy.t, noisy.alpha, noisy.sigma)
    (score,) = torch.autograd.grad(teacher.log_density(x, Condition(labels)).sum(), x.x_t)
    torch.testing.assert_close(teacher.score(noisy, Condition(labels)), score)
    tweedie = (noisy.x_t + 0.4**2 * score) / 0.6
    torch.testing.assert_close(teacher.denoise(noisy, Condition(labels)), tweedie)


def test_samples_have_the_moments_of_the_mixture():
    count = 200_000
    x = mixture().sample(count, torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = reference(1.0, 0.0)
    assert ((x.mean(0) - exact.mean).abs() < 4 * (exact.variance / count).sqrt()).all()
    # Cumulants through the characteristic function, which sees the whole distribution.
    for frequency in torch.tensor([[0.5, 0.0], [1.0, -1.0], [0.3, 2.0]], dtype=torch.float64):
        means, covariances = (torch.tensor(v, dtype=torch.float64) for v in (MEANS, COVARIANCES))
        phase, damping = means @ frequency, (frequency @ covariances @ frequency) / 2
        expected = sum(w * torch.exp(-d) * p.cos() for w, d, p in zip(WEIGHTS, damping, phase, strict=True))
        assert abs(float((x @ frequency).cos().mean() - expected)) < 4 / math.sqrt(2 * count)


def test_samples_of_a_class():
    labels = torch.tensor([0, 1]).repeat(50_000)
    x = mixture().sample(len(labels), torch.Generator().manual_seed(0), Condition(labels), torch.float64)
    assert x[labels == 1].mean(0).tolist() == pytest.approx([-1.0, 0.5], abs=4 * math.sqrt(0.8 / 50_000))
    assert x[labels == 0].mean(0).tolist() == pytest.approx([1.2, -0.2], abs=4 * math.sqrt(2 / 50_000))


def test_exact_ratio_and_its_gradient():
    """l from the teacher's features equals the difference of the log densities; -grad l is the score difference."""
    student = GaussianMixture(means=[[0.5, 0.5]], covariances=[[[1.0, 0.3], [0.3, 0.6]]])
    noisy = noisy_points(0.6, 0.4)
    nodes = {"teacher": mixture(), "student_score": student, "ratio": ExactRatio(student=student)}
    evaluation = evaluation_of(noisy, **nodes)
    exact = reference(0.6, 0.4).log_prob(noisy.x_t)
    covariance = torch.tensor([[0.52, 0.108], [0.108, 0.376]], dtype=torch.float64)  # alpha^2 C + sigma^2 I
    gaussian = distributions.MultivariateNormal(torch.full((2,), 0.3, dtype=torch.float64), covariance)
    torch.testing.assert_close(evaluation.log_ratio, exact - gaussian.log_prob(noisy.x_t))
    torch.testing.assert_close(RatioGradient()(evaluation), ScoreDifference()(evaluation))


def test_samples_of_any_shape():
    """Images are vectors to a mixture."""
    flat = GaussianMixture(means=torch.randn(3, 12, dtype=torch.float64).tolist(), std=[0.3, 0.5, 1.0])
    x, full = torch.randn(4, 3, 2, 2, dtype=torch.float64), torch.full((4,), 0.5, dtype=torch.float64)
    image, vector = Noisy(x, full, full, full), Noisy(x.flatten(1), full, full, full)
    for function in (flat.denoise, flat.score):
        torch.testing.assert_close(function(image, FREE).flatten(1), function(vector, FREE))


@pytest.mark.parametrize("process", [RectifiedFlow(), VariancePreserving()])
def test_float32_agrees_with_float64(process):
    ring = RingMixture(std=0.05)
    t = torch.linspace(0.02, 0.98, 500)
    generator = torch.Generator().manual_seed(0)
    noisy = process.add_noise(ring.sample(500, generator), t, torch.randn(500, 2, generator=generator))
    precise = Noisy(noisy.x_t.double(), t.double(), noisy.alpha.double(), noisy.sigma.double())
    torch.testing.assert_close(ring.denoise(noisy, FREE).double(), ring.denoise(precise, FREE), rtol=0, atol=1e-3)
    single, double = ring.log_density(noisy, FREE).double(), ring.log_density(precise, FREE)
    torch.testing.assert_close(single, double, rtol=1e-4, atol=1e-3)


def test_ring():
    ring = RingMixture(modes=4, radius=2.0, std=0.1)
    expected = torch.tensor([[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0], [0.0, -2.0]])
    torch.testing.assert_close(ring.means.float(), expected, rtol=0, atol=1e-6)
    assert ring.class_masses().tolist() == pytest.approx([0.25] * 4)


def test_constants_survive_a_meta_build():
    with torch.device("meta"):
        built = mixture()
    torch.testing.assert_close(built.means, torch.tensor(MEANS, dtype=torch.float64))


class Quadratic(Reward):
    def log_reward(self, x0, condition):
        return -x0.square().sum(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianMixture(means=[[0.0]]), "exactly one"),
        (lambda: GaussianMixture(means=[[0.0]], std=1.0, covariances=[[[1.0]]]), "exactly one"),
        (lambda: GaussianMixture(means=[[0.0], [1.0]], std=[1.0]), "std has 1 entries for 2"),
        (lambda: GaussianMixture(means=[[0.0]], std=-1.0), "positive"),
        (lambda: GaussianMixture(means=[[0.0], [1.0]], std=1.0, classes=[0, 2]), "classes"),
        (lambda: GaussianMixture(means=[[0.0, 0.0]], covariances=[[[1.0, 0.5], [0.4, 1.0]]]), "symmetric"),
        (lambda: GaussianMixture(means=[[0.0, 0.0]], covariances=[[[1.0, 2.0], [2.0, 1.0]]]), "positive definite"),
        (lambda: tilt(Quadratic(), ONE), "RewardTilted"),
        (lambda: tilt(SumReward(rewards=[Quadratic()]), ONE), "scaled or summed Quadratic"),
        (lambda: tilt(QuadraticReward(curvature=1 / 0.36), ONE), "component 0"),
        (lambda: tilt(QuadraticReward(curvature=[[0.0, 4.0], [4.0, 0.0]]), mixture()), "not integrable"),
        (lambda: tilt(ClassReward(classifier=torch.nn.Identity(), log_rewards=[0.0, 1.0]), ONE), "MixtureClassifier"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def task_of(sampler, target=None) -> SimpleNamespace:
    """What ``MixtureEvaluator`` looks at, with any sampler as the student."""
    terms = {"distribution": SimpleNamespace(target=target or MatchTeacher())}
    return SimpleNamespace(
        teacher=RingMixture(std=0.1, classes=[0, 1] * 4),
        objective=SimpleNamespace(terms=terms),
        student_sampler=sampler,
    )


CPU = torch.device("cpu")


def judged(task, workdir) -> dict:
    evaluator = MixtureEvaluator(samples=1000, repeats=4)
    return evaluator.after(task, CPU, 0, evaluator.before(task, CPU, 0), workdir)


def test_evaluator_finds_no_fault_with_the_teacher_itself(tmp_path):
    document = judged(task_of(lambda n, g: RingMixture(std=0.1).sample(n, g)), tmp_path)
    fresh, _, student = document["rows"]
    assert fresh["relative_energy_distance"] == 1
    # Two sets of n samples of one distribution are 2 E|X - X'| / n apart on average.
    x = RingMixture(std=0.1).sample(4000, torch.Generator().manual_seed(5))
    assert fresh["energy_distance"] == pytest.approx(2 * float(torch.pdist(x).mean()) / 1000, rel=0.3)
    assert student["relative_energy_distance"] == pytest.approx(1, abs=0.3)
    assert student["smallest_relative_mode"] > 0.8
    assert student["largest_class_error"] < 4 * 0.5 / math.sqrt(4000)
    assert student["stray"] < 0.002  # exactly e^-8
    assert document["class_shares"]["exact"] == pytest.approx([0.5, 0.5])
    assert (tmp_path / document["figures"][0]["file"]).read_bytes()[:4] == b"\x89PNG"


def test_evaluator_sees_a_missing_mode_and_strays(tmp_path):
    seven = RingMixture(std=0.1, weights=[1.0] * 7 + [1e-9])

    def sampler(samples, generator):
        x = seven.sample(samples, generator)
        x[: samples // 10] = 0  # a tenth of the samples in the middle, where nothing is
        return x

    student = judged(task_of(sampler), tmp_path)["rows"][-1]
    assert student["smallest_relative_mode"] < 0.01
    assert student["stray"] == pytest.approx(0.1, abs=0.002)
    assert student["relative_energy_distance"] > 5


def test_evaluator_judges_a_tilted_student_by_the_tilted_target(tmp_path):
    teacher = RingMixture(std=0.1, classes=[0, 1] * 4)
    reward = ClassReward(classifier=MixtureClassifier(mixture=teacher), log_rewards=[math.log(3), 0.0])
    tilted = RingMixture(std=0.1, weights=[3.0, 1.0] * 4)
    for target in (ExactTilted(reward=reward), RewardTilted(reward=reward)):
        good, bad = (
            judged(task_of(lambda n, g, m=mixture: m.sample(n, g), target), tmp_path)["rows"][-1]
            for mixture in (tilted, teacher)
        )
        assert good["relative_energy_distance"] < 1.4 < bad["relative_energy_distance"]
        assert good["largest_class_error"] < 0.03
        assert bad["largest_class_error"] == pytest.approx(0.25, abs=0.03)


def test_evaluator_refuses_another_teacher():
    task = SimpleNamespace(teacher=torch.nn.Identity(), objective=None)
    with pytest.raises(ValueError, match="GaussianMixture"):
        MixtureEvaluator().before(task, CPU, 0)
