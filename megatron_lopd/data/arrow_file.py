"""Arrow IPC files as shards are: mapped into memory, never compressed, checked before a value is looked at.

Arrow itself trusts a file: it takes as much memory as a compressed one asks for, and follows offsets to where
nothing is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from megatron_lopd.artifacts.committed import CommittedFile
from megatron_lopd.errors import DataError
from megatron_lopd.files.reading import open_file

ShardFile = Path | CommittedFile
"""A shard: of an artifact, then read as its manifest says or not at all; or by itself."""

_MAGIC = b"ARROW1\0\0"
# Of the flatbuffers Message and RecordBatch, in Arrow's Message.fbs: which field is where.
_HEADER, _COMPRESSION = 2, 3


PLAN = b"lopd.plan"  # the key, in a schema, of the digest of the plan that made the shard
_DAMAGE = (pa.ArrowException, struct.error, ValueError, OverflowError, OSError, LookupError, TypeError)


def path_of(file: ShardFile) -> Path:
    """Where a shard is."""
    return file if isinstance(file, Path) else file.path


class ArrowFile:
    """A file's `schema`, and its record batches, each with its metadata. The values stay where they are.

    Raises DataError as CommittedFile.open and `open_file` do; pa.ArrowException, ValueError, struct.error or
    OSError where it is damaged, or compressed.
    """

    def __init__(self, file: ShardFile) -> None:
        opened = open_file(file, follow_links=False) if isinstance(file, Path) else file.open()
        with opened as stream:
            # The open file itself, whatever its name has come to mean.
            content = pa.memory_map(f"/proc/self/fd/{stream.fileno()}").read_buffer()
        head, tail = content.slice(0, 8).to_pybytes(), content.slice(max(0, content.size - 6)).to_pybytes()
        if content.size < 16 or head != _MAGIC or tail != _MAGIC[:6]:
            raise ValueError("not an Arrow file, or not whole")
        # What follows the magic is Arrow's stream. The footer says the same again, and is not asked.
        self._stream = content.slice(8)
        self._reader = pa.ipc.open_stream(self._stream)
        self.schema: pa.Schema = self._reader.schema

    def batches(self) -> Iterator[tuple[pa.RecordBatch, Mapping[bytes, bytes]]]:
        """Each record batch and its metadata, to be gone through once."""
        for message in pa.ipc.MessageReader.open_stream(self._stream):
            if message.type == "record batch" and _is_compressed(message.metadata.to_pybytes()):
                raise ValueError("it is compressed, as no shard is")
        while True:
            try:
                batch, metadata = self._reader.read_next_batch_with_custom_metadata()
            except StopIteration:
                return
            batch.validate(full=True)
            yield batch, metadata or {}


def _is_compressed(message: bytes) -> bool:
    """Whether a record batch's message says that its buffers are. Arrow has found it well-formed."""
    table = _pointed_to(message, 0)
    header = _pointed_to(message, _field(message, table, _HEADER))
    return _field(message, header, _COMPRESSION) != 0


def _pointed_to(data: bytes, at: int) -> int:
    return at + int(struct.unpack_from("<I", data, at)[0])


def _field(data: bytes, table: int, number: int) -> int:
    """Where a table's field is; 0 where it has none."""
    layout = table - int(struct.unpack_from("<i", data, table)[0])
    size = int(struct.unpack_from("<H", data, layout)[0])
    at = 4 + 2 * number
    offset = int(struct.unpack_from("<H", data, layout + at)[0]) if at + 2 <= size else 0
    return table + offset if offset else 0


def plan_of(schema: pa.Schema) -> str | None:
    """The digest of the plan that made a shard, "" for one of no run; None where its schema has none."""
    plan = (schema.metadata or {}).get(PLAN)
    return None if plan is None else str(plan.decode())


def require_plan(path: Path, plan: str) -> None:
    """Raise DataError unless a shard that was made earlier is by this plan. Its schema alone is read."""
    with damage_of(path):
        require_same_plan(path, plan_of(ArrowFile(path).schema), plan)


def require_same_plan(path: Path, made_by: str | None, plan: str) -> None:
    """Raise DataError unless the plan that made a shard, by `plan_of`, is this one."""
    if made_by != plan:
        raise DataError(
            f"{path}: another plan made it ({(made_by or 'none')[:12]}; this stage's is {plan[:12]}): "
            "remove it to have it made again"
        )


@contextmanager
def damage_of(path: Path) -> Iterator[None]:
    """Raise as a DataError what reading a file that is no shard, or a damaged one, may raise."""
    try:
        yield
    except _DAMAGE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            f"{path}: damaged or truncated ({reason}): delete the artifact and make it again"
        ) from error
