"""The next token as one of k + 2 events: the teacher's top k, the drawn token, and all else as one.

So a divergence is one between two whole distributions: never below 0, at most that over the vocabulary, with
nothing renormalised and nothing clamped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_lopd.errors import DataError
from megatron_lopd.objectives.objective import TokenLogProbs

if TYPE_CHECKING:
    from torch import Tensor

OVER_EVENTS = "over the teacher's top k, the sampled token and all else as one event"  # for captions


@dataclass(frozen=True)
class Events:
    """Log-probs [R, k + 2] of the top k, a_t and the tail; `counted` is False where one of the k is a_t."""

    log_probs: Tensor
    counted: Tensor


def over_events(tokens: TokenLogProbs) -> tuple[Events, Events]:
    """(the student's, the teacher's). Raises DataError when no top k was kept."""
    import torch

    top_k, teacher = tokens.top_k, tokens.of_teacher()
    if top_k is None:
        raise DataError(
            "the top-k objectives need the teacher's top-k scores and the data has none: "
            "run the score stage again with score.top_k above 0 (64, say)"
        )
    counted = torch.nn.functional.pad(top_k.counted, (0, 2), value=True)

    def events(of_top_k: Tensor, of_token: Tensor, of_tail: Tensor) -> Events:
        return Events(torch.cat([of_top_k, of_token[:, None], of_tail[:, None]], dim=1), counted)

    return (
        events(top_k.current, tokens.current, top_k.current_tail),
        events(top_k.teacher, teacher, top_k.teacher_tail),
    )


def divergence(p: Events, q: Events) -> Tensor:
    """KL(p || q), [R], nats."""
    terms = p.log_probs.exp() * (p.log_probs - q.log_probs)
    return terms.masked_fill(~p.counted, 0.0).sum(1)


def entropy(p: Events) -> Tensor:
    """[R], nats. A mass too small for its type counts as none, and its log-prob is finite."""
    return -(p.log_probs.exp() * p.log_probs).masked_fill(~p.counted, 0.0).sum(1)
