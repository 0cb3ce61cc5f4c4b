"""One context parallel rank's part of a micro-batch: its tokens, and all that belongs to them.

Rank r of c holds chunks r and 2c-1-r of the 2c equal chunks of every document: a zigzag, so that all
ranks have as much causal attention to do. A response token goes with the position that predicts it.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, get_args

import torch
from torch import Tensor

from megatron_lopd.data.collate import MicroBatch, RowsOf


def fields_by_rows(kind: type[MicroBatch]) -> dict[str, RowsOf]:
    """What the leading axis of each field counts. Raises TypeError for a field that does not say it."""
    rules = {each.name: each.metadata.get("rows_of") for each in fields(kind)}
    for name, rule in rules.items():
        if rule not in get_args(RowsOf):
            raise TypeError(
                f"{kind.__name__}.{name} does not say what its rows are, so context parallelism cannot cut "
                f"it: declare it as `{name}: Tensor = rows_of(...)`, of {', '.join(get_args(RowsOf))}"
            )
    return rules


# At import, and not when a layout first needs it: few tests and fewer runs have context parallel ranks.
_ROWS_OF = fields_by_rows(MicroBatch)


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
    own: dict[str, Any] = {}
    for name, rows in _ROWS_OF.items():
        value = getattr(batch, name)
        if isinstance(value, Tensor) and rows in ("positions", "responses"):
            own[name] = value[positions if rows == "positions" else predicted_here]
        elif rows == "counts" and rank:
            own[name] = 0
    own["predict_index"] = place[own["predict_index"]]
    return replace(batch, **own)
