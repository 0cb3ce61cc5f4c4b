"""Packed attention and norm against plain formulas, one document at a time."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer import TransformerConfig

from megatron_lopd.mcore.attention import bucketed_attention
from megatron_lopd.mcore.norm import RMSNorm


def one_document(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Textbook causal attention with grouped queries, [length, heads, d]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(any))
def test_packed_equals_separate(lengths: list[int]) -> None:
    total, kv_heads, heads, dim = sum(lengths), 2, 4, 6
    generator = torch.Generator().manual_seed(total)
    q, k, v = (
        torch.randn(total, n, dim, generator=generator, dtype=torch.float64, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )
    upstream = torch.randn(total, heads, dim, generator=generator, dtype=torch.float64)
    cu_seqlens = tuple(itertools.accumulate(lengths, initial=0))
    packed = bucketed_attention(q, k, v, cu_seqlens, 0.3)
    spans = [slice(a, b) for a, b in itertools.pairwise(cu_seqlens)]
    separate = torch.cat([one_document(q[s], k[s], v[s], 0.3) for s in spans])
    # fp64 rounding.
    torch.testing.assert_close(packed, separate, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        torch.autograd.grad(packed, (q, k, v), upstream),
        torch.autograd.grad(separate, (q, k, v), upstream),
        rtol=1e-9,
        atol=1e-10,
    )


def test_rms_norm_normalises_in_fp32() -> None:
    config = TransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=1, params_dtype=torch.bfloat16, bf16=True
    )
    norm = RMSNorm(config, hidden_size=64, eps=1e-6)
    torch.nn.init.uniform_(norm.weight)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = exact.bfloat16() * norm.weight
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=0)
    assert not norm.weight.sequence_parallel
