"""Samples by position -> this rank's packed micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_lopd.config import Fp8Config, ParallelConfig
from megatron_lopd.data.collate import LossNormalization, MicroBatch, collate
from megatron_lopd.data.context_parallel import slice_micro_batch
from megatron_lopd.data.packing import Padding, pack
from megatron_lopd.data.records import Sample
from megatron_lopd.mcore.precision import packed_padding
from megatron_lopd.mcore.process_groups import Ranks


class Samples(Protocol):
    """Samples by position; `lengths` int64 [n], tokens of each."""

    @property
    def lengths(self) -> NDArray[np.int64]: ...

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class ListedSamples:
    """Samples that are all in memory."""

    samples: Sequence[Sample] = ()
    lengths: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        rollouts = [sample.rollout for sample in self.samples]
        lengths = [len(each.prompt_tokens) + len(each.response_tokens) for each in rollouts]
        object.__setattr__(self, "lengths", np.array(lengths, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: int) -> Sample:
        return self.samples[index]


class BatchSettings(Protocol):
    """What of a TrainingConfig decides how samples are packed and weighed."""

    @property
    def micro_batch_tokens(self) -> int: ...

    @property
    def loss_normalization(self) -> LossNormalization: ...


@dataclass(frozen=True)
class BatchLoader:
    """Sample positions -> this rank's micro-batches."""

    data: Samples
    config: BatchSettings
    ranks: Ranks
    padding: Padding
    count_multiple: int  # of micro-batches on each rank

    @staticmethod
    def of(
        data: Samples,
        config: BatchSettings,
        parallel: ParallelConfig,
        ranks: Ranks,
        fp8: Fp8Config | None = None,
    ) -> BatchLoader:
        """Interleaving takes micro-batches through a model chunk in groups of as many as there are stages."""
        count_multiple = parallel.pipeline if parallel.virtual_pipeline > 1 else 1
        return BatchLoader(data, config, ranks, packed_padding(parallel, fp8), count_multiple)

    def packed(self, positions: Sequence[int]) -> list[list[int]]:
        """The positions in each of this data parallel rank's micro-batches.

        Raises DataError when one does not fit a micro-batch.
        """
        lengths = self.padding.documents(self.data.lengths[list(positions)])
        budget = self.padding.budget(self.config.micro_batch_tokens)
        packed = pack(lengths, budget, self.ranks.dp_size, self.count_multiple)[self.ranks.dp_rank]
        return [[int(positions[index]) for index in indices] for indices in packed]

    def micro_batches(self, positions: Sequence[int]) -> list[MicroBatch]:
        """The samples at `positions` of the data, packed; this data and context parallel rank's share."""
        return [self.micro_batch(chosen) for chosen in self.packed(positions)]

    def micro_batch(self, positions: Sequence[int]) -> MicroBatch:
        """One micro-batch of just these; this context parallel rank's share of it."""
        samples = [self.data.sample(position) for position in positions]
        whole = collate(samples, self.config.loss_normalization, self.padding)
        if self.ranks.cp_size == 1:
            return whole
        return slice_micro_batch(whole, self.ranks.cp_size, self.ranks.cp_rank)
