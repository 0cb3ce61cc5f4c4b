"""Causal attention within packed documents, in plain torch, where Transformer Engine is not.

Megatron-Core's own `DotProductAttention` refuses packed sequences (PackedSeqParams).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig

from megatron_lopd.mcore import compat


class PackedAttention(torch.nn.Module):
    """The `core_attention` of a Megatron-Core SelfAttention: softmax(q k^T / sqrt(d)) v a document."""

    def __init__(self, config: TransformerConfig, **unused: Any) -> None:
        """`unused`: layer_number, attn_mask_type and the like, which Megatron-Core passes to each kind."""
        super().__init__()
        self.scale = config.kv_channels**-0.5

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        *,
        packed_seq_params: PackedSeqParams,
        **unused: Any,
    ) -> torch.Tensor:
        """[S, heads, d], [S, kv_heads, d], [S, kv_heads, d] -> [S, heads * d]."""
        cu_seqlens, max_seqlen = packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q
        flash = compat.variable_length_attention(query.dtype)
        if flash is not None:
            out: torch.Tensor = flash(
                query,
                key,
                value,
                cu_seqlens,
                cu_seqlens,
                max_seqlen,
                max_seqlen,
                scale=self.scale,
                window_size=(-1, 0),
                enable_gqa=True,
            )
            return out.flatten(1)
        return bucketed_attention(query, key, value, tuple(cu_seqlens.tolist()), self.scale).flatten(1)


def bucketed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: tuple[int, ...], scale: float
) -> torch.Tensor:
    """Causal attention in every document, those of like length run together as one padded batch.

    Padding stands at the end, where causality hides it from every real query, so it needs no mask.
    query [S, heads, d]; key, value [S, kv_heads, d]; `cu_seqlens` from 0 to S. Returns [S, heads, d].
    """
    buckets, order = _buckets(cu_seqlens, query.device)
    outputs = []
    for index in buckets:  # [documents, longest]
        q, k, v = (
            x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:]).transpose(1, 2)
            for x in (query, key, value)
        )  # [documents, heads, longest, d]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, order)


@functools.lru_cache(maxsize=4)
def _buckets(cu_seqlens: tuple[int, ...], device: torch.device) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Which tokens each bucket reads, int64 [documents, longest] a bucket, and where each token's output is.

    A bucket holds the documents of one power of two, so less than half of it is padding. Kept for the
    layers of one micro-batch, which all ask for the same.
    """
    starts = torch.tensor(cu_seqlens[:-1])
    lengths = torch.tensor(cu_seqlens[1:]) - starts
    buckets: list[torch.Tensor] = []
    order = torch.empty(cu_seqlens[-1], dtype=torch.int64)
    offset = 0
    for exponent in range(int(lengths.max()).bit_length() + 1):
        members = (lengths >= 2**exponent // 2) & (lengths < 2**exponent) & (lengths > 0)
        if not members.any():
            continue
        length, start = lengths[members, None], starts[members, None]
        column = torch.arange(int(length.max()))  # [longest]
        index = start + column.clamp(max=length - 1)  # [documents, longest]
        order[index[column < length]] = offset + torch.arange(index.numel()).view_as(index)[column < length]
        offset += index.numel()
        buckets.append(index.to(device))
    return buckets, order.to(device)
