"""The kinds of shard: what was sampled, and what a teacher said of it, with its top k or without."""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megatron_lopd.data.arrow_file import ArrowFile, ShardFile, path_of
from megatron_lopd.data.columns import (
    COMPAND_LIMIT,
    LOG_PROBS,
    MAX_VOCABULARY,
    TOKENS,
    TOP_K_IDS,
    TOP_K_LOG_PROBS,
)
from megatron_lopd.data.records import FinishReason, Rollout, Score, TopK
from megatron_lopd.data.shard_kind import ShardKind
from megatron_lopd.errors import DataError

LOWEST = float(np.finfo(np.float32).min)


# Kept beside the sampler's own log-probs where those are of another distribution.
UNTRUNCATED = "untruncated_log_probs"


def _make_rollout(**columns: Any) -> Rollout:
    # A response has at least one token, so no log-probs can only mean that none are kept.
    for name in ("log_probs", UNTRUNCATED):
        if not len(columns.get(name, ())):
            columns[name] = None
    return Rollout(**columns)


def _rollout_problem(rollout: Rollout) -> str | None:
    if rollout.finish_reason not in get_args(FinishReason):
        return f"finish_reason is {rollout.finish_reason!r}, not one of {get_args(FinishReason)}"
    for name, tokens in (("prompt", rollout.prompt_tokens), ("response", rollout.response_tokens)):
        if not len(tokens):
            return f"the {name} is empty"
        if problem := _tokens_problem(tokens, f"{name} token"):
            return problem
    if rollout.log_probs is None:
        return None if rollout.untruncated_log_probs is None else "there are untruncated log-probs alone"
    for name, log_probs in (
        ("log-prob", rollout.log_probs),
        ("untruncated log-prob", rollout.untruncated_log_probs),
    ):
        if log_probs is None:
            continue
        if len(log_probs) != len(rollout.response_tokens):
            return f"{len(log_probs)} {name}s for {len(rollout.response_tokens)} response tokens"
        if problem := _log_probs_problem(log_probs, name):
            return problem
    return None


def _score_problem(score: Score, top_k: int) -> str | None:
    if not len(score.log_probs):
        return "there are no log-probs"
    if problem := _log_probs_problem(score.log_probs, "log-prob"):
        return problem
    if score.top_k is None:
        return f"there is no top k, and the shard's is {top_k}" if top_k else None
    shape = (len(score.log_probs), top_k)
    if score.top_k.ids.shape != shape or score.top_k.log_probs.shape != shape:
        return (
            f"top-k ids are {score.top_k.ids.shape} and log-probs {score.top_k.log_probs.shape}, where the "
            f"shard's are [response tokens, k] = {shape}"
        )
    if len(score.top_k.tail_log_probs) != len(score.log_probs):
        return f"{len(score.top_k.tail_log_probs)} tail log-probs for {len(score.log_probs)} log-probs"
    return (
        _tokens_problem(score.top_k.ids, "top-k id")
        or _log_probs_problem(score.top_k.tail_log_probs, "tail log-prob")
        or _log_probs_problem(score.top_k.log_probs, "top-k log-prob", least=-COMPAND_LIMIT)
    )


def _tokens_problem(tokens: NDArray[np.int32], name: str) -> str | None:
    if tokens.dtype != np.int32:
        return f"{name}s are {tokens.dtype}, not int32"
    # One look for both ends: as unsigned numbers, negative ones are the largest.
    unsigned = tokens.view(np.uint32)
    if unsigned.max() >= MAX_VOCABULARY:
        at = int(unsigned.argmax())
        return f"{name} {at} is {tokens.ravel()[at]}: ids must be from 0 to {MAX_VOCABULARY - 1}"
    return None


def _log_probs_problem(log_probs: NDArray[np.float32], name: str, least: float = LOWEST) -> str | None:
    """Engines subtract a log-sum-exp no smaller than the logit, so even rounding gives none above 0.

    One above 0 is therefore an error in whatever made it, and is refused like one that is not finite.
    """
    if log_probs.dtype != np.float32:
        return f"{name}s are {log_probs.dtype}, not float32"
    # By the extremes, which a NaN passes on to both: twice as fast as a mask of all values.
    if log_probs.min() >= least and log_probs.max() <= 0:
        return None
    flat = log_probs.ravel()
    at = int((~((flat >= least) & (flat <= 0))).argmax())
    bound = "" if least == LOWEST else f" and not below {least:g}"
    return f"{name} {at} of {flat.size} is {flat[at]}: it must be finite and not above 0{bound}"


def _split_score(score: Score) -> dict[str, Any]:
    top_k = score.top_k
    return {
        "sample_id": score.sample_id,
        "log_probs": score.log_probs,
        "top_k_ids": top_k and top_k.ids,
        "top_k_log_probs": top_k and top_k.log_probs,
        "tail_log_probs": top_k and top_k.tail_log_probs,
    }


@cache
def scores_kind(top_k: int) -> ShardKind[Score]:
    """Scores with the teacher's `top_k` likeliest tokens, or without any (0)."""

    def make(
        sample_id: str,
        log_probs: NDArray[np.float32],
        top_k_ids: NDArray[np.int32] | None = None,
        top_k_log_probs: NDArray[np.float32] | None = None,
        tail_log_probs: NDArray[np.float32] | None = None,
    ) -> Score:
        if top_k_ids is None or top_k_log_probs is None or tail_log_probs is None:
            return Score(sample_id, log_probs)
        shape = (-1, top_k)
        return Score(
            sample_id,
            log_probs,
            TopK(top_k_ids.reshape(shape), top_k_log_probs.reshape(shape), tail_log_probs),
        )

    columns = {"log_probs": LOG_PROBS}
    if top_k:
        columns |= {
            "tail_log_probs": LOG_PROBS,
            "top_k_log_probs": TOP_K_LOG_PROBS,
            "top_k_ids": TOP_K_IDS,
        }
    return ShardKind(
        name="scores",
        version=3,
        text=("sample_id",),
        columns=columns,
        split=_split_score,
        make=make,
        problem=lambda score: _score_problem(score, top_k),
        parameters={"top_k": str(top_k)},
    )


ROLLOUTS: ShardKind[Rollout] = ShardKind(
    name="rollouts",
    version=3,
    text=("sample_id", "finish_reason"),
    columns={"log_probs": LOG_PROBS, "prompt_tokens": TOKENS, "response_tokens": TOKENS},
    extra={UNTRUNCATED: LOG_PROBS},
    split=vars,
    make=_make_rollout,
    problem=_rollout_problem,
)

SCORES = scores_kind(0)


def kind_of(file: ShardFile) -> ShardKind[Any]:
    """The kind a shard says it is. DataError when it is not a shard."""
    path = path_of(file)
    try:
        about = ArrowFile(file).schema.metadata or {}
        name, top_k = about[b"lopd.kind"].decode(), int(about.get(b"lopd.top_k", 0))
    except (pa.ArrowException, ValueError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a shard, or damaged ({reason}): delete it and make it again") from error
    if name == ROLLOUTS.name:
        return ROLLOUTS
    return scores_kind(top_k)
