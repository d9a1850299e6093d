"""Terms, their sum, and the evaluation that runs every network at most once."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from exact import LOCATION, SCALE, TEACHER, student_of
from ratiograph.algebra.directions import RatioGradient, ScoreDifference
from ratiograph.algebra.noising import RectifiedFlow
from ratiograph.algebra.objective import Objective, RewardAscent, Term
from ratiograph.algebra.rewards import BlackBoxReward, ClassReward, LinearReward, Reward
from ratiograph.algebra.targets import RewardTilted, RewardTiltedNoJacobian, RewardWeighted
from ratiograph.algebra.times import InverseTeacherError, SigmaSquared, TimeWeight
from ratiograph.algebra.weightings import BE, KL, LR, LS, SoftenedReverseKL
from ratiograph.core.contracts import Evaluation, Needs, Nodes, RatioEstimator
from ratiograph.core.types import Batch, Condition
from ratiograph.networks.architectures.unet import MLP
from ratiograph.networks.denoisers import EDM
from ratiograph.networks.ratios import EncoderRatio
from ratiograph.networks.teachers.mixture import ExactRatio
from ratiograph.training.checkpoints import load_strict

FREE = Condition()


def noisy_batch(count: int = 50):
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, count, 1, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.2, 0.8, count, dtype=torch.float64)
    return RectifiedFlow().add_noise(x0, t, noise), x0


def exact_nodes() -> Nodes:
    student = student_of(LOCATION, SCALE)
    return Nodes(TEACHER, student, ExactRatio(student=student))


def evaluation_for(needs: Needs, nodes: Nodes | None = None) -> Evaluation:
    noisy, x0 = noisy_batch()
    return Evaluation(noisy, x0, FREE, nodes or exact_nodes(), needs)


def log_ratio_and_gradient() -> tuple[Tensor, Tensor]:
    """l and grad l by hand, from log densities."""
    noisy, _ = noisy_batch()
    x = noisy.x_t.clone().requires_grad_()
    at = type(noisy)(x, noisy.t, noisy.alpha, noisy.sigma)
    l = TEACHER.log_density(at, FREE) - student_of(LOCATION, SCALE).log_density(at, FREE)  # noqa: E741
    return l.detach(), torch.autograd.grad(l.sum(), x)[0]


def test_a_term_is_the_product_of_its_parts():
    term = Term(direction=ScoreDifference(), weighting=LS(), time_weight=SigmaSquared(), coefficient=0.3)
    evaluation = evaluation_for(term.needs)
    l, gradient = log_ratio_and_gradient()  # noqa: E741
    noisy = evaluation.noisy
    expected = (0.3 * noisy.sigma**2 * noisy.alpha * (-l).exp())[:, None] * -gradient
    torch.testing.assert_close(term.field(evaluation), expected)


def test_a_tilted_term_subtracts_the_weighted_correction():
    target = RewardTilted(reward=LinearReward(slope=[0.7]))
    target.double().log_normalizer.fill_(0.4)
    term = Term(direction=RatioGradient(), weighting=BE(), target=target)
    evaluation = evaluation_for(term.needs)
    l, gradient = log_ratio_and_gradient()  # noqa: E741
    log_target, correction = target.log_target(evaluation_for(term.needs))
    # omega = rho = 1/r: e^l for the ratio, e^(-log r*) for the target.
    expected = l.exp()[:, None] * -gradient - (-log_target).exp()[:, None] * correction
    torch.testing.assert_close(term.velocity(evaluation), expected)


def test_both_directions_agree_on_exact_nodes():
    evaluation = evaluation_for(RatioGradient.needs)
    torch.testing.assert_close(RatioGradient()(evaluation), ScoreDifference()(evaluation))


@pytest.mark.parametrize(
    ("weighting", "loss"),
    [
        (SoftenedReverseKL(), lambda logit: torch.nn.functional.softplus(-logit)),  # -log D
        (LR(), lambda logit: -torch.nn.functional.softplus(logit)),  # log(1 - D)
        (KL(), lambda logit: -logit),  # log (1 - D) / D
    ],
)
def test_gan_losses_are_terms(weighting, loss):
    """(-grad l, omega) is the gradient of the GAN's generator loss in x_t."""
    noisy, x0 = noisy_batch()
    x = noisy.x_t.clone().requires_grad_()
    at = type(noisy)(x, noisy.t, noisy.alpha, noisy.sigma)
    l = TEACHER.log_density(at, FREE) - student_of(LOCATION, SCALE).log_density(at, FREE)  # noqa: E741
    (expected,) = torch.autograd.grad(loss(l).sum(), x)
    term = Term(direction=RatioGradient(), weighting=weighting)
    found = term.velocity(Evaluation(noisy, x0, FREE, exact_nodes(), term.needs))
    torch.testing.assert_close(found, expected)


def terms() -> dict[str, Term]:
    tilted = RewardTilted(reward=LinearReward(slope=[0.7]))
    cheap = RewardTiltedNoJacobian(reward=LinearReward(slope=[0.2]))
    for target in (tilted, cheap):
        target.double().log_normalizer.fill_(0.1)
    return {
        "distribution": Term(direction=ScoreDifference(), weighting=KL(), time_weight=InverseTeacherError()),
        "adversarial": Term(direction=RatioGradient(), weighting=SoftenedReverseKL(), coefficient=1e-2),
        "tilted": Term(direction=ScoreDifference(), weighting=LS(), target=tilted),
        "cheap": Term(direction=RatioGradient(), weighting=LR(), target=cheap, time_weight=SigmaSquared()),
    }


def test_the_objective_is_the_sum_of_its_terms():
    """``x0.backward`` of the summed fields is the sum of the terms' own gradients."""
    everything = terms()
    objective = Objective(terms=everything)
    fields = objective.fields(evaluation_for(objective.needs))
    assert list(fields) == list(everything)
    for name, term in everything.items():
        torch.testing.assert_close(fields[name], term.field(evaluation_for(term.needs)))
    theta = torch.ones((), dtype=torch.float64, requires_grad=True)
    (theta * noisy_batch()[1]).backward(torch.stack(list(fields.values())).sum(0))
    expected = sum((field * noisy_batch()[1]).sum() for field in fields.values())
    torch.testing.assert_close(theta.grad, expected)


class Counted:
    """Calls of a network's parts, counted by wrapping them."""

    def __init__(self, module, *parts: str):
        self.calls = dict.fromkeys(parts, 0)
        for part in parts:
            setattr(module, part, self._wrap(part, getattr(module, part)))

    def _wrap(self, part, function):
        def wrapped(*args, **kwargs):
            self.calls[part] += 1
            return function(*args, **kwargs)

        return wrapped


def network() -> EDM:
    edm = EDM(network=MLP(dimension=1, width=8), sigma_data=1.0)
    torch.nn.init.normal_(edm.network.out.weight)
    return edm.double()


class OnFeatures(RatioEstimator):
    """A linear logit on the teacher's features."""

    on_teacher = True

    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(8, 1, dtype=torch.float64)

    def log_ratio(self, evaluation):
        return self.out(evaluation.teacher_encoding.features[-1]).squeeze(1)


def random_nodes(on_teacher: bool) -> Nodes:
    torch.manual_seed(0)
    if on_teacher:
        return Nodes(network(), network(), OnFeatures())
    ratio = EncoderRatio(network=MLP(dimension=1, width=8), sigma_data=1.0)
    torch.nn.init.normal_(ratio.out.weight)
    return Nodes(network(), network(), ratio.double())


@pytest.mark.parametrize("on_teacher", [True, False])
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_every_network_runs_once_in_any_order(order, on_teacher):
    everything = terms()
    names = [list(everything)[i] for i in order]
    nodes = random_nodes(on_teacher)
    counts = [
        Counted(nodes.teacher.network, "encode", "decode"),
        Counted(nodes.student_score.network, "encode", "decode"),
        Counted(nodes.ratio, "log_ratio"),
    ]
    objective = Objective(terms={name: everything[name] for name in names})
    fields = objective.fields(evaluation_for(objective.needs, nodes))
    assert [count.calls for count in counts] == [{"encode": 1, "decode": 1}] * 2 + [{"log_ratio": 1}]
    for name in names:
        assert not fields[name].requires_grad
        term = terms()[name]
        expected = term.field(evaluation_for(term.needs, random_nodes(on_teacher)))
        torch.testing.assert_close(fields[name], expected)


def test_only_what_is_asked_for_runs():
    nodes = random_nodes(on_teacher=True)
    teacher = Counted(nodes.teacher.network, "encode", "decode")
    score = Counted(nodes.student_score.network, "encode", "decode")
    ratio = Counted(nodes.ratio, "log_ratio")
    gan = Term(direction=RatioGradient(), weighting=LR())
    gan.field(evaluation_for(gan.needs, nodes))
    assert teacher.calls == {"encode": 1, "decode": 0}, "features need no decoder"
    assert score.calls == {"encode": 0, "decode": 0}
    scores = Term(direction=ScoreDifference(), weighting=KL())
    scores.field(evaluation_for(scores.needs, nodes))
    assert ratio.calls == {"log_ratio": 1}, "KL weighs nothing"


def test_scores_alone_keep_no_graph():
    evaluation = evaluation_for(Needs(), random_nodes(on_teacher=True))
    assert not evaluation.teacher_encoding.features[0].requires_grad
    assert not evaluation.teacher_output.requires_grad
    assert not evaluation.log_ratio.requires_grad
    assert not evaluation.noisy.x_t.requires_grad


def test_features_are_differentiated_without_the_decoder():
    """A ratio on the teacher's features keeps the encoder's graph only."""
    evaluation = evaluation_for(Needs(ratio_gradient=True), random_nodes(on_teacher=True))
    assert evaluation.teacher_encoding.features[0].requires_grad
    assert not evaluation.teacher_output.requires_grad


def test_the_evaluation_is_cut_from_the_student():
    noisy, x0 = noisy_batch()
    x0 = x0.requires_grad_()
    attached = type(noisy)(noisy.x_t * x0, noisy.t, noisy.alpha, noisy.sigma)
    evaluation = Evaluation(attached, x0, FREE, exact_nodes(), Needs(ratio_gradient=True))
    assert evaluation.noisy.x_t.is_leaf
    assert not evaluation.x0.requires_grad


def test_what_an_objective_requires():
    assert Objective(terms={"kl": Term(direction=ScoreDifference(), weighting=KL())}).requires == {
        "teacher": ["kl"],
        "student_score": ["kl"],
    }
    both = Objective(
        terms={
            "scores": Term(direction=ScoreDifference(), weighting=LR()),
            "gan": Term(direction=RatioGradient(), weighting=KL()),
        }
    )
    assert both.requires["ratio"] == ["scores", "gan"]
    assert both.needs == Needs(ratio_gradient=True)


def test_a_missing_node_is_named():
    term = Term(direction=ScoreDifference(), weighting=KL())
    with pytest.raises(ValueError, match=r"Distillation\.student_score"):
        term.field(evaluation_for(term.needs, Nodes(teacher=TEACHER)))


def test_an_empty_objective_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        Objective(terms={})


class Constant(TimeWeight):
    def __call__(self, evaluation):
        return torch.full_like(evaluation.noisy.t, 7.0)


def test_any_time_weight_scales_the_field():
    plain, scaled = (
        Term(direction=ScoreDifference(), weighting=KL(), time_weight=weight).field(evaluation_for(Needs()))
        for weight in (None, Constant())
    )
    torch.testing.assert_close(scaled, 7 * plain)


# --- rewards in an objective ----------------------------------------------------------------------------------------


def rewarded(seed: int) -> Objective:
    """A tilted term and an ascent, each with a classifier of its own."""
    torch.manual_seed(seed)
    first, second = (ClassReward(classifier=torch.nn.Linear(1, 2).double(), log_rewards=[0, b]) for b in (1, 2))
    tilted = Term(direction=RatioGradient(), weighting=LR(), target=RewardTilted(reward=first).double())
    tilted.target.log_normalizer.fill_(0.1 + seed)
    return Objective(terms={"tilted": tilted, "reward": RewardAscent(reward=second, coefficient=0.5)})


def test_rewards_stay_out_of_checkpoints_and_of_what_is_loaded():
    one, other = rewarded(0), rewarded(1)
    assert list(one.state_dict()) == ["terms.tilted.target.log_normalizer"]
    kept = other.terms["reward"].reward.classifier.weight.clone()
    load_strict({"objective": other}, {"objective": one.state_dict()})
    assert float(other.terms["tilted"].target.log_normalizer) == pytest.approx(0.1)
    torch.testing.assert_close(other.terms["reward"].reward.classifier.weight, kept, rtol=0, atol=0)
    holder = torch.nn.ModuleDict({"objective": other})
    assert list(holder.state_dict()) == ["objective.terms.tilted.target.log_normalizer"]
    holder.load_state_dict(holder.state_dict())
    with pytest.raises(RuntimeError, match="log_normalizer"):
        other.load_state_dict({})


def test_metrics_are_the_mean_rewards_of_what_was_asked():
    objective = rewarded(0)
    evaluation = evaluation_for(objective.needs)
    objective.fields(evaluation)
    means = objective.metrics()
    asked = {"reward/ClassReward": evaluation.teacher_denoised, "reward/ClassReward 2": evaluation.x0}
    rewards = [objective.terms["tilted"].target.reward, objective.terms["reward"].reward]
    assert list(means) == list(asked)
    for (name, x0), reward in zip(asked.items(), rewards, strict=True):
        torch.testing.assert_close(means[name], reward.log_reward(x0, FREE).mean().float())
    assert not objective.metrics()


class Broken(Reward):
    """log R = x, NaN for x > 1."""

    def log_reward(self, x0: Tensor, condition: Condition) -> Tensor:
        return torch.where(x0[:, 0] > 1, torch.nan, x0[:, 0])


def test_a_reward_that_gives_nan_is_named_by_the_metrics():
    objective = Objective(terms={"reward": RewardAscent(reward=Broken())})
    evaluation = evaluation_for(objective.needs)
    assert (evaluation.x0 > 1).any()
    objective.fields(evaluation)
    means = objective.metrics()
    assert list(means) == ["reward/Broken"]
    assert means["reward/Broken"].isnan()


def test_an_objective_of_ascent_and_matching():
    everything = {"distribution": Term(direction=ScoreDifference(), weighting=KL())}
    everything["reward"] = RewardAscent(reward=LinearReward(slope=[0.7]), coefficient=0.5)
    objective = Objective(terms=everything)
    assert objective.requires == {"teacher": ["distribution"], "student_score": ["distribution"]}
    assert objective.needs == Needs()
    fields = objective.fields(evaluation_for(objective.needs))
    torch.testing.assert_close(fields["distribution"], everything["distribution"].field(evaluation_for(Needs())))
    torch.testing.assert_close(fields["reward"], torch.full((50, 1), -0.35, dtype=torch.float64), rtol=1e-6, atol=0)


def weighted(log_normalizer: float = 0.2) -> RewardWeighted:
    return RewardWeighted(reward=BlackBoxReward(reward=LinearReward(slope=[0.7])), log_normalizer=log_normalizer)


def test_positive_weights_are_those_of_the_one_term_that_has_them():
    positives = Batch(noisy_batch()[1], FREE)
    plain = {"distribution": Term(direction=ScoreDifference(), weighting=KL())}
    assert Objective(terms=plain).positive_weights(positives) is None
    black = Term(direction=RatioGradient(), weighting=LR(), target=weighted())
    gan = Term(direction=RatioGradient(), weighting=SoftenedReverseKL())
    ascent = RewardAscent(reward=LinearReward(slope=[0.2]))
    found = Objective(terms=plain | {"tilt": black, "gan": gan, "reward": ascent}).positive_weights(positives)
    torch.testing.assert_close(found, (0.7 * positives.images[:, 0] - 0.2).exp(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "other",
    [
        lambda: Term(direction=ScoreDifference(), weighting=LR()),
        lambda: Term(direction=RatioGradient(), weighting=KL(), target=weighted()),
        lambda: Term(direction=RatioGradient(), weighting=KL(), target=RewardTilted(reward=LinearReward(slope=[0.7]))),
    ],
)
def test_terms_that_would_take_the_tilted_ratio_for_another_are_refused(other):
    black = Term(direction=RatioGradient(), weighting=LR(), target=weighted())
    with pytest.raises(ValueError, match=r"'tilt' has the ratio estimated of the tilted p\*, and 'other'"):
        Objective(terms={"tilt": black, "other": other()})
