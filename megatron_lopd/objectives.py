"""The losses on plain tensors (DESIGN section 1). Knows nothing of Megatron-Core.

An objective turns log-probs of the response tokens into a loss per token, and the same log-probs of
a whole global batch into the step's metrics. R = response tokens; every tensor is float [R], nats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_lopd.errors import ConfigError, DataError

KeptLogProbs = Literal["teacher", "behaviour"]


@dataclass(frozen=True)
class TokenLogProbs:
    """`log pi(a_t | s_t)` of each response token under three models, [R] each, nats.

    `current` is the student being trained (differentiable), `teacher` is pi_T and `behaviour` is
    pi_ref, the sampler's own distribution; the last two are constants, None where not kept.
    """

    current: Tensor
    teacher: Tensor | None
    behaviour: Tensor | None


class Objective(Protocol):
    """A loss and the metrics that belong to it. `needs`: the log-probs the data must hold for it."""

    needs: tuple[KeptLogProbs, ...]
    metric_names: tuple[str, ...]

    def token_loss(self, tokens: TokenLogProbs) -> Tensor:
        """The loss of each response token, [R], differentiable in `tokens.current`.

        Raises DataError when it needs a log-prob that the data does not hold.
        """
        ...

    def metrics(self, tokens: TokenLogProbs) -> dict[str, float]:
        """`metric_names` over all response tokens of a global batch (R >= 1)."""
        ...


class Sft:
    """`-log pi_theta(a_t | s_t)`: maximum likelihood of the teacher's answers."""

    needs: tuple[KeptLogProbs, ...] = ()
    metric_names: tuple[str, ...] = ()

    def token_loss(self, tokens: TokenLogProbs) -> Tensor:
        return -tokens.current

    def metrics(self, tokens: TokenLogProbs) -> dict[str, float]:
        return {}


class SampledReverseKl:
    """`-A_t log pi_theta(a_t | s_t)` with `A_t = log pi_T - stopgrad(log pi_theta)`.

    Lightning OPD's loss (arXiv 2604.13010; DESIGN section 1). The advantage is taken from the very
    log-probs that are differentiated, so it is always the current student's. With p the softmax of
    the logits, the gradient with respect to logit v is `A_t (p_v - 1[v = a_t])`.
    """

    needs: tuple[KeptLogProbs, ...] = ("teacher", "behaviour")
    metric_names: tuple[str, ...] = (
        "reverse_kl",
        "advantage_mean",
        "advantage_std",
        "advantage_p05",
        "advantage_p50",
        "advantage_p95",
        "drift_kl",
        "effective_sample_size",
    )

    def token_loss(self, tokens: TokenLogProbs) -> Tensor:
        return -advantages(tokens) * tokens.current

    def metrics(self, tokens: TokenLogProbs) -> dict[str, float]:
        """The spread of the advantages, and how far the student has drifted from pi_ref.

        reverse_kl: mean of `log pi_theta - log pi_T`, over tokens that pi_ref drew.
        """
        advantage = advantages(tokens).double()
        p05, p50, p95 = _quantiles(advantage, (0.05, 0.5, 0.95))
        return {
            "reverse_kl": -advantage.mean().item(),
            "advantage_mean": advantage.mean().item(),
            "advantage_std": advantage.std(correction=0).item(),
            "advantage_p05": p05,
            "advantage_p50": p50,
            "advantage_p95": p95,
            **drift(tokens),
        }


def advantages(tokens: TokenLogProbs) -> Tensor:
    """`A_t = log pi_T(a_t|s_t) - stopgrad(log pi_theta(a_t|s_t))`, [R], a constant to autograd."""
    if tokens.teacher is None:
        raise DataError(
            "sampled_reverse_kl needs the teacher's log-probs of every rollout and the data has none: "
            "run the score stage and train from its scores"
        )
    return tokens.teacher - tokens.current.detach()


def drift(tokens: TokenLogProbs) -> dict[str, float]:
    """How far pi_theta is from pi_ref, which drew the tokens; from `r = pi_theta / pi_ref` per token.

    drift_kl: `mean(r - 1 - log r)`, an estimate of KL(pi_ref || pi_theta) that is never negative
    (the k3 estimator of J. Schulman, "Approximating KL divergence", 2020).
    effective_sample_size: `(sum r)^2 / (R sum r^2)`, in (0, 1]; 1 when nothing has moved. Taken over
    tokens: over whole responses the product of ratios collapses to one sample at any useful length.
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


OBJECTIVES: Mapping[str, Objective] = {"sft": Sft(), "sampled_reverse_kl": SampledReverseKl()}


def get_objective(name: str) -> Objective:
    """The objective of that name; ConfigError naming the known ones otherwise."""
    if name not in OBJECTIVES:
        raise ConfigError(f"objective {name!r} is unknown: choose one of {', '.join(sorted(OBJECTIVES))}")
    return OBJECTIVES[name]
