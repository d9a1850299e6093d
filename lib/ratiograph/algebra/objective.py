"""Terms and their sum: the field that moves the student's samples.

Notation: v = omega(r) d - omega(r*) grad log r* is one term's vector field at x_t; its gradient with respect to x0 is
coefficient * w(t) * alpha * v, and the parameters' gradient is E[(dx0/dtheta)^T of that], so ``x0.backward(field)``
is exact without a pseudo-loss.

A term works in two parts. ``ask`` reads the networks' outputs, sample by sample, so that a batch may come in
micro-batches; ``combine`` computes the field from the outputs of the whole batch, which normalised weightings need.

Two routes to p* proportional to R p with the weighting KL. Tilting at x_t, ``Term`` with a target r* = R_t/Z, descends
E_t[w(t) KL(q_t || p*_t)]: at rest at q = p* for every w, if R_t is exact. Tilting at x0, ``Term`` without a target
beside ``RewardAscent`` with the coefficient c, needs no R_t and descends

    F(q) = E_t[w(t) KL(q_t || p_t)] - c E_q[log R(x0)],

which is convex in q; its one minimum solves E_t[w(t) E[log (q_t/p_t)(x_t) | x0]] = c log R(x0) + const. Where all times
are of noise far below the finest structure of p and R, that is q proportional to p R^(c / E[w]), so that c = E[w] gives
p*: KL(q || p*) = KL(q || p) - E_q[log R] + log Z. Otherwise noise hides part of the divergence, KL(q_t || p_t) <=
KL(q || p), and the same c tilts more. A Gaussian p of variance s^2 is moved by R = exp(b x0) to

    m + b s^2 c / g,   g = E_t[w(t) alpha^2 s^2 / (alpha^2 s^2 + sigma^2)] <= E_t[w(t)],

instead of m + b s^2: one c fits one scale s; c = E[w] tilts too much, most so narrow directions and what lies within a
mode, and hardly the masses of modes further apart than the largest sigma. Weights growing with sigma make it worse,
and a large c collapses q, as even a point mass has a finite KL(q_t || p_t). ``test_reward_ascent.py``: numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ratiograph.algebra.directions import Direction
from ratiograph.algebra.noising import NoisingProcess
from ratiograph.algebra.rewards import Reward, take_means
from ratiograph.algebra.targets import CleanTilted, MatchTeacher, Target
from ratiograph.algebra.times import TimeSampler, TimeWeight, UnitTimeWeight
from ratiograph.algebra.weightings import Weighting
from ratiograph.core.contracts import Evaluation, Needs
from ratiograph.core.types import Batch, expand

__all__ = ["AbsorbedTerm", "BaseTerm", "Objective", "RewardAscent", "Term"]


Answers = dict[str, Tensor]
"""The networks' outputs that a term uses, by name, [B, ...] each, without a graph."""


class BaseTerm(nn.Module):
    """Base class of terms: each gives a vector field that moves the student's samples."""

    needs = Needs()
    """Gradients the evaluation must be prepared to give."""
    weighting: Weighting | None
    """omega; None for a term that has none."""
    target: Target
    """r*, what the student is to match by this term."""

    @property
    def requires(self) -> set[str]:
        """Names of the nodes whose outputs this term uses: 'teacher', 'student_score', 'ratio'."""
        return set()

    def connect(self, noising: NoisingProcess, times: TimeSampler) -> None:
        """Called once by the root with the process and p(t) of the objective."""

    def ask(self, evaluation: Evaluation) -> Answers:
        """The outputs that ``combine`` needs, each computed sample by sample."""
        raise NotImplementedError

    def combine(self, answers: Answers) -> Tensor:
        """The field [B, ...] from the outputs ``ask`` returned for the whole batch."""
        raise NotImplementedError

    def field(self, evaluation: Evaluation) -> Tensor:
        """The gradient [B, ...] with respect to each x0, before the mean over the batch; without a graph."""
        return self.combine(self.ask(evaluation))


class Term(BaseTerm):
    """direction x weighting x target x w(t), times a coefficient.

    The GAN loss of DMD2, f-distill and Di-Bregman is the term (RatioGradient, SoftenedReverseKL).

    Args:
        direction: d, an estimate of s_q - s_p.
        weighting: omega.
        target: r*; the teacher itself by default.
        time_weight: w(t); 1 by default.
        coefficient: multiplies the term.

    Raises:
        ValueError: the direction cannot lead to the target.
    """

    def __init__(
        self,
        *,
        direction: Direction,
        weighting: Weighting,
        target: Target | None = None,
        time_weight: TimeWeight | None = None,
        coefficient: float = 1.0,
    ):
        super().__init__()
        self.direction, self.weighting = direction, weighting
        self.target = MatchTeacher() if target is None else target
        self.time_weight = UnitTimeWeight() if time_weight is None else time_weight
        self.coefficient = coefficient
        self.target.check(direction)

    @property
    def needs(self) -> Needs:
        return self.direction.needs | self.target.needs

    @property
    def requires(self) -> set[str]:
        weighs = ("ratio",) if self.weighting.needs_ratio else ()
        return {*self.direction.requires, *self.target.requires, *self.time_weight.requires, *weighs}

    def connect(self, noising, times):
        self.weighting.connect(noising, times)

    def ask(self, evaluation):
        t = evaluation.noisy.t
        answers = {"t": t, "direction": self.direction(evaluation)}
        answers["log_ratio"] = evaluation.log_ratio if self.weighting.needs_ratio else torch.zeros_like(t)
        tilt = self.target.log_target(evaluation)
        if tilt is not None:
            answers["log_target"], answers["target_gradient"] = tilt
        answers["scale"] = self.coefficient * self.time_weight(evaluation) * evaluation.noisy.alpha
        return answers

    def steer(self, answers: Answers) -> Tensor:
        """v [B, ...] = omega(r) d - omega(r*) grad log r*."""
        t, d, log_ratio = answers["t"], answers["direction"], answers["log_ratio"]
        if "log_target" not in answers:
            return expand(self.weighting(log_ratio, t), d) * d
        log_target, gradient = answers["log_target"], answers["target_gradient"]
        # Weightings are functions of l = -log r, so omega(r*) is taken at -log r*.
        weight, target_weight = self.weighting.pair(log_ratio, -log_target, t)
        return expand(weight, d) * d - expand(target_weight, gradient) * gradient

    def velocity(self, evaluation: Evaluation) -> Tensor:
        """v [B, ...] at the noisy samples of ``evaluation``."""
        return self.steer(self.ask(evaluation))

    def combine(self, answers):
        """coefficient w(t) alpha v [B, ...]."""
        v = self.steer(answers)
        return expand(answers["scale"], v) * v


class AbsorbedTerm(Term):
    """The tilt absorbed into the reference, v = omega(r/r*) (d - grad log r*), instead of subtracted as in ``Term``.

    As r/r* = q/p*, this is an untilted term whose teacher is p* = R p / Z. It descends D_h(q_t || p*_t) =
    E_p*[h(q/p*)] = E_p[r* h(r/r*)], where ``Term`` descends E_p[h(r) - h(r*) - h'(r*) (r - r*)]; the two are the same
    for KL only, and both are at rest at q = p* and nowhere else. Z matters here too, except to KL; ``RatioNormalized``
    removes an error of it, because E_q[p*/q] = 1 at every t.

    Args:
        direction: d, an estimate of s_q - s_p.
        weighting: omega, taken at l + log r* = log p*/q.
        target: r*; the teacher itself by default, with which this is ``Term``.
        time_weight: w(t); 1 by default.
        coefficient: multiplies the term.
    """

    def steer(self, answers: Answers) -> Tensor:
        """v [B, ...] = omega(r/r*) (d - grad log r*)."""
        if "log_target" not in answers:
            return super().steer(answers)
        difference = answers["direction"] - answers["target_gradient"]
        log_ratio = answers["log_ratio"] + answers["log_target"]  # a weighting without a ratio, KL's, reads neither
        return expand(self.weighting(log_ratio, answers["t"]), difference) * difference


class RewardAscent(BaseTerm):
    """Climbs log R at the student's own samples: the field -coefficient grad log R(x0), neither noised nor denoised.

    Beside a ``Term`` with the weighting KL it is the clean-level form of the tilt, KL(q || p*) = KL(q || p) -
    E_q[log R(x0)] + log Z (the route of RTDMD, arXiv 2605.26108, and DMDR, arXiv 2511.13649): exact where the term's
    divergence is that of clean samples, and stronger than p* elsewhere (the module's docstring says by how much). It
    needs no teacher, no R_t and no Z.

    Args:
        reward: log R of clean samples, differentiable.
        coefficient: c; compare it with E[w(t)] times the coefficient of the term beside it.

    Raises:
        ValueError: for a reward without a gradient.
    """

    def __init__(self, *, reward: Reward, coefficient: float = 1.0):
        super().__init__()
        self.reward, self.coefficient = reward, coefficient
        self.target, self.weighting = CleanTilted(reward=reward), None

    def ask(self, evaluation):
        _, gradient = self.target.log_target(evaluation)
        return {"gradient": gradient}

    def combine(self, answers):
        """-coefficient grad log R(x0) [B, ...]."""
        return -self.coefficient * answers["gradient"]


def _pretrained(module: nn.Module) -> tuple[str, ...]:
    """Names of the tensors in ``module`` that belong to rewards."""
    parts = module.named_modules(remove_duplicate=False)
    rewards = [(name, part) for name, part in parts if isinstance(part, Reward)]
    return tuple({f"{name}.{key}" for name, reward in rewards for key in reward.state_dict()})


def _leave_out_rewards(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict) -> None:
    for name in _pretrained(module):
        state.pop(prefix + name, None)


def _expect_no_rewards(module: nn.Module, incompatible) -> None:
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if not name.endswith(_pretrained(module) or ("\0",))]


class Objective(nn.Module):
    """Named sum of terms: the loss combiner.

    Weights of rewards are no part of its ``state_dict``: they are pretrained, never trained, and loaded from their own
    files by every run.

    Args:
        terms: terms by name, at least one; the names appear in logs and errors.

    Raises:
        ValueError: no term; or terms that disagree about what the ratio is of.
    """

    def __init__(self, *, terms: Mapping[str, BaseTerm]):
        super().__init__()
        if not terms:
            raise ValueError("Objective.terms is empty: give at least one, e.g. {'distribution': @Term()}")
        self.terms = nn.ModuleDict(terms)
        self._check_ratio()
        self.register_state_dict_post_hook(_leave_out_rewards)
        self.register_load_state_dict_post_hook(_expect_no_rewards)

    def _check_ratio(self) -> None:
        weighing = [name for name, term in self.terms.items() if term.target.weighs_positives]
        if not weighing:
            return
        for name, term in self.terms.items():
            plain = isinstance(term.target, MatchTeacher) and term.direction.requires == ("ratio",)
            if name != weighing[0] and "ratio" in term.requires and not plain:
                raise ValueError(
                    f"the term {weighing[0]!r} has the ratio estimated of the tilted p*, and {name!r} asks it too, as "
                    f"if it were of p: give {name!r} the direction RatioGradient and the target MatchTeacher, by which "
                    "it matches p*, or the weighting KL, by which it does not ask"
                )

    def positive_weights(self, positives: Batch) -> Tensor | None:
        """r* [B] by which the ratio's positives count, for a term whose target is ``RewardWeighted``; None for 1."""
        for term in self.terms.values():
            if term.target.weighs_positives:
                return term.target.log_weight(positives).exp()
        return None

    def metrics(self) -> dict[str, Tensor]:
        """``reward/NAME``: mean log R [] of each reward since the last call, NaN or infinite only if the reward was."""
        return {f"reward/{name}": mean for name, mean in take_means(self).items()}

    @property
    def needs(self) -> Needs:
        needs = Needs()
        for term in self.terms.values():
            needs = needs | term.needs
        return needs

    @property
    def requires(self) -> dict[str, list[str]]:
        """For each node of the graph that some term needs, the names of those terms."""
        terms_of: dict[str, list[str]] = {}
        for name, term in self.terms.items():
            for node in term.requires:
                terms_of.setdefault(node, []).append(name)
        return terms_of

    def connect(self, noising: NoisingProcess, times: TimeSampler) -> None:
        """Called once by the root with the process and p(t) of the objective."""
        for term in self.terms.values():
            term.connect(noising, times)

    def fields(self, evaluations: Evaluation | Iterable[Evaluation]) -> dict[str, Tensor]:
        """Each term's field [B, ...] by name.

        Args:
            evaluations: of the batch, or of its micro-batches; the activations of one are freed before the next is
                evaluated.
        """
        evaluations = [evaluations] if isinstance(evaluations, Evaluation) else evaluations
        answers: list[dict[str, Answers]] = []
        for evaluation in evaluations:
            answers.append({name: term.ask(evaluation) for name, term in self.terms.items()})
        return {name: term.combine(_joined([each[name] for each in answers])) for name, term in self.terms.items()}


def _joined(answers: list[Answers]) -> Answers:
    if len(answers) == 1:
        return answers[0]
    return {name: torch.cat([each[name] for each in answers]) for name in answers[0]}
