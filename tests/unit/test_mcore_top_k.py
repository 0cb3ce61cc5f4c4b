"""The likeliest tokens and their log-probs, against a top k and log_softmax of the whole logits."""

from __future__ import annotations

import pytest
import torch
from gloo import run_ranks
from torch import Tensor

from megatron_lopd.ops.softmax import ResponseLogProbs
from megatron_lopd.ops.top_k import vocab_parallel_top_k
from tests.log_prob_oracle import Watch, inputs, naive, values

VOCABULARIES = (51, 29, 28)
TOP_KS = (0, 5, 28)  # up to all that the smallest of VOCABULARIES has
TOKENLESS = torch.tensor([0, 3, 27, 28, 40, 50])  # on both ranks; with some beyond the smaller vocabularies
ROWS, AT_ONCE = 13, 4


def sliced_inputs(vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """56 rows of weight for two ranks, of which the second has many tokens, one or none."""
    hidden, weight, tokens, _ = inputs(ROWS, vocab, 0, torch.float64)
    weight = torch.cat([weight[:vocab], torch.full((56 - vocab, 5), 90.0, dtype=torch.float64)])
    return hidden.detach(), weight.detach(), tokens


def test_the_likeliest_are_those_of_the_whole_vocabulary() -> None:
    """By one rank and by two, four rows at a time."""
    ranks = run_ranks(2, scores_of_vocabularies)
    for vocab, (first, second) in zip(VOCABULARIES, zip(*ranks, strict=True), strict=True):
        hidden, weight, tokens = sliced_inputs(vocab)
        for k, one, other in zip(TOP_KS, first, second, strict=True):
            expected_ids = (hidden @ weight[:vocab].t()).topk(k, dim=1).indices
            expected = naive(hidden, weight, tokens, expected_ids, vocab, 1.0)
            # A whole vocabulary leaves no tail: log 0, of which the operation says -1e30.
            expected.tail_log_probs.clamp_(min=-1e30)
            alone = vocab_parallel_top_k(hidden, weight, tokens, k, vocab_size=vocab, rows=AT_ONCE)
            for ids, scored in (alone, one, other):
                assert torch.equal(ids, expected_ids)
                # fp64 rounding of sums over 51 entries.
                torch.testing.assert_close(values(scored), values(expected), rtol=1e-12, atol=1e-12)


def scores_of_vocabularies() -> list[list[tuple[Tensor, ResponseLogProbs]]]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    found = []
    for vocab in VOCABULARIES:
        hidden, weight, tokens = sliced_inputs(vocab)
        own = weight[28 * rank : 28 * (rank + 1)]
        found.append(
            [
                vocab_parallel_top_k(hidden, own, tokens, k, vocab_size=vocab, group=group, rows=AT_ONCE)
                for k in TOP_KS
            ]
        )
    dist.destroy_process_group()
    return found


def test_ids_without_a_token_are_in_the_tail() -> None:
    """By one rank and by two; up to as many as there are others."""
    ranks = run_ranks(2, scores_without_some)
    for vocab, one, other in zip(VOCABULARIES, *ranks, strict=True):
        hidden, weight, tokens = sliced_inputs(vocab)
        logits, barred = hidden @ weight[:vocab].t(), TOKENLESS[TOKENLESS.lt(vocab)]
        k = vocab - len(barred)
        expected_ids = logits.index_fill(1, barred, -torch.inf).topk(k, dim=1).indices
        expected = naive(hidden, weight, tokens, expected_ids, vocab, 1.0)
        for ids, scored in (one, other):
            assert torch.equal(ids, expected_ids)
            torch.testing.assert_close(values(scored), values(expected), rtol=1e-12, atol=1e-12)


def scores_without_some() -> list[tuple[Tensor, ResponseLogProbs]]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    group, rank, found = dist.group.WORLD, dist.get_rank(), []
    for vocab in VOCABULARIES:
        hidden, weight, tokens = sliced_inputs(vocab)
        barred = TOKENLESS[TOKENLESS.lt(vocab)]
        own, k = weight[28 * rank : 28 * (rank + 1)], vocab - len(barred)
        found.append(
            vocab_parallel_top_k(
                hidden, own, tokens, k, TOKENLESS, vocab_size=vocab, group=group, rows=AT_ONCE
            )
        )
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("k", [0, 5])
def test_logits_are_made_once(k: int) -> None:
    hidden, weight, tokens = sliced_inputs(51)
    with Watch() as watch:
        vocab_parallel_top_k(hidden, weight, tokens, k, vocab_size=51, rows=AT_ONCE)
    assert watch.widths == [51] * 4  # 13 rows, four at a time


def test_no_rows_have_no_scores() -> None:
    hidden, weight, tokens = sliced_inputs(51)
    ids, scored = vocab_parallel_top_k(hidden[:0], weight, tokens[:0], 5, vocab_size=51)
    assert ids.shape == scored.top_k_log_probs.shape == (0, 5)
