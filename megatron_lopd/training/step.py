"""Micro-batches through the model with an objective at its end: one forward and one backward each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from megatron_lopd.data.collate import MicroBatch
from megatron_lopd.mcore.log_probs import ResponseLogProbs
from megatron_lopd.mcore.model import PackedGPTModel, response_log_probs
from megatron_lopd.mcore.schedule import run_schedule
from megatron_lopd.objectives import Objective, TokenLogProbs, TokenPlaces, TopKLogProbs
from megatron_lopd.training.metrics import TokenValues


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

    values: list[TokenValues] = run_schedule(
        chunks,
        micro_batches,
        token_budget,
        device,
        partial(_loss, objective, temperature),
        forward_only=forward_only,
    )
    return values


def _loss(
    objective: Objective, temperature: float, model: PackedGPTModel, batch: MicroBatch, hidden: Tensor
) -> tuple[Tensor, Tensor, TokenValues]:
    """(summed weighted loss, its count, constants for the metrics), as Megatron-Core's schedules want."""
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
