"""Shards: records in a memory-mapped Arrow IPC file, with checksums for every batch of records.

Kinds of shard, that is their columns and what makes a record good, are in `schemas`. Arrow finds no
flipped byte by itself, so each record batch carries two xxh3_128 checksums in its metadata. One is of its
index: sample ids and other text, list offsets, and its place in the file, so that no batch can go missing;
it is verified when the shard is opened. The other is of its values, token ids and log-probs; it is verified
the first time a record of the batch is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from xxhash import xxh3_128

from megatron_lopd.artifacts.files import atomic_file
from megatron_lopd.errors import DataError

RECORDS_PER_BATCH = 1024

# The large types: 32-bit offsets would end a column at 2 GiB.
TEXT = pa.large_string()
TOKENS = pa.large_list(pa.field("item", pa.int32(), nullable=False))
LOG_PROBS = pa.large_list(pa.field("item", pa.float32(), nullable=False))


class Identified(Protocol):
    """What every record has."""

    @property
    def sample_id(self) -> str: ...


Record = TypeVar("Record", bound=Identified)


@dataclass(frozen=True)
class ShardKind(Generic[Record]):
    """One kind of shard. Columns are named after the record's attributes; `sample_id` is one of them.

    A record's None is stored as an empty list. `make` builds a record from its columns, given by name
    (`str`, or read-only arrays into the mapped file); `problem` says in a few words what is wrong with a
    record, or None, and is asked on write and on read.
    """

    name: str
    version: int
    columns: Mapping[str, pa.DataType]
    make: Callable[..., Record]
    problem: Callable[[Record], str | None]

    @cached_property
    def schema(self) -> pa.Schema:
        """The Arrow schema; its metadata names the kind and the version of the format."""
        fields = [pa.field(name, dtype, nullable=False) for name, dtype in self.columns.items()]
        return pa.schema(fields, metadata={"lopd.kind": self.name, "lopd.version": str(self.version)})


def write_shard(path: Path, kind: ShardKind[Record], records: Iterable[Record]) -> int:
    """Write `records` to `path`, which appears only once it is whole and on disk. Returns how many.

    The bytes depend on the records alone. Raises DataError naming file and sample on a bad or repeated
    record, on no records at all, and when the disk is full.
    """
    good = _checked(path, kind, records)
    count, number = 0, 0
    with atomic_file(path) as stream, pa.ipc.new_file(stream, kind.schema) as writer:
        chunk = list(islice(good, RECORDS_PER_BATCH))
        if not chunk:
            raise DataError(f"{path}: there are no {kind.name} to write")
        while chunk:
            following = list(islice(good, RECORDS_PER_BATCH))
            arrays = [
                _array(dtype, [getattr(r, name) for r in chunk]) for name, dtype in kind.columns.items()
            ]
            batch = pa.RecordBatch.from_arrays(arrays, schema=kind.schema)
            view = _BatchView(path, kind, batch, number, is_last=not following)
            writer.write_batch(batch, custom_metadata=view.checksums())
            count, number, chunk = count + len(chunk), number + 1, following
    return count


class ShardReader(Generic[Record]):
    """The records of several shards, in the order of the shards, read in place.

    `sample_ids` are in record order. Raises DataError naming the file, and the sample where there is one:
    on opening, for a file that is missing, truncated, of another kind or version or damaged in its index, and
    for a sample id met twice; on reading, for values that are damaged or not valid.
    """

    def __init__(self, kind: ShardKind[Record], paths: Sequence[Path]) -> None:
        self.kind = kind
        self._batches = [batch for path in paths for batch in _open_shard(path, kind)]
        self._starts = np.cumsum([0, *(batch.num_records for batch in self._batches)])
        self.sample_ids: list[str] = []
        self._positions: dict[str, int] = {}
        for batch in self._batches:
            for row in range(batch.num_records):
                sample_id = batch.text("sample_id", row)
                if sample_id in self._positions:
                    raise DataError(f"{batch.path}: sample {sample_id} is there twice in these {kind.name}")
                self._positions[sample_id] = len(self.sample_ids)
                self.sample_ids.append(sample_id)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __iter__(self) -> Iterator[Record]:
        return (self.record(index) for index in range(len(self)))

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._positions

    def position(self, sample_id: str) -> int:
        """Where a sample is, in O(1). Raises DataError when there is none of that id."""
        if sample_id not in self._positions:
            raise DataError(f"sample {sample_id} is not among these {len(self)} {self.kind.name}")
        return self._positions[sample_id]

    def path(self, index: int) -> Path:
        """The file record `index` is in."""
        return self._find(index)[0].path

    def lengths(self, column: str) -> NDArray[np.int64]:
        """Items of a list column by record, int64 [len(self)], from the offsets alone."""
        empty = np.empty(0, dtype=np.int64)
        return np.concatenate([empty, *(np.diff(batch.columns[column].offsets) for batch in self._batches)])

    def record(self, index: int) -> Record:
        """Record `index`; its arrays are read-only views of the file."""
        batch, row = self._find(index)
        batch.verify_values()
        record = self.kind.make(**{name: batch.value(name, row) for name in self.kind.columns})
        if problem := self.kind.problem(record):
            raise DataError(f"{batch.path}: sample {self.sample_ids[index]}: {problem}")
        return record

    def _find(self, index: int) -> tuple[_BatchView, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        chosen = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._batches[chosen], index - int(self._starts[chosen])


@dataclass(frozen=True)
class _ColumnView:
    """A column's memory: row i is `values[offsets[i]:offsets[i + 1]]`; offsets int64 [records + 1]."""

    offsets: NDArray[np.int64]
    values: NDArray[Any]


class _BatchView:
    """A record batch as numpy views of its buffers. Raises ValueError when a buffer is too short."""

    def __init__(
        self, path: Path, kind: ShardKind[Any], batch: pa.RecordBatch, number: int, is_last: bool
    ) -> None:
        self.path = path
        self._place = f"{number} {is_last}".encode()
        self.num_records: int = batch.num_rows
        self.columns: dict[str, _ColumnView] = {}
        self._is_text = {name: dtype == TEXT for name, dtype in kind.columns.items()}
        self._unverified: str | None = None
        for (name, dtype), array in zip(kind.columns.items(), batch.columns, strict=True):
            buffers = array.buffers()
            offsets = np.frombuffer(buffers[1], dtype=np.int64, count=batch.num_rows + 1)
            item = np.uint8 if dtype == TEXT else dtype.value_type.to_pandas_dtype()
            size = int(offsets[-1])
            values = np.frombuffer(buffers[-1], dtype=item, count=size) if size else np.empty(0, dtype=item)
            self.columns[name] = _ColumnView(offsets, values)

    def text(self, column: str, row: int) -> str:
        return bytes(self._row(column, row)).decode()

    def value(self, column: str, row: int) -> str | NDArray[Any]:
        return self.text(column, row) if self._is_text[column] else self._row(column, row)

    def checksums(self) -> dict[str, str]:
        """The batch's checksums, as they are kept in its metadata."""
        return {"xxh3_128.index": self._index_checksum(), "xxh3_128.values": self._values_checksum()}

    def expect(self, checksums: Mapping[bytes, bytes]) -> bool:
        """Whether the index is what `checksums` says; the values are compared when they are read."""
        self._unverified = checksums[b"xxh3_128.values"].decode()
        return checksums[b"xxh3_128.index"].decode() == self._index_checksum()

    def verify_values(self) -> None:
        if self._unverified is None:
            return
        if self._unverified != self._values_checksum():
            first, last = self.text("sample_id", 0), self.text("sample_id", self.num_records - 1)
            raise DataError(
                f"{self.path}: damaged: the checksum of samples {first} to {last} does not match: "
                "delete the artifact and make it again"
            )
        self._unverified = None

    def _row(self, column: str, row: int) -> NDArray[Any]:
        view = self.columns[column]
        return view.values[view.offsets[row] : view.offsets[row + 1]]

    def _index_checksum(self) -> str:
        digest = xxh3_128(self._place)
        for name, column in self.columns.items():
            digest.update(column.offsets.data)
            if self._is_text[name]:
                digest.update(column.values.data)
        return digest.hexdigest()

    def _values_checksum(self) -> str:
        digest = xxh3_128()
        for name, column in self.columns.items():
            if not self._is_text[name]:
                digest.update(column.values.data)
        return digest.hexdigest()


def _open_shard(path: Path, kind: ShardKind[Any]) -> list[_BatchView]:
    """Map a shard and verify what can be without reading its values."""
    if not path.is_file():
        raise DataError(f"{path}: no such {kind.name} shard")
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if reader.schema.metadata != kind.schema.metadata or reader.schema != kind.schema:
            raise DataError(
                f"{path}: not a {kind.name} shard of version {kind.version}: its schema says "
                f"{reader.schema.metadata}, columns {', '.join(reader.schema.names)}"
            )
        batches: list[_BatchView] = []
        last = reader.num_record_batches - 1
        if last < 0:
            raise ValueError("no records")
        for number in range(last + 1):
            batch, checksums = reader.get_batch_with_custom_metadata(number)
            view = _BatchView(path, kind, batch, number, is_last=number == last)
            if not view.expect(checksums):
                raise DataError(
                    f"{path}: damaged: the index checksum of record batch {number} does not match: "
                    "delete the artifact and make it again"
                )
            batches.append(view)
    except (pa.ArrowException, ValueError, OSError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path}: damaged or truncated ({reason}): delete the artifact and make it again"
        ) from error
    return batches


def _checked(path: Path, kind: ShardKind[Record], records: Iterable[Record]) -> Iterator[Record]:
    """Pass good records on; raise DataError at the first that is not."""
    seen: set[str] = set()
    for record in records:
        if record.sample_id in seen:
            raise DataError(f"{path}: sample {record.sample_id} is given twice")
        if problem := kind.problem(record):
            raise DataError(f"{path}: sample {record.sample_id}: {problem}")
        seen.add(record.sample_id)
        yield record


def _array(dtype: pa.DataType, values: Sequence[Any]) -> pa.Array:
    """One column of a batch."""
    if dtype == TEXT:
        return pa.array(values, dtype)
    item = dtype.value_type.to_pandas_dtype()
    rows = [np.empty(0, dtype=item) if value is None else value for value in values]
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows)), type=dtype)
