"""Each row's likeliest tokens and their log-probs, from logits made once: what a teacher's scores are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_gather

from megatron_lopd.ops.row_chunks import row_chunks, rows_at_once
from megatron_lopd.ops.softmax import ResponseLogProbs, Softmax, VocabularySlice


@torch.no_grad()
def vocab_parallel_top_k(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    k: int,
    tokenless: Tensor | None = None,
    *,
    vocab_size: int,
    group: ProcessGroup | None = None,
    rows: int | None = None,
) -> tuple[Tensor, ResponseLogProbs]:
    """(ids of each row's `k` largest logits, the largest first, int64 [R, k]; what the row's softmax says of
    its token, of these and of the rest), the same on every rank; constants.

    Arguments as of `vocab_parallel_log_probs`; `tokenless` int64 [n] are ids that are never among the
    likeliest, and `k` is from 0 to how many others there are; `rows` whose logits are held at once (None:
    what CHUNK_BYTES holds).
    """
    vocab = VocabularySlice.of(weight, vocab_size, group)
    likeliest = _Likeliest(tokens, k, vocab, _columns(tokenless, vocab))
    size = rows_at_once(hidden, vocab, rows)
    chunks = row_chunks(hidden, weight, vocab, 1.0, size, likeliest.with_tokens)
    softmaxes = [chunk.softmax for chunk in chunks]

    def whole(part: Callable[[Softmax], Tensor]) -> Tensor:
        return torch.cat([part(softmax) for softmax in softmaxes])

    log_probs = whole(lambda softmax: softmax.log_probs)
    scored = ResponseLogProbs(
        log_probs[:, 0],
        whole(lambda softmax: softmax.log_sum_exp),
        whole(lambda softmax: softmax.entropy),
        log_probs[:, 1:],
        whole(lambda softmax: softmax.tail_log_probs),
    )
    return whole(lambda softmax: softmax.kept.ids)[:, 1:], scored


def _columns(ids: Tensor | None, vocab: VocabularySlice) -> Tensor | None:
    """Where this rank has `ids`; None where it has none of them."""
    if ids is None:
        return None
    own = ids[(ids >= vocab.start) & (ids < vocab.start + vocab.size)] - vocab.start
    return own if len(own) else None


@dataclass(frozen=True)
class _Likeliest:
    """Each row's token and the `k` of the largest logits, of all ranks."""

    tokens: Tensor
    k: int
    vocab: VocabularySlice
    tokenless: Tensor | None  # this rank's columns that are not looked at

    def with_tokens(self, rows: slice, logits: Tensor) -> Tensor:
        """ids [rows, 1 + k], the row's own token first, from this rank's logits."""
        if self.tokenless is None:
            top = logits.topk(min(self.k, logits.shape[1]), dim=1)
        else:  # in place: the logits of a chunk are not held twice
            kept = logits[:, self.tokenless]
            logits[:, self.tokenless] = -torch.inf
            top = logits.topk(min(self.k, logits.shape[1]), dim=1)
            logits[:, self.tokenless] = kept
        values, ids = top.values, top.indices + self.vocab.start
        if self.vocab.is_shared and self.k:
            values, ids = self._gather(values, ids)
            ids = ids.gather(1, values.topk(self.k, dim=1).indices)
        return torch.cat([self.tokens[rows, None], ids], dim=1)

    def _gather(self, *columns: Tensor) -> Iterator[Tensor]:
        """[rows, ranks x k] of each; the last ranks can have fewer tokens than k."""
        group = self.vocab.group
        assert group is not None
        for own, filler in zip(columns, (-torch.inf, 0), strict=True):
            padded = torch.nn.functional.pad(own, (0, self.k - own.shape[1]), value=filler).contiguous()
            ranks = [torch.empty_like(padded) for _ in range(group.size())]
            all_gather(ranks, padded, group=group)
            yield torch.cat(ranks, dim=1)
