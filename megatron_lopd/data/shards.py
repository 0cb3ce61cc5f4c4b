"""Shards: records in a memory-mapped Arrow IPC file, with checksums for every record and batch of records.

Kinds of shard, that is their columns and what makes a record good, are in `schemas`; how values become
bytes is in `columns`. A record's values (token ids and log-probs) lie together, as one binary value: reading
one at random is one place on the disk. Beside it are its text and, for each column, how many items it has.

Arrow finds no flipped byte by itself. So every record has an xxh3_64 of its values, verified whenever it is
read, and every record batch an xxh3_128 of its index: all that is not values, those checksums, the largest
token id, and its place in the file, so that no batch can go missing. The index is verified when the shard is
opened, which reads no values. A shard also says, there and in its schema, which plan it was made by.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Generic

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest, xxh3_128

from megatron_lopd.data.arrow_file import ArrowFile, ShardFile, damage_of, path_of, plan_of, require_same_plan
from megatron_lopd.data.columns import Bytes
from megatron_lopd.data.sample_ids import SampleIds
from megatron_lopd.data.shard_kind import (
    ALIGNMENT,
    BYTES_PER_BATCH,
    CHECKSUM,
    NO_TOKEN,
    RECORDS_PER_BATCH,
    VALUES,
    Item,
    Record,
    ShardKind,
)
from megatron_lopd.errors import DataError
from megatron_lopd.files.writing import errors_of_file, temporary_file


class ShardWriter(Generic[Record]):
    """Takes the records of a shard, one by one. Made by `shard_writer`. `count`: how many it has."""

    def __init__(self, path: Path, kind: ShardKind[Record], stream: IO[bytes], plan: str) -> None:
        self.count = 0
        self._path, self._kind, self._stream, self._plan = path, kind, stream, plan
        self._file: pa.RecordBatchFileWriter | None = None
        self._draft: _BatchDraft[Record]
        self._seen: set[str] = set()

    def add(self, record: Record) -> None:
        """Take a record. Raises DataError naming file and sample when it is bad or there already."""
        if record.sample_id in self._seen:
            raise DataError(f"{self._path}: sample {record.sample_id} is given twice")
        if problem := self._kind.problem(record):
            raise DataError(f"{self._path}: sample {record.sample_id}: {problem}")
        self._begin(record)
        if self._draft.is_full():
            self._seal(is_last=False)
            self._draft = _BatchDraft(self._kind, self._plan, self._draft.number + 1)
        self._draft.add(record)
        self._seen.add(record.sample_id)
        self.count += 1

    def _begin(self, record: Record) -> None:
        """Have the columns that the first record fills. DataError for a later one that fills more."""
        kind = self._kind.holding(record)
        if self._file is None:
            with errors_of_file(self._path):
                self._file = pa.ipc.new_file(self._stream, kind.schema_of(self._plan))
            self._kind, self._draft = kind, _BatchDraft(kind, self._plan, number=0)
        elif kind is not self._kind:
            raise DataError(
                f"{self._path}: sample {record.sample_id} has {', '.join(self._kind.extra)}, and the first "
                f"of its {self._kind.name} has none: they were not sampled alike"
            )

    def finish(self) -> None:
        """Write what is left. Raises DataError when there was no record at all."""
        if self._file is None:
            raise DataError(f"{self._path}: there are no {self._kind.name} to write")
        self._seal(is_last=True)
        with errors_of_file(self._path):
            self._file.close()

    def _seal(self, is_last: bool) -> None:
        assert self._file is not None  # a record came before
        with errors_of_file(self._path):
            self._file.write_batch(*self._draft.seal(self._path, is_last))


@contextmanager
def shard_writer(path: Path, kind: ShardKind[Record], plan: str = "") -> Iterator[ShardWriter[Record]]:
    """Make `path` of the records that the block adds; it appears only once it is whole and on disk.

    `plan`: the digest of the plan of the stage that makes it; none for a shard of no run. The bytes depend on
    the records and that alone. Errors of the file are DataErrors, those of whatever makes the
    records pass as they are; then there is no file. Raises DataError as `ShardWriter` does.
    """
    with ExitStack() as file:
        with errors_of_file(path):
            shard = ShardWriter(path, kind, file.enter_context(temporary_file(path)), plan)
        yield shard
        shard.finish()
        with errors_of_file(path):
            file.close()


def write_shard(path: Path, kind: ShardKind[Record], records: Iterable[Record], plan: str = "") -> int:
    """Write `records` to `path`, as `shard_writer` does. Returns how many."""
    with shard_writer(path, kind, plan) as shard:
        for record in records:
            shard.add(record)
    return shard.count


class ShardReader(Generic[Record]):
    """The records of several shards, in the order of the shards, read in place.

    Raises DataError naming the file, and the sample where there is one: on opening, for a file that is
    missing, truncated, of another kind or version or damaged in its index, and for a sample id met twice; on
    reading, for values that are damaged or not valid. With `plan`, also for a shard that another plan made.
    `check_ids=False` where ids have been looked at, by
    whoever committed the shards: so many processes may read one artifact, each with its files mapped and
    next to nothing of its own.
    """

    def __init__(
        self,
        kind: ShardKind[Record],
        files: Sequence[ShardFile],
        check_ids: bool = True,
        plan: str | None = None,
    ) -> None:
        self.kind, self.paths = kind, [path_of(file) for file in files]
        self._batches = [batch for file in files for batch in _open_shard(file, kind, plan)]
        self._starts = np.cumsum([0, *(batch.num_records for batch in self._batches)])
        self.sample_ids = SampleIds([batch.ids for batch in self._batches])
        if check_ids:
            self.check_ids()

    def check_ids(self) -> None:
        """Raise DataError naming the first sample id that is met twice."""
        repeated = self.sample_ids.first_repeated()
        if repeated is not None:
            raise DataError(
                f"{self.path(repeated)}: sample {self.sample_ids[repeated]} is there twice in these "
                f"{self.kind.name}"
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
        """Items of a column by record, int64 [len(self)], from the index alone; 0 in a file without it."""
        items = (batch.items.get(column, np.zeros(batch.num_records)) for batch in self._batches)
        return np.concatenate([np.empty(0), *items]).astype(np.int64)

    def matches(self, column: str, value: str) -> NDArray[np.bool_]:
        """Of which records text `column` is `value`, bool [len(self)], from the index alone."""
        found = (batch.matches(column, value.encode()) for batch in self._batches)
        return np.concatenate([np.empty(0, dtype=bool), *found])

    def record(self, index: int) -> Record:
        """Record `index`. Its arrays may be read-only views of the file."""
        batch, row, raw = self._values(index)
        fields: dict[str, Any] = {name: batch.text(name, row) for name in self.kind.text}
        begin = 0
        try:
            for name, column in batch.kind.columns.items():
                end = begin + int(batch.items[name][row]) * column.item_bytes
                fields[name] = column.decode(raw[begin:end])
                begin = end
            record = self.kind.make(**fields)
            problem = self.kind.problem(record)
        except ValueError as error:  # values that have no shape of this kind
            problem = str(error)
        if problem:
            raise DataError(f"{batch.path}: sample {self.sample_ids[index]}: {problem}")
        return record

    def require_whole(self) -> None:
        """Raise DataError naming the first sample whose values are damaged; all are read."""
        for index in range(len(self)):
            self._values(index)

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

    def _values(self, index: int) -> tuple[_Batch, int, Bytes]:
        batch, row = self._find(index)
        raw = batch.values(row)
        if xxh3_64_intdigest(raw.data) != batch.checksums[row]:
            raise DataError(
                f"{batch.path}: damaged: the checksum of sample {self.sample_ids[index]} does not match: "
                "delete the artifact and make it again"
            )
        return batch, row, raw

    def _find(self, index: int) -> tuple[_Batch, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        chosen = int(self._starts.searchsorted(index, side="right")) - 1
        return self._batches[chosen], index - int(self._starts[chosen])


class _BatchDraft(Generic[Record]):
    """A record batch in the making: encoded records, by column of the file."""

    def __init__(self, kind: ShardKind[Record], plan: str, number: int) -> None:
        self.number = number
        self._kind, self._plan = kind, plan
        self._fields: dict[str, list[Any]] = {name: [] for name in kind.schema.names}
        self._bytes = 0
        self._max_token = NO_TOKEN

    def is_full(self) -> bool:
        return len(self._fields[VALUES]) >= RECORDS_PER_BATCH or self._bytes >= BYTES_PER_BATCH

    def add(self, record: Record) -> None:
        fields = self._kind.split(record)
        parts = {name: column.encode(fields[name]) for name, column in self._kind.columns.items()}
        values = b"".join(parts.values())
        values += bytes(-len(values) % ALIGNMENT)
        for name in self._kind.text:
            self._fields[name].append(fields[name])
        for name, column in self._kind.columns.items():
            self._fields[name].append(len(parts[name]) // column.item_bytes)
        self._fields[CHECKSUM].append(xxh3_64_intdigest(values))
        self._fields[VALUES].append(values)
        self._bytes += len(values)
        self._max_token = max(self._max_token, _largest_token(self._kind, fields))

    def seal(self, path: Path, is_last: bool) -> tuple[pa.RecordBatch, dict[str, str]]:
        """The batch and its metadata, as `write_batch` takes them."""
        schema = self._kind.schema_of(self._plan)
        arrays = [pa.array(self._fields[each.name], each.type) for each in schema]
        batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
        view = _Batch(path, self._kind, batch, self._max_token)
        checksum = view.index_checksum(self._plan, self.number, is_last)
        return batch, {"max_token": str(self._max_token), "xxh3_128": checksum}


class _Batch:
    """A record batch as numpy views of its buffers. Raises ValueError when a buffer is too short.

    `items` uint32 [records] by column; `checksums` uint64 [records].
    """

    def __init__(self, path: Path, kind: ShardKind[Any], batch: pa.RecordBatch, max_token: int) -> None:
        self.path, self.kind = path, kind
        self.num_records: int = batch.num_rows
        self.max_token = max_token
        self.ids: pa.Array = batch.column(0)
        self._text = {name: _Ragged(batch.column(name)) for name in kind.text}
        self.items = {name: _flat(batch.column(name), np.uint32) for name in kind.columns}
        self.checksums = _flat(batch.column(CHECKSUM), np.uint64)
        self._values = _Ragged(batch.column(VALUES))

    def text(self, name: str, row: int) -> str:
        return self._text[name].row(row).tobytes().decode()

    def matches(self, name: str, value: bytes) -> NDArray[np.bool_]:
        text = self._text[name]
        found = (text.row(row).tobytes() == value for row in range(self.num_records))
        return np.fromiter(found, dtype=bool, count=self.num_records)

    def values(self, row: int) -> Bytes:
        return self._values.row(row)

    def index_checksum(self, plan: str, number: int, is_last: bool) -> str:
        digest = xxh3_128(f"{plan} {number} {is_last} {self.max_token}".encode())
        for ragged in self._text.values():
            digest.update(ragged.offsets.data)
            digest.update(ragged.data.data)
        for items in self.items.values():
            digest.update(items.data)
        digest.update(self.checksums.data)
        digest.update(self._values.offsets.data)
        return digest.hexdigest()


class _Ragged:
    """A text or binary column in place: row i is `data[offsets[i] : offsets[i + 1]]`. int64 and uint8."""

    def __init__(self, array: pa.Array) -> None:
        _, offsets, data = array.buffers()
        self.offsets = np.frombuffer(offsets, dtype=np.int64, count=len(array) + 1)
        size = int(self.offsets[-1])
        self.data: Bytes = np.frombuffer(data, np.uint8, count=size) if size else np.empty(0, dtype=np.uint8)

    def row(self, row: int) -> Bytes:
        begin, end = self.offsets[row : row + 2].tolist()
        return self.data[begin:end]


def _flat(array: pa.Array, dtype: type[Item]) -> NDArray[Item]:
    return np.frombuffer(array.buffers()[1], dtype=dtype, count=len(array))


def _open_shard(file: ShardFile, kind: ShardKind[Any], plan: str | None) -> list[_Batch]:
    """Map a shard and verify what can be without reading its values."""
    path = path_of(file)
    with damage_of(path):
        arrow_file = ArrowFile(file)
        schema = arrow_file.schema
        if set(kind.extra) & set(schema.names):
            kind = kind.with_extra
        made_by = plan_of(schema)
        if made_by is None or not schema.equals(kind.schema_of(made_by), check_metadata=True):
            wanted = ", ".join(f"{key} {value}" for key, value in kind.parameters.items())
            raise DataError(
                f"{path}: not a {kind.name} shard of version {kind.version}{wanted and f' with {wanted}'}: "
                f"its schema says {str(schema.metadata)[:200]}, columns {', '.join(schema.names)[:200]}"
            )
        if plan is not None:
            require_same_plan(path, made_by, plan)
        batches: list[_Batch] = []
        found = list(arrow_file.batches())
        if not found:
            raise ValueError("no records")
        for number, (arrow, metadata) in enumerate(found):
            batch = _Batch(path, kind, arrow, int(metadata[b"max_token"]))
            checksum = batch.index_checksum(made_by, number, is_last=number == len(found) - 1)
            if metadata[b"xxh3_128"].decode() != checksum:
                raise DataError(
                    f"{path}: damaged: the index checksum of record batch {number} does not match: "
                    "delete the artifact and make it again"
                )
            batches.append(batch)
        return batches


def _largest_token(kind: ShardKind[Any], fields: Mapping[str, Any]) -> int:
    """The largest token id of a record, NO_TOKEN when it has none."""
    tokens = [fields[name] for name, column in kind.columns.items() if column.holds_tokens]
    return max((int(ids.max()) for ids in tokens if ids is not None), default=NO_TOKEN)
