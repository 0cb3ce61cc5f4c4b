from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_lopd.data.collate import MicroBatch, collate
from megatron_lopd.data.packing import Padding
from megatron_lopd.data.records import Rollout, Sample, Score, TopK
from megatron_lopd.errors import DataError


def sample(index: int, prompt: int, response: int) -> Sample:
    """Every value says where it comes from: sample, part and position."""
    base = 10_000 * (index + 1)
    response_tokens = np.arange(base + 5000, base + 5000 + response, dtype=np.int32)
    rollout = Rollout(
        sample_id=f"sample-{index}",
        prompt_tokens=np.arange(base, base + prompt, dtype=np.int32),
        response_tokens=response_tokens,
        finish_reason="stop",
        log_probs=-response_tokens.astype(np.float32),
    )
    values = response_tokens.astype(np.float32)
    columns = np.arange(3, dtype=np.int32)
    top_k = TopK(response_tokens[:, None] + columns, -3 * values[:, None] - columns, -4 * values)
    return Sample(rollout, Score(rollout.sample_id, -2 * values, top_k))


def check_against_oracle(batch: MicroBatch, samples: list[Sample], padding: Padding) -> None:
    """Walk the packed batch token by token and find each sample again."""
    start, row = 0, 0
    assert batch.prefix_discrepancy is not None
    for index, one in enumerate(samples):
        prompt, response = one.rollout.prompt_tokens, one.rollout.response_tokens
        assert batch.cu_seqlens[index] == start
        for position, token in enumerate([*prompt, *response]):
            assert batch.tokens[start + position] == token
            assert batch.position_ids[start + position] == position
        for position, token in enumerate(response):
            assert batch.response_tokens[row] == token
            assert batch.response_position[row] == position
            # |teacher - behaviour| is the token itself here; float32 keeps 6e-8.
            expected = response[:position].sum() / response.sum()
            assert batch.prefix_discrepancy[row].item() == pytest.approx(expected, abs=1e-7)
            # The hidden state just before the token predicts it: the token itself comes next.
            assert batch.tokens[batch.predict_index[row] + 1] == token
            assert batch.sequence_index[row] == index
            assert batch.behaviour_log_probs is not None
            assert batch.teacher_log_probs is not None
            assert batch.behaviour_log_probs[row] == -float(token)
            assert batch.teacher_log_probs[row] == -2 * float(token)
            assert batch.top_k_ids is not None
            assert batch.top_k_log_probs is not None
            assert batch.tail_log_probs is not None
            assert batch.top_k_ids[row].tolist() == [token, token + 1, token + 2]
            assert batch.top_k_log_probs[row].tolist() == [-3 * token, -3 * token - 1, -3 * token - 2]
            assert batch.tail_log_probs[row] == -4 * float(token)
            row += 1
        end = start + -(-(len(prompt) + len(response)) // padding.document) * padding.document
        assert batch.position_ids[start:end].tolist() == list(range(end - start))
        start = end
    assert row == len(batch.predict_index) == len(batch.response_tokens) == len(batch.loss_weights)
    assert batch.num_tokens == sum(len(one.rollout.prompt_tokens) for one in samples) + row
    assert len(batch.tokens) == len(batch.position_ids) == batch.cu_seqlens[-1]
    assert len(batch.tokens) % padding.total == 0
    assert len(batch.tokens) - start < padding.total
    assert batch.max_seqlen == int(batch.cu_seqlens.diff().max())
    assert bool((batch.cu_seqlens.diff() > 0).all())
    assert torch.equal(batch.position_ids[start:], torch.arange(len(batch.tokens) - start))


shapes = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6)


@given(shapes=shapes, document=st.integers(1, 8), times=st.integers(1, 4))
def test_positions_tokens_and_log_probs_line_up(
    shapes: list[tuple[int, int]], document: int, times: int
) -> None:
    samples = [sample(index, *shape) for index, shape in enumerate(shapes)]
    padding = Padding(document, document * times)
    check_against_oracle(collate(samples, "token_mean", padding), samples, padding)


@given(shapes=shapes)
def test_loss_is_normalised_over_the_global_batch_however_it_is_split(shapes: list[tuple[int, int]]) -> None:
    samples = [sample(index, *shape) for index, shape in enumerate(shapes)]
    losses = [np.cos(one.rollout.response_tokens.astype(np.float64)) for one in samples]
    expected = {
        "sequence_mean": np.mean([loss.mean() for loss in losses]),
        "token_mean": np.concatenate(losses).mean(),
    }
    for normalization, value in expected.items():
        for split in range(len(samples) + 1):
            halves = (samples[:split], samples[split:])
            parts = [collate(part, normalization, Padding(total=4)) for part in halves]
            total = sum(
                float(part.loss_weights.double() @ part.response_tokens.double().cos()) for part in parts
            )
            # 36 tokens at most, weights rounded to float32 (6e-8 relative each).
            assert total / sum(part.loss_count for part in parts) == pytest.approx(value, rel=1e-6, abs=1e-6)


def test_an_empty_micro_batch_is_padding_alone() -> None:
    batch = collate([], "sequence_mean", Padding(total=8))
    assert batch.cu_seqlens.tolist() == [0, 8]
    assert batch.position_ids.tolist() == list(range(8))
    assert (batch.loss_count, batch.num_samples, batch.num_tokens, batch.max_seqlen) == (0, 0, 0, 8)
    for empty in (
        batch.predict_index,
        batch.response_tokens,
        batch.teacher_log_probs,
        batch.behaviour_log_probs,
    ):
        assert empty is not None
        assert len(empty) == 0


def test_dtypes() -> None:
    batch = collate([sample(0, 2, 3)], "sequence_mean", Padding(total=4))
    int64 = (
        batch.tokens,
        batch.position_ids,
        batch.predict_index,
        batch.response_tokens,
        batch.sequence_index,
    )
    assert {tensor.dtype for tensor in int64} == {torch.int64}
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.loss_weights.dtype == torch.float32


def test_unsampled_responses_have_no_log_probs_and_do_not_mix() -> None:
    sampled, other = sample(0, 2, 3), sample(1, 2, 3)
    text = Sample(replace(other.rollout, log_probs=None), score=None)
    batch = collate([text], "sequence_mean", Padding())
    assert batch.behaviour_log_probs is None
    assert batch.teacher_log_probs is None
    with pytest.raises(DataError, match="sample-1 has no behaviour log-probs"):
        collate([sampled, text], "sequence_mean", Padding())


def test_bad_samples_are_named() -> None:
    good = sample(0, 2, 3)
    other = sample(1, 2, 3)
    assert other.score is not None
    without_top_k = replace(other, score=replace(other.score, top_k=None))
    with pytest.raises(DataError, match="sample-1 does not have the 3 top-k scores"):
        collate([good, without_top_k], "sequence_mean", Padding())
    short = replace(good, score=Score(good.rollout.sample_id, np.zeros(2, dtype=np.float32)))
    with pytest.raises(DataError, match="sample-0 has 2 teacher log-probs for 3 response tokens"):
        collate([short], "sequence_mean", Padding())
    no_prompt = replace(good, rollout=replace(good.rollout, prompt_tokens=np.empty(0, dtype=np.int32)))
    with pytest.raises(DataError, match="sample-0: the prompt is empty"):
        collate([no_prompt], "sequence_mean", Padding())
