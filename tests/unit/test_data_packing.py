from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lopd.config import ParallelConfig
from megatron_lopd.data.packing import ATTENTION_PARITY_TOKENS, Padding, pack
from megatron_lopd.errors import DataError

BUDGET = 100


@given(
    lengths=st.lists(st.integers(1, BUDGET), max_size=80),
    num_ranks=st.integers(1, 9),
    multiple=st.integers(1, 4),
)
def test_each_sample_once_within_the_budget_and_ranks_alike(
    lengths: list[int], num_ranks: int, multiple: int
) -> None:
    ranks = pack(lengths, BUDGET, num_ranks, multiple)
    assert len(ranks) == num_ranks
    assert len({len(micro_batches) for micro_batches in ranks}) == 1
    packed = [samples for micro_batches in ranks for samples in micro_batches]
    assert sorted(sample for samples in packed for sample in samples) == list(range(len(lengths)))
    assert all(sum(lengths[sample] for sample in samples) <= BUDGET for samples in packed)
    # No group of micro-batches more than best-fit would need.
    alone = sum(len(micro_batches) for micro_batches in pack(lengths, BUDGET, 1))
    assert len(ranks[0]) == max(1, -(-alone // (num_ranks * multiple))) * multiple
    assert pack(lengths, BUDGET, num_ranks, multiple) == ranks


def log_normal_lengths(count: int, seed: int) -> np.ndarray:
    lengths = np.random.default_rng(seed).lognormal(7.5, 0.8, count)
    return np.clip(lengths, 16, 16384).astype(np.int64)


@pytest.mark.parametrize("seed", [0, 1])
def test_fill_on_log_normal_lengths(seed: int) -> None:
    lengths = log_normal_lengths(20_000, seed)
    (micro_batches,) = pack(lengths, 16384, 1)
    assert lengths.sum() / (16384 * len(micro_batches)) >= 0.99


@pytest.mark.parametrize(("count", "num_ranks"), [(2048, 8), (256, 4), (64, 8)])
def test_ranks_carry_equal_cost(count: int, num_ranks: int) -> None:
    lengths = log_normal_lengths(count, seed=0)
    cost = lengths * (1 + lengths / ATTENTION_PARITY_TOKENS)
    loads = [sum(cost[samples].sum() for samples in rank) for rank in pack(lengths, 16384, num_ranks)]
    # Whole documents are moved, so no rank is exactly the mean; left in best-fit order the last is at 1.57.
    assert max(loads) <= 1.1 * np.mean(loads)


def test_a_sample_above_the_budget_is_named() -> None:
    with pytest.raises(DataError, match=r"sample 1 .* 101 tokens.*raise micro_batch_tokens to at least 101"):
        pack([5, 101, 7], BUDGET, 2)


@pytest.mark.parametrize(
    ("parallel", "tokens_multiple", "padding"),
    [
        (ParallelConfig(), 1, Padding(1, 1)),
        (ParallelConfig(tensor=4, processes=4), 1, Padding(1, 4)),
        (ParallelConfig(tensor=4, sequence=False, processes=4), 1, Padding(1, 1)),
        (ParallelConfig(context=3, processes=3), 1, Padding(6, 6)),
        (ParallelConfig(tensor=4, context=2, processes=8), 1, Padding(4, 8)),
        (ParallelConfig(tensor=2, context=2, processes=4), 16, Padding(4, 64)),
    ],
)
def test_what_a_layout_wants_lengths_to_be(
    parallel: ParallelConfig, tokens_multiple: int, padding: Padding
) -> None:
    assert Padding.of(parallel, tokens_multiple) == padding


@given(
    lengths=st.lists(st.integers(1, BUDGET), min_size=1, max_size=20),
    document=st.integers(1, 8),
    times=st.integers(1, 8),
)
def test_padded_micro_batches_stay_within_the_budget(lengths: list[int], document: int, times: int) -> None:
    padding = Padding(document, document * times)
    padded = padding.documents(np.array(lengths))
    least = max(padding.least_budget(length) for length in lengths)
    for budget in (least, least + 1, BUDGET + least):
        for samples in pack(padded, padding.budget(budget), 1)[0]:
            assert -(-int(padded[samples].sum()) // padding.total) * padding.total <= budget
    with pytest.raises(DataError):
        pack(padded, padding.budget(least - 1), 1)
