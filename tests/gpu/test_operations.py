"""Our own operations on this device: log-probs at a real vocabulary, and packed attention."""

from __future__ import annotations

import pytest
import torch
from support import Bench

from megatron_lopd.mcore import compat
from megatron_lopd.mcore.attention import bucketed_attention, spans_of
from megatron_lopd.ops.log_probs import vocab_parallel_log_probs


def test_lean_log_probs_in_bf16_are_those_of_fp64(bench: Bench) -> None:
    vocab_size, rows, hidden_size = (5_003, 64, 128) if bench.quick else (151_936, 512, 1024)
    compat.prepare()
    device = compat.device()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, hidden_size, generator=generator).bfloat16().to(device).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size, generator=generator).mul_(3 / hidden_size**0.5)
    weight = weight.bfloat16().to(device).requires_grad_()
    tokens = torch.randint(vocab_size, (rows,), generator=generator).to(device)

    result = vocab_parallel_log_probs(hidden, weight, tokens, vocab_size=vocab_size)
    result.log_probs.mean().backward()

    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = (exact_hidden @ exact_weight.t()).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    exact.mean().backward()
    # bf16 products are exact in fp32, so what is left is fp32 sums of 1,024 and of 151,936 terms.
    assert (result.log_probs.double() - exact).abs().max() < 1e-4
    for ours, reference in ((hidden.grad, exact_hidden.grad), (weight.grad, exact_weight.grad)):
        assert ours is not None
        # Gradients of logits are rounded to bf16 before they are multiplied, and so is the result.
        assert (ours.double() - reference).norm() / reference.norm() < 1e-2


@pytest.mark.needs("gpu")
def test_variable_length_attention_is_sdpa_of_each_document() -> None:
    """torch's own packed flash attention, which native layers take in bf16; keys have fewer heads."""
    flash = compat.variable_length_attention(torch.bfloat16)
    assert flash is not None, "torch here has no torch.nn.attention.varlen with scale and window"
    cu_seqlens = (0, 300, 317, 319, 448, 512)
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [
        torch.randn(512, heads, 64, device="cuda", generator=generator).bfloat16().requires_grad_()
        for heads in (4, 2, 2)
    ]
    offsets = torch.tensor(cu_seqlens, dtype=torch.int32, device="cuda")
    ours = flash(*inputs, offsets, offsets, 300, 300, scale=0.125)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = bucketed_attention(*exact_inputs, spans_of(offsets, 300, 1, 0), 0.125)
    seed = torch.randn(exact.shape, device="cuda", generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad(ours, inputs, seed.bfloat16())
    references = torch.autograd.grad(exact, exact_inputs, seed)
    for got, reference in zip((ours, *gradients), (exact, *references), strict=True):
        # Probabilities and results are rounded to bf16: 2^-9 each, a few of them in a row.
        assert (got.double() - reference).norm() / reference.norm() < 2e-2
