"""One context parallel rank's part of a micro-batch: its tokens, and all that belongs to them.

Rank r of c holds chunks r and 2c-1-r of the 2c equal chunks of every document: a zigzag, so that all
ranks have as much causal attention to do. A response token goes with the position that predicts it.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from megatron_lopd.data.collate import MicroBatch

# Every other tensor of a micro-batch has one row for each response token.
OF_POSITIONS = ("tokens", "position_ids", "cu_seqlens", "predict_index")


def slice_micro_batch(batch: MicroBatch, size: int, rank: int) -> MicroBatch:
    """What rank `rank` of `size` reads of `batch`, whose documents are multiples of 2 `size` tokens long.

    Tokens and per-response tensors are the rank's own, in their order; `predict_index` counts in its own
    tokens. `cu_seqlens` and `max_seqlen` stay those of the whole documents: Megatron-Core and Transformer
    Engine find the rank's chunks from them. Counts are summed over the ranks, so only rank 0 has any.
    """
    chunk_tokens = (batch.cu_seqlens.diff() // (2 * size)).repeat_interleave(batch.cu_seqlens.diff())  # [S]
    chunk = batch.position_ids // chunk_tokens
    positions = ((chunk == rank) | (chunk == 2 * size - 1 - rank)).nonzero().squeeze(1)  # [S / size]
    place = torch.full_like(batch.tokens, -1)  # of each position among the rank's own
    place[positions] = torch.arange(len(positions))
    predicted_here = place[batch.predict_index] >= 0  # [R]
    of_responses: dict[str, Any] = {
        field.name: value[predicted_here]
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor) and field.name not in OF_POSITIONS
    }
    counts: dict[str, Any] = {} if rank == 0 else {"loss_count": 0, "num_samples": 0, "num_tokens": 0}
    return replace(
        batch,
        tokens=batch.tokens[positions],
        position_ids=batch.position_ids[positions],
        predict_index=place[batch.predict_index[predicted_here]],
        **of_responses,
        **counts,
    )
