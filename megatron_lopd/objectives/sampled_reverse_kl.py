"""The published loss of Lightning OPD, on the sampled token alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from megatron_lopd.config import Options, Positive, Recipe, key, require
from megatron_lopd.objectives.advantages import advantages
from megatron_lopd.objectives.distillation import Distillation
from megatron_lopd.objectives.objective import TokenLogProbs

if TYPE_CHECKING:
    from torch import Tensor


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
            f"train.sampled_reverse_kl.extrapolation={self.extrapolation:g} needs tokens that pi_ref itself "
            "drew, and the rollouts have another temperature, top-p or top-k: set rollout.sampling to "
            "temperature=1, top_p=1, top_k=0, or the extrapolation to 1",
        )


class SampledReverseKl(Distillation):
    """`-A_t log pi_theta(a_t | s_t)` with `A_t = log pi_T - stopgrad(log pi_theta)`.

    Lightning OPD's loss (arXiv 2604.13010). The advantage is taken from the very
    log-probs that are differentiated, so it is always the current student's. With p the softmax of
    the logits, the gradient with respect to logit v is `A_t (p_v - 1[v = a_t])`.

    extrapolation = l: `A_t = l (log pi_T - log pi_ref) - (log pi_theta - log pi_ref)`, which 1
    leaves as it is; ExOPD (arXiv 2602.12125), with pi_ref, the student that sampled, for its reference.
    importance = clipped, with importance_clip = c: the token's loss times
    `stopgrad(min(c, pi_theta(a_t|s_t) / q(a_t|s_t)))`, q being what it was drawn from, pi_ref after
    temperature, top-p and top-k. That makes a token count as often as pi_theta would draw it after the same
    prefix; c bounds its variance (truncated importance sampling, E. Ionides, 2008). Metrics are of the plain
    advantage either way.
    """

    name: ClassVar[str] = "sampled_reverse_kl"
    caption: ClassVar[str] = "-mean of A log π, with A held constant: its sign carries no meaning"
    Options: ClassVar[type[Options]] = SampledReverseKlOptions
    options: SampledReverseKlOptions

    def token_loss(self, tokens: TokenLogProbs) -> Tensor:
        advantage, beyond = advantages(tokens), self.options.extrapolation - 1
        if beyond:
            advantage = advantage + beyond * (tokens.of_teacher() - tokens.of_behaviour())
        if self.options.importance == "clipped":
            log_ratio = tokens.current.detach() - tokens.of_draw()
            advantage = advantage * log_ratio.clamp(max=math.log(self.options.importance_clip)).exp()
        return -advantage * tokens.current
