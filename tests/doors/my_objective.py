"""An objective in one file: the sampled reverse KL whose advantage is held within a bound.

A recipe takes it by its import path, and its options by its name:

    allow_user_code: true
    train:
      objective: my_objective:BoundedReverseKl
      bounded_reverse_kl: {bound: 2}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_lopd.config import Options, Positive, key
from megatron_lopd.objectives import Distillation, TokenLogProbs, advantages

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class BoundedReverseKlOptions(Options):
    bound: Positive = key("largest |advantage| of a token, nats", 5.0)


class BoundedReverseKl(Distillation):
    """`-clamp(A_t, -b, b) log pi_theta(a_t | s_t)` with `A_t = log pi_T - stopgrad(log pi_theta)`.

    As a Distillation it has the weights of train.weights and the metrics of the others; `needs` is theirs,
    too: the teacher's and the sampler's log-probs of every token.
    """

    name = "bounded_reverse_kl"
    caption = "-mean of A log π, with A held constant and within a bound"
    Options = BoundedReverseKlOptions
    options: BoundedReverseKlOptions

    def token_loss(self, tokens: TokenLogProbs) -> Tensor:
        bound = self.options.bound
        return -advantages(tokens).clamp(-bound, bound) * tokens.current
