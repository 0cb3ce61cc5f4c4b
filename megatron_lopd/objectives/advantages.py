"""How much better the teacher thinks of each drawn token than the student does, and how that spreads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_lopd.objectives.objective import TokenLogProbs

if TYPE_CHECKING:
    from torch import Tensor

ADVANTAGE_METRICS = ("advantage_mean", "advantage_std", "advantage_p05", "advantage_p50", "advantage_p95")


def advantages(tokens: TokenLogProbs) -> Tensor:
    """`A_t = log pi_T(a_t|s_t) - stopgrad(log pi_theta(a_t|s_t))`, [R], a constant to autograd."""
    return tokens.of_teacher() - tokens.current.detach()


def advantage_metrics(tokens: TokenLogProbs) -> dict[str, float]:
    """ADVANTAGE_METRICS: mean, standard deviation and quantiles of `advantages`."""
    advantage = advantages(tokens).double()
    mean, std = advantage.mean().item(), advantage.std(correction=0).item()
    spread = quantiles(advantage, (0.05, 0.5, 0.95))
    return dict(zip(ADVANTAGE_METRICS, (mean, std, *spread), strict=True))


def quantiles(values: Tensor, probabilities: tuple[float, ...]) -> list[float]:
    """Linear-interpolated quantiles. torch.quantile refuses more than 2^24 values, a sort does not."""
    import torch

    ordered = values.sort().values
    positions = torch.tensor(probabilities, dtype=torch.float64, device=values.device) * (len(ordered) - 1)
    below = positions.floor().long()
    above = positions.ceil().long()
    result: list[float] = torch.lerp(ordered[below], ordered[above], positions - below).tolist()
    return result
