from __future__ import annotations

from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from megatron_lopd.data import sample_ids
from megatron_lopd.data.sample_ids import SampleIds

IDS = st.lists(st.text("aé0/-", min_size=0, max_size=4), max_size=40)
# With the second most ids share a hash with another, in the first and the last bucket.
HASHES = [xxh3_64_intdigest, lambda data: (1 << 64) - 1 if len(data) % 2 else 0]


def made(ids: Sequence[str], parts: int) -> SampleIds:
    splits = np.array_split(np.arange(len(ids)), parts)
    return SampleIds([pa.array([ids[i] for i in split], pa.large_string()) for split in splits])


@pytest.mark.parametrize("digest", HASHES)
@given(ids=IDS, parts=st.integers(1, 5))
def test_found_in_place_and_repeats_noticed(
    digest: Callable[[bytes], int], ids: list[str], parts: int
) -> None:
    with mock.patch.object(sample_ids, "xxh3_64_intdigest", digest):
        table = made(ids, parts)
        assert [table[index] for index in range(len(table))] == ids
        repeats = [index for index, each in enumerate(ids) if each in ids[:index]]
        assert table.first_repeated() == (repeats[0] if repeats else None)
        unique = list(dict.fromkeys(ids))
        table = made(unique, parts)
        for index, each in enumerate(unique):
            assert table.find(each) == index
        assert table.find("nobody") is None


@pytest.mark.parametrize("digest", HASHES)
@given(data=st.data(), mine=IDS, theirs=IDS, parts=st.integers(1, 5))
def test_matching_is_what_a_dictionary_says(
    digest: Callable[[bytes], int], data: st.DataObject, mine: list[str], theirs: list[str], parts: int
) -> None:
    mine = list(dict.fromkeys(mine))
    theirs = data.draw(
        st.permutations(list(dict.fromkeys([*theirs, *mine[: data.draw(st.integers(0, 40))]])))
    )
    where = {each: index for index, each in enumerate(theirs)}
    expected = [where.get(each, -1) for each in mine]
    with mock.patch.object(sample_ids, "xxh3_64_intdigest", digest):
        positions = made(mine, parts).positions_in(made(theirs, 2))
        assert (list(range(len(mine))) if positions is None else positions.tolist()) == expected
        assert made(mine, parts).positions_in(made(mine, 1)) is None
