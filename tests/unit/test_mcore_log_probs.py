"""The log-prob operation against log_softmax, in fp64 where the tolerance can be tight."""

from __future__ import annotations

import pytest
import torch
from gloo import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lopd.ops.log_probs import BLOCK_MULTIPLE, vocab_parallel_log_probs
from megatron_lopd.ops.products import matmul_fp32
from megatron_lopd.ops.softmax import ResponseLogProbs, fold_repeats
from tests.log_prob_oracle import DIFFERENTIABLE, Watch, inputs, naive, unaligned, values


def upstream(result: ResponseLogProbs) -> list[Tensor]:
    """A gradient for each differentiable output, no two entries alike."""
    outputs = [getattr(result, name) for name in DIFFERENTIABLE]
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outputs]


def gradients(result: ResponseLogProbs, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    outputs = [getattr(result, name) for name in DIFFERENTIABLE]
    return torch.autograd.grad(outputs, (hidden, weight), upstream(result))


@settings(max_examples=60)
@given(
    rows=st.integers(0, 9),
    beside_the_ids=st.one_of(st.integers(1, 8), st.integers(250, 600)),
    k=st.integers(0, 6),
    temperature=st.sampled_from([1.0, 0.7, 3.0]),
    chunk_elements=st.sampled_from([1, 10_000]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_equals_log_softmax_forward_and_backward(
    rows: int, beside_the_ids: int, k: int, temperature: float, chunk_elements: int, dtype: torch.dtype
) -> None:
    vocab = 1 + k + beside_the_ids  # so that there is a tail
    hidden, weight, tokens, ids = inputs(rows, vocab, k, dtype)
    ours = vocab_parallel_log_probs(
        hidden,
        weight,
        tokens,
        ids,
        vocab_size=vocab,
        temperature=temperature,
        chunk_elements=chunk_elements,
    )
    expected = naive(hidden, weight, tokens, ids, vocab, temperature)
    # Rounding of sums over up to three blocks of entries, logits up to about 40.
    slack = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(values(ours), values(expected), **slack)
    # A gradient of weight adds up to 9 rows of hidden, times up to 9 gradients each.
    looser = {name: 10 * value for name, value in slack.items()}
    our_gradients = gradients(ours, hidden, weight)
    torch.testing.assert_close(our_gradients, gradients(expected, hidden, weight), **looser)
    assert not ours.entropy.requires_grad
    assert our_gradients[1][vocab:].count_nonzero() == 0


@settings(max_examples=10)
@given(
    rows=st.integers(1, 3),
    k=st.integers(0, 3),
    temperature=st.sampled_from([1.0, 1.3]),
)
def test_gradcheck(rows: int, k: int, temperature: float) -> None:
    hidden, weight, tokens, ids = inputs(rows, 7, k, torch.float64)
    weight = weight[:7].detach().requires_grad_()

    def differentiable(hidden: Tensor, weight: Tensor) -> list[Tensor]:
        out = vocab_parallel_log_probs(
            hidden,
            weight,
            tokens,
            ids,
            vocab_size=7,
            temperature=temperature,
        )
        return [getattr(out, name) for name in DIFFERENTIABLE if getattr(out, name).numel()]

    assert torch.autograd.gradcheck(differentiable, (hidden, weight))


def test_a_tail_far_below_rounding_keeps_its_digits() -> None:
    """One token takes all but e^-200: 1 - p is 0 in fp32, the tail and its gradient are not."""
    logits = torch.tensor([[200.0, 0.0, 1.0, -1.0]], requires_grad=True)
    out = vocab_parallel_log_probs(logits, torch.eye(4), torch.tensor([0]), vocab_size=4)
    expected = torch.tensor([0.0, 1.0, -1.0]).logsumexp(0)
    # fp32 rounding at 200; the gradient is the tail's own softmax less a vector of e^-200.
    torch.testing.assert_close(out.tail_log_probs, expected[None] - 200, rtol=0, atol=2e-5)
    (gradient,) = torch.autograd.grad(out.tail_log_probs.sum(), logits)
    tail = torch.tensor([0.0, 1.0, -1.0]).softmax(0)
    torch.testing.assert_close(gradient[0], torch.cat([torch.tensor([-1.0]), tail]), rtol=0, atol=1e-6)


def test_ids_that_are_the_whole_vocabulary_leave_an_empty_tail() -> None:
    hidden, weight, tokens, _ = inputs(4, 6, 0, torch.float64)
    ids = torch.arange(6).expand(4, 6)
    out = vocab_parallel_log_probs(hidden, weight, tokens, ids, vocab_size=6)
    assert (out.tail_log_probs.exp() == 0).all()
    expected = naive(hidden, weight, tokens, ids, 6, 1.0)
    # fp64 sums of a few entries, here and below.
    torch.testing.assert_close(out.entropy, expected.entropy, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(out.top_k_log_probs.square().sum(), (hidden, weight))
    theirs = torch.autograd.grad(expected.top_k_log_probs.square().sum(), (hidden, weight))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_bf16_is_accumulated_in_fp32() -> None:
    """bf16 inputs must lose nothing past their own rounding: bf16 logits would be off by up to 0.06 nats."""
    hidden, weight, tokens, ids = inputs(9, 6000, 3, torch.bfloat16)
    result = vocab_parallel_log_probs(hidden, weight, tokens, ids, vocab_size=6000, chunk_elements=1)
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    expected = naive(*exact, tokens, ids, 6000, 1.0)
    for ours, theirs in zip(values(result), values(expected), strict=True):
        assert ours.dtype == torch.float32
        # fp32 rounding at logits of about 10.
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5)
    for ours, theirs in zip(gradients(result, hidden, weight), gradients(expected, *exact), strict=True):
        assert ours.dtype == torch.bfloat16
        # Rounded to bf16 twice, as logits' gradients and at the end: each by at most 2^-9 of the entry.
        assert (ours.double() - theirs).norm() <= 2**-8 * theirs.norm()


def test_never_holds_logits_of_every_token() -> None:
    rows, vocab, chunk_elements = 512, 4096, 2**17
    hidden, weight, tokens, ids = inputs(rows, vocab, 4, torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape != weight.shape:
                largest = max(largest, out.numel())
            return out

    with Watch():
        result = vocab_parallel_log_probs(
            hidden, weight, tokens, ids, vocab_size=vocab, chunk_elements=chunk_elements
        )
        gradients(result, hidden, weight)
    assert largest == chunk_elements


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_of_whole_tiles_and_aligned_rows(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An odd vocabulary, where blocks of 300 would fit: cuBLAS would take its slow kernels for both."""
    hidden, weight, tokens, ids = inputs(13, 601, 2, dtype, hidden_size=8)
    widths, off = [], []

    def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        result = matmul_fp32(a, b, out)
        widths.append(result.shape[1])
        off.extend(unaligned(a, b, out))
        return result

    monkeypatch.setattr("megatron_lopd.ops.log_probs.matmul_fp32", product)
    result = vocab_parallel_log_probs(hidden, weight, tokens, ids, vocab_size=601, chunk_elements=13 * 300)
    gradients(result, hidden, weight)
    assert off == []
    assert {width for width in widths if width != 8} == {BLOCK_MULTIPLE, 601 % BLOCK_MULTIPLE}


def test_repeated_ids_are_summed_before_they_are_scattered() -> None:
    """On a GPU a scatter that adds floats in one place sums them in another order each time."""
    hidden, weight, tokens, ids = inputs(13, 300, 5, torch.float32)
    ids[:, 1] = ids[:, 2] = ids[:, 3]
    with Watch() as watch:
        gradients(vocab_parallel_log_probs(hidden, weight, tokens, ids, vocab_size=300), hidden, weight)
    assert watch.unordered == 0


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9))
def test_the_first_of_equal_ids_has_their_sum(row: list[int]) -> None:
    ids = torch.tensor([row, row[::-1]])
    values = torch.arange(1.0, 1 + ids.numel()).view_as(ids)
    expected = [
        [
            sum(value for other, value in zip(of, by, strict=True) if other == name)
            if name not in of[:place]
            else 0
            for place, name in enumerate(of)
        ]
        for of, by in zip(ids.tolist(), values.tolist(), strict=True)
    ]
    assert fold_repeats(values, ids).tolist() == expected


@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_extreme_logits_stay_finite(scale: float) -> None:
    hidden, weight, tokens, ids = inputs(6, 11, 4, torch.float32)
    result = vocab_parallel_log_probs(hidden * scale, weight, tokens, ids, vocab_size=11)
    for tensor in (*values(result), *gradients(result, hidden, weight)):
        assert tensor.isfinite().all()
    assert (result.log_probs <= 0).all()
    assert (result.top_k_log_probs <= 0).all()


def test_two_slices_of_the_vocabulary_are_one() -> None:
    """600 rows over two ranks, in blocks of 256; the second rank owns many tokens, one or none."""
    ranks = run_ranks(2, slices_of_vocabularies, VOCABULARIES)
    for vocab, (first, second) in zip(VOCABULARIES, zip(*ranks, strict=True), strict=True):
        hidden, weight, tokens, ids = sliced_inputs(vocab)
        expected = naive(hidden, weight, tokens, ids, vocab, 1.3)
        grad_hidden, grad_weight = gradients(expected, hidden, weight)
        for outputs, _, _ in (first, second):
            # fp64 rounding of sums over 595 entries, here and below.
            torch.testing.assert_close(outputs, values(expected), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(first[1] + second[1], grad_hidden, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(torch.cat([first[2], second[2]]), grad_weight, rtol=1e-11, atol=1e-11)


VOCABULARIES = (595, 301, 300)


def sliced_inputs(vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, tokens, ids = inputs(13, vocab, 4, torch.float64)
    weight = torch.cat([weight[:vocab], torch.full((600 - vocab, 5), 90.0, dtype=torch.float64)])
    ids[:4] %= 20  # rows whose ids are all of the first rank
    return hidden, weight.detach().requires_grad_(), tokens, ids


def slices_of_vocabularies(vocabularies: tuple[int, ...]) -> list[tuple[list[Tensor], Tensor, Tensor]]:
    """In a rank, of each vocabulary: what came out, its share of hidden's gradient, its rows of weight's."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    results = []
    for vocab in vocabularies:
        hidden, weight, tokens, ids = sliced_inputs(vocab)
        mine = weight.detach().chunk(2)[dist.get_rank()].clone().requires_grad_()
        out = vocab_parallel_log_probs(
            hidden,
            mine,
            tokens,
            ids,
            vocab_size=vocab,
            temperature=1.3,
            group=dist.group.WORLD,
            chunk_elements=1,
        )
        shares = gradients(out, hidden, mine)
        results.append(([tensor.detach() for tensor in values(out)], *shares))
    dist.destroy_process_group()
    return results
