"""What the distillation objectives share: how tokens are weighted, and the metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from megatron_lopd.errors import DataError
from megatron_lopd.objectives.advantages import ADVANTAGE_METRICS, advantage_metrics
from megatron_lopd.objectives.drift import DRIFT_METRICS, drift
from megatron_lopd.objectives.objective import KeptLogProbs, Objective, TokenLogProbs, TokenPlaces

if TYPE_CHECKING:
    from torch import Tensor


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

    needs: ClassVar[tuple[KeptLogProbs, ...]] = ("teacher", "behaviour")
    metric_names: tuple[str, ...] = ("reverse_kl_sampled", *ADVANTAGE_METRICS, *DRIFT_METRICS)

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
        """reverse_kl_sampled: mean of `log pi_theta - log pi_T`, over the tokens that were drawn."""
        spread = advantage_metrics(tokens)
        return {"reverse_kl_sampled": -spread["advantage_mean"], **spread, **drift(tokens)}
