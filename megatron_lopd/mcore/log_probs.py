"""Log-probs of chosen tokens straight from hidden states, without ever holding [tokens, vocabulary].

The logits are made chunk by chunk, this rank's slice of the vocabulary only, and once more in the
backward pass. With z = h W^T / temperature and p = softmax(z):
    log p(a) = z_a - logsumexp(z)        d log p(a) / d z_v = 1[v = a] - p_v
    entropy  = logsumexp(z) - sum_v p_v z_v        (a metric: it carries no gradient)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from megatron_lopd.mcore.compat import matmul_fp32

# Logits in memory at once, elements on this rank: 256 MiB in fp32.
CHUNK_ELEMENTS = 2**26


@dataclass(frozen=True)
class ResponseLogProbs:
    """`log_probs` fp32 [R], differentiable; `entropy` fp32 [R], without gradient. Nats."""

    log_probs: torch.Tensor
    entropy: torch.Tensor


def vocab_parallel_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> ResponseLogProbs:
    """`log softmax(hidden W^T / temperature)[tokens]`, and the entropy of that distribution.

    hidden [R, h], the same on every rank of `group`; weight [V / ranks, h], this rank's rows of the padded
    output matrix; tokens int64 [R], below `vocab_size`. Rows from `vocab_size` on are padding and take no
    probability. `group` None is one rank. fp64 inputs give fp64 outputs.

    The gradient of `hidden` is this rank's share, from its own slice of the vocabulary: the caller's
    copy_to_tensor_model_parallel_region or gather_from_sequence_parallel_region sums the shares.
    """
    log_probs, entropy = _VocabParallelLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, tokens, _Slice.of(weight, vocab_size, group), temperature, chunk_elements
    )
    return ResponseLogProbs(log_probs, entropy)


@dataclass(frozen=True)
class _Slice:
    """This rank's columns of the vocabulary: `size` of them, without padding, from `start` on."""

    start: int
    size: int
    group: ProcessGroup | None

    @classmethod
    def of(cls, weight: torch.Tensor, vocab_size: int, group: ProcessGroup | None) -> _Slice:
        start = 0 if group is None else group.rank() * len(weight)
        return cls(start, min(len(weight), vocab_size - start), group)

    def columns_of(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each token's column here (0 if another rank has it), and whether it is here: both [chunk, 1]."""
        column = tokens[:, None] - self.start
        here = (column >= 0) & (column < self.size)
        return column.masked_fill(~here, 0), here

    def reduce(self, x: torch.Tensor, op: Any) -> torch.Tensor:
        """All-reduce in place over the ranks that hold the other slices."""
        if self.group is not None and self.group.size() > 1:
            all_reduce(x, op, group=self.group)
        return x


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        tokens: torch.Tensor,
        vocab: _Slice,
        temperature: float,
        chunk_elements: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = weight[: vocab.size]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        log_probs, entropy, log_sums = hidden.new_empty((3, len(hidden)), dtype=dtype)
        for chunk in _chunks(len(hidden), len(weight), chunk_elements):
            logits = _logits(hidden[chunk], rows, temperature)  # [chunk, vocabulary here]
            largest = vocab.reduce(logits.amax(-1), ReduceOp.MAX)
            column, here = vocab.columns_of(tokens[chunk])
            logits.sub_(largest[:, None])
            exp = logits.exp()
            chosen = logits.gather(-1, column).masked_fill_(~here, 0.0).squeeze(-1)
            weighted = logits.mul_(exp).sum(-1)
            sums = vocab.reduce(torch.stack((exp.sum(-1), weighted, chosen)), ReduceOp.SUM)
            log_sum = sums[0].log()
            log_probs[chunk] = sums[2] - log_sum
            entropy[chunk] = log_sum - sums[1] / sums[0]
            log_sums[chunk] = log_sum + largest
        ctx.save_for_backward(hidden, weight, tokens, log_sums)
        ctx.vocab, ctx.temperature, ctx.chunk_elements = vocab, temperature, chunk_elements
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _entropy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, tokens, log_sums = ctx.saved_tensors
        rows = weight[: ctx.vocab.size]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=log_sums.dtype)
        for chunk in _chunks(len(hidden), len(weight), ctx.chunk_elements):
            logits = _logits(hidden[chunk], rows, ctx.temperature)
            probs = logits.sub_(log_sums[chunk, None]).exp_()
            column, here = ctx.vocab.columns_of(tokens[chunk])
            scale = grad[chunk, None] / ctx.temperature
            grad_logits = probs.mul_(-scale).scatter_add_(-1, column, scale * here).to(hidden.dtype)
            grad_hidden[chunk] = grad_logits @ rows
            grad_weight[: ctx.vocab.size] += matmul_fp32(grad_logits.t(), hidden[chunk])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _logits(hidden: torch.Tensor, rows: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = matmul_fp32(hidden, rows.t())
    return logits if temperature == 1.0 else logits.div_(temperature)


def _chunks(rows: int, columns: int, elements: int) -> Iterator[slice]:
    step = max(1, elements // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
