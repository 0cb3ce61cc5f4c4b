"""The control that a distillation objective must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from megatron_lopd.objectives.distillation import Distillation
from megatron_lopd.objectives.objective import TokenLogProbs

if TYPE_CHECKING:
    from torch import Tensor


class FixedNegative(Distillation):
    """`log pi_theta(a_t | s_t)`: the sampled loss with the advantage -1 for every token.

    The control that a distillation objective must beat (arXiv 2608.31046): it knows nothing of the teacher
    and makes all that was sampled less likely. Unbounded below. The gradient with respect to logit v is
    `1[v = a_t] - p_v`. The kept log-probs serve its metrics alone.
    """

    name: ClassVar[str] = "fixed_negative"
    caption: ClassVar[str] = (
        "mean of log π: every sampled token is made less likely, whatever the teacher says"
    )

    def token_loss(self, tokens: TokenLogProbs) -> Tensor:
        return tokens.current
