"""The training state as a Megatron-Core distributed checkpoint that any layout can read.

Model, optimizer, schedule and random state, in one directory. It is staged in host memory with the ranks
together, and written by each rank alone, so that a thread can do it while the next steps run. Which
checkpoints there are, whether they are whole and whose they are is training/checkpoints.py's business:
common.pt and the sharded objects are pickles, so a directory must pass its digests before `load_state`
opens it.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any, cast

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save as save_with_torch
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_lopd.artifacts.files import HashedFile, sha256_file
from megatron_lopd.artifacts.manifest import FileEntry
from megatron_lopd.errors import CheckpointError
from megatron_lopd.mcore.optimizer import (
    Optimization,
    finish_gathering,
    load_optimizer_state,
    optimizer_sharded_state,
)
from megatron_lopd.mcore.parallel import Ranks


@dataclass(frozen=True)
class WrittenPart:
    """What one rank has put on the disk: its files, and where each of its shards is in them."""

    files: dict[str, FileEntry]
    shards: list[WriteResult]


@dataclass(frozen=True)
class StagedState:
    """One rank's part of a checkpoint, copied to host memory: training may go on.

    `whole_files` (name -> bytes) and `metadata`, which lists the shards of all ranks, are rank 0's.
    """

    directory: Path
    shards_file: str
    shards: deque[tuple[WriteItem, Tensor | BytesIO]]
    whole_files: dict[str, bytes]
    metadata: Metadata | None

    def write(self) -> WrittenPart:
        """Write this rank's files into the directory, flush and hash them; the copy is gone after it.

        No collectives: a thread may run it. Raises CheckpointError when it cannot, as on a full disk.
        """
        files: dict[str, FileEntry] = {}
        results: list[WriteResult] = []
        with _checkpoint_errors(self.directory):
            for name, content in self.whole_files.items():
                with _hashed_file(self.directory / name, files) as stream:
                    stream.write(content)
            if self.shards:
                with _hashed_file(self.directory / self.shards_file, files) as stream:
                    while self.shards:
                        results.append(self._write_shard(stream, *self.shards.popleft()))
        return WrittenPart(files, results)

    def _write_shard(self, stream: HashedFile, item: WriteItem, data: Tensor | BytesIO) -> WriteResult:
        start = stream.size
        if isinstance(data, BytesIO):
            stream.write(data.getbuffer())
        else:
            # A clone, since a shard may be a view, and torch.save would write all that it is a view of.
            torch.save(data.clone(), cast(IO[bytes], stream))
        size = stream.size - start
        return WriteResult(item.index, size, _StorageInfo(self.shards_file, start, size))


def stage_state(directory: Path, optimization: Optimization, ranks: Ranks) -> StagedState:
    """Copy the training state to host memory and plan who writes what. Every rank calls.

    Nothing is written yet: a checkpoint is whole once every rank has run `StagedState.write`, and then
    rank 0 `finish_state`. Raises CheckpointError when the ranks' shards do not fit together.
    """
    finish_gathering(optimization)
    state = _sharded_state(optimization, ranks, is_loading=False)
    state["scheduler"] = optimization.scheduler.state_dict()
    sharded, common = save_preprocess(state)
    # Megatron-Core has gathered the optimizer's state into tensors of its own; the rest is still the model's.
    _detach_from_model({name: part for name, part in sharded.items() if name != "optimizer"})
    plan, *_ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    writer = _StagingWriter(directory)
    with _checkpoint_errors(directory):
        save_with_torch(
            mcore_to_pyt_state_dict(plan, False),
            storage_writer=writer,
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
    whole_files = {}
    if ranks.rank == 0:
        config = json.dumps(asdict(CheckpointingConfig("torch_dist", 1)))
        whole_files = {COMMON_STATE_FNAME: _saved(common), CONFIG_FNAME: config.encode()}
    return StagedState(directory, writer.file_name, writer.staged, whole_files, writer.metadata)


def finish_state(staged: StagedState, parts: Sequence[WrittenPart]) -> dict[str, FileEntry]:
    """Write the index of the shards that all ranks wrote, their `parts` by rank; every file's entry.

    Rank 0 alone calls. Raises CheckpointError when it cannot be written.
    """
    assert staged.metadata is not None  # rank 0's
    entries = {name: entry for part in parts for name, entry in part.files.items()}
    writer = _PlainWriter(staged.directory)
    with _checkpoint_errors(staged.directory):
        writer.finish(staged.metadata, [part.shards for part in parts])
        index = staged.directory / ".metadata"
        return entries | {index.name: FileEntry(index.stat().st_size, sha256_file(index))}


def load_state(directory: Path, optimization: Optimization, ranks: Ranks, same_layout: bool) -> None:
    """Read a digest-checked checkpoint into the model, the optimizer and the schedule. Every rank calls.

    The random state is restored only under `same_layout` (every parallel size the same): it belongs to a
    rank, and at another layout the ranks keep the one they were seeded with. No step draws from it today.
    """
    state = _sharded_state(optimization, ranks, is_loading=True)
    if not same_layout:
        del state["random"]
    loaded = dist_checkpointing.load(state, str(directory))
    for number, chunk in enumerate(optimization.chunks):
        chunk.module.load_state_dict(loaded["model"][str(number)])
    load_optimizer_state(optimization.optimizer, loaded["optimizer"])
    optimization.scheduler.load_state_dict(loaded["scheduler"])
    if same_layout:
        _restore_random_state(loaded["random"])


def _sharded_state(optimization: Optimization, ranks: Ranks, is_loading: bool) -> dict[str, Any]:
    # By chunk here, but in the file under names that count the whole model's layers.
    model_state = {
        str(number): chunk.module.sharded_state_dict() for number, chunk in enumerate(optimization.chunks)
    }
    return {
        "model": model_state,
        "optimizer": optimizer_sharded_state(optimization.optimizer, model_state, is_loading),
        "random": ShardedObject(
            "random",
            None if is_loading else _random_state(),
            (ranks.world_size,),
            (ranks.rank,),
        ),
    }


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


def _detach_from_model(sharded: dict[str, Any]) -> None:
    """Put copies in host memory in place of this rank's shards of live tensors."""
    for shard in nested_values(sharded):
        if isinstance(shard, ShardedTensor) and is_main_replica(shard.replica_id):
            shard.data = shard.data.detach().to("cpu", copy=True)


def _saved(value: Any) -> bytes:
    """The one pickle of a value: equal strings and tuples in it become one object.

    A pickle tells of two equal values whether they are one object, which after a resume they may not be.
    """
    stream = BytesIO()
    torch.save(_with_one_of_each(value, {}), stream)
    return stream.getvalue()


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
def _hashed_file(path: Path, entries: dict[str, FileEntry]) -> Iterator[HashedFile]:
    """A new file that is on the disk when the block ends, its entry put into `entries`."""
    with path.open("wb") as stream:
        hashed = HashedFile(stream)
        yield hashed
        stream.flush()
        os.fsync(stream.fileno())
    entries[path.name] = FileEntry(hashed.size, hashed.sha256)


@contextmanager
def _checkpoint_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    # torch wraps what a rank raised in CheckpointException, and its zip writer turns errno into RuntimeError.
    except (OSError, RuntimeError, CheckpointException) as error:
        reason = " ".join(str(error).split())[-300:]
        raise CheckpointError(
            f"{directory}: the checkpoint cannot be written ({reason}): free some disk space and run again"
        ) from error


class _PlainWriter(FileSystemWriter):
    """Without the writer's path and a random id in `.metadata`: same state, same bytes."""

    def storage_meta(self) -> StorageMeta | None:
        return None


class _StagingWriter(_PlainWriter):
    """Takes part in torch's planning, but keeps what it is given to write, for a thread to write later.

    The stock strategy starts a manager process for that, which imports __main__ anew (seconds) and which
    a kill -9 of the trainer leaves running.
    """

    staged: deque[tuple[WriteItem, Tensor | BytesIO]]
    file_name: str
    metadata: Metadata | None = None

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # nothing touches the disk yet

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self.file_name = f"{plan.storage_data.prefix}0.distcp"
        self.staged = deque((item, planner.resolve_data(item)) for item in plan.items)
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.metadata = metadata
