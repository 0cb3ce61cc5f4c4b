"""The ids of many samples, left where they are in the mapped files, found and matched by hash."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest


class SampleIds:
    """Sample ids in order, from the id columns of record batches: nothing but these columns is kept.

    Hashes only say where to look: an id counts as found when it is the same text. They are made when they
    are asked for, 16 bytes a sample, and kept for `find` alone.
    """

    def __init__(self, columns: Sequence[pa.Array]) -> None:
        self._ids: pa.ChunkedArray = pa.chunked_array(columns, pa.large_string())

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> str:
        text: str = self._ids[index].as_py()
        return text

    def find(self, sample_id: str) -> int | None:
        """The position of an id, or None; in O(1) after the first."""
        digest = xxh3_64_intdigest(sample_id.encode())
        for position in self._table.with_hash(digest):
            if self[position] == sample_id:
                return position
        return None

    def first_repeated(self) -> int | None:
        """The first position whose id is that of an earlier one; None when all differ."""
        hashes = self._hashed()
        ordered = np.sort(hashes)
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if not len(twice):
            return None
        seen: set[str] = set()
        for position in np.flatnonzero(np.isin(hashes, twice)).tolist():
            if self[position] in seen:
                return position
            seen.add(self[position])
        return None

    def positions_in(self, other: SampleIds) -> NDArray[np.int64] | None:
        """Where each id is in `other`, -1 where it is not: int64 [len(self)]. None: just where it is here."""
        if self._ids.equals(other._ids):
            return None
        positions = _Table(other._hashed()).positions(self._hashed())
        found = np.flatnonzero(positions >= 0)
        theirs = other._ids.combine_chunks().take(pa.array(positions[found]))
        same = pc.equal(self._ids.combine_chunks().take(pa.array(found)), theirs).to_numpy(
            zero_copy_only=False
        )
        for position in found[~same]:  # another text of the same hash: not met in practice
            there = other.find(self[int(position)])
            positions[position] = -1 if there is None else there
        return positions

    @cached_property
    def _table(self) -> _Table:
        return _Table(self._hashed())

    def _hashed(self) -> NDArray[np.uint64]:
        """The hash of each id, uint64 [n]."""
        return np.concatenate([np.empty(0, np.uint64), *map(_hashes, self._ids.chunks)])


class _Table:
    """Hashes, uint64 [n], and where they are."""

    def __init__(self, hashes: NDArray[np.uint64]) -> None:
        self._order: NDArray[np.int64] = np.argsort(hashes)
        self._sorted: NDArray[np.uint64] = hashes[self._order]  # ascending
        self._shift = 64 - max(1, len(hashes).bit_length())

    def with_hash(self, digest: int) -> Iterator[int]:
        """The positions that have a hash."""
        bucket = digest >> self._shift
        for at in range(int(self._buckets[bucket]), int(self._buckets[bucket + 1])):
            if int(self._sorted[at]) == digest:
                yield int(self._order[at])

    def positions(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """A position of each of `hashes`, -1 where there is none: int64 [m]."""
        if not len(self._order):
            return np.full(len(hashes), -1, dtype=np.int64)
        at = np.minimum(np.searchsorted(self._sorted, hashes), len(self._order) - 1)
        return np.where(self._sorted[at] == hashes, self._order[at], -1)

    @cached_property
    def _buckets(self) -> NDArray[np.int64]:
        """Where each run of equal leading hash bits begins, [2^bits + 1]: about one id in each."""
        bounds = np.arange((1 << (64 - self._shift)) + 1, dtype=np.uint64)
        return np.searchsorted(self._sorted >> np.uint64(self._shift), bounds)


def _hashes(ids: pa.Array) -> NDArray[np.uint64]:
    """xxh3_64 of the text of each id, uint64 [n]."""
    _, offsets, text = ids.buffers()
    bounds = np.frombuffer(offsets, dtype=np.int64, count=len(ids) + 1).tolist()
    data = text.to_pybytes()
    hashes = (xxh3_64_intdigest(data[begin:end]) for begin, end in pairwise(bounds))
    return np.fromiter(hashes, dtype=np.uint64, count=len(ids))
