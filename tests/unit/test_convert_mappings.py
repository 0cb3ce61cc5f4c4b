"""The tables and the two reshapes that everything else follows from."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lopd.families.weight_rules import Split, merge_parts, split_parts


@settings(max_examples=60)
@given(
    groups_per_rank=st.integers(1, 4),
    tp=st.integers(1, 4),
    heads_per_group=st.integers(1, 4),
    head_dim=st.integers(1, 4),
    columns=st.sampled_from([(), (3,)]),  # a bias, a weight
)
def test_qkv_of_the_ranks_is_the_qkv_of_the_whole(
    groups_per_rank: int, tp: int, heads_per_group: int, head_dim: int, columns: tuple[int, ...]
) -> None:
    groups = groups_per_rank * tp
    kv_rows = groups * head_dim
    whole = torch.arange(kv_rows * (heads_per_group + 2) * (columns or (1,))[0]).reshape(-1, *columns)
    parts = list(torch.split(whole, [kv_rows * heads_per_group, kv_rows, kv_rows]))
    merged = merge_parts(Split.QKV, parts, groups)
    # What Megatron does with the whole: rank r's slice is its r-th block of rows.
    slices = [[part.chunk(tp)[rank] for part in parts] for rank in range(tp)]
    assert torch.equal(torch.cat([merge_parts(Split.QKV, mine, groups_per_rank) for mine in slices]), merged)
    for back, part in zip(split_parts(Split.QKV, merged, groups, heads_per_group), parts, strict=True):
        assert torch.equal(back, part)


def test_qkv_order_is_per_group_its_queries_its_key_its_value() -> None:
    query, key, value = (torch.tensor(rows) for rows in ([0, 1, 2, 3], [10, 11], [20, 21]))
    assert merge_parts(Split.QKV, [query, key, value], groups=2).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
