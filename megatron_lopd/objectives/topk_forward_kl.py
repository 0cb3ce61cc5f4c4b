"""The forward KL over the teacher's top k."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from megatron_lopd.objectives.distillation import Distillation
from megatron_lopd.objectives.events import OVER_EVENTS, divergence, over_events
from megatron_lopd.objectives.objective import KeptLogProbs, TokenLogProbs

if TYPE_CHECKING:
    from torch import Tensor


class TopKForwardKl(Distillation):
    """`sum_{v in K} p_T,v (log p_T,v - log p_v) + p_T,tail (log p_T,tail - log p_tail)` after each prefix.

    TopKReverseKl with the roles swapped, on the same K and tail, and so never below 0 and
    at most the whole KL(pi_T || pi_theta). The gradient with respect to logit v is `p_v - p_T,v` in K and
    `p_v (1 - p_T,tail / p_tail)` outside it. Metrics are of a_t, but forward_kl_top_k, the loss's mean.
    """

    name: ClassVar[str] = "topk_forward_kl"
    caption: ClassVar[str] = f"KL(π_T ‖ π) {OVER_EVENTS}: never below 0"
    needs: ClassVar[tuple[KeptLogProbs, ...]] = ("teacher", "behaviour", "top_k")
    metric_names: tuple[str, ...] = ("forward_kl_top_k", *Distillation.metric_names)

    def token_loss(self, tokens: TokenLogProbs) -> Tensor:
        student, teacher = over_events(tokens)
        return divergence(teacher, student)

    def metrics(self, tokens: TokenLogProbs, loss: Tensor) -> dict[str, float]:
        return super().metrics(tokens, loss) | {"forward_kl_top_k": loss.double().mean().item()}
