"""Micro-batches through the model: one forward and one backward each, in Megatron-Core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray
from torch import Tensor

from megatron_lopd.config import Fp8Config, ParallelConfig, TrainingConfig
from megatron_lopd.data.collate import MicroBatch, collate
from megatron_lopd.data.context_parallel import slice_micro_batch
from megatron_lopd.data.packing import Padding, pack
from megatron_lopd.data.records import Sample
from megatron_lopd.mcore.log_probs import ResponseLogProbs
from megatron_lopd.mcore.model import PackedGPTModel, response_log_probs
from megatron_lopd.mcore.parallel import Ranks
from megatron_lopd.mcore.precision import packed_padding
from megatron_lopd.objectives import Objective, TokenLogProbs, TokenPlaces, TopKLogProbs
from megatron_lopd.training.metrics import TokenValues


class Samples(Protocol):
    """Samples by position; `lengths` int64 [n], tokens of each."""

    @property
    def lengths(self) -> NDArray[np.int64]: ...

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class BatchLoader:
    """Sample positions -> this rank's micro-batches."""

    data: Samples
    config: TrainingConfig
    ranks: Ranks
    padding: Padding
    count_multiple: int  # of micro-batches on each rank

    @staticmethod
    def of(
        data: Samples,
        config: TrainingConfig,
        parallel: ParallelConfig,
        ranks: Ranks,
        fp8: Fp8Config | None = None,
    ) -> BatchLoader:
        """Interleaving takes micro-batches through a model chunk in groups of as many as there are stages."""
        count_multiple = parallel.pipeline if parallel.virtual_pipeline > 1 else 1
        return BatchLoader(data, config, ranks, packed_padding(parallel, fp8), count_multiple)

    def micro_batches(self, positions: Sequence[int]) -> list[MicroBatch]:
        """The samples at `positions` of the data, packed; this data and context parallel rank's share."""
        lengths = self.padding.documents(self.data.lengths[list(positions)])
        budget = self.padding.budget(self.config.micro_batch_tokens)
        packed = pack(lengths, budget, self.ranks.dp_size, self.count_multiple)
        return [self._collate(positions, indices) for indices in packed[self.ranks.dp_rank]]

    def _collate(self, positions: Sequence[int], indices: Sequence[int]) -> MicroBatch:
        samples = [self.data.sample(int(positions[index])) for index in indices]
        whole = collate(samples, self.config.loss_normalization, self.padding)
        if self.ranks.cp_size == 1:
            return whole
        return slice_micro_batch(whole, self.ranks.cp_size, self.ranks.cp_rank)


def run_micro_batches(
    chunks: Sequence[torch.nn.Module],
    objective: Objective,
    micro_batches: Sequence[MicroBatch],
    token_budget: int,
    device: torch.device,
    *,
    forward_only: bool = False,
    temperature: float = 1.0,
) -> list[TokenValues]:
    """Forward each micro-batch, and backward unless `forward_only`; then finalize the gradients.

    `chunks` are this rank's wrapped PackedGPTModels. The gradients end up those of
    `sum(loss_weights * token_weights * token_loss) / sum(loss_count)` over the global batch. `temperature`
    divides the logits. Returns the values of each micro-batch on the last pipeline stage, nothing on the
    others.
    """

    def forward_step(
        batches: Iterator[MicroBatch], wrapped: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, TokenValues]]]:
        batch = _to_device(next(batches), device)
        hidden = wrapped(batch.tokens, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
        return hidden, partial(_loss, wrapped, objective, batch, temperature)

    values: list[TokenValues] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in chunks],
        model=list(chunks),
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
    ids = batch.top_k_ids if "top_k" in objective.needs else None
    scored = response_log_probs(model, hidden, batch.predict_index, batch.response_tokens, temperature, ids)
    tokens = TokenLogProbs(
        scored.log_probs,
        batch.teacher_log_probs if "teacher" in objective.needs else None,
        batch.behaviour_log_probs if "behaviour" in objective.needs else None,
        _top_k(batch, scored) if "top_k" in objective.needs else None,
    )
    loss = objective.token_loss(tokens)  # [R]
    places = TokenPlaces(batch.response_position, batch.prefix_discrepancy)
    weights = batch.loss_weights * objective.token_weights(places)
    constants = replace(tokens, current=scored.log_probs.detach(), top_k=None)
    values = TokenValues(loss.detach(), weights, scored.entropy, constants)
    count = torch.tensor(batch.loss_count, dtype=torch.int, device=hidden.device)
    return (weights * loss).sum(), count, values


def _top_k(batch: MicroBatch, scored: ResponseLogProbs) -> TopKLogProbs | None:
    """The kept top k beside the student's; None where none was kept."""
    if batch.top_k_ids is None or batch.top_k_log_probs is None or batch.tail_log_probs is None:
        return None
    return TopKLogProbs(
        scored.top_k_log_probs,
        scored.tail_log_probs,
        batch.top_k_log_probs,
        batch.tail_log_probs,
        counted=batch.top_k_ids != batch.response_tokens[:, None],
    )


def _to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    moved: dict[str, Any] = {
        field.name: value.to(device, non_blocking=True)
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    return replace(batch, **moved)
