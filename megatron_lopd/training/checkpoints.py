"""The checkpoints of a run: each a committed directory, the newest whole one found by its digests.

`step_00000050/` is written under a temporary name, its files hashed into manifest.json, flushed, and
renamed. A kill at any moment leaves either the whole directory or a temporary one that is swept away.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_lopd.artifacts.files import TEMPORARY_PREFIX, fsync_directory
from megatron_lopd.artifacts.manifest import (
    LineageStatus,
    clear_temporaries,
    commit,
    load_manifest,
    verify_files,
)
from megatron_lopd.errors import CheckpointError, DataError
from megatron_lopd.mcore.checkpoint import load_state, save_state
from megatron_lopd.mcore.optimizer import Optimization
from megatron_lopd.mcore.parallel import Ranks
from megatron_lopd.training.agreement import on_rank_zero

KIND = "checkpoint"


@dataclass(frozen=True)
class Progress:
    """How far a run is: steps done and what they consumed; `loss` is the last step's, None when it was
    not finite or none was run. No clock is in it: the same run gives the same checkpoint, byte for byte."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    response_tokens: int = 0
    skipped_steps: int = 0
    loss: float | None = None


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints below `directory` of the job `identity`; the newest `keep` stay. Every rank calls."""

    directory: Path
    identity: str
    lineage: LineageStatus
    keep: int

    def save(self, optimization: Optimization, progress: Progress, ranks: Ranks) -> None:
        """Commit a checkpoint at `progress.step` and remove those that are too many."""
        name = f"step_{progress.step:08d}"
        temporary = self.directory / f"{TEMPORARY_PREFIX}{name}"
        on_rank_zero(lambda: _make_empty(temporary))
        save_state(temporary, optimization, ranks)
        dist.barrier()  # rank 0 hashes what every rank wrote
        on_rank_zero(lambda: self._commit(temporary, name, progress, ranks))

    def resume(self, optimization: Optimization, ranks: Ranks, note: Callable[[str], None]) -> Progress:
        """Load the newest whole checkpoint; a fresh `Progress` when there is none.

        A damaged one is passed over, with a line through `note` (called on rank 0).
        Raises CheckpointError when the checkpoints are another job's.
        """
        found = on_rank_zero(lambda: self._newest_whole(note))
        if found is None:
            return Progress()
        path, config = found
        same_layout = config["layout"] == _layout(ranks)
        load_state(path, optimization, ranks, same_layout)
        return Progress(**config["progress"])

    def _commit(self, temporary: Path, name: str, progress: Progress, ranks: Ranks) -> None:
        commit(
            temporary,
            KIND,
            files=sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file()),
            config={"identity": self.identity, "layout": _layout(ranks), "progress": asdict(progress)},
            counts={"step": progress.step},
            versions={},
            parents={},
            lineage=self.lineage,
        )
        target = self.directory / name
        if target.exists():  # a damaged one that resuming passed over
            _remove(target)
        os.rename(temporary, target)
        fsync_directory(self.directory)
        for old in self._newest_first()[self.keep :]:
            _remove(old)

    def _newest_first(self) -> list[Path]:
        return sorted(self.directory.glob("step_*"), reverse=True)

    def _newest_whole(self, note: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        if not self.directory.exists():
            return None
        clear_temporaries(self.directory)
        for path in self._newest_first():
            try:
                manifest = load_manifest(path, KIND)
                verify_files(path, manifest)
            except DataError as error:
                note(f"checkpoint passed over: {error}")
                continue
            found = manifest.config["identity"]
            if found != self.identity:
                raise CheckpointError(
                    f"{path} is of another job ({found[:12]}; this one is {self.identity[:12]}): the model, "
                    f"the data or the recipe has changed: undo that, or remove {self.directory} to start over"
                )
            return path, manifest.config
        return None


def _layout(ranks: Ranks) -> dict[str, int]:
    """What a rank's random state belongs to."""
    return {"tensor": ranks.tp_size, "pipeline": ranks.pp_size}


def _make_empty(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)


def _remove(directory: Path) -> None:
    """Rename first: a kill midway must not leave half a checkpoint under its name."""
    doomed = directory.with_name(f"{TEMPORARY_PREFIX}removed-{directory.name}")
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(directory, doomed)
    shutil.rmtree(doomed)
