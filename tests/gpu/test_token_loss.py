"""The loss by chunks of rows on this device, at a real vocabulary, against whole logits in fp64."""

from __future__ import annotations

import pytest
import torch
from support import Bench
from torch import Tensor

from megatron_lopd.mcore import compat
from megatron_lopd.ops.kernel_trial import trial, usable
from megatron_lopd.ops.softmax import ResponseLogProbs
from megatron_lopd.ops.token_loss import vocab_parallel_loss
from tests.log_prob_oracle import naive


def of_everything(scored: ResponseLogProbs, rows: slice) -> Tensor:
    top_k = (scored.top_k_log_probs.exp() * scored.top_k_log_probs).sum(1)
    return top_k + scored.tail_log_probs.exp() * scored.tail_log_probs - scored.log_probs


@pytest.mark.needs("gpu")
def test_the_kernels_run() -> None:
    compat.prepare()
    assert trial("cuda") == ""


@pytest.mark.parametrize("k", [0, 64])
def test_loss_and_gradients_in_bf16_are_those_of_fp64_twice(bench: Bench, k: int) -> None:
    """Of an odd vocabulary, in chunks, with ids that repeat; the weight's gradient in fp32, as in DDP."""
    vocab, rows, hidden_size = (5_003, 48, 128) if bench.quick else (151_935, 700, 1024)
    compat.prepare()
    device = compat.device()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, hidden_size, generator=generator).bfloat16().to(device).requires_grad_()
    weight = torch.randn(vocab + 1, hidden_size, generator=generator).mul_(3 / hidden_size**0.5)
    weight = weight.bfloat16().to(device).requires_grad_()
    tokens = torch.randint(vocab, (rows,), generator=generator).to(device)
    ids = torch.randint(vocab, (rows, k), generator=generator).to(device)
    if k:
        ids[:, 0] = ids[:, 1] = tokens
    weights = torch.rand(rows, generator=generator).to(device)

    def step() -> list[Tensor]:
        hidden.grad = weight.grad = None
        weight.main_grad = torch.zeros(weight.shape, device=device)
        summed = vocab_parallel_loss(
            hidden, weight, tokens, ids, of_everything, weights, vocab_size=vocab, rows=256
        )
        summed.total.backward()
        assert hidden.grad is not None
        by_weight = weight.main_grad if usable(device) else weight.grad
        return [summed.log_probs, summed.entropy, hidden.grad, by_weight]

    log_probs, entropy, *gradients = first = step()
    assert all(torch.equal(one, two) for one, two in zip(first, step(), strict=True))

    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = naive(exact[0], exact[1], tokens, ids, vocab, 1.0)
    total = (weights.double() * of_everything(expected, slice(None))).sum()
    # bf16 products are exact in fp32, so what is left is fp32 sums of 1,024 and of 151,935 terms.
    assert (log_probs.double() - expected.log_probs).abs().max() < 1e-4
    assert (entropy.double() - expected.entropy).abs().max() < 1e-4
    for ours, reference in zip(gradients, torch.autograd.grad(total, exact), strict=True):
        # Gradients of logits are rounded to bf16 before they are multiplied, and so is hidden's.
        assert (ours.double() - reference).norm() / reference.norm() < 1e-2
