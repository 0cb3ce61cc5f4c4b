"""A weighted sum of per-token losses straight from hidden states: the log-prob operation's end in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lopd.mcore.log_probs import ResponseLogProbs, vocab_parallel_log_probs

# (what the model says of some rows, which rows these are) -> the loss of each, [rows]
TokenLoss = Callable[[ResponseLogProbs, slice], Tensor]


@dataclass(frozen=True)
class SummedLoss:
    """`total`, a scalar, is differentiable; the rest are constants [R]: a metric's material.

    `token_loss` is unweighted; `log_probs` are the rows' tokens', `entropy` the rows', nats.
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
    gives the loss of each row of a slice, from ResponseLogProbs of these rows alone; it may be called once
    or many times, in order, and together they cover all rows.
    """
    scored = vocab_parallel_log_probs(
        hidden, weight, tokens, top_k_ids, vocab_size=vocab_size, temperature=temperature, group=group
    )
    losses = token_loss(scored, slice(0, len(hidden)))
    total = (loss_weights * losses).sum()
    return SummedLoss(total, losses.detach(), scored.log_probs.detach(), scored.entropy)
