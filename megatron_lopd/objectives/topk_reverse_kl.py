"""The reverse KL over the teacher's top k."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_lopd.config import NotNegative, Options, Recipe, WeightsConfig, key, require
from megatron_lopd.objectives.distillation import Distillation
from megatron_lopd.objectives.events import OVER_EVENTS, divergence, entropy, over_events
from megatron_lopd.objectives.objective import KeptLogProbs, TokenLogProbs

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TopKReverseKlOptions(Options):
    entropy: NotNegative | None = key(
        "teacher entropy above which a token gets the forward KL added, nats; empty: none", None
    )

    def check(self, recipe: Recipe) -> None:
        kept = recipe.score.top_k
        most = math.log(kept + 2)  # the k, the sampled token, and the rest as one event
        require(
            self.entropy is None or self.entropy < most,
            f"train.topk_reverse_kl.entropy={self.entropy} is never exceeded: score.top_k={kept} kept tokens "
            f"show an entropy of at most {most:.3g} nats: lower it, or raise score.top_k",
        )


class TopKReverseKl(Distillation):
    """`sum_{v in K} p_v (log p_v - log p_T,v) + p_tail (log p_tail - log p_T,tail)` after each prefix.

    K is the teacher's top k and a_t; p the student's and p_T the teacher's probabilities; the tail is all
    else, taken as one event. So it is a divergence between two whole distributions: never
    below 0, at most the KL over the vocabulary, with nothing renormalised and nothing clamped. With
    `c_v = log p_v - log p_T,v` (the tail's c for all v outside K) and D the loss, the gradient with respect
    to logit v is `p_v (c_v - D)`.

    entropy = h: where the teacher's entropy is above h, TopKForwardKl is added; EA-OPD (arXiv 2603.07079):
    where the teacher is undecided, the reverse KL alone settles on one of its choices. Its entropy is taken
    over K and the tail as one event, which is at most that over the vocabulary: a token that is given the
    second term here would be there, too.
    """

    name: ClassVar[str] = "topk_reverse_kl"
    caption: ClassVar[str] = f"KL(π ‖ π_T) {OVER_EVENTS}: never below 0"
    Options: ClassVar[type[Options]] = TopKReverseKlOptions
    options: TopKReverseKlOptions
    needs: ClassVar[tuple[KeptLogProbs, ...]] = ("teacher", "behaviour", "top_k")

    metric_names: tuple[str, ...] = ("reverse_kl_top_k", *Distillation.metric_names)

    def __init__(self, options: Any = None, weights: WeightsConfig | None = None) -> None:
        super().__init__(options, weights)
        if (
            self.options.entropy is not None
        ):  # the loss has the forward KL in it, and does not show the reverse
            self.metric_names = Distillation.metric_names

    def token_loss(self, tokens: TokenLogProbs) -> Tensor:
        student, teacher = over_events(tokens)
        reverse = divergence(student, teacher)
        if self.options.entropy is None:
            return reverse
        return reverse + (entropy(teacher) > self.options.entropy) * divergence(teacher, student)

    def metrics(self, tokens: TokenLogProbs, loss: Tensor) -> dict[str, float]:
        """reverse_kl_top_k: the mean loss of the tokens, exact over K and the tail; the rest is of a_t."""
        found = super().metrics(tokens, loss)
        own = {"reverse_kl_top_k": loss.double().mean().item()} if self.options.entropy is None else {}
        return found | own
