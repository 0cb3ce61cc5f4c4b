"""Which samples make up which optimizer step: a pure function of seed, data size and batch size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_lopd.errors import ConfigError, DataError


@dataclass(frozen=True)
class BatchPlan:
    """The data order, as one endless stream: a fresh permutation an epoch, cut into global batches.

    No sample is dropped at the end of an epoch: a batch that straddles it is filled from the next
    epoch. The layout (ranks, micro-batches, packing) is not an argument, so it cannot change the order.

    Raises DataError when there are no samples, ConfigError when the batch size or the seed cannot be.
    """

    num_samples: int
    global_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise DataError("there are no samples to train on")
        if self.global_batch_size < 1:
            raise ConfigError(f"global_batch_size must be at least 1, not {self.global_batch_size}")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed must be between 0 and 2^64 - 1, not {self.seed}")

    def samples(self, step: int) -> NDArray[np.int64]:
        """Sample positions of global batch `step` (0-based), in order: int64 [global_batch_size]."""
        begin = step * self.global_batch_size
        end = begin + self.global_batch_size
        parts = []
        for epoch in range(begin // self.num_samples, (end - 1) // self.num_samples + 1):
            start = epoch * self.num_samples
            order = _epoch_order(self.num_samples, self.seed, epoch)
            parts.append(order[max(begin - start, 0) : end - start])
        return np.concatenate(parts)

    def steps_for(self, epochs: float) -> int:
        """Steps that cover `epochs` passes over the data, the last one filled from the next pass."""
        # By way of the decimal the user wrote: 0.7 * 10 is 7.000000000000001 in floats, a step too many.
        return math.ceil(Fraction(str(epochs)) * self.num_samples / self.global_batch_size)


@dataclass(frozen=True)
class PlanPart:
    """The steps [first_step, end_step) of a plan.

    With `visited_only` the data holds none but the samples that these steps visit, in ascending order of
    their positions in the whole plan; otherwise it holds them all.
    """

    plan: BatchPlan
    first_step: int
    end_step: int
    visited_only: bool

    @cached_property
    def visited(self) -> NDArray[np.int64]:
        """Positions in the whole plan that these steps visit, ascending, each once: int64 [m]."""
        steps = range(self.first_step, self.end_step)
        return np.unique(np.concatenate([self.plan.samples(step) for step in steps]))

    def samples(self, step: int) -> NDArray[np.int64]:
        """As BatchPlan.samples, but positions in the data there is: int64 [global_batch_size]."""
        positions = self.plan.samples(step)
        return np.searchsorted(self.visited, positions) if self.visited_only else positions


@lru_cache(maxsize=2)  # a batch reads one epoch, or two where it straddles them
def _epoch_order(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of one epoch, int64 [num_samples], read-only."""
    # Ranks of raw Philox words: numpy keeps a bit generator's words stable across versions, which it
    # does not promise of Generator.permutation, and a run may be resumed under another numpy.
    key = np.array([seed, epoch], dtype=np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(num_samples), kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order
