"""Causal attention within packed documents, in plain torch, where Transformer Engine is not.

Megatron-Core's own `DotProductAttention` refuses packed sequences (PackedSeqParams) and context parallelism.
Under the latter, each rank gathers the keys and values of all, and its queries attend to whole documents.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig

from megatron_lopd.errors import ConfigError
from megatron_lopd.mcore import compat


@dataclass(frozen=True)
class Spans:
    """Runs of queries, and the run of keys that each attends to, causally: the last query sees the last key.

    `cu_seqlens_q`, `cu_seqlens_k` int32 [runs + 1], where each begins; `max_q`, `max_k` the longest ones.
    `key_index` int64: which keys of all ranks, one rank after another, make up the runs; None: this rank's.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_q: int
    max_k: int
    key_index: torch.Tensor | None = None


@dataclass
class PackedDocuments(PackedSeqParams):  # type: ignore[misc]
    """Megatron-Core's own description of packed documents, which Transformer Engine reads, and our spans."""

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor, max_seqlen: int) -> PackedDocuments:
        """`cu_seqlens` int32 [documents + 1] and `max_seqlen` are those of whole documents.

        A document's own padding is part of it (causality hides it), so Transformer Engine needs no
        `cu_seqlens_*_padded`, under context parallelism either.
        """
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
        )

    @functools.cached_property
    def spans(self) -> Spans:
        """The same for every layer of a micro-batch."""
        size = parallel_state.get_context_parallel_world_size()
        rank = parallel_state.get_context_parallel_rank()
        return spans_of(self.cu_seqlens_q, self.max_seqlen_q, size, rank)


def spans_of(cu_seqlens: torch.Tensor, max_seqlen: int, size: int, rank: int) -> Spans:
    """What context parallel rank `rank` of `size` attends to, when data/context_parallel.py dealt the tokens.

    It has chunks `rank` and `2 size - 1 - rank` of the 2 `size` of each document; chunk c attends to 0..c.
    """
    if size == 1:
        return Spans(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    chunk = (cu_seqlens.diff() // (2 * size)).long().repeat_interleave(2)  # [runs], two a document
    chunks_seen = torch.tensor([rank + 1, 2 * size - rank], device=chunk.device).repeat(len(chunk) // 2)
    keys = chunks_seen * chunk
    cu_seqlens_k = F.pad(keys.cumsum(0), (1, 0))
    run = torch.arange(len(keys), device=keys.device).repeat_interleave(keys)  # [all keys], as what follows
    position = torch.arange(len(run), device=run.device) - cu_seqlens_k[run]  # in the document
    number = position // chunk[run]
    owner = torch.minimum(number, 2 * size - 1 - number)
    document = (cu_seqlens[:-1] // size).repeat_interleave(2)  # [runs], where its tokens begin on every rank
    place = document[run] + position % chunk[run] + torch.where(number < size, 0, chunk[run])
    return Spans(
        cu_seqlens_q=F.pad(chunk.cumsum(0), (1, 0)).int(),
        cu_seqlens_k=cu_seqlens_k.int(),
        max_q=max_seqlen // (2 * size),
        max_k=max_seqlen // (2 * size) * (2 * size - rank),
        key_index=owner * (cu_seqlens[-1] // size) + place,
    )


class PackedAttention(torch.nn.Module):
    """The `core_attention` of a Megatron-Core SelfAttention: softmax(scale q k^T) v a document.

    `scale` is 1 / sqrt(d), where the settings name no other.
    """

    def __init__(self, config: TransformerConfig, **unused: Any) -> None:
        """`unused`: layer_number, attn_mask_type and the like, which Megatron-Core passes to each kind.

        Raises ConfigError for a sliding window, which is not made here.
        """
        super().__init__()
        if config.window_size is not None:
            raise ConfigError(
                f"attention over a window of {config.window_size} takes Transformer Engine, in bf16 on a GPU"
            )
        self.scale = config.softmax_scale or config.kv_channels**-0.5

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        *,
        packed_seq_params: PackedDocuments,
        **unused: Any,
    ) -> torch.Tensor:
        """[S, heads, d], [S, kv_heads, d], [S, kv_heads, d] -> [S, heads * d]."""
        spans = packed_seq_params.spans
        if spans.key_index is not None:
            key, value = _keys_of_all_ranks(key, value, spans.key_index)
        flash = compat.variable_length_attention(query.dtype)
        if flash is not None:
            out = flash(
                query,
                key,
                value,
                spans.cu_seqlens_q,
                spans.cu_seqlens_k,
                spans.max_q,
                spans.max_k,
                scale=self.scale,
            )
            return out.flatten(1)
        return bucketed_attention(query, key, value, spans, self.scale).flatten(1)


def _keys_of_all_ranks(
    key: torch.Tensor, value: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values at `index` of the context parallel group's; the backward sums what each rank adds."""
    group = parallel_state.get_context_parallel_group()
    both = gather_from_sequence_parallel_region(torch.stack((key, value), 1), group=group)
    return both[:, 0].index_select(0, index), both[:, 1].index_select(0, index)


def bucketed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scale: float
) -> torch.Tensor:
    """Causal attention in every run, those of like length taken together as one padded batch.

    Padding stands at the end, where causality hides it from every real query.
    query [queries, heads, d]; key, value [keys, kv_heads, d]. Returns [queries, heads, d].
    """
    buckets, order = _buckets(
        tuple(spans.cu_seqlens_q.tolist()), tuple(spans.cu_seqlens_k.tolist()), query.device
    )
    outputs = []
    for bucket in buckets:
        q, k, v = (
            x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:]).transpose(1, 2)
            for x, index in ((query, bucket.queries), (key, bucket.keys), (value, bucket.keys))
        )  # [runs, heads, longest, d]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bucket.seen, is_causal=bucket.seen is None, scale=scale, enable_gqa=True
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, order)


@dataclass(frozen=True)
class _Bucket:
    """Runs of like length: which tokens they read, int64 [runs, longest], and what each query sees.

    `seen` bool [runs, 1, longest queries, longest keys]; None where queries and keys are the same tokens.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    seen: torch.Tensor | None


@functools.lru_cache(maxsize=4)
def _buckets(
    cu_seqlens_q: tuple[int, ...], cu_seqlens_k: tuple[int, ...], device: torch.device
) -> tuple[list[_Bucket], torch.Tensor]:
    """The buckets, and where in their outputs each query's is.

    A bucket holds the runs whose keys are of one power of two, so less than half of it is padding. Kept
    for the layers of one micro-batch, which all ask for the same.
    """
    first_q, first_k = torch.tensor(cu_seqlens_q[:-1]), torch.tensor(cu_seqlens_k[:-1])
    queries, keys = torch.tensor(cu_seqlens_q[1:]) - first_q, torch.tensor(cu_seqlens_k[1:]) - first_k
    buckets: list[_Bucket] = []
    order = torch.empty(cu_seqlens_q[-1], dtype=torch.int64)
    offset = 0
    for exponent in range(int(keys.max()).bit_length() + 1):
        members = (keys >= 2**exponent // 2) & (keys < 2**exponent) & (queries > 0)
        if not members.any():
            continue
        q, k = queries[members, None], keys[members, None]  # [runs, 1]
        row, column = torch.arange(int(q.max())), torch.arange(int(k.max()))
        index = first_q[members, None] + row.clamp(max=q - 1)  # [runs, longest]
        order[index[row < q]] = offset + torch.arange(index.numel()).view_as(index)[row < q]
        offset += index.numel()
        # The last query stands at the last key, so the first one has keys - queries before it.
        seen = None if bool((q == k).all()) else column <= (row + (k - q))[:, None, :, None]
        buckets.append(
            _Bucket(
                index.to(device),
                (first_k[members, None] + column.clamp(max=k - 1)).to(device),
                None if seen is None else seen.to(device),
            )
        )
    return buckets, order.to(device)
