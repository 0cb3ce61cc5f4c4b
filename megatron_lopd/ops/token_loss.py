"""A weighted sum of per-token losses straight from hidden states: the log-prob operation's end in training.

A loss of each row by itself, of the few log-probs it reads, can be differentiated by them while the row's
logits are at hand. So where the Triton kernels run, rows go by chunks, and the gradients of hidden states and
weight are made in the forward pass: three products of R x V x h in all, where making the logits again in the
backward pass takes four. The weight's is added to Megatron's fp32 `main_grad` then and there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lopd.ops.kernel_trial import usable
from megatron_lopd.ops.log_probs import vocab_parallel_log_probs
from megatron_lopd.ops.products import add_product, matmul_fp32
from megatron_lopd.ops.row_chunks import RowChunk, row_chunks, rows_at_once
from megatron_lopd.ops.softmax import ResponseLogProbs, Softmax, VocabularySlice, repeats

# (what the model says of some rows, which rows these are) -> the loss of each, [rows]
TokenLoss = Callable[[ResponseLogProbs, slice], Tensor]


@dataclass(frozen=True)
class SummedLoss:
    """`total`, a scalar, is differentiable; the rest are constants [R], of which metrics are made.

    `token_loss` is unweighted; `log_probs` are of the rows' tokens, `entropy` of the rows, nats.
    """

    total: Tensor
    token_loss: Tensor
    log_probs: Tensor
    entropy: Tensor


def vocab_parallel_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    top_k_ids: Tensor | None,
    token_loss: TokenLoss,
    loss_weights: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    rows: int | None = None,
    grad_ready: Callable[[], None] | None = None,
) -> SummedLoss:
    """`sum(loss_weights * token_loss)` over R rows, and what it was made of.

    Arguments as of `vocab_parallel_log_probs`, and `loss_weights` [R], constants. `token_loss(scored, rows)`
    gives the loss of each row of a slice from what the model says of these rows, by operations that know one
    row from another by its place alone. It is called once, or for one slice after the other. `rows`: how many
    have their logits made at once, where that is by rows (None: what row_chunks.CHUNK_BYTES holds).

    Where there is a `weight.main_grad` (fp32, of Megatron's data parallelism) and the kernels run, the
    weight's gradient is in it when this returns, as for a gradient of 1 of the sum: any other makes that of
    `hidden` NaN. Autograd then knows of no gradient of the weight, and `grad_ready` is called in the backward
    pass instead. Without gradients enabled nothing but the sum is made.
    """
    if not usable(hidden.device):
        scored = vocab_parallel_log_probs(
            hidden, weight, tokens, top_k_ids, vocab_size=vocab_size, temperature=temperature, group=group
        )
        losses = token_loss(scored, slice(0, len(hidden)))
        total = (loss_weights * losses).sum()
        return SummedLoss(total, losses.detach(), scored.log_probs.detach(), scored.entropy)
    ids = tokens[:, None] if top_k_ids is None else torch.cat([tokens[:, None], top_k_ids], dim=1)
    vocab = VocabularySlice.of(weight, vocab_size, group)
    loss = _Loss(vocab, temperature, rows_at_once(hidden, vocab, rows), ids, token_loss, loss_weights)
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    known = weight if main_grad is None else weight.detach()
    if not torch.is_grad_enabled() or not (hidden.requires_grad or known.requires_grad):
        return loss.summed([(loss.of_rows(chunk), chunk.softmax) for chunk in loss.chunks(hidden, weight)])
    total, *constants = _LossByRowChunks.apply(  # type: ignore[no-untyped-call]
        hidden, known, loss, main_grad, grad_ready
    )
    return SummedLoss(total, *constants)


@dataclass(frozen=True)
class _Loss:
    vocab: VocabularySlice
    temperature: float
    rows: int
    ids: Tensor
    token_loss: TokenLoss
    weights: Tensor

    def chunks(self, hidden: Tensor, weight: Tensor) -> Iterator[RowChunk]:
        """As row_chunks."""
        ids = self.ids
        return row_chunks(
            hidden, weight, self.vocab, self.temperature, self.rows, lambda rows, logits: ids[rows]
        )

    def of_rows(self, chunk: RowChunk) -> Tensor:
        """The loss of each of the chunk's rows."""
        softmax = chunk.softmax
        return self._of(chunk, softmax.log_probs, softmax.log_sum_exp, softmax.tail_log_probs).detach()

    def with_gradient(self, chunk: RowChunk, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(`of_rows`, the gradient of their weighted sum by the chunk's logits: `dtype` [rows, size], in the
        memory where they were)."""
        from megatron_lopd.ops.log_prob_kernels import gradient_in_place

        softmax, kept = chunk.softmax, chunk.softmax.kept
        inputs = [
            x.detach().requires_grad_()
            for x in (softmax.log_probs, softmax.log_sum_exp, softmax.tail_log_probs)
        ]
        with torch.enable_grad():
            losses = self._of(chunk, *inputs)
        weights = self.weights[chunk.rows].to(losses.dtype)
        g_chosen, g_log_sum, g_tail = torch.autograd.grad(losses, inputs, weights, materialize_grads=True)
        of_chosen, of_tail = kept.logit_gradient(g_chosen, g_log_sum, g_tail, self.temperature)
        gradient = gradient_in_place(chunk.logits, kept.largest, of_tail, dtype)
        # The column that is no token's takes ids of other ranks, and those whose first mention has it all.
        columns = chunk.columns.masked_fill(repeats(kept.ids), chunk.size)
        gradient.scatter_(1, columns, of_chosen.to(dtype))
        return losses.detach(), gradient[:, : chunk.size]

    def summed(self, parts: Sequence[tuple[Tensor, Softmax]]) -> SummedLoss:
        """Over all rows, from the losses and the softmax of each chunk's."""
        losses = torch.cat([losses for losses, _ in parts])
        log_probs = torch.cat([softmax.log_probs[:, 0] for _, softmax in parts])
        entropy = torch.cat([softmax.entropy for _, softmax in parts])
        return SummedLoss((self.weights * losses).sum(), losses, log_probs, entropy)

    def _of(self, chunk: RowChunk, chosen: Tensor, log_sum_exp: Tensor, tail: Tensor) -> Tensor:
        scored = ResponseLogProbs(chosen[:, 0], log_sum_exp, chunk.softmax.entropy, chosen[:, 1:], tail)
        return self.token_loss(scored, chunk.rows)


class _LossByRowChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        loss: _Loss,
        main_grad: Tensor | None,
        grad_ready: Callable[[], None] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grad_hidden = torch.empty_like(hidden)
        added_to = main_grad
        if weight.requires_grad:
            added_to = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        parts = []
        for chunk in loss.chunks(hidden, weight):
            losses, gradient = loss.with_gradient(chunk, hidden.dtype)
            parts.append((losses, chunk.softmax))
            grad_hidden[chunk.rows] = matmul_fp32(gradient, weight[: chunk.size])
            if added_to is not None:
                add_product(added_to[: chunk.size], gradient.t(), hidden[chunk.rows])
        grad_weight = None if added_to is None or added_to is main_grad else added_to.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.in_main_grad, ctx.grad_ready = main_grad is not None, grad_ready
        summed = loss.summed(parts)
        ctx.mark_non_differentiable(summed.token_loss, summed.log_probs, summed.entropy)
        return summed.total, summed.token_loss, summed.log_probs, summed.entropy

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if ctx.in_main_grad:
            upstream = upstream.masked_fill(upstream != 1, torch.nan)
            if ctx.grad_ready is not None:
                ctx.grad_ready()
        scaled = None if grad_weight is None else grad_weight.mul_(upstream)
        return grad_hidden.mul_(upstream), scaled, None, None, None
