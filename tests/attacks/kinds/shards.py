"""Shards of a committed run: each record is what was committed, or the shard is refused by name."""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from megatron_lopd.errors import LopdError
from tests.attacks.attack import Attack, lopd
from tests.attacks.changes import file_changes, in_files

ROLLOUTS = [f"run/rollout/rollouts-{number:05d}.arrow" for number in range(3)]
SCORES = [f"run/score/scores-{number:05d}.arrow" for number in range(3)]
BLOWN = [0, 0, 0, 1, 16, 3000]  # MiB, seldom much: a bomb takes seconds to make
FOREIGN = [f"run/generate/rollouts-{number:05d}.arrow" for number in range(3)]


@dataclass(frozen=True)
class Exchange:
    """Two files change places; with `copy`, the second is a copy of the first instead."""

    first: str
    second: str
    copy: bool

    def __call__(self, world: Path) -> None:
        first, second = world / self.first, world / self.second
        if self.copy and first != second:
            shutil.copyfile(first, second)
        elif first != second:
            kept = second.read_bytes()
            shutil.copyfile(first, second)
            first.write_bytes(kept)


@dataclass(frozen=True)
class Extra:
    """A shard more, under `name`: a copy of `of`."""

    of: str
    name: str

    def __call__(self, world: Path) -> None:
        shutil.copyfile(world / self.of, world / self.name)


@dataclass(frozen=True)
class Compressed:
    """The shard's records rewritten with `codec`; with `blown` MiB of zeros in one, where that is not 0."""

    file: str
    codec: str
    blown: int

    def __call__(self, world: Path) -> None:
        path = world / self.file
        with pa.ipc.open_file(io.BytesIO(path.read_bytes())) as reader:
            schema = reader.schema
            batches = [reader.get_batch_with_custom_metadata(n) for n in range(reader.num_record_batches)]
        options = pa.ipc.IpcWriteOptions(compression=self.codec)
        with pa.ipc.new_file(str(path), schema, options=options) as writer:
            for batch, metadata in batches:
                if self.blown:
                    values = _zeros(self.blown << 20, batch.num_rows, schema.field(-1).type)
                    batch = pa.RecordBatch.from_arrays([*batch.columns[:-1], values], schema=schema)
                writer.write_batch(batch, custom_metadata=metadata)


def _zeros(size: int, rows: int, kind: Any) -> pa.Array:
    """A binary column whose first row is `size` zeros, of memory that is never there: nobody writes to it."""
    zeros = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
    offsets = np.full(rows + 1, size, dtype=np.int64)
    offsets[0] = 0
    return pa.Array.from_buffers(kind, rows, [None, pa.py_buffer(offsets), pa.py_buffer(zeros)])


class Shards(Attack[Any]):
    """Bits, cuts, exchanges, other shards, bombs, and what is no file: in what is trained on."""

    name = "shards"
    copies = ("recipe.yaml", "run/generate", "run/sft", "run/rollout", "run/score", "student", "teacher")
    examples = 6

    def changes(self) -> SearchStrategy[Any]:
        shards = [*ROLLOUTS, *SCORES]
        extra = [
            "run/rollout/rollouts-00003.arrow",
            "run/score/scores-00003.arrow",
            "run/rollout/rollouts-x.arrow",
        ]
        return st.one_of(
            in_files(shards, file_changes),
            st.builds(Exchange, st.sampled_from([*shards, *FOREIGN]), st.sampled_from(shards), st.booleans()),
            st.builds(Extra, st.sampled_from([*shards, *FOREIGN]), st.sampled_from(extra)),
            st.builds(
                Compressed,
                st.sampled_from(shards),
                st.sampled_from(["zstd", "lz4"]),
                st.sampled_from(BLOWN),
            ),
        )

    def spoil(self, world: Path, change: Any) -> None:
        change(world)

    def use(self, world: Path, change: Any) -> str:
        """All that is read of them; `lopd verify` says what it says, without which a reader must do."""
        import megatron_lopd as api

        with suppress(LopdError):
            lopd("verify", "run")
        digest = hashlib.sha256()
        for arrays in (api.read_rollouts("run/rollout"), api.read_scores("run/score")):
            for name, value in sorted(vars(arrays).items()):
                digest.update(f"{name} {None if value is None else (value.dtype, value.shape)}".encode())
                digest.update(b"" if value is None else value.tobytes())
        return digest.hexdigest()


class LooseShards(Attack[Any]):
    """A shard by itself, which no manifest speaks for: its checksums alone must tell."""

    name = "loose shards"
    copies = ("run/rollout", "run/score")
    examples = 6

    def changes(self) -> SearchStrategy[Any]:
        shards = [ROLLOUTS[0], SCORES[0]]
        bombs = st.builds(
            Compressed, st.sampled_from(shards), st.sampled_from(["zstd", "lz4"]), st.sampled_from(BLOWN)
        )
        return st.one_of(in_files(shards, file_changes), bombs)

    def spoil(self, world: Path, change: Any) -> None:
        change(world)

    def use(self, world: Path, change: Any) -> str:
        """Every value of every record, and what a person is shown."""
        from megatron_lopd.data.schemas import kind_of
        from megatron_lopd.data.shards import ShardReader

        lines = []
        with np.printoptions(threshold=10**9, floatmode="unique"):
            for name in (ROLLOUTS[0], SCORES[0]):
                path = world / name
                lines += [repr(record) for record in ShardReader(kind_of(path), [path])]
        for name in (ROLLOUTS[0], SCORES[0]):
            lopd("inspect", name, "--samples", "1")
        return "\n".join(lines)

    def named(self, change: Any) -> Sequence[str]:
        return [os.path.basename(change.file)]
