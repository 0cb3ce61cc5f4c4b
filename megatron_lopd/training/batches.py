"""Where a step's micro-batches come from: cached data, read ahead, or a live sampler (training/live.py)."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_lopd.data.batch_plan import PlanPart
from megatron_lopd.data.collate import MicroBatch
from megatron_lopd.mcore.loader import BatchLoader
from megatron_lopd.training.prefetch import Prefetcher, pinned


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

    def lengths(self, step: int) -> NDArray[np.int64]:
        """Tokens of each sample of the step that was got last: int64 [global_batch_size]."""
        ...


class CachedBatches:
    """The steps of `part` from `first_step` on, of data that is there already, made ready ahead of time."""

    seconds: Mapping[str, float] = {}

    def __init__(self, loader: BatchLoader, part: PlanPart, device: torch.device, first_step: int) -> None:
        self._loader, self._part, self._device = loader, part, device
        self._ahead = Prefetcher(self._load, first_step, part.end_step)

    def __enter__(self) -> CachedBatches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ahead.__exit__(kind, error, trace)

    def get(self, step: int) -> list[MicroBatch]:
        return self._ahead.get(step)

    def lengths(self, step: int) -> NDArray[np.int64]:
        return self._loader.data.lengths[self._part.samples(step)]

    def _load(self, step: int) -> list[MicroBatch]:
        return ready(self._loader.micro_batches(self._part.samples(step).tolist()), self._device)


def ready(micro_batches: list[MicroBatch], device: torch.device) -> list[MicroBatch]:
    """For a GPU in page-locked memory."""
    return [pinned(each) for each in micro_batches] if device.type == "cuda" else micro_batches
