"""The ranks' slices are the whole, once: every value says where it came from."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_lopd.data.collate import MicroBatch, collate
from megatron_lopd.data.context_parallel import fields_by_rows, slice_micro_batch
from megatron_lopd.data.packing import Padding
from tests.unit.test_data_collate import sample

shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), max_size=5)


@given(shapes=shapes, size=st.integers(2, 4), times=st.integers(1, 3))
def test_the_union_over_ranks_is_the_whole(shapes: list[tuple[int, int]], size: int, times: int) -> None:
    samples = [sample(index, *shape) for index, shape in enumerate(shapes)]
    whole = collate(samples, "sequence_mean", Padding(2 * size, 2 * size * times))
    parts = [slice_micro_batch(whole, size, rank) for rank in range(size)]

    starts, lengths = whole.cu_seqlens[:-1].tolist(), whole.cu_seqlens.diff().tolist()
    seen_tokens, seen_responses = [], []
    for rank, part in enumerate(parts):
        positions = [
            position
            for start, length in zip(starts, lengths, strict=True)
            for chunk in (rank, 2 * size - 1 - rank)
            for position in range(
                start + chunk * length // (2 * size), start + (chunk + 1) * length // (2 * size)
            )
        ]
        assert torch.equal(part.tokens, whole.tokens[positions])
        assert torch.equal(part.position_ids, whole.position_ids[positions])
        assert torch.equal(part.cu_seqlens, whole.cu_seqlens)
        assert part.max_seqlen == whole.max_seqlen
        seen_tokens += positions

        row = {place: index for index, place in enumerate(whole.predict_index.tolist())}
        rows = [row[positions[place]] for place in part.predict_index.tolist()]
        check_rows(part, whole, rows)
        seen_responses += rows
    assert sorted(seen_tokens) == list(range(len(whole.tokens)))
    assert sorted(seen_responses) == list(range(len(whole.response_tokens)))
    for count in ("loss_count", "num_samples", "num_tokens"):
        assert sum(getattr(part, count) for part in parts) == getattr(whole, count)


def check_rows(part: MicroBatch, whole: MicroBatch, rows: list[int]) -> None:
    """Every per-response tensor holds the rows of the whole that it should."""
    checked = 0
    for field in fields(MicroBatch):
        value, expected = getattr(part, field.name), getattr(whole, field.name)
        if field.name in ("tokens", "position_ids", "cu_seqlens", "predict_index"):
            continue
        if isinstance(expected, torch.Tensor):
            assert torch.equal(value, expected[rows]), field.name
            checked += 1
    assert checked == 10


def test_what_is_not_there_stays_so() -> None:
    batch = collate([sample(0, 2, 7)], "token_mean", Padding(4, 4))
    assert batch.top_k_ids is not None
    bare = MicroBatch(**{**vars(batch), "teacher_log_probs": None, "top_k_ids": None})
    part = slice_micro_batch(bare, 2, 1)
    assert part.teacher_log_probs is None
    assert part.top_k_ids is None


def test_a_field_that_does_not_say_what_its_rows_are_is_refused() -> None:
    """It would be cut as if it had a row for each response token, under context parallelism alone."""
    assert set(fields_by_rows(MicroBatch)) == {field.name for field in fields(MicroBatch)}

    @dataclass(frozen=True)
    class Wider(MicroBatch):
        lengths: torch.Tensor

    with pytest.raises(TypeError, match=r"Wider\.lengths does not say what its rows are.*= rows_of\("):
        fields_by_rows(Wider)


def test_what_counts_documents_stays_whole() -> None:
    """Of one tensor each: a row a position is cut, a row a document is not."""
    whole = collate([sample(0, 3, 9), sample(1, 2, 14)], "token_mean", Padding(4, 4))
    part = slice_micro_batch(whole, 2, 1)
    rows = fields_by_rows(MicroBatch)
    for name, value in vars(part).items():
        if isinstance(value, torch.Tensor):
            before = len(getattr(whole, name))
            assert (len(value) == before) == (rows[name] == "documents"), name
