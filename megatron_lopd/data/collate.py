"""Samples into one packed micro-batch of tensors, with everything a loss over its responses needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_lopd.data.packing import Padding
from megatron_lopd.data.records import Rollout, Sample
from megatron_lopd.errors import DataError

LossNormalization = Literal["sequence_mean", "token_mean"]

# Any id of the vocabulary would do: padding stands after all that could attend to it.
PADDING_TOKEN = 0

RowsOf = Literal["positions", "documents", "responses", "counts", "maximum"]


def rows_of(what: RowsOf) -> Any:
    """A field of MicroBatch, and what its leading axis counts: packed positions, documents (and their end),
    or response tokens; `counts` are numbers that ranks add up, `maximum` one that they share.

    data/context_parallel.py cuts each field by that, and refuses one that says nothing.
    """
    return field(metadata={"rows_of": what})


@dataclass(frozen=True)
class MicroBatch:
    """Documents laid end to end. CPU tensors; S packed tokens, D documents, R response tokens.

    `tokens` int64 [S]; `position_ids` int64 [S], from 0 in each document; `cu_seqlens` int32 [D+1],
    where each document begins, its own padding counted in, and what pads the whole being a document at
    the end; `max_seqlen` tokens of the longest one. `predict_index` int64 [R]: the position whose hidden
    state predicts the response token, one before the token itself (a prompt's last position predicts the
    response's first token). `response_tokens` int64 [R]; `sequence_index` int64 [R], which sample, from 0;
    `response_position` int64 [R], which token of its response, from 0.
    The loss of a step is `sum(loss_weights * loss) / sum(loss_count)`, both sums over the global batch:
    with sequence_mean the weights are one over the response's length and the count is samples, with
    token_mean 1 and response tokens. `loss_weights` float32 [R]. `behaviour_log_probs` (pi_ref's own, at
    temperature 1) and `teacher_log_probs` float32 [R], nats, or None where the samples have none;
    `sampled_log_probs` float32 [R], of the distribution that was drawn from, None where that is pi_ref's own;
    of the teacher's k likeliest (records.TopK): `top_k_ids` int64 [R, k], `top_k_log_probs` float32 [R, k],
    `tail_log_probs` float32 [R]. `prefix_discrepancy` float32 [R]: how much of a response's disagreement
    between teacher and sampler lies before the token (_prefix_discrepancy), None without both their
    log-probs. `num_tokens` leaves padding out.
    """

    tokens: Tensor = rows_of("positions")
    position_ids: Tensor = rows_of("positions")
    cu_seqlens: Tensor = rows_of("documents")
    max_seqlen: int = rows_of("maximum")
    predict_index: Tensor = rows_of("responses")
    response_tokens: Tensor = rows_of("responses")
    sequence_index: Tensor = rows_of("responses")
    response_position: Tensor = rows_of("responses")
    loss_weights: Tensor = rows_of("responses")
    loss_count: int = rows_of("counts")
    behaviour_log_probs: Tensor | None = rows_of("responses")
    sampled_log_probs: Tensor | None = rows_of("responses")
    teacher_log_probs: Tensor | None = rows_of("responses")
    prefix_discrepancy: Tensor | None = rows_of("responses")
    top_k_ids: Tensor | None = rows_of("responses")
    top_k_log_probs: Tensor | None = rows_of("responses")
    tail_log_probs: Tensor | None = rows_of("responses")
    num_samples: int = rows_of("counts")
    num_tokens: int = rows_of("counts")


def collate(samples: Sequence[Sample], loss_normalization: LossNormalization, padding: Padding) -> MicroBatch:
    """Pack `samples` in order, padded as `padding` asks: each document at its end, and then the whole.

    No samples give a micro-batch of padding alone (R = 0), so that a rank with nothing left to do can
    still take part in the step's communication.

    Raises DataError naming the sample when its prompt is empty, when some samples have behaviour
    log-probs, teacher log-probs or top-k scores and others do not, or when their k differ.
    """
    rollouts = [sample.rollout for sample in samples]
    for rollout in rollouts:
        if not len(rollout.prompt_tokens):
            raise DataError(
                f"sample {rollout.sample_id}: the prompt is empty, so nothing predicts its answer"
            )
    prompt = np.array([len(rollout.prompt_tokens) for rollout in rollouts], dtype=np.int64)  # [N]
    response = np.array([len(rollout.response_tokens) for rollout in rollouts], dtype=np.int64)  # [N]
    documents = padding.documents(prompt + response)  # [N]
    rest = -int(documents.sum()) % padding.total or (0 if rollouts else padding.total)
    if rest:
        documents = np.append(documents, rest)  # [D]
    starts = np.concatenate([[0], np.cumsum(documents)])  # [D+1]
    first = starts[: len(rollouts)]  # [N]
    predict_index = _ramps(first + prompt - 1, response)  # [R]
    response_tokens = _joined([rollout.response_tokens for rollout in rollouts], np.int64)
    tokens = torch.full((int(starts[-1]),), PADDING_TOKEN)
    tokens[_ramps(first, prompt)] = _joined([rollout.prompt_tokens for rollout in rollouts], np.int64)
    tokens[predict_index + 1] = response_tokens

    weights = 1.0 / response if loss_normalization == "sequence_mean" else np.ones(len(rollouts))
    count = len(rollouts) if loss_normalization == "sequence_mean" else int(response.sum())
    teacher = [None if sample.score is None else sample.score.log_probs for sample in samples]
    return MicroBatch(
        tokens=tokens,
        position_ids=_ramps(np.zeros_like(documents), documents),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        max_seqlen=int(documents.max()),
        predict_index=predict_index,
        response_tokens=response_tokens,
        sequence_index=torch.from_numpy(np.repeat(np.arange(len(rollouts)), response)),
        response_position=_ramps(np.zeros_like(response), response),
        loss_weights=torch.from_numpy(np.repeat(weights, response).astype(np.float32)),
        loss_count=count,
        behaviour_log_probs=_log_probs(
            rollouts, [each.behaviour_log_probs for each in rollouts], "behaviour"
        ),
        sampled_log_probs=_log_probs(rollouts, [each.log_probs for each in rollouts], "sampled")
        if any(each.untruncated_log_probs is not None for each in rollouts)
        else None,
        teacher_log_probs=_log_probs(rollouts, teacher, "teacher"),
        prefix_discrepancy=_prefix_discrepancies(samples),
        **_top_k(samples),
        num_samples=len(rollouts),
        num_tokens=int((prompt + response).sum()),
    )


def _ramps(first: NDArray[np.int64], count: NDArray[np.int64]) -> Tensor:
    """`first[i], first[i] + 1, ...`, `count[i]` of them for each i, end to end: int64 [sum(count)]."""
    begins = np.cumsum(count) - count
    return torch.from_numpy(np.repeat(first - begins, count) + np.arange(int(count.sum())))


def _joined(parts: Sequence[NDArray[Any]], dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype), *parts], dtype=dtype, casting="same_kind"))


def _log_probs(
    rollouts: Sequence[Rollout], per_sample: Sequence[NDArray[np.float32] | None], whose: str
) -> Tensor | None:
    """float32 [R]; None when no sample has any. Raises DataError on a mixture or a wrong length."""
    if per_sample and all(log_probs is None for log_probs in per_sample):
        return None
    present = []
    for rollout, log_probs in zip(rollouts, per_sample, strict=True):
        if log_probs is None:
            raise DataError(
                f"sample {rollout.sample_id} has no {whose} log-probs, while others of its micro-batch have: "
                "do not mix sampled and unsampled responses"
            )
        if len(log_probs) != len(rollout.response_tokens):
            raise DataError(
                f"sample {rollout.sample_id} has {len(log_probs)} {whose} log-probs for "
                f"{len(rollout.response_tokens)} response tokens: score it again"
            )
        present.append(log_probs)
    return _joined(present, np.float32)


def _prefix_discrepancies(samples: Sequence[Sample]) -> Tensor | None:
    """float32 [R]; None when a sample lacks the teacher's or the behaviour log-probs."""
    parts = []
    for sample in samples:
        behaviour = sample.rollout.behaviour_log_probs
        if sample.score is None or behaviour is None:
            return None
        parts.append(_prefix_discrepancy(sample.score.log_probs, behaviour))
    return _joined(parts, np.float32)


def _prefix_discrepancy(teacher: NDArray[np.float32], behaviour: NDArray[np.float32]) -> NDArray[np.float64]:
    """`sum_{s<t} d_s / sum_s d_s` with `d_s = |log pi_T - log pi_ref|` of a response's token s; float64 [T].

    From 0 at the first token, never falling, at most 1; 0 throughout where the two agree everywhere. Of one
    response alone, and made before context parallelism cuts it: the same however it is packed and split.
    """
    sums = np.concatenate([[0.0], np.cumsum(np.abs(teacher.astype(np.float64) - behaviour))])
    return sums[:-1] / sums[-1] if sums[-1] > 0 else sums[:-1]


def _top_k(samples: Sequence[Sample]) -> dict[str, Tensor | None]:
    """The MicroBatch's three top-k tensors; None when no sample has any. Raises DataError on a mixture."""
    if not samples:  # k = 0: as with the other kept log-probs, there are none to miss
        empty = torch.empty((0, 0))
        return {"top_k_ids": empty.long(), "top_k_log_probs": empty, "tail_log_probs": empty.flatten()}
    scored = [(sample, sample.score.top_k) for sample in samples if sample.score and sample.score.top_k]
    if not scored:
        return {"top_k_ids": None, "top_k_log_probs": None, "tail_log_probs": None}
    k = scored[0][1].ids.shape[1]
    with_k = {sample.rollout.sample_id for sample, top_k in scored if top_k.ids.shape[1] == k}
    for sample in samples:
        if sample.rollout.sample_id not in with_k:
            raise DataError(
                f"sample {sample.rollout.sample_id} does not have the {k} top-k scores that others of its "
                "micro-batch have: score all rollouts with one score.top_k"
            )
    return {
        "top_k_ids": torch.from_numpy(np.concatenate([t.ids for _, t in scored]).astype(np.int64)),
        "top_k_log_probs": torch.from_numpy(np.concatenate([t.log_probs for _, t in scored])),
        "tail_log_probs": torch.from_numpy(np.concatenate([t.tail_log_probs for _, t in scored])),
    }
