"""Log-probs of chosen tokens straight from hidden states, without ever holding [tokens, vocabulary].

The logits are made one block of the vocabulary at a time, for every row at once, and made again in the
backward pass. Blocks of vocabulary, not of rows: each block's weight gradient is then one matrix product, so
no second, fp32 copy of it is ever added up, and the ranks of a group meet twice in all. Plain torch, on any
device: the reference for row_chunks.py, and what runs where that cannot. softmax.py has the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from megatron_lopd.ops.products import matmul_fp32
from megatron_lopd.ops.softmax import (
    LOG_ZERO,
    Kept,
    ResponseLogProbs,
    Softmax,
    Sums,
    VocabularySlice,
    aligned_matrix,
)

# Logits in memory at once, elements on this rank. On a CPU 16 MiB of fp32, since the allocator gives larger
# blocks back to the system each time; on a GPU 128 MiB, for fewer launches.
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}
# Blocks are whole tiles of a GPU's matrix products, and their rows begin at multiples of 16 bytes, as cuBLAS
# wants for its fast kernels.
BLOCK_MULTIPLE = 256


def vocab_parallel_log_probs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    top_k_ids: Tensor | None = None,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    chunk_elements: int | None = None,
) -> ResponseLogProbs:
    """Log-probs under `softmax(hidden W^T / temperature)`, as softmax.py defines them.

    hidden [R, h], the same on every rank of `group`; weight [V / ranks, h], this rank's rows of the padded
    output matrix; tokens int64 [R] and top_k_ids int64 [R, k] (None is k = 0), below `vocab_size`, the same
    on every rank; ids may repeat each other and the token. Weight rows from `vocab_size` on are padding and
    take no probability. `group` None is one rank. `chunk_elements`: logits held at once (CHUNK_ELEMENTS), but
    never fewer than BLOCK_MULTIPLE of each row.

    The gradient of `hidden` is this rank's share, from its own slice of the vocabulary: the caller's
    copy_to_tensor_model_parallel_region or gather_from_sequence_parallel_region sums the shares.
    """
    ids = tokens[:, None] if top_k_ids is None else torch.cat([tokens[:, None], top_k_ids], dim=1)
    elements = chunk_elements or CHUNK_ELEMENTS[hidden.device.type]
    block = max(1, elements // max(1, len(hidden)) // BLOCK_MULTIPLE) * BLOCK_MULTIPLE
    vocab = VocabularySlice.of(weight, vocab_size, group)
    log_probs, log_sum_exp, entropy, tail = _VocabParallelLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, ids, _Blocks(vocab, temperature, block)
    )
    return ResponseLogProbs(log_probs[:, 0], log_sum_exp, entropy, log_probs[:, 1:], tail)


@dataclass(frozen=True)
class _Blocks:
    """A slice of the vocabulary, `size` columns at a time."""

    vocab: VocabularySlice
    temperature: float
    size: int

    def of(self, hidden: Tensor, weight: Tensor, ids: Tensor) -> Iterator[_Block]:
        """All of them, `ids` [R, m] located in each."""
        for start in range(0, self.vocab.size, self.size):
            rows = slice(start, min(start + self.size, self.vocab.size))
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            logits = aligned_matrix(len(hidden), rows.stop - start, hidden, dtype)
            matmul_fp32(hidden, weight[rows].t(), out=logits)
            if self.temperature != 1.0:
                logits.div_(self.temperature)
            columns = ids - (self.vocab.start + start)
            here = (columns >= 0) & (columns < logits.shape[1])
            yield _Block(rows, logits, columns.masked_fill_(~here, 0), here)


@dataclass(frozen=True)
class _Block:
    """`logits` [R, block], from `rows` of the weight; `columns` [R, m]: where each id is, 0 if not `here`."""

    rows: slice
    logits: Tensor
    columns: Tensor
    here: Tensor

    def take(self) -> Tensor:
        """The ids' logits [R, m], 0 where another block has them."""
        return self.logits.gather(1, self.columns).masked_fill_(~self.here, 0.0)

    def tail_logits(self) -> Tensor:
        """Overwrites `logits` with LOG_ZERO or less at the ids. As it is added, repeats do no harm."""
        return self.logits.scatter_add_(1, self.columns, self.here.to(self.logits.dtype) * LOG_ZERO)


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, blocks: _Blocks
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        chosen = hidden.new_zeros(ids.shape, dtype=dtype)  # logits of the ids
        sums = Sums.of_nothing(chosen[:, 0])  # over the tail
        for block in blocks.of(hidden, weight, ids):
            chosen += block.take()
            sums = sums.merge(Sums.of(block.tail_logits()))
        blocks.vocab.reduce(largest := sums.largest.clone(), ReduceOp.MAX)
        added_up = sums.seen_from(largest).with_logits(chosen)
        blocks.vocab.reduce(added_up, ReduceOp.SUM)
        softmax = Softmax.of(Sums(largest, added_up[:, 0], added_up[:, 1]), added_up[:, 2:], ids)
        ctx.save_for_backward(hidden, weight, *vars(softmax.kept).values())
        ctx.blocks = blocks
        ctx.mark_non_differentiable(softmax.entropy)
        return softmax.log_probs, softmax.log_sum_exp, softmax.entropy, softmax.tail_log_probs

    @staticmethod
    def backward(
        ctx: Any, g_chosen: Tensor, g_log_sum: Tensor, _entropy: Tensor, g_tail: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, *rest = ctx.saved_tensors
        kept, blocks = Kept(*rest), ctx.blocks
        of_chosen, of_tail = kept.logit_gradient(g_chosen, g_log_sum, g_tail, blocks.temperature)
        grad_hidden = torch.zeros_like(hidden, dtype=of_tail.dtype)
        grad_weight = torch.empty_like(weight)
        grad_weight[blocks.vocab.size :] = 0
        for block in blocks.of(hidden, weight, kept.ids):
            gradient = block.tail_logits().sub_(kept.largest[:, None]).exp_().mul_(of_tail[:, None])
            gradient.scatter_add_(1, block.columns, of_chosen * block.here)  # a repeat adds 0
            if gradient.dtype != hidden.dtype:
                rows, columns = gradient.shape
                gradient = aligned_matrix(rows, columns, gradient, hidden.dtype).copy_(gradient)
            grad_hidden += matmul_fp32(gradient, weight[block.rows])
            grad_weight[block.rows] = matmul_fp32(gradient.t(), hidden)
        return grad_hidden.to(hidden.dtype), grad_weight, None, None
