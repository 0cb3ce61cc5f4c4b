"""Shards: records in a memory-mapped Arrow IPC file, with checksums for every record and batch of records.

Kinds of shard, that is their columns and what makes a record good, are in `schemas`; how values become
bytes is in `columns`. Arrow finds no flipped byte by itself. So every record has an xxh3_64 of its values
(token ids and log-probs), verified whenever it is read, and every record batch an xxh3_128 of its index:
those checksums, the sample ids and other text, the list offsets, the largest token id, and its place in the
file, so that no batch can go missing. The index is verified when the shard is opened, which reads no values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from xxhash import xxh3_64, xxh3_128

from megatron_lopd.artifacts.files import atomic_file
from megatron_lopd.data.columns import Bytes, Column
from megatron_lopd.data.sample_ids import SampleIds
from megatron_lopd.errors import DataError

# A batch is what a writer holds in memory and what is indexed at once: so many records or bytes of values.
RECORDS_PER_BATCH = 1024
BYTES_PER_BATCH = 1 << 25

CHECKSUM = "xxh3_64"
NO_TOKEN = -1


class Identified(Protocol):
    """What every record has."""

    @property
    def sample_id(self) -> str: ...


Record = TypeVar("Record", bound=Identified)


@dataclass(frozen=True)
class ShardKind(Generic[Record]):
    """One kind of shard. `sample_id` is the first of its columns.

    `split` gives a record's values by column, None where it has none; `make` builds a record from what the
    columns decode, given by name; `problem` says in a few words what is wrong with a record, or None, and
    is asked on write and on read. `parameters` tell shards of one kind apart: all of an artifact agree.
    """

    name: str
    version: int
    columns: Mapping[str, Column]
    split: Callable[[Record], Mapping[str, Any]]
    make: Callable[..., Record]
    problem: Callable[[Record], str | None]
    parameters: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def schema(self) -> pa.Schema:
        """The Arrow schema; its metadata names the kind, the version of the format and the parameters."""
        fields = [pa.field(name, column.dtype, nullable=False) for name, column in self.columns.items()]
        fields.append(pa.field(CHECKSUM, pa.uint64(), nullable=False))
        about = {"kind": self.name, "version": str(self.version), **self.parameters}
        return pa.schema(fields, metadata={f"lopd.{key}": value for key, value in about.items()})


def write_shard(path: Path, kind: ShardKind[Record], records: Iterable[Record]) -> int:
    """Write `records` to `path`, which appears only once it is whole and on disk. Returns how many.

    The bytes depend on the records alone. Raises DataError naming file and sample on a bad or repeated
    record, on no records at all, and when the disk is full.
    """
    count = 0
    with atomic_file(path) as stream, pa.ipc.new_file(stream, kind.schema) as writer:
        draft = _BatchDraft(kind, number=0)
        for record in _checked(path, kind, records):
            if draft.is_full():
                writer.write_batch(*draft.seal(path, is_last=False))
                draft = _BatchDraft(kind, draft.number + 1)
            draft.add(record)
            count += 1
        if not count:
            raise DataError(f"{path}: there are no {kind.name} to write")
        writer.write_batch(*draft.seal(path, is_last=True))
    return count


class ShardReader(Generic[Record]):
    """The records of several shards, in the order of the shards, read in place.

    Raises DataError naming the file, and the sample where there is one: on opening, for a file that is
    missing, truncated, of another kind or version or damaged in its index, and for a sample id met twice; on
    reading, for values that are damaged or not valid.
    """

    def __init__(self, kind: ShardKind[Record], paths: Sequence[Path]) -> None:
        self.kind = kind
        self._batches = [batch for path in paths for batch in _open_shard(path, kind)]
        self._starts = np.cumsum([0, *(batch.num_records for batch in self._batches)])
        self.sample_ids = SampleIds([batch.ids for batch in self._batches])
        repeated = self.sample_ids.first_repeated()
        if repeated is not None:
            raise DataError(
                f"{self.path(repeated)}: sample {self.sample_ids[repeated]} is there twice in these "
                f"{kind.name}"
            )

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __iter__(self) -> Iterator[Record]:
        return (self.record(index) for index in range(len(self)))

    def position(self, sample_id: str) -> int:
        """Where a sample is, in O(1). Raises DataError when there is none of that id."""
        position = self.sample_ids.find(sample_id)
        if position is None:
            raise DataError(f"sample {sample_id} is not among these {len(self)} {self.kind.name}")
        return position

    @property
    def max_token(self) -> int:
        """The largest token id in any record, NO_TOKEN when there is none; from the index alone."""
        return max(batch.max_token for batch in self._batches)

    def path(self, index: int) -> Path:
        """The file record `index` is in."""
        return self._find(index)[0].path

    def lengths(self, column: str) -> NDArray[np.int64]:
        """Items of a list column by record, int64 [len(self)], from the offsets alone."""
        empty = np.empty(0, dtype=np.int64)
        return np.concatenate([empty, *(np.diff(batch.offsets[column]) for batch in self._batches)])

    def record(self, index: int) -> Record:
        """Record `index`. Its arrays may be read-only views of the file."""
        batch, row = self._find(index)
        raw = batch.row(row)
        if _checksum(self.kind, raw) != batch.checksums[row]:
            raise DataError(
                f"{batch.path}: damaged: the checksum of sample {self.sample_ids[index]} does not match: "
                "delete the artifact and make it again"
            )
        try:
            values = {name: column.decode(raw[name]) for name, column in self.kind.columns.items()}
            record = self.kind.make(**values)
            problem = self.kind.problem(record)
        except ValueError as error:  # values that have no shape of this kind
            problem = str(error)
        if problem:
            raise DataError(f"{batch.path}: sample {self.sample_ids[index]}: {problem}")
        return record

    def require_vocabulary(self, size: int) -> None:
        """Raise DataError naming file and first sample when a token id is `size` or above.

        The largest id of every batch is part of the index, so values are read only to find the sample.
        """
        for batch, start in zip(self._batches, self._starts, strict=False):
            if batch.max_token < size:
                continue
            for index in range(int(start), int(start) + batch.num_records):
                largest = _largest_token(self.kind, self.kind.split(self.record(index)))
                if largest >= size:
                    raise DataError(
                        f"{batch.path}: sample {self.sample_ids[index]} has token {largest}, beyond the "
                        f"model's vocabulary of {size}: these {self.kind.name} are of another model"
                    )

    def _find(self, index: int) -> tuple[_Batch, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        chosen = int(self._starts.searchsorted(index, side="right")) - 1
        return self._batches[chosen], index - int(self._starts[chosen])


class _BatchDraft(Generic[Record]):
    """A record batch in the making: encoded rows, by column."""

    def __init__(self, kind: ShardKind[Record], number: int) -> None:
        self.number = number
        self._kind = kind
        self._rows: list[dict[str, Bytes]] = []
        self._bytes = 0
        self._max_token = NO_TOKEN

    def is_full(self) -> bool:
        return len(self._rows) >= RECORDS_PER_BATCH or self._bytes >= BYTES_PER_BATCH

    def add(self, record: Record) -> None:
        values = self._kind.split(record)
        row = {name: column.encode(values[name]) for name, column in self._kind.columns.items()}
        self._rows.append(row)
        self._bytes += sum(map(len, row.values()))
        self._max_token = max(self._max_token, _largest_token(self._kind, values))

    def seal(self, path: Path, is_last: bool) -> tuple[pa.RecordBatch, dict[str, str]]:
        """The batch and its metadata, as `write_batch` takes them."""
        arrays = [
            _array(column, [row[name] for row in self._rows]) for name, column in self._kind.columns.items()
        ]
        checksums = np.array([_checksum(self._kind, row) for row in self._rows], dtype=np.uint64)
        batch = pa.RecordBatch.from_arrays([*arrays, pa.array(checksums)], schema=self._kind.schema)
        view = _Batch(path, self._kind, batch, self._max_token)
        return batch, {
            "max_token": str(self._max_token),
            "xxh3_128": view.index_checksum(self.number, is_last),
        }


class _Batch:
    """A record batch as numpy views of its buffers. Raises ValueError when a buffer is too short.

    By column, row i is `values[offsets[i] * item_bytes : offsets[i + 1] * item_bytes]`, uint8; `offsets` are
    int64 [records + 1]. `checksums` uint64 [records].
    """

    def __init__(self, path: Path, kind: ShardKind[Any], batch: pa.RecordBatch, max_token: int) -> None:
        self.path = path
        self.num_records: int = batch.num_rows
        self.max_token = max_token
        self.ids: pa.Array = batch.column(0)
        self.offsets: dict[str, NDArray[np.int64]] = {}
        self._columns, self._parameters = kind.columns, dict(kind.parameters)
        self._values: dict[str, Bytes] = {}
        for (name, column), array in zip(kind.columns.items(), batch.columns, strict=False):
            buffers = array.buffers()
            self.offsets[name] = np.frombuffer(buffers[1], dtype=np.int64, count=self.num_records + 1)
            size = int(self.offsets[name][-1]) * column.item_bytes
            empty = np.empty(0, dtype=np.uint8)
            self._values[name] = np.frombuffer(buffers[-1], np.uint8, count=size) if size else empty
        checksums = batch.column(len(kind.columns)).buffers()[1]
        self.checksums = np.frombuffer(checksums, dtype=np.uint64, count=self.num_records)

    def row(self, row: int) -> dict[str, Bytes]:
        """The bytes of one record, by column."""
        rows = {}
        for name, column in self._columns.items():
            begin, end = self.offsets[name][row : row + 2].tolist()
            rows[name] = self._values[name][begin * column.item_bytes : end * column.item_bytes]
        return rows

    def index_checksum(self, number: int, is_last: bool) -> str:
        place = f"{self._parameters} {number} {is_last} {self.max_token}"
        digest = xxh3_128(place.encode())
        digest.update(self.checksums.data)
        for name, column in self._columns.items():
            digest.update(self.offsets[name].data)
            if column.is_text:
                digest.update(self._values[name].data)
        return digest.hexdigest()


def _open_shard(path: Path, kind: ShardKind[Any]) -> list[_Batch]:
    """Map a shard and verify what can be without reading its values."""
    if not path.is_file():
        raise DataError(f"{path}: no such {kind.name} shard")
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if reader.schema.metadata != kind.schema.metadata or reader.schema != kind.schema:
            wanted = ", ".join(f"{key} {value}" for key, value in kind.parameters.items())
            raise DataError(
                f"{path}: not a {kind.name} shard of version {kind.version}{wanted and f' with {wanted}'}: "
                f"its schema says {reader.schema.metadata}, columns {', '.join(reader.schema.names)}"
            )
        batches: list[_Batch] = []
        last = reader.num_record_batches - 1
        if last < 0:
            raise ValueError("no records")
        for number in range(last + 1):
            arrow, metadata = reader.get_batch_with_custom_metadata(number)
            batch = _Batch(path, kind, arrow, int(metadata[b"max_token"]))
            if metadata[b"xxh3_128"].decode() != batch.index_checksum(number, is_last=number == last):
                raise DataError(
                    f"{path}: damaged: the index checksum of record batch {number} does not match: "
                    "delete the artifact and make it again"
                )
            batches.append(batch)
    except (pa.ArrowException, ValueError, OverflowError, OSError, KeyError, TypeError) as error:
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


def _checksum(kind: ShardKind[Any], row: Mapping[str, Bytes]) -> int:
    """Of a record's values, column after column; their lengths and its text are part of the index."""
    digest = xxh3_64()
    for name, column in kind.columns.items():
        if not column.is_text:
            digest.update(row[name].data)
    return digest.intdigest()


def _largest_token(kind: ShardKind[Any], values: Mapping[str, Any]) -> int:
    """The largest token id of a record, NO_TOKEN when it has none."""
    tokens = [values[name] for name, column in kind.columns.items() if column.holds_tokens]
    return max((int(ids.max()) for ids in tokens if ids is not None), default=NO_TOKEN)


def _array(column: Column, rows: Sequence[Bytes]) -> pa.Array:
    """One column of a batch from its encoded rows."""
    offsets = np.cumsum([0, *(len(row) // column.item_bytes for row in rows)], dtype=np.int64)
    buffers = [None, pa.py_buffer(offsets)]
    values = pa.py_buffer(np.concatenate(rows))
    if column.is_text:
        return pa.Array.from_buffers(column.dtype, len(rows), [*buffers, values])
    items = pa.Array.from_buffers(column.dtype.value_type, int(offsets[-1]), [None, values])
    return pa.Array.from_buffers(column.dtype, len(rows), buffers, children=[items])
