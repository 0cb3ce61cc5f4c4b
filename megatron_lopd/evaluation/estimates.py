"""What graded samples say of a model: means with their errors, pass@k, and the vote of the majority."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts, in [0, 1], with its standard error over prompts; None of a single prompt.

    The error is the deviation of the prompts' own values (n - 1 in its denominator) over sqrt(n): it holds
    the choice of prompts and the luck of sampling alike.
    """

    share: float
    error: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """Of one value a prompt, such as the share of its samples that are right."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, None)
    return Estimate(mean, float(np.std(values, ddof=1)) / math.sqrt(len(values)))


def percent(share: float, error: float | None) -> str:
    """A share in percent, with its standard error where it has one: 82.3 ± 0.8."""
    return f"{100 * share:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that k of a prompt's samples, drawn without putting back, hold a right one.

    1 - C(samples - right, k) / C(samples, k), unbiased (Chen et al. 2021, arXiv 2107.03374, eq. 1), as a
    product that no binomial overflows. Wants 0 <= right <= samples and 1 <= k <= samples.
    """
    if samples - right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - right + 1, samples + 1))


def ks_of(samples: int) -> list[int]:
    """The k that pass@k is reported at: 1, 2, 4, ... and `samples` itself, ascending."""
    return sorted({2**power for power in range(samples.bit_length())} | {samples})


@dataclass(frozen=True)
class Paired:
    """Two models on the same prompts: on how many each is the better, and how likely so much is by chance.

    `p`: the two-sided sign test's, exact: were each as likely to win a prompt that they differ on, how often
    the wins would be shared as unevenly as here, or more so.
    """

    problems: int
    better: int
    worse: int
    p: float


def paired(before: Sequence[float], after: Sequence[float]) -> Paired:
    """Of one value a prompt under each, the prompts in the same order: how `after` does beside `before`."""
    better = sum(now > was for was, now in zip(before, after, strict=True))
    worse = sum(now < was for was, now in zip(before, after, strict=True))
    differ = better + worse

    def chance(wins: int) -> float:  # in logs: of many thousands no float holds the binomial
        ways = math.lgamma(differ + 1) - math.lgamma(wins + 1) - math.lgamma(differ - wins + 1)
        return math.exp(ways - differ * math.log(2))

    tail = math.fsum(chance(wins) for wins in range(min(better, worse) + 1))
    return Paired(len(before), better, worse, min(1.0, 2 * tail))


def majority(answers: Sequence[tuple[str | None, bool]]) -> bool:
    """Whether the commonest answer to a prompt, the earliest of equals, is right; one without any is wrong.

    `answers`: (answer, right) of each sample; None does not vote.
    """
    votes = Counter(answer for answer, _ in answers if answer is not None)
    if not votes:
        return False
    winner = votes.most_common(1)[0][0]
    return next(right for answer, right in answers if answer == winner)
