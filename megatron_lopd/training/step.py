"""Micro-batches through the model: one forward and one backward each, in Megatron-Core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_lopd.config import Fp8Config, ParallelConfig, TrainingConfig
from megatron_lopd.data.collate import MicroBatch, collate
from megatron_lopd.data.dataset import TrainingData
from megatron_lopd.data.packing import pack
from megatron_lopd.mcore.model import PackedGPTModel, response_log_probs
from megatron_lopd.mcore.parallel import Ranks
from megatron_lopd.mcore.precision import token_alignment
from megatron_lopd.objectives import Objective, TokenLogProbs
from megatron_lopd.training.metrics import TokenValues


@dataclass(frozen=True)
class BatchLoader:
    """Sample positions -> this rank's micro-batches."""

    data: TrainingData
    config: TrainingConfig
    ranks: Ranks
    pad_to_multiple: int

    @staticmethod
    def of(
        data: TrainingData,
        config: TrainingConfig,
        parallel: ParallelConfig,
        ranks: Ranks,
        fp8: Fp8Config | None = None,
    ) -> BatchLoader:
        """Sequence parallelism cuts a micro-batch into tensor-parallel parts, each aligned for FP8."""
        parts = parallel.tensor if parallel.sequence else 1
        return BatchLoader(data, config, ranks, parts * token_alignment(fp8, parallel))

    def micro_batches(self, positions: Sequence[int]) -> list[MicroBatch]:
        """The samples at `positions` of the data, packed; this data-parallel rank's share."""
        lengths = self.data.lengths[list(positions)]
        packed = pack(lengths, self.config.micro_batch_tokens, self.ranks.dp_size)[self.ranks.dp_rank]
        return [
            collate(
                [self.data.sample(int(positions[index])) for index in micro_batch],
                self.config.loss_normalization,
                self.pad_to_multiple,
            )
            for micro_batch in packed
        ]


def run_micro_batches(
    model: torch.nn.Module,
    objective: Objective,
    micro_batches: Sequence[MicroBatch],
    token_budget: int,
    device: torch.device,
    *,
    forward_only: bool = False,
    temperature: float = 1.0,
) -> list[TokenValues]:
    """Forward each micro-batch, and backward unless `forward_only`; then finalize the gradients.

    `model` is the wrapped PackedGPTModel. The gradients end up those of
    `sum(loss_weights * token_loss) / sum(loss_count)` over the global batch. `temperature` divides the
    logits. Returns the values of each micro-batch on the last pipeline stage, nothing on the others.
    """

    def forward_step(
        batches: Iterator[MicroBatch], wrapped: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, TokenValues]]]:
        batch = _to_device(next(batches), device)
        hidden = wrapped(batch.tokens, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
        return hidden, partial(_loss, wrapped, objective, batch, temperature)

    values: list[TokenValues] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches),
        model=[model],
        num_microbatches=len(micro_batches),
        seq_length=token_budget,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return values


def _loss(
    wrapped: torch.nn.Module, objective: Objective, batch: MicroBatch, temperature: float, hidden: Tensor
) -> tuple[Tensor, Tensor, TokenValues]:
    """(summed weighted loss, its count, constants for the metrics), as Megatron-Core's schedules want."""
    model = wrapped.module
    assert isinstance(model, PackedGPTModel)
    scored = response_log_probs(model, hidden, batch.predict_index, batch.response_tokens, temperature)
    tokens = TokenLogProbs(
        scored.log_probs,
        batch.teacher_log_probs if "teacher" in objective.needs else None,
        batch.behaviour_log_probs if "behaviour" in objective.needs else None,
    )
    loss = batch.loss_weights * objective.token_loss(tokens)  # [R]
    values = TokenValues(loss.detach(), scored.entropy, replace(tokens, current=scored.log_probs.detach()))
    count = torch.tensor(batch.loss_count, dtype=torch.int, device=hidden.device)
    return loss.sum(), count, values


def _to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    moved: dict[str, Any] = {
        field.name: value.to(device, non_blocking=True)
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    return replace(batch, **moved)
