"""The two kinds of shard: what was sampled, and what a teacher said of it."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from megatron_lopd.data.records import FinishReason, Rollout, Score
from megatron_lopd.data.shards import LOG_PROBS, TEXT, TOKENS, ShardKind


def _make_rollout(log_probs: NDArray[np.float32], **columns: Any) -> Rollout:
    # A response has at least one token, so no log-probs can only mean that it was not sampled.
    return Rollout(log_probs=log_probs if len(log_probs) else None, **columns)


def _rollout_problem(rollout: Rollout) -> str | None:
    if rollout.finish_reason not in get_args(FinishReason):
        return f"finish_reason is {rollout.finish_reason!r}, not one of {get_args(FinishReason)}"
    for name, tokens in (("prompt", rollout.prompt_tokens), ("response", rollout.response_tokens)):
        if tokens.dtype != np.int32:
            return f"{name} tokens are {tokens.dtype}, not int32"
        if not len(tokens):
            return f"the {name} is empty"
        if tokens.min() < 0:
            return f"{name} token {int(tokens.argmin())} is {tokens.min()}, below 0"
    if rollout.log_probs is None:
        return None
    if len(rollout.log_probs) != len(rollout.response_tokens):
        return f"{len(rollout.log_probs)} log-probs for {len(rollout.response_tokens)} response tokens"
    return _log_probs_problem(rollout.log_probs)


def _score_problem(score: Score) -> str | None:
    return _log_probs_problem(score.log_probs) if len(score.log_probs) else "there are no log-probs"


def _log_probs_problem(log_probs: NDArray[np.float32]) -> str | None:
    """Engines subtract a log-sum-exp no smaller than the logit, so even rounding gives none above 0.

    One above 0 is therefore an error in whatever made it, and is refused like one that is not finite.
    """
    if log_probs.dtype != np.float32:
        return f"log-probs are {log_probs.dtype}, not float32"
    bad = ~(np.isfinite(log_probs) & (log_probs <= 0))
    if bad.any():
        at = int(bad.argmax())
        return f"log-prob {at} of {len(log_probs)} is {log_probs[at]}: it must be finite and not above 0"
    return None


ROLLOUTS: ShardKind[Rollout] = ShardKind(
    name="rollouts",
    version=1,
    columns={
        "sample_id": TEXT,
        "finish_reason": TEXT,
        "prompt_tokens": TOKENS,
        "response_tokens": TOKENS,
        "log_probs": LOG_PROBS,
    },
    make=_make_rollout,
    problem=_rollout_problem,
)

SCORES: ShardKind[Score] = ShardKind(
    name="scores",
    version=1,
    columns={"sample_id": TEXT, "log_probs": LOG_PROBS},
    make=Score,
    problem=_score_problem,
)
