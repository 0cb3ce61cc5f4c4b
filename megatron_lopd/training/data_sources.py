"""What a run trains on: cached data, read ahead, or a live sampler (training/live.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_lopd.data.batch_plan import PlanPart
from megatron_lopd.data.collate import MicroBatch
from megatron_lopd.data.dataset import TrainingData
from megatron_lopd.data.packing import Padding
from megatron_lopd.mcore.loader import BatchLoader
from megatron_lopd.training.prefetch import Prefetcher, pinned
from megatron_lopd.training.preflight import CACHED_CAUSES, check_rollouts

if TYPE_CHECKING:
    from megatron_lopd.training.trainer import Trainer


class Batches(Protocol):
    """A context manager. Steps are asked for in order; every rank asks alike."""

    def __enter__(self) -> Batches: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def get(self, step: int) -> list[MicroBatch]:
        """This rank's share of global batch `step` (0-based)."""
        ...

    @property
    def seconds(self) -> Mapping[str, float]:
        """The parts of the last `get` that were not waiting for data, by their names in the metrics."""
        ...

    def check(self, step: int, micro_batches: list[MicroBatch]) -> None:
        """Look at what `get` gave for `step` before it is trained on; every rank calls.

        Raises NumericsError when it cannot be.
        """
        ...

    def lengths(self, step: int) -> NDArray[np.int64]:
        """Tokens of each sample of the step that was got last: int64 [global_batch_size]."""
        ...


class DataSource(Protocol):
    """What a segment of a run trains on, by position. `is_alone`: nothing else is on the trainer's GPU."""

    is_alone: ClassVar[bool]

    def __len__(self) -> int: ...

    def require_within(self, token_budget: int, padding: Padding) -> None:
        """Raise DataError when a sample, padded, is above `token_budget` tokens."""
        ...

    def require_positions(self, positions: int) -> None:
        """Raise DataError when a sample has more tokens than `positions`."""
        ...

    def require_vocabulary(self, size: int) -> None:
        """Raise DataError when a token id is `size` or above."""
        ...

    def prepare(self, trainer: Trainer, part: PlanPart, steps_done: int) -> None:
        """What is done once, before the first batch; every rank calls. Raises NumericsError as `check`."""
        ...

    def batches(self, trainer: Trainer, part: PlanPart, first_step: int) -> Batches:
        """The steps of `part` from `first_step` on."""
        ...


class CachedData(TrainingData):
    """Rollouts and scores that are there already."""

    is_alone: ClassVar[bool] = True

    def __init__(self, rollout_dir: Path, score_dir: Path | None = None, leave_out_cut: bool = False) -> None:
        # Committed, and hashed before training: that no id is there twice was seen to when they were made.
        super().__init__(rollout_dir, score_dir, check_ids=False, leave_out_cut=leave_out_cut)

    def prepare(self, trainer: Trainer, part: PlanPart, steps_done: int) -> None:
        """FP8's scales before the first step of all, and the preflight before the part's."""
        loader = trainer.loader(self)
        if not steps_done:  # a checkpoint brings its own
            trainer.find_scales(loader, loader.micro_batches(part.samples(0).tolist()))
        preflight = trainer.job.preflight
        if preflight is None or steps_done != part.first_step:
            return
        if not self.keeps_behaviour(preflight.sampling):
            trainer.note(
                "preflight left out: an earlier release kept of these rollouts what temperature, top-p and "
                "top-k made of the model's log-probs, and not its own: drift is measured against that, too"
            )
            return
        count = min(preflight.samples, len(self))
        spread = [int(position) for position in np.linspace(0, len(self) - 1, count)]
        check_rollouts(trainer, loader.micro_batches(spread), CACHED_CAUSES)

    def batches(self, trainer: Trainer, part: PlanPart, first_step: int) -> CachedBatches:
        return CachedBatches(trainer.loader(self), part, trainer.device, first_step)


class CachedBatches:
    """The steps of `part` from `first_step` on, of data that is there already, made ready ahead of time."""

    seconds: Mapping[str, float] = {}

    def __init__(self, loader: BatchLoader, part: PlanPart, device: torch.device, first_step: int) -> None:
        self._loader, self._part, self._device = loader, part, device
        self._first_step = first_step

    def __enter__(self) -> CachedBatches:
        self._ahead = Prefetcher(self._load, self._first_step, self._part.end_step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ahead.__exit__(kind, error, trace)

    def get(self, step: int) -> list[MicroBatch]:
        return self._ahead.get(step)

    def check(self, step: int, micro_batches: list[MicroBatch]) -> None:
        """`CachedData.prepare` has looked."""

    def lengths(self, step: int) -> NDArray[np.int64]:
        return self._loader.data.lengths[self._part.samples(step)]

    def _load(self, step: int) -> list[MicroBatch]:
        return ready(self._loader.micro_batches(self._part.samples(step).tolist()), self._device)


def ready(micro_batches: list[MicroBatch], device: torch.device) -> list[MicroBatch]:
    """For a GPU in page-locked memory."""
    return [pinned(each) for each in micro_batches] if device.type == "cuda" else micro_batches
