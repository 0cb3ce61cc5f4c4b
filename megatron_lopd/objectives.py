"""The losses on plain tensors (DESIGN section 1). Knows nothing of Megatron-Core.

An objective turns log-probs of the response tokens into a loss per token, and the same log-probs of
a whole global batch into the step's metrics. R = response tokens; a tensor is float [R], nats, unless said.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from megatron_lopd.config import (
    NotNegative,
    Options,
    Positive,
    Recipe,
    TrainConfig,
    TrainingConfig,
    WeightsConfig,
    key,
    require,
)
from megatron_lopd.errors import DataError
from megatron_lopd.registry import OBJECTIVES

if TYPE_CHECKING:
    from torch import Tensor

KeptLogProbs = Literal["teacher", "behaviour", "top_k"]


@dataclass(frozen=True)
class TopKLogProbs:
    """The teacher's k likeliest tokens after each prefix, under the student and the teacher, nats.

    `current` [R, k] and `current_tail` [R] are the student's (differentiable), `teacher` [R, k] and
    `teacher_tail` [R] constants. A tail is the log of the mass of every token that is neither among the k nor
    a_t. `counted` bool [R, k] is False where one of the k is a_t: TokenLogProbs holds that one already.
    """

    current: Tensor
    current_tail: Tensor
    teacher: Tensor
    teacher_tail: Tensor
    counted: Tensor


@dataclass(frozen=True)
class TokenLogProbs:
    """`log pi(a_t | s_t)` of each response token under three models, [R] each, nats.

    `current` is the student being trained (differentiable), `teacher` is pi_T and `behaviour` is
    pi_ref, the sampler's own distribution; the last two are constants, None where not kept. `top_k` has the
    tokens beside a_t, None where the objective has no need of them.
    """

    current: Tensor
    teacher: Tensor | None
    behaviour: Tensor | None
    top_k: TopKLogProbs | None = None
    sampled: Tensor | None = None


@dataclass(frozen=True)
class TokenPlaces:
    """Where in its response each token stands, [R] each; constants of the data.

    `position` int64, from 0. `discrepancy` float in [0, 1]: the share of the response's disagreement between
    pi_T and pi_ref that lies before the token (MicroBatch.prefix_discrepancy), None where not known.
    """

    position: Tensor
    discrepancy: Tensor | None


class Objective(Protocol):
    """A loss and the metrics that belong to it. `needs`: the log-probs the data must hold for it."""

    needs: ClassVar[tuple[KeptLogProbs, ...]]
    metric_names: ClassVar[tuple[str, ...]]

    def token_loss(self, tokens: TokenLogProbs) -> Tensor:
        """The loss of each response token, [R], differentiable in the student's log-probs.

        Raises DataError when it needs a log-prob that the data does not hold.
        """
        ...

    def token_weights(self, places: TokenPlaces) -> Tensor:
        """What the step multiplies each token's loss by, [R], beside the normalisation; constants.

        Apart from `token_loss`, so that `metrics` are of the unweighted loss. Raises DataError as it does.
        """
        import torch

        return torch.ones_like(places.position, dtype=torch.float32)

    def metrics(self, tokens: TokenLogProbs, loss: Tensor) -> dict[str, float]:
        """`metric_names` over all response tokens of a global batch (R >= 1).

        `loss` [R] is what `token_loss` gave; `tokens.top_k` is None, as k floats a token are not gathered.
        """
        ...


class Sft(Objective):
    """`-log pi_theta(a_t | s_t)`: maximum likelihood of the teacher's answers."""

    needs: ClassVar[tuple[KeptLogProbs, ...]] = ()
    metric_names: ClassVar[tuple[str, ...]] = ()

    def token_loss(self, tokens: TokenLogProbs) -> Tensor:
        return -tokens.current

    def metrics(self, tokens: TokenLogProbs, loss: Tensor) -> dict[str, float]:
        return {}


ADVANTAGE_METRICS = ("advantage_mean", "advantage_std", "advantage_p05", "advantage_p50", "advantage_p95")
DRIFT_METRICS = ("drift_kl", "effective_sample_size", "kept_mass")
# A token that pi_ref draws less than a tenth as often as pi_theta is one that the cache hardly covers.
LARGEST_COVERED_RATIO = 10.0


@dataclass(frozen=True)
class Distillation(Objective):
    """What the distillation objectives share: how tokens are weighted, and the metrics.

    A token's weight is the product of two, of which each is 1 unless its key is set. Both are functions of
    one response's cached data, so they are the same at every layout; neither is renormalised, as a mean over
    the batch would tie samples to each other. sequence_mean still divides by the whole response's length.

    train.weights.position = w: `w - (w - 1) F_t`, `F_t = sum_{s<t} d_s / sum_s d_s`,
    `d_s = |log pi_T(a_s|s_s) - log pi_ref(a_s|s_s)|`; IW-OPD (arXiv 2606.22600), as in its authors' code,
    where w is 1.5. There the student is the one being trained, which has just sampled; here it is pi_ref,
    which sampled once, so a weight does not follow the student as it learns.
    train.weights.horizon = h: 1 for the first h response tokens, 0 for the rest; TOPD of arXiv 2605.31490,
    which also samples no further and so divides by the truncated length. To save the sampling too, set
    rollout.sampling.max_new_tokens. Its POPD, a horizon that grows as training goes on, is not here.
    """

    weights: WeightsConfig = field(default_factory=WeightsConfig)
    options: Options = field(default_factory=Options)

    needs: ClassVar[tuple[KeptLogProbs, ...]] = ("teacher", "behaviour")
    metric_names: ClassVar[tuple[str, ...]] = ("reverse_kl", *ADVANTAGE_METRICS, *DRIFT_METRICS)

    @classmethod
    def of(cls, config: TrainConfig) -> Objective:
        """The objective with what a recipe says of it."""
        return cls(config.weights, config.options)

    def token_weights(self, places: TokenPlaces) -> Tensor:
        weight = super().token_weights(places)
        if self.weights.position != 1:
            if places.discrepancy is None:
                raise DataError(
                    "train.weights.position needs the teacher's and the behaviour log-probs of every rollout "
                    "and the data lacks some: run the rollout and score stages, or set it to 1"
                )
            weight = weight + (self.weights.position - 1) * (1 - places.discrepancy)
        if self.weights.horizon is not None:
            weight = weight * (places.position < self.weights.horizon)
        return weight

    def metrics(self, tokens: TokenLogProbs, loss: Tensor) -> dict[str, float]:
        """reverse_kl: mean of `log pi_theta - log pi_T`, over tokens that pi_ref drew."""
        spread = advantage_metrics(tokens)
        return {"reverse_kl": -spread["advantage_mean"], **spread, **drift(tokens)}


@dataclass(frozen=True)
class SampledReverseKlOptions(Options):
    importance: Literal["none", "clipped"] = key(
        "clipped: weigh each token by how much likelier it is to the student than to its sampler, at most "
        "importance_clip",
        "none",
    )
    importance_clip: Positive = key(
        "largest importance weight: a token twice as likely as when it was sampled counts in full", 2.0
    )
    extrapolation: Positive = key(
        "factor on the teacher's reward over the sampling student; 1 is plain OPD, above 1 goes beyond the "
        "teacher (ExOPD)",
        1.0,
    )

    def check(self, recipe: Recipe) -> None:
        sampling = recipe.rollout.sampling
        require(
            self.importance == "none" or sampling.temperature > 0,
            "train.sampled_reverse_kl.importance=clipped needs tokens that were drawn at random, and "
            "rollout.sampling.temperature=0 draws none: set it to none, or the temperature above 0",
        )
        plain = sampling.temperature in (0, 1) and sampling.top_p == 1 and sampling.top_k == 0
        require(
            self.extrapolation == 1 or plain,
            f"train.sampled_reverse_kl.extrapolation={self.extrapolation:g} needs pi_ref's own log-probs, "
            "and the rollouts keep those of another temperature, top-p or top-k: set rollout.sampling to "
            "temperature=1, top_p=1, top_k=0, or the extrapolation to 1",
        )


@dataclass(frozen=True)
class SampledReverseKl(Distillation):
    """`-A_t log pi_theta(a_t | s_t)` with `A_t = log pi_T - stopgrad(log pi_theta)`.

    Lightning OPD's loss (arXiv 2604.13010; DESIGN section 1). The advantage is taken from the very
    log-probs that are differentiated, so it is always the current student's. With p the softmax of
    the logits, the gradient with respect to logit v is `A_t (p_v - 1[v = a_t])`.

    `extrapolation` = l: `A_t = l (log pi_T - log pi_ref) - (log pi_theta - log pi_ref)`, which 1 leaves
    as it is; ExOPD (arXiv 2602.12125), with pi_ref, the student that sampled, for its reference.
    `importance_clip` = c (importance=clipped): the token's loss times
    `stopgrad(min(c, pi_theta(a_t|s_t) / pi_ref(a_t|s_t)))`, which makes a token that pi_ref drew count as
    often as pi_theta would draw it after the same prefix; c bounds its variance (truncated importance
    sampling, E. Ionides, 2008). Metrics are of the plain advantage either way.
    """

    options: SampledReverseKlOptions = field(default_factory=SampledReverseKlOptions)

    name: ClassVar[str] = "sampled_reverse_kl"
    caption: ClassVar[str] = "reverse KL by the sampled token alone, the published loss (Lightning OPD)"
    Options = SampledReverseKlOptions

    def token_loss(self, tokens: TokenLogProbs) -> Tensor:
        advantage, beyond = advantages(tokens), self.options.extrapolation - 1
        if beyond:
            advantage = advantage + beyond * (_teacher(tokens) - _behaviour(tokens))
        if self.options.importance == "clipped":
            drawn = _behaviour(tokens) if tokens.sampled is None else tokens.sampled
            log_ratio = tokens.current.detach() - drawn
            advantage = advantage * log_ratio.clamp(max=math.log(self.options.importance_clip)).exp()
        return -advantage * tokens.current


class FixedNegative(Distillation):
    """`log pi_theta(a_t | s_t)`: the sampled loss with the advantage -1 for every token.

    The control that a distillation objective must beat (arXiv 2608.31046): it knows nothing of the teacher
    and makes all that was sampled less likely. Unbounded below. The gradient with respect to logit v is
    `1[v = a_t] - p_v`. The kept log-probs serve its metrics alone.
    """

    name: ClassVar[str] = "fixed_negative"
    caption: ClassVar[str] = "control: every sampled token less likely, whatever the teacher says"

    def token_loss(self, tokens: TokenLogProbs) -> Tensor:
        return tokens.current


@dataclass(frozen=True)
class TopKReverseKlOptions(Options):
    entropy: NotNegative | None = key(
        "teacher entropy above which a token gets the forward KL added, nats; empty: none", None
    )

    def check(self, recipe: Recipe) -> None:
        most = math.log(recipe.score.top_k + 2)  # the k, the sampled token, and the rest as one event
        require(
            self.entropy is None or self.entropy < most,
            f"train.topk_reverse_kl.entropy={self.entropy} is never exceeded: score.top_k="
            f"{recipe.score.top_k} kept tokens show an entropy of at most {most:.3g} nats: lower it, or "
            "raise score.top_k",
        )


@dataclass(frozen=True)
class TopKReverseKl(Distillation):
    """`sum_{v in K} p_v (log p_v - log p_T,v) + p_tail (log p_tail - log p_T,tail)` after each prefix.

    K is the teacher's top k and a_t; p the student's and p_T the teacher's probabilities; the tail is all
    else, taken as one event (DESIGN section 1). So it is a divergence between two whole distributions: never
    below 0, at most the KL over the vocabulary, with nothing renormalised and nothing clamped. With
    `c_v = log p_v - log p_T,v` (the tail's c for all v outside K) and D the loss, the gradient with respect
    to logit v is `p_v (c_v - D)`.
    """

    options: TopKReverseKlOptions = field(default_factory=TopKReverseKlOptions)

    name: ClassVar[str] = "topk_reverse_kl"
    caption: ClassVar[str] = "reverse KL over the teacher's top k tokens, the sampled one and the rest"
    Options = TopKReverseKlOptions
    needs: ClassVar[tuple[KeptLogProbs, ...]] = ("teacher", "behaviour", "top_k")

    @classmethod
    def of(cls, config: TrainConfig) -> Objective:
        kind = cls if config.options.entropy is None else EntropyAwareKl
        return kind(config.weights, config.options)

    def token_loss(self, tokens: TokenLogProbs) -> Tensor:
        student, teacher = _over_events(tokens)
        return _divergence(student, teacher)

    def metrics(self, tokens: TokenLogProbs, loss: Tensor) -> dict[str, float]:
        """reverse_kl: the loss's mean over tokens, exact over K and the tail; the rest is of a_t alone."""
        return super().metrics(tokens, loss) | {"reverse_kl": loss.double().mean().item()}


@dataclass(frozen=True)
class EntropyAwareKl(Distillation):
    """TopKReverseKl plus, where the teacher's entropy is above a threshold, TopKForwardKl.

    EA-OPD (arXiv 2603.07079), by train.topk_reverse_kl.entropy, nats: where the teacher is undecided, the
    reverse KL alone settles on one of its choices. Its entropy is taken over K and the tail as one event,
    which is at most that over the vocabulary: a token that is given the second term here would be there, too.
    """

    options: TopKReverseKlOptions = field(default_factory=TopKReverseKlOptions)

    needs: ClassVar[tuple[KeptLogProbs, ...]] = TopKReverseKl.needs

    def token_loss(self, tokens: TokenLogProbs) -> Tensor:
        student, teacher = _over_events(tokens)
        assert self.options.entropy is not None  # TopKReverseKl makes no other
        undecided = _entropy(teacher) > self.options.entropy
        return _divergence(student, teacher) + undecided * _divergence(teacher, student)


class TopKForwardKl(Distillation):
    """`sum_{v in K} p_T,v (log p_T,v - log p_v) + p_T,tail (log p_T,tail - log p_tail)` after each prefix.

    TopKReverseKl with the roles swapped, on the same K and tail (DESIGN section 1), and so never below 0 and
    at most the whole KL(pi_T || pi_theta). The gradient with respect to logit v is `p_v - p_T,v` in K and
    `p_v (1 - p_T,tail / p_tail)` outside it. Metrics are of a_t, but forward_kl, the loss's mean.
    """

    name: ClassVar[str] = "topk_forward_kl"
    caption: ClassVar[str] = "forward KL over the teacher's top k tokens, the sampled one and the rest"
    needs: ClassVar[tuple[KeptLogProbs, ...]] = TopKReverseKl.needs
    metric_names: ClassVar[tuple[str, ...]] = ("forward_kl", *Distillation.metric_names)

    def token_loss(self, tokens: TokenLogProbs) -> Tensor:
        student, teacher = _over_events(tokens)
        return _divergence(teacher, student)

    def metrics(self, tokens: TokenLogProbs, loss: Tensor) -> dict[str, float]:
        return super().metrics(tokens, loss) | {"forward_kl": loss.double().mean().item()}


@dataclass(frozen=True)
class _Events:
    """Log-probs [R, k + 2] of the top k, a_t and the tail; `counted` is False where one of the k is a_t."""

    log_probs: Tensor
    counted: Tensor


def _over_events(tokens: TokenLogProbs) -> tuple[_Events, _Events]:
    """(the student's, the teacher's). Raises DataError when no top k was kept."""
    top_k, teacher = tokens.top_k, _teacher(tokens)
    if top_k is None:
        raise DataError(
            "the top-k objectives need the teacher's top-k scores and the data has none: "
            "run the score stage again with score.top_k above 0 (64, say)"
        )
    import torch

    counted = torch.nn.functional.pad(top_k.counted, (0, 2), value=True)

    def events(of_top_k: Tensor, of_token: Tensor, of_tail: Tensor) -> _Events:
        return _Events(torch.cat([of_top_k, of_token[:, None], of_tail[:, None]], dim=1), counted)

    return (
        events(top_k.current, tokens.current, top_k.current_tail),
        events(top_k.teacher, teacher, top_k.teacher_tail),
    )


def _divergence(p: _Events, q: _Events) -> Tensor:
    """KL(p || q), [R], nats."""
    terms = p.log_probs.exp() * (p.log_probs - q.log_probs)
    return terms.masked_fill(~p.counted, 0.0).sum(1)


def _entropy(p: _Events) -> Tensor:
    """[R], nats. A mass too small for its type counts as none, and its log-prob is finite."""
    return -(p.log_probs.exp() * p.log_probs).masked_fill(~p.counted, 0.0).sum(1)


def advantages(tokens: TokenLogProbs) -> Tensor:
    """`A_t = log pi_T(a_t|s_t) - stopgrad(log pi_theta(a_t|s_t))`, [R], a constant to autograd."""
    return _teacher(tokens) - tokens.current.detach()


def _teacher(tokens: TokenLogProbs) -> Tensor:
    if tokens.teacher is None:
        raise DataError(
            "the objective needs the teacher's log-probs of every rollout and the data has none: "
            "run the score stage and train from its scores"
        )
    return tokens.teacher


def _behaviour(tokens: TokenLogProbs) -> Tensor:
    if tokens.behaviour is None:
        raise DataError(
            "the rollouts hold no behaviour log-probs, so nothing can be compared with pi_ref: "
            "train on responses that the rollout stage sampled"
        )
    return tokens.behaviour


def advantage_metrics(tokens: TokenLogProbs) -> dict[str, float]:
    """ADVANTAGE_METRICS: mean, standard deviation and quantiles of `advantages`."""
    advantage = advantages(tokens).double()
    mean, std = advantage.mean().item(), advantage.std(correction=0).item()
    quantiles = _quantiles(advantage, (0.05, 0.5, 0.95))
    return dict(zip(ADVANTAGE_METRICS, (mean, std, *quantiles), strict=True))


def drift(tokens: TokenLogProbs) -> dict[str, float]:
    """How far pi_theta is from pi_ref, which drew the tokens; from `r = pi_theta / pi_ref` per token.

    drift_kl: `mean(r - 1 - log r)`, an estimate of KL(pi_ref || pi_theta) that is never negative
    (the k3 estimator of J. Schulman, "Approximating KL divergence", 2020).
    effective_sample_size: `(sum r)^2 / (R sum r^2)`, in (0, 1]; 1 when nothing has moved. Taken over
    tokens: over whole responses the product of ratios collapses to one sample at any useful length.
    kept_mass: `mean min(r, 10)`. Without the bound its expectation over pi_ref's draws is the probability
    that pi_theta keeps on what pi_ref can draw; with it, on what pi_ref draws at least a tenth as often,
    which a batch can measure: one token of ratio 1,000 would be as much as a thousand others. 1 while the
    cache covers the student; well below 1, its mass has moved to tokens that no teacher has judged, however
    steady the loss looks.
    After a refresh (train.refresh_every) pi_ref is the student that sampled this round.
    """
    log_ratio = tokens.current.detach().double() - _behaviour(tokens).double()
    import torch

    k3 = torch.expm1(log_ratio) - log_ratio
    # In logs, because a ratio may overflow long before the fraction does.
    log_fraction = 2 * torch.logsumexp(log_ratio, 0) - torch.logsumexp(2 * log_ratio, 0)
    return {
        "drift_kl": k3.mean().item(),
        "effective_sample_size": log_fraction.exp().item() / log_ratio.numel(),
        "kept_mass": log_ratio.exp().clamp(max=LARGEST_COVERED_RATIO).mean().item(),
    }


def _quantiles(values: Tensor, probabilities: tuple[float, ...]) -> list[float]:
    """Linear-interpolated quantiles. torch.quantile refuses more than 2^24 values, a sort does not."""
    ordered = values.sort().values
    import torch

    positions = torch.tensor(probabilities, dtype=torch.float64, device=values.device) * (len(ordered) - 1)
    below = positions.floor().long()
    above = positions.ceil().long()
    result: list[float] = torch.lerp(ordered[below], ordered[above], positions - below).tolist()
    return result


OBJECTIVES.add(SampledReverseKl, TopKReverseKl, TopKForwardKl, FixedNegative)


def get_objective(name: str, config: TrainingConfig | None = None) -> Objective:
    """The objective of that name, with what `config` says of it where it is a TrainConfig.

    Raises ConfigError naming the known ones otherwise.
    """
    if name == "sft":
        return Sft()
    kind: type[Distillation] = OBJECTIVES[name]
    return kind.of(config) if isinstance(config, TrainConfig) else kind()
