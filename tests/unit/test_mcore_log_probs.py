"""The log-prob operation against log_softmax, in fp64 where the tolerance can be tight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lopd.mcore.log_probs import ResponseLogProbs, vocab_parallel_log_probs

PADDING_ROWS = 3


def inputs(rows: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + vocab)
    hidden = torch.randn(rows, 5, generator=generator, dtype=dtype)
    # Large padding rows: had they a share of the probability, it would be nearly all of it.
    weight = torch.randn(vocab + PADDING_ROWS, 5, generator=generator, dtype=dtype) * 2
    weight[vocab:] *= 100
    tokens = torch.randint(vocab, (rows,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), tokens


def naive(
    hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, vocab: int, temperature: float
) -> ResponseLogProbs:
    log_softmax = (hidden @ weight[:vocab].t() / temperature).log_softmax(-1)
    chosen = log_softmax.gather(-1, tokens[:, None]).squeeze(-1)
    return ResponseLogProbs(chosen, -(log_softmax.exp() * log_softmax).sum(-1))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    vocab=st.integers(1, 12),
    temperature=st.sampled_from([1.0, 0.7, 3.0]),
    chunk_elements=st.sampled_from([1, 30, 10_000]),
)
def test_equals_log_softmax_forward_and_backward(
    rows: int, vocab: int, temperature: float, chunk_elements: int
) -> None:
    hidden, weight, tokens = inputs(rows, vocab, torch.float64)
    upstream = torch.linspace(-1, 2, rows, dtype=torch.float64)
    ours = vocab_parallel_log_probs(
        hidden, weight, tokens, vocab_size=vocab, temperature=temperature, chunk_elements=chunk_elements
    )
    our_gradients = torch.autograd.grad(ours.log_probs, (hidden, weight), upstream)
    expected = naive(hidden, weight, tokens, vocab, temperature)
    gradients = torch.autograd.grad(expected.log_probs, (hidden, weight), upstream)
    # fp64 rounding of sums over at most 12 entries.
    torch.testing.assert_close(ours.log_probs, expected.log_probs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.entropy, expected.entropy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(our_gradients, gradients, rtol=1e-11, atol=1e-12)
    assert not ours.entropy.requires_grad
    assert our_gradients[1][vocab:].count_nonzero() == 0


def test_gradcheck() -> None:
    hidden, weight, tokens = inputs(4, 7, torch.float64)
    weight = weight[:7].detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: (
            vocab_parallel_log_probs(h, w, tokens, vocab_size=7, temperature=1.3, chunk_elements=14).log_probs
        ),
        (hidden, weight),
    )


def test_bf16_is_accumulated_in_fp32() -> None:
    """bf16 inputs must lose nothing past their own rounding: bf16 logits would be off by up to 0.06 nats."""
    hidden, weight, tokens = inputs(9, 12, torch.bfloat16)
    result = vocab_parallel_log_probs(hidden, weight, tokens, vocab_size=12)
    exact = naive(hidden.double(), weight.double(), tokens, 12, 1.0)
    assert result.log_probs.dtype == torch.float32
    # fp32 rounding at logits of about 10.
    torch.testing.assert_close(result.log_probs.double(), exact.log_probs, rtol=0, atol=1e-5)
    result.log_probs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_never_holds_logits_of_every_token() -> None:
    rows, vocab, chunk_elements = 512, 4096, 2**16
    hidden, weight, tokens = inputs(rows, vocab, torch.float32)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1] == vocab:
                largest = max(largest, out.numel())
            return out

    with Watch():
        result = vocab_parallel_log_probs(
            hidden, weight, tokens, vocab_size=vocab, chunk_elements=chunk_elements
        )
    assert 0 < largest <= chunk_elements
    result.log_probs.sum().backward()


@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_extreme_logits_stay_finite(scale: float) -> None:
    hidden, weight, tokens = inputs(6, 11, torch.float32)
    result = vocab_parallel_log_probs(hidden * scale, weight, tokens, vocab_size=11)
    gradients = torch.autograd.grad(result.log_probs.sum(), (hidden, weight))
    for tensor in (result.log_probs, result.entropy, *gradients):
        assert tensor.isfinite().all()
    assert (result.log_probs <= 0).all()
