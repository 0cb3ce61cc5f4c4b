"""The training state as a Megatron-Core distributed checkpoint that any layout can read.

Model, optimizer, schedule and random state, in one directory. Each rank copies what it keeps to host memory
of its own, and writes it from there alone, so that threads can do it while the next steps run: nothing is
gathered, on the GPU or off it. Which checkpoints there are, whether they are whole and whose they are is
training/checkpoints.py's business: a directory must pass its digests before `load_state` opens it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_lopd.artifacts.committed import FileEntry
from megatron_lopd.checkpoint.layer_states import require_plain
from megatron_lopd.checkpoint.staging import HostBuffer
from megatron_lopd.checkpoint.tensor_shards import Box, ShardedModel
from megatron_lopd.checkpoint.torch_dist import INDEX, Entry, TorchDistReader, index_of, pickled, write_value
from megatron_lopd.errors import CheckpointError, DataError
from megatron_lopd.files.digests import HashedFile
from megatron_lopd.mcore.optimizer import Optimization, common_state, finish_gathering, load_common_state
from megatron_lopd.mcore.private import (
    COMMON_STATE_FNAME,
    CONFIG_FNAME,
    CheckpointingConfig,
    is_main_replica,
    nested_values,
)
from megatron_lopd.mcore.process_groups import Ranks

# Files of a rank, each written and hashed by a thread of its own. Not a setting: it is in the bytes.
FILES = 4
# Threads of a rank that read a checkpoint.
READERS = 4


@dataclass(frozen=True)
class WrittenPart:
    """What one rank has put on the disk: its files, and what is where in them."""

    files: dict[str, FileEntry]
    entries: list[Entry]


@dataclass(frozen=True)
class StagedFile:
    """What will be in a file: `objects`, pickled, by key; `boxes`, whose elements are in host memory."""

    name: str
    objects: list[tuple[str, bytes]]
    boxes: list[Box]


@dataclass(frozen=True)
class StagedState:
    """One rank's part of a checkpoint, copied to host memory: training may go on.

    `whole_files` (name -> bytes) are rank 0's.
    """

    directory: Path
    files: list[StagedFile]
    whole_files: dict[str, bytes]

    def write(self) -> WrittenPart:
        """Write this rank's files into the directory, flush and hash them, all at the same time.

        No collectives: a thread may run it. Raises CheckpointError when it cannot, as on a full disk.
        """
        with _checkpoint_errors(self.directory), ThreadPoolExecutor(FILES, "checkpoint-file") as pool:
            whole = [pool.submit(self._write_whole, *each) for each in self.whole_files.items()]
            written = list(pool.map(self._write_file, self.files))
            files = dict(each.result() for each in whole)
        for name, entry, _ in written:
            files[name] = entry
        return WrittenPart(files, [entry for _, _, entries in written for entry in entries])

    def _write_whole(self, name: str, content: bytes) -> tuple[str, FileEntry]:
        with _new_file(self.directory / name) as stream:
            stream.write(content)
        return name, _entry_of(stream)

    def _write_file(self, file: StagedFile) -> tuple[str, FileEntry, list[Entry]]:
        entries = []
        with _new_file(self.directory / file.name) as stream:
            for key, content in file.objects:
                start = stream.size
                write_value(stream, content)
                entries.append(Entry(key, None, (), (), (), file.name, start, len(content)))
            for box in file.boxes:
                start, dtype = stream.size, box.elements.dtype
                write_value(stream, box.elements.view(box.shape))
                place = file.name, start, stream.size - start
                entries.append(Entry(box.key, dtype, box.size, box.offset, box.shape, *place))
        return file.name, _entry_of(stream), entries


def stage_state(directory: Path, optimization: Optimization, ranks: Ranks, host: HostBuffer) -> StagedState:
    """Copy this rank's part of the training state into `host`, for files in `directory`. Every rank calls.

    Nothing is written yet: a checkpoint is whole once every rank has run `StagedState.write`, and then
    rank 0 `finish_state`. Until this rank's has run, `host` must be left alone.
    """
    finish_gathering(optimization)
    model = ShardedModel(optimization)
    objects = [
        (each.unique_key, pickled([each.data]))  # a list, as Megatron-Core keeps a rank's shards of an object
        for each in (*nested_values(model.objects()), _random_shard(ranks, _random_state()))
        if is_main_replica(each.replica_id)
    ]
    files = [
        StagedFile(f"__{ranks.rank}_{number}.distcp", [] if number else objects, boxes)
        for number, boxes in enumerate(_shared_out(host.copied(model.own_boxes())))
    ]
    whole_files = {}
    if ranks.rank == 0:
        common = {
            "optimizer": common_state(optimization.optimizer),
            "scheduler": optimization.scheduler.state_dict(),
        }
        config = json.dumps(asdict(CheckpointingConfig("torch_dist", 1)))
        whole_files = {COMMON_STATE_FNAME: canonical_pickle(common), CONFIG_FNAME: config.encode()}
    return StagedState(directory, files, whole_files)


def finish_state(directory: Path, parts: Sequence[WrittenPart]) -> dict[str, FileEntry]:
    """Write the index of what all ranks wrote, their `parts` by rank; every file's entry.

    Rank 0 alone calls. Raises CheckpointError when it cannot be written, or the parts do not make a whole.
    """
    files = {name: entry for part in parts for name, entry in part.files.items()}
    index = index_of(entry for part in parts for entry in part.entries)
    with _checkpoint_errors(directory), _new_file(directory / INDEX) as stream:
        stream.write(index)
    return files | {INDEX: _entry_of(stream)}


def load_state(directory: Path, optimization: Optimization, ranks: Ranks, same_layout: bool) -> None:
    """Read a digest-checked checkpoint into the model, the optimizer and the schedule. Every rank calls.

    Each rank reads what it keeps, straight to where it keeps it. What modules keep beside their weights is
    read where both the checkpoint and the model have it: kinds of layers differ in that. The random state is
    restored only under `same_layout` (every parallel size the same): it belongs to a rank, and at another
    layout the ranks keep the one they were seeded with. No step draws from it today.

    Raises CheckpointError when the checkpoint has not the tensors that the model needs, DataError when it is
    malformed.
    """
    reader, model = TorchDistReader(directory), ShardedModel(optimization)
    boxes = list(model.wanted_boxes())
    _require_tensors(reader, boxes)
    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(lambda box: _read_box(reader, box), boxes):
            pass
    with _strange_states(directory):
        for chunk, objects in zip(optimization.chunks, model.objects(), strict=True):
            kept = {
                name: reader.read_object(each.unique_key)[0]
                for name, each in objects.items()
                if each.unique_key in reader.objects
            }
            # Layers that keep nothing save None, which others cannot read. The tensors are there already.
            known = {name: value for name, value in kept.items() if value is not None}
            require_plain(directory, known)
            chunk.module.load_state_dict(known, strict=False)
        common = reader.read_file(COMMON_STATE_FNAME)
        load_common_state(optimization.optimizer, common["optimizer"])
        optimization.scheduler.load_state_dict(common["scheduler"])
        if same_layout:
            _restore_random_state(reader.read_object(_random_shard(ranks, None).unique_key)[0])


@contextmanager
def _strange_states(directory: Path) -> Iterator[None]:
    """Raise as a DataError what comes of giving a state of another shape to who kept it."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(
            f"{directory}: its state is none that this model, optimizer or schedule kept ({reason}): "
            "remove it to go on from the checkpoint before"
        ) from error


def _require_tensors(reader: TorchDistReader, boxes: Iterable[Box]) -> None:
    for box in boxes:
        stored = reader.tensors.get(box.key)
        if stored is None:
            raise CheckpointError(
                f"{reader.directory}: holds no {box.key}: it was saved with other layers (with or without "
                "Transformer Engine, which name those of experts differently): go on as it was saved"
            )
        if tuple(stored.size) != box.size and not box.padded:
            raise CheckpointError(
                f"{reader.directory}: {box.key} is {tuple(stored.size)} there and {box.size} here: "
                "train the model it was saved from"
            )


def _read_box(reader: TorchDistReader, box: Box) -> None:
    if box.padded:
        box.elements.zero_()
    reader.read_box(box.key, box.offset, box.elements.view(box.shape))


def _shared_out(boxes: Sequence[Box]) -> list[list[Box]]:
    """Into FILES runs of about as many bytes."""
    total = sum(box.elements.nbytes for box in boxes)
    shares: list[list[Box]] = [[] for _ in range(FILES)]
    done = 0
    for box in boxes:
        shares[min(FILES - 1, done * FILES // max(1, total))].append(box)
        done += box.elements.nbytes
    return shares


def _random_shard(ranks: Ranks, state: Any) -> ShardedObject:
    return ShardedObject("random", state, (ranks.world_size,), (ranks.rank,))


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def canonical_pickle(value: Any) -> bytes:
    """The one pickle of a value: equal strings and tuples in it become one object.

    A pickle tells of two equal values whether they are one object, which after a resume they may not be.
    """
    return pickled(_with_one_of_each(value, {}))


def _with_one_of_each(value: Any, known: dict[Any, Any]) -> Any:
    if isinstance(value, dict):
        return {_with_one_of_each(k, known): _with_one_of_each(v, known) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_one_of_each(each, known) for each in value]
    if type(value) is tuple:
        whole = tuple(_with_one_of_each(each, known) for each in value)
        return known.setdefault(repr(whole), whole)  # by its text, for which 1 and 1.0 are not the same
    return known.setdefault(value, value) if isinstance(value, str) else value


@contextmanager
def _new_file(path: Path) -> Iterator[HashedFile]:
    """A new file that is on the disk when the block ends."""
    with path.open("wb") as stream:
        yield HashedFile(stream)
        stream.flush()
        os.fsync(stream.fileno())


def _entry_of(file: HashedFile) -> FileEntry:
    return FileEntry(file.size, file.blake3)


@contextmanager
def _checkpoint_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch's zip writer, when a write has failed, fails once more as it ends, in words of its own.
        first = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = " ".join(str(first).split())[-300:]
        raise CheckpointError(
            f"{directory}: the checkpoint cannot be written ({reason}): free some disk space and run again"
        ) from error
