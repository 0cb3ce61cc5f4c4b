"""How far the student has moved from the one that made the rollouts."""

from __future__ import annotations

from megatron_lopd.objectives.objective import TokenLogProbs

DRIFT_METRICS = ("drift_kl", "effective_sample_size", "kept_mass")
# A token that pi_ref draws less than a tenth as often as pi_theta is one that the cache hardly covers.
LARGEST_COVERED_RATIO = 10.0


def drift(tokens: TokenLogProbs) -> dict[str, float]:
    """How far pi_theta is from pi_ref, which drew the tokens; from `r = pi_theta / pi_ref` per token.

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
    """
    import torch

    log_ratio = tokens.current.detach().double() - tokens.of_behaviour().double()
    k3 = torch.expm1(log_ratio) - log_ratio
    # In logs, because a ratio may overflow long before the fraction does.
    log_fraction = 2 * torch.logsumexp(log_ratio, 0) - torch.logsumexp(2 * log_ratio, 0)
    return {
        "drift_kl": k3.mean().item(),
        "effective_sample_size": log_fraction.exp().item() / log_ratio.numel(),
        "kept_mass": log_ratio.exp().clamp(max=LARGEST_COVERED_RATIO).mean().item(),
    }
