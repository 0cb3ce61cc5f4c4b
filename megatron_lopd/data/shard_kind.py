"""What a kind of shard is: its columns, and how a record becomes values and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from megatron_lopd.data.arrow_file import PLAN
from megatron_lopd.data.columns import Column

# A batch is what a writer holds in memory and what is indexed at once: so many records or bytes of values.
RECORDS_PER_BATCH = 1024
BYTES_PER_BATCH = 1 << 25

# Of a record's values: its columns' bytes end to end, padded so that the next record's are aligned.
VALUES, CHECKSUM = "values", "xxh3_64"
ALIGNMENT = 8

NO_TOKEN = -1


class Identified(Protocol):
    """What every record has."""

    @property
    def sample_id(self) -> str: ...


Record = TypeVar("Record", bound=Identified)
Item = TypeVar("Item", bound=np.generic)


@dataclass(frozen=True)
class ShardKind(Generic[Record]):
    """One kind of shard: a record's `text`, `sample_id` first, and `columns` of arrays, largest items first.

    `extra` are columns that a file has, before the others, when its first record fills one of them.
    `split` gives a record's text and arrays by name, None where it has none; `make` builds a record from
    them, given by name; `problem` says in a few words what is wrong with a record, or None, and
    is asked on write and on read. `parameters` tell shards of one kind apart: all of an artifact agree.
    """

    name: str
    version: int
    text: tuple[str, ...]
    columns: Mapping[str, Column]
    split: Callable[[Record], Mapping[str, Any]]
    make: Callable[..., Record]
    problem: Callable[[Record], str | None]
    parameters: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Column] = field(default_factory=dict)

    @cached_property
    def with_extra(self) -> ShardKind[Record]:
        """This kind in a file that has the extra columns."""
        return replace(self, columns={**self.extra, **self.columns}, extra={})

    def holding(self, record: Record) -> ShardKind[Record]:
        """This kind in a file that begins with `record`."""
        fields = self.split(record)
        return self.with_extra if any(fields[name] is not None for name in self.extra) else self

    def schema_of(self, plan: str) -> pa.Schema:
        """The Arrow schema of a shard that `plan` made; its metadata names that, and what `schema` names."""
        return self.schema.with_metadata({**self.schema.metadata, PLAN: plan.encode()})

    @cached_property
    def schema(self) -> pa.Schema:
        """The Arrow schema; its metadata names the kind, the version of the format and the parameters."""
        # The large types: 32-bit offsets would end a column at 2 GiB.
        dtypes = {name: pa.large_string() for name in self.text}
        dtypes |= {name: pa.uint32() for name in self.columns}  # items
        dtypes |= {CHECKSUM: pa.uint64(), VALUES: pa.large_binary()}
        fields = [pa.field(name, dtype, nullable=False) for name, dtype in dtypes.items()]
        about = {"kind": self.name, "version": str(self.version), **self.parameters}
        return pa.schema(fields, metadata={f"lopd.{key}": value for key, value in about.items()})
