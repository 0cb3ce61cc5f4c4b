"""Put things in a row near where they want to be, without overlap."""

from __future__ import annotations

from collections.abc import Sequence


def spread(
    wanted: Sequence[float], separations: Sequence[float], weights: Sequence[float] | None = None
) -> list[float]:
    """Positions in the given order, `separations[i]` or more between i and i + 1, nearest to `wanted`.

    Nearest in least squares with `weights` (all 1 when not given): isotonic regression of the positions
    less the room taken before them, by pooling adjacent violators (Barlow et al. 1972). `separations` is
    one shorter than `wanted`.
    """
    taken = [0.0]
    for separation in separations:
        taken.append(taken[-1] + separation)
    pools: list[tuple[float, float, int]] = []  # (mean, weight, size)
    for want, before, weight in zip(wanted, taken, weights or [1.0] * len(wanted), strict=True):
        mean, size = want - before, 1
        while pools and pools[-1][0] > mean:
            other_mean, other_weight, other_size = pools.pop()
            mean = (mean * weight + other_mean * other_weight) / (weight + other_weight)
            weight += other_weight
            size += other_size
        pools.append((mean, weight, size))
    means = [mean for mean, _, size in pools for _ in range(size)]
    return [mean + before for mean, before in zip(means, taken, strict=True)]
