"""What stops a run whose numbers cannot be trusted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lopd.config import GuardConfig, TrainingConfig
from megatron_lopd.errors import DriftError, NumericsError

# A step's values of the metrics that limits stand on, by name.
Drift = Mapping[str, float]


@dataclass(frozen=True)
class _Limit:
    """What `train.guard.<key>` says of a metric: the least that it may be, or the most."""

    metric: str
    key: str
    is_least: bool

    def is_passed(self, value: float, limit: float) -> bool:
        return value < limit if self.is_least else value > limit


_LIMITS = (
    _Limit("kept_mass", "min_kept_mass", is_least=True),
    _Limit("effective_sample_size", "min_effective_sample_size", is_least=True),
    _Limit("drift_kl", "max_drift_kl", is_least=False),
)


def check_skipped(skipped_steps: int, max_skipped_steps: int, step: int, grad_norm: float) -> None:
    """Raise NumericsError when more steps were skipped for non-finite gradients than are allowed."""
    if skipped_steps > max_skipped_steps:
        raise NumericsError(
            f"step {step}: the gradient norm is {grad_norm}, and {skipped_steps} steps were skipped so, "
            f"above max_skipped_steps={max_skipped_steps}: in another run_dir, lower optimizer.lr, raise "
            "optimizer.warmup_steps or train in fp32; if it was so from the first step on, check the "
            "starting model's weights"
        )


def recent_drift(
    before: Sequence[Drift], measured: Mapping[str, float], window: int
) -> list[dict[str, float]]:
    """The last `window` steps' values of the guarded metrics, `measured` (this step's) the last of them."""
    own = {limit.metric: measured[limit.metric] for limit in _LIMITS if limit.metric in measured}
    earlier = before[-(window - 1) :] if window > 1 else []
    return [*(dict(each) for each in earlier), own]


def checkpoints_kept(config: TrainingConfig, guard: GuardConfig | None) -> int:
    """How many of the newest checkpoints to keep: one from before the guard's window is to be among them."""
    if guard is None or not guard.is_on:
        return config.keep_checkpoints
    within_window = math.ceil(guard.window / config.checkpoint_every)
    return max(config.keep_checkpoints, within_window + 1)


def drift_seen(recent: Sequence[Drift], guard: GuardConfig, step: int) -> str | None:
    """The first metric whose median over `recent` (of `recent_drift`) is past its limit, in words.

    A median, for a single token that the student now finds a thousand times likelier moves one step's
    values past any limit and means nothing. The metrics are objectives.drift's.
    """
    for limit in _LIMITS:
        bound: float | None = getattr(guard, limit.key)
        if bound is None or limit.metric not in recent[-1]:
            continue
        value = statistics.median(each[limit.metric] for each in recent)
        if limit.is_passed(value, bound):
            return (
                f"step {step}: the student has drifted from the one that made the rollouts: {limit.metric} "
                f"is {value:.3g} over {len(recent)} steps, past train.guard.{limit.key}={bound:g}"
            )
    return None


def check_drift(recent: Sequence[Drift], guard: GuardConfig, step: int, last_good: Path) -> None:
    """Raise DriftError for what `drift_seen` finds over `guard.window` steps; fewer are not judged.

    `last_good` is the checkpoint, or starting model, from before all of those steps.
    """
    if len(recent) == guard.window and (seen := drift_seen(recent, guard, step)):
        raise DriftError(
            f"{seen}: the last good weights are {last_good}; in another run_dir set "
            "train.objective=topk_reverse_kl (with score.top_k), train.refresh_every, "
            "train.optimizer.warmup_steps or a lower train.optimizer.lr, or, to go on here all the same, "
            "another limit of train.guard",
            last_good,
        )
