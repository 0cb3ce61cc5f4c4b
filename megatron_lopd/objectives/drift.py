"""How far the student has moved from the one that made the rollouts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_lopd.objectives.objective import TokenLogProbs

if TYPE_CHECKING:
    from torch import Tensor

DRIFT_METRICS = ("drift_kl", "effective_sample_size", "kept_mass")
# A token that is drawn less than a tenth as often as pi_theta would is one that the cache hardly covers.
LARGEST_COVERED_RATIO = 10.0


def drift(tokens: TokenLogProbs) -> dict[str, float]:
    """How far pi_theta is from pi_ref, the student that sampled; from `r = pi_theta / pi_ref` per token.

    drift_kl: `mean(r - 1 - log r)`, an estimate of KL(pi_ref || pi_theta) that is never negative
    (the k3 estimator of J. Schulman, "Approximating KL divergence", 2020).
    effective_sample_size: `(sum r)^2 / (R sum r^2)`, in (0, 1]; 1 when nothing has moved. Taken over
    tokens: over whole responses the product of ratios collapses to one sample at any useful length.
    kept_mass: `mean min(r, 10)`. Without the bound its expectation over pi_ref's draws is the probability
    that pi_theta keeps on what pi_ref can draw; with it, on what pi_ref draws at least a tenth as often,
    which a batch can measure: one token of ratio 1,000 would be as much as a thousand others. 1 while the
    cache covers the student; well below 1, its mass has moved to tokens that no teacher has judged, however
    steady the loss looks.
    After a refresh (train.refresh_every) pi_ref is the student that sampled this round.

    Where tokens were drawn from another distribution q, pi_ref after temperature, top-p and top-k, nothing
    has moved while r is 1 everywhere, and all three say so. drift_kl and effective_sample_size are then
    means over q's draws: what is cut off is not looked at, and what a low temperature prefers counts more.
    kept_mass is `mean min(pi_theta / q, 10) / mean min(pi_ref / q, 10)`: without the bound, pi_theta's
    probability of what q can draw, over pi_ref's.
    """
    import torch

    current, reference = tokens.current.detach().double(), tokens.of_behaviour().double()
    log_ratio = current - reference
    k3 = torch.expm1(log_ratio) - log_ratio
    # In logs, because a ratio may overflow long before the fraction does.
    log_fraction = 2 * torch.logsumexp(log_ratio, 0) - torch.logsumexp(2 * log_ratio, 0)
    kept_mass = _covered(log_ratio)
    if tokens.sampled is not None:
        drawn = tokens.sampled.double()
        kept_mass = _covered(current - drawn) / _covered(reference - drawn)
    return {
        "drift_kl": k3.mean().item(),
        "effective_sample_size": log_fraction.exp().item() / log_ratio.numel(),
        "kept_mass": kept_mass,
    }


def _covered(log_ratio: Tensor) -> float:
    return log_ratio.exp().clamp(max=LARGEST_COVERED_RATIO).mean().item()
