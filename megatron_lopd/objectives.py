"""The losses on plain tensors (DESIGN section 1). Knows nothing of Megatron-Core.

An objective turns log-probs of the response tokens into a loss per token, and the same log-probs of
a whole global batch into the step's metrics. R = response tokens; a tensor is float [R], nats, unless said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_lopd.errors import ConfigError, DataError

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


class Objective(Protocol):
    """A loss and the metrics that belong to it. `needs`: the log-probs the data must hold for it."""

    needs: tuple[KeptLogProbs, ...]
    metric_names: tuple[str, ...]

    def token_loss(self, tokens: TokenLogProbs) -> Tensor:
        """The loss of each response token, [R], differentiable in the student's log-probs.

        Raises DataError when it needs a log-prob that the data does not hold.
        """
        ...

    def metrics(self, tokens: TokenLogProbs, loss: Tensor) -> dict[str, float]:
        """`metric_names` over all response tokens of a global batch (R >= 1).

        `loss` [R] is what `token_loss` gave; `tokens.top_k` is None, as k floats a token are not gathered.
        """
        ...


class Sft:
    """`-log pi_theta(a_t | s_t)`: maximum likelihood of the teacher's answers."""

    needs: tuple[KeptLogProbs, ...] = ()
    metric_names: tuple[str, ...] = ()

    def token_loss(self, tokens: TokenLogProbs) -> Tensor:
        return -tokens.current

    def metrics(self, tokens: TokenLogProbs, loss: Tensor) -> dict[str, float]:
        return {}


ADVANTAGE_METRICS = ("advantage_mean", "advantage_std", "advantage_p05", "advantage_p50", "advantage_p95")
DRIFT_METRICS = ("drift_kl", "effective_sample_size")


class SampledReverseKl:
    """`-A_t log pi_theta(a_t | s_t)` with `A_t = log pi_T - stopgrad(log pi_theta)`.

    Lightning OPD's loss (arXiv 2604.13010; DESIGN section 1). The advantage is taken from the very
    log-probs that are differentiated, so it is always the current student's. With p the softmax of
    the logits, the gradient with respect to logit v is `A_t (p_v - 1[v = a_t])`.
    """

    needs: tuple[KeptLogProbs, ...] = ("teacher", "behaviour")
    metric_names: tuple[str, ...] = ("reverse_kl", *ADVANTAGE_METRICS, *DRIFT_METRICS)

    def token_loss(self, tokens: TokenLogProbs) -> Tensor:
        return -advantages(tokens) * tokens.current

    def metrics(self, tokens: TokenLogProbs, loss: Tensor) -> dict[str, float]:
        """reverse_kl: mean of `log pi_theta - log pi_T`, over tokens that pi_ref drew."""
        spread = advantage_metrics(tokens)
        return {"reverse_kl": -spread["advantage_mean"], **spread, **drift(tokens)}


class TopKReverseKl:
    """`sum_{v in K} p_v (log p_v - log p_T,v) + p_tail (log p_tail - log p_T,tail)` after each prefix.

    K is the teacher's top k and a_t; p the student's and p_T the teacher's probabilities; the tail is all
    else, taken as one event (DESIGN section 1). So it is a divergence between two whole distributions: never
    below 0, at most the KL over the vocabulary, with nothing renormalised and nothing clamped. With
    `c_v = log p_v - log p_T,v` (the tail's c for all v outside K) and D the loss, the gradient with respect
    to logit v is `p_v (c_v - D)`.
    """

    needs: tuple[KeptLogProbs, ...] = ("teacher", "behaviour", "top_k")
    metric_names: tuple[str, ...] = SampledReverseKl.metric_names

    def token_loss(self, tokens: TokenLogProbs) -> Tensor:
        top_k, teacher = tokens.top_k, _teacher(tokens)
        if top_k is None:
            raise DataError(
                "topk_reverse_kl needs the teacher's top-k scores and the data has none: "
                "run the score stage again with score.top_k above 0 (64, say)"
            )
        of_top_k = _weighted_log_ratio(top_k.current, top_k.teacher).masked_fill(~top_k.counted, 0.0)
        of_tail = _weighted_log_ratio(top_k.current_tail, top_k.teacher_tail)
        return of_top_k.sum(-1) + _weighted_log_ratio(tokens.current, teacher) + of_tail

    def metrics(self, tokens: TokenLogProbs, loss: Tensor) -> dict[str, float]:
        """reverse_kl: the loss's mean over tokens, exact over K and the tail; the rest is of a_t alone."""
        return {"reverse_kl": loss.double().mean().item(), **advantage_metrics(tokens), **drift(tokens)}


def _weighted_log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    return log_p.exp() * (log_p - log_q)


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
    After a refresh (train.refresh_every) pi_ref is the student that sampled this round.
    """
    if tokens.behaviour is None:
        raise DataError(
            "the rollouts hold no behaviour log-probs, so drift from pi_ref cannot be measured: "
            "train on responses that the rollout stage sampled"
        )
    log_ratio = tokens.current.detach().double() - tokens.behaviour.double()
    k3 = torch.expm1(log_ratio) - log_ratio
    # In logs, because a ratio may overflow long before the fraction does.
    log_fraction = 2 * torch.logsumexp(log_ratio, 0) - torch.logsumexp(2 * log_ratio, 0)
    return {
        "drift_kl": k3.mean().item(),
        "effective_sample_size": log_fraction.exp().item() / log_ratio.numel(),
    }


def _quantiles(values: Tensor, probabilities: tuple[float, ...]) -> list[float]:
    """Linear-interpolated quantiles. torch.quantile refuses more than 2^24 values, a sort does not."""
    ordered = values.sort().values
    positions = torch.tensor(probabilities, dtype=torch.float64, device=values.device) * (len(ordered) - 1)
    below = positions.floor().long()
    above = positions.ceil().long()
    result: list[float] = torch.lerp(ordered[below], ordered[above], positions - below).tolist()
    return result


OBJECTIVES: Mapping[str, Objective] = {
    "sft": Sft(),
    "sampled_reverse_kl": SampledReverseKl(),
    "topk_reverse_kl": TopKReverseKl(),
}


def get_objective(name: str) -> Objective:
    """The objective of that name; ConfigError naming the known ones otherwise."""
    if name not in OBJECTIVES:
        raise ConfigError(f"objective {name!r} is unknown: choose one of {', '.join(sorted(OBJECTIVES))}")
    return OBJECTIVES[name]
