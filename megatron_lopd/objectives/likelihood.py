"""The loss of the sft stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from megatron_lopd.objectives.objective import Objective, TokenLogProbs

if TYPE_CHECKING:
    from torch import Tensor


class Sft(Objective):
    """`-log pi_theta(a_t | s_t)`: maximum likelihood of the teacher's answers."""

    name: ClassVar[str] = "sft"
    caption: ClassVar[str] = "-log π(x) of the teacher's answers"

    def token_loss(self, tokens: TokenLogProbs) -> Tensor:
        return -tokens.current

    def metrics(self, tokens: TokenLogProbs, loss: Tensor) -> dict[str, float]:
        return {}
