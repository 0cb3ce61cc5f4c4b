"""A model ready to be trained: what the loop, its data and its checks have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_lopd.data.collate import MicroBatch
from megatron_lopd.families.architecture import Architecture
from megatron_lopd.mcore.loader import BatchLoader, Samples
from megatron_lopd.mcore.optimizer import Optimization
from megatron_lopd.mcore.process_groups import Ranks
from megatron_lopd.objectives import Objective
from megatron_lopd.training.fp8_scales import find_scales
from megatron_lopd.training.job import TrainingJob


@dataclass(frozen=True)
class Trainer:
    """This rank's part of it; every rank calls alike. `note` is a line to the user."""

    job: TrainingJob
    optimization: Optimization
    objective: Objective
    architecture: Architecture
    ranks: Ranks
    device: torch.device
    note: Callable[[str], None]

    def loader(self, samples: Samples) -> BatchLoader:
        """`samples` -> this rank's micro-batches."""
        model = self.job.model
        return BatchLoader.of(samples, self.job.config, model.parallel, self.ranks, model.fp8)

    def find_scales(self, loader: BatchLoader, micro_batches: Sequence[MicroBatch]) -> None:
        """Under FP8's delayed scaling, from as few of the first step's micro-batches as the layout takes."""
        fp8 = self.job.model.fp8
        if fp8 is not None and fp8.recipe == "delayed":
            few, budget = micro_batches[: loader.count_multiple], self.job.config.micro_batch_tokens
            find_scales(self.optimization, self.objective, few, budget, self.device)
