"""The training state as a Megatron-Core distributed checkpoint that any layout can read.

Model, optimizer, schedule and random state, in one directory. Which checkpoints there are, whether they
are whole and whose they are is training/checkpoints.py's business: common.pt and the sharded objects
are pickles, so a directory must pass its digests before `load_state` opens it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.state_dict_saver import save as save_with_torch

from megatron_lopd.errors import CheckpointError
from megatron_lopd.mcore import compat
from megatron_lopd.mcore.optimizer import (
    Optimization,
    finish_gathering,
    load_optimizer_state,
    optimizer_sharded_state,
)
from megatron_lopd.mcore.parallel import Ranks


def save_state(directory: Path, optimization: Optimization, ranks: Ranks) -> None:
    """Write the training state into `directory`, which exists and is empty. Every rank calls.

    Raises CheckpointError when it cannot be written, as on a full disk.
    """
    finish_gathering(optimization)
    state = _sharded_state(optimization, ranks, is_loading=False)
    state["scheduler"] = optimization.scheduler.state_dict()
    try:
        dist_checkpointing.save(state, str(directory), sharded_strategy=_SaveInProcess("torch_dist", 1))
    # torch wraps what a rank raised in CheckpointException, and its zip writer turns errno into RuntimeError.
    except (OSError, RuntimeError, CheckpointException) as error:
        reason = " ".join(str(error).split())[-300:]
        raise CheckpointError(
            f"{directory}: the checkpoint cannot be written ({reason}): free some disk space and run again"
        ) from error


def load_state(directory: Path, optimization: Optimization, ranks: Ranks, same_layout: bool) -> None:
    """Read a digest-checked checkpoint into the model, the optimizer and the schedule. Every rank calls.

    The random state is restored only under `same_layout` (same tensor and pipeline sizes): it belongs to
    a rank, and at another layout the ranks keep the one they were seeded with.
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
            (ranks.pp_size, ranks.tp_size),
            (ranks.pp_rank, ranks.tp_rank),
            replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
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


class _PlainWriter(FileSystemWriter):
    """Without the writer's path and a random id in `.metadata`: same state, same bytes."""

    def storage_meta(self) -> StorageMeta | None:
        return None


class _SaveInProcess(TorchDistSaveShardedStrategy):  # type: ignore[misc]  # untyped base
    """The stock format, written by this process through torch's own writer.

    The stock strategy starts a manager process, which imports __main__ anew (seconds) and which a
    kill -9 of the trainer leaves running.
    """

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str) -> None:
        compat.write_common_state(sharded_state_dict, checkpoint_dir)
        state, *_ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        save_with_torch(
            mcore_to_pyt_state_dict(state, False),
            storage_writer=_PlainWriter(checkpoint_dir),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
