"""Packed attention and norm against plain formulas, one document at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer import TransformerConfig
from torch.nn.attention import varlen

from megatron_lopd.mcore import compat
from megatron_lopd.mcore.attention import Spans, bucketed_attention, spans_of
from megatron_lopd.mcore.norm import RMSNorm

pytestmark = pytest.mark.release


def one_document(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Textbook causal attention with grouped queries, [length, heads, d]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)


@settings(max_examples=40)
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
    starts = torch.tensor(cu_seqlens, dtype=torch.int32)
    packed = bucketed_attention(q, k, v, spans_of(starts, max(lengths), 1, 0), 0.3)
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


@settings(max_examples=40)
@given(chunks=st.lists(st.integers(1, 5), min_size=1, max_size=6), size=st.integers(2, 4))
def test_context_parallel_ranks_make_up_the_whole(chunks: list[int], size: int) -> None:
    """Each rank's queries against the keys of all ranks, in the order that gathering them gives."""
    lengths = torch.tensor(chunks) * 2 * size
    total, kv_heads, heads, dim = int(lengths.sum()), 2, 4, 6
    generator = torch.Generator().manual_seed(total)
    q, k, v = (
        torch.randn(total, n, dim, generator=generator, dtype=torch.float64)
        for n in (heads, kv_heads, kv_heads)
    )
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    longest = int(lengths.max())
    whole = bucketed_attention(q, k, v, Spans(cu_seqlens, cu_seqlens, longest, longest), 0.3)
    owned = []  # positions of each rank, chunk by chunk
    for rank in range(size):
        places = [
            torch.arange(start, start + length).chunk(2 * size)[number]
            for start, length in zip(cu_seqlens.tolist(), lengths.tolist(), strict=False)
            for number in (rank, 2 * size - 1 - rank)
        ]
        owned.append(torch.cat(places))
    gathered = torch.cat(owned)
    for rank, mine in enumerate(owned):
        spans = spans_of(cu_seqlens, longest, size, rank)
        assert spans.max_q == spans.cu_seqlens_q.diff().max()
        assert spans.max_k == spans.cu_seqlens_k.diff().max()
        assert {spans.cu_seqlens_q.dtype, spans.cu_seqlens_k.dtype} == {torch.int32}
        assert spans.key_index is not None
        here = gathered[spans.key_index]
        out = bucketed_attention(q[mine], k[here], v[here], spans, 0.3)
        torch.testing.assert_close(out, whole[mine], rtol=1e-10, atol=1e-10)  # fp64 rounding


def varlen_attn_of_2_13(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """A fake of torch.nn.attention.varlen's, which needs CUDA: its signature, refusals and formula."""
    if key.shape[1] != query.shape[1] and not enable_gqa:
        raise ValueError("Expect query and key/value to have the same number of heads")
    assert window_size == (-1, 0), "causal"
    assert scale is not None
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    spans = [slice(a, b) for a, b in itertools.pairwise(cu_seq_q.tolist())]
    return torch.cat([one_document(query[s], key[s], value[s], scale) for s in spans])


def varlen_attn_of_2_11(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """The same, of the release that knows no groups of queries."""
    where = cu_seq_q, cu_seq_k, max_q, max_k
    return varlen_attn_of_2_13(query, key, value, *where, scale=scale, window_size=window_size)


def varlen_attn_of_2_10(
    query: torch.Tensor, key: torch.Tensor, *rest: object, is_causal: bool = False
) -> None:
    """Takes neither a scale nor a window."""


@pytest.mark.parametrize(
    ("fake", "can"),
    [(varlen_attn_of_2_13, True), (varlen_attn_of_2_11, True), (varlen_attn_of_2_10, False)],
)
def test_torch_s_packed_attention_is_taken_as_each_release_has_it(
    monkeypatch: pytest.MonkeyPatch, fake: Callable[..., Any], can: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(varlen, "varlen_attn", fake)
    compat._packed_flash.cache_clear()
    flash = compat.variable_length_attention(torch.bfloat16)
    compat._packed_flash.cache_clear()
    assert compat.variable_length_attention(torch.float32) is None
    assert (flash is not None) == can
    if flash is None:
        return
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(9, heads, 6, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    starts = torch.tensor([0, 5, 7, 9], dtype=torch.int32)
    ours = flash(q, k, v, starts, starts, 5, 5, scale=0.3)
    exact = bucketed_attention(q, k, v, spans_of(starts, 5, 1, 0), 0.3)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)  # fp64 rounding
    for got, reference in zip(
        torch.autograd.grad(ours.square().sum(), (q, k, v)),
        torch.autograd.grad(exact.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(got, reference, rtol=1e-9, atol=1e-10)


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
