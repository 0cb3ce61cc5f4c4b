"""Micro-batches through a model's pipeline stages, in Megatron-Core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_lopd.data.collate import MicroBatch
from megatron_lopd.mcore.experts import forget_routing
from megatron_lopd.mcore.model import PackedGPTModel
from megatron_lopd.runtime import heartbeats

V = TypeVar("V")


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    token_budget: int,
    device: torch.device,
    finish: Callable[[PackedGPTModel, MicroBatch, Tensor], tuple[Tensor, Tensor, V]],
    *,
    forward_only: bool,
) -> list[V]:
    """Forward each micro-batch, and backward unless `forward_only`; every rank calls.

    `chunks` are this rank's PackedGPTModels, wrapped for data parallelism if they are trained. On the last
    stage `finish(model, micro-batch, hidden)` gives (summed loss, its int count, value); hidden is what the
    model returned, the micro-batch is on `device`. Returns the values in order, none on other stages.
    """

    def forward_step(
        batches: Iterator[MicroBatch], chunk: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, V]]]:
        heartbeats.moved()
        batch = _to_device(next(batches), device)
        hidden = chunk(batch.tokens, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
        model = chunk if isinstance(chunk, PackedGPTModel) else chunk.module
        assert isinstance(model, PackedGPTModel)
        return hidden, partial(finish, model, batch)

    values: list[V] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(micro_batches),
        seq_length=token_budget,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    forget_routing(chunks)
    return values


def _to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    moved: dict[str, Any] = {
        field.name: value.to(device, non_blocking=True)
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    return replace(batch, **moved)
