"""Checkpoints as all ranks see them: saved in the background, committed together, loaded at any layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_lopd.checkpoint.sharded import StagedState, WrittenPart, finish_state, load_state, stage_state
from megatron_lopd.checkpoint.staging import HostBuffer
from megatron_lopd.checkpoint.tensor_shards import ShardedModel
from megatron_lopd.mcore.optimizer import Optimization
from megatron_lopd.mcore.process_groups import Ranks
from megatron_lopd.training.checkpoints import Checkpoint, Checkpoints, Progress
from megatron_lopd.training.consensus import any_rank, on_rank_zero, verify_together


@dataclass(frozen=True)
class _Save:
    """A checkpoint on its way to the disk."""

    staged: StagedState
    progress: Progress
    written: Future[WrittenPart]


class Saver:
    """Writes checkpoints while training goes on, one at a time. Every rank calls every method alike.

    A step is held up for the copy to host memory only, which is taken when the saver is made, and kept.
    Threads of each rank write and hash that rank's files; they take part in no collective. Once all are
    done, `poll` or `finish` commits. A failed write raises the same CheckpointError in every rank, from
    whichever method comes next.
    """

    def __init__(
        self, checkpoints: Checkpoints, optimization: Optimization, ranks: Ranks, device: torch.device
    ) -> None:
        self._checkpoints, self._ranks, self._device = checkpoints, ranks, device
        self._optimization = optimization
        self._host = HostBuffer(ShardedModel(optimization).own_boxes())
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._save: _Save | None = None

    def start(self, progress: Progress) -> None:
        """Begin a checkpoint at `progress.step`, once the one before is committed."""
        self.finish()
        temporary = on_rank_zero(lambda: self._checkpoints.begin(progress.step))
        staged = stage_state(temporary, self._optimization, self._ranks, self._host)
        self._save = _Save(staged, progress, self._thread.submit(staged.write))

    def poll(self) -> None:
        """Commit the checkpoint that is being written if every rank has written its part; do not wait."""
        if self._save is not None and not any_rank(not self._save.written.done(), self._device):
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint that is being written, if any, is committed."""
        if self._save is None:
            return
        save, self._save = self._save, None
        error = save.written.exception()
        parts: list[Any] | None = [None] * self._ranks.world_size if self._ranks.rank == 0 else None
        dist.gather_object(error or save.written.result(), parts, dst=0)
        on_rank_zero(lambda: self._commit(save, parts or []))

    def _commit(self, save: _Save, parts: list[WrittenPart | BaseException]) -> None:
        written = []
        try:
            for part in parts:
                if isinstance(part, BaseException):
                    raise part
                written.append(part)
            files = finish_state(save.staged.directory, written)
            self._checkpoints.commit(save.staged.directory, files, save.progress, layout_of(self._ranks))
        except Exception:
            # No rank writes any more: what half a checkpoint takes is room that a full disk needs.
            shutil.rmtree(save.staged.directory, ignore_errors=True)
            raise


def newest_checkpoint(checkpoints: Checkpoints, note: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint of this job, each rank hashing its share of the files. Every rank calls.

    No group need exist yet, and none waits meanwhile. Raises CheckpointError, in every rank, when it is of
    another model or job: rank 0 looks, which alone knows what the job is made from.
    """
    present = on_rank_zero(checkpoints.present)
    found = checkpoints.newest_whole(present, lambda path, manifest: verify_together({path: manifest}), note)
    return None if found is None else on_rank_zero(lambda: checkpoints.own(*found))


def load_checkpoint(checkpoint: Checkpoint, optimization: Optimization, ranks: Ranks) -> Progress:
    """Read a checkpoint that passed its digests, at whatever layout this is. Every rank calls."""
    load_state(checkpoint.path, optimization, ranks, same_layout=checkpoint.layout == layout_of(ranks))
    return checkpoint.progress


def layout_of(ranks: Ranks) -> dict[str, int]:
    """Every parallel size: what a rank's random state belongs to."""
    return {name: size for name, size in asdict(ranks).items() if name.endswith("_size")}
