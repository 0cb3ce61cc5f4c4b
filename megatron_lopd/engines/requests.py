"""What engines in this process share: requests looked at before anything is run, the errors of a run, and
giving back memory after it."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_lopd.config import EngineConfig
from megatron_lopd.data.records import Rollout
from megatron_lopd.data.vocabulary import ids_without_token
from megatron_lopd.errors import ConfigError, EngineError, is_out_of_memory

# Bytes of scores held while they wait for their turn: requests are run in any order within such a window.
SCORED_BYTES = 1 << 28


def tokenless_ids(config: EngineConfig, model_dir: str, rows: int) -> NDArray[np.int64]:
    """The ids of a model of `rows` that no engine draws, or keeps among the likeliest: int64 [n], in order.

    EngineError for a tokenizer that does not load.
    """
    try:
        return ids_without_token(model_dir, rows, config.trust_remote_code)
    except ConfigError as error:
        raise EngineError(str(error)) from None


def check_scoring(
    rollouts: Sequence[Rollout],
    top_k: int,
    vocabulary: int,
    tokens: int,
    positions: int | None,
    model_dir: str,
) -> None:
    """Raise EngineError for a rollout that the model cannot score, or `top_k` that leaves no tail.

    `vocabulary`: the model's rows; `tokens`: how many of them have a token.
    """
    most = min(tokens, vocabulary - 2)
    if top_k > most:
        raise EngineError(
            f"score.top_k={top_k} leaves none of the {vocabulary} tokens of {model_dir} over "
            f"beside the response token: lower it to at most {most}"
        )
    for rollout in rollouts:
        if not len(rollout.response_tokens):
            raise EngineError(f"sample {rollout.sample_id}: the response to score is empty")
        whole = np.concatenate([rollout.prompt_tokens, rollout.response_tokens])
        check_tokens(rollout.sample_id, whole, 0, vocabulary, positions, model_dir)


def check_tokens(
    sample_id: str,
    tokens: NDArray[np.int32],
    new_tokens: int,
    vocabulary: int,
    positions: int | None,
    model_dir: str,
) -> None:
    """Raise EngineError unless the model has a place for `tokens` int32 [T], T >= 1, and `new_tokens` more.

    `positions` None: the model says no limit.
    """
    if not len(tokens):
        raise EngineError(f"sample {sample_id}: the prompt is empty")
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        outside = int(tokens.max() if tokens.max() >= vocabulary else tokens.min())
        raise EngineError(
            f"sample {sample_id}: token {outside} is outside the vocabulary of {vocabulary} of "
            f"{model_dir}: was it made with another tokenizer?"
        )
    if positions is not None and len(tokens) + new_tokens > positions:
        raise EngineError(
            f"sample {sample_id}: {len(tokens)} tokens and {new_tokens} new ones do not fit the "
            f"{positions} positions of {model_dir}: shorten it or lower sampling.max_new_tokens"
        )


def check_finite(sample_id: str, log_probs: NDArray[np.float32], model_dir: str, dtype: str) -> None:
    """Raise EngineError naming the sample for a log-prob that is not finite."""
    if not np.isfinite(log_probs).all():
        raise EngineError(
            f"sample {sample_id}: {model_dir} gives log-probs that are not finite in "
            f"{dtype}: are its weights damaged? engine.dtype=fp32, in another run_dir, rules out overflow"
        )


def windows(rollouts: Sequence[Rollout], top_k: int, batch_size: int = 1) -> Iterator[Sequence[Rollout]]:
    """Consecutive rollouts whose scores take about SCORED_BYTES; whole batches, so at least one."""
    begin, held = 0, 0
    for index, rollout in enumerate(rollouts):
        held += len(rollout.response_tokens) * (4 if top_k == 0 else 8 + 8 * top_k)
        if held >= SCORED_BYTES and (index + 1 - begin) % batch_size == 0:
            yield rollouts[begin : index + 1]
            begin, held = index + 1, 0
    if begin < len(rollouts):
        yield rollouts[begin:]


@contextmanager
def memory_advice(model_dir: str, device: torch.device, setting: str, advice: str) -> Iterator[None]:
    """Turn running out of memory, on either device, into one line that says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise EngineError(f"{model_dir}: out of memory on {device} ({setting}): {advice}") from error


def give_back_memory() -> None:
    """Return to the driver the GPU memory that nothing here refers to any more: others may need it now.

    What torch keeps for its own next use counts as taken for every other process. A process that has not
    touched a GPU does not begin to, nor looks through all its objects for nothing.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        gc.collect()
        torch.cuda.empty_cache()
