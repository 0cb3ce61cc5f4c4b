"""Log-probs of chosen tokens straight from hidden states, without ever holding [tokens, vocabulary].

The logits are made one block of the vocabulary at a time, for every row at once, and made again in the
backward pass. Blocks of vocabulary, not of rows: each block's weight gradient is then one matrix product, so
no second, fp32 copy of it is ever added up, and the ranks of a group meet twice in all.

With z = h W^T / temperature, p = softmax(z), a row's chosen set K = its token and its top-k ids, and the tail
all that is not in K:
    log_sum_exp = log sum_v exp z_v             log p(v) = z_v - log_sum_exp
    log p_tail  = log sum_{v not in K} exp z_v - log_sum_exp    (summed itself: 1 - sum_K p would cancel)
    entropy     = -sum_v p_v log p_v            (a metric: it carries no gradient)
and with g the gradients that come in (g_K one for each chosen log-prob) and c = g_lse - sum g_K - g_tail:
    d / d z_v   = p_v c + g_v                   for v in K
                = (p_v / p_tail) (p_tail c + g_tail)     for v in the tail
where p_v / p_tail is a softmax over the tail alone, at most 1 however small the tail is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_gather, all_reduce

from megatron_lopd.mcore.compat import matmul_fp32

# Logits in memory at once, elements on this rank. On a CPU 16 MiB of fp32, since the allocator gives larger
# blocks back to the system each time; on a GPU 128 MiB, for fewer launches.
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}
# Stands for log 0 where -inf would turn 0 * log 0 into NaN. Adding any logit to it changes nothing.
LOG_ZERO = -1e30


@dataclass(frozen=True)
class ResponseLogProbs:
    """What a distribution says of its row's token and top-k ids; fp32 (fp64 for fp64 inputs), nats.

    `log_probs` [R], `log_sum_exp` [R] of the logits after temperature, `top_k_log_probs` [R, k] and
    `tail_log_probs` [R] are differentiable; `entropy` [R] is not. The tail is every token that is neither the
    row's own nor among its ids; its log-prob is about -1e30 where there is no such token.
    """

    log_probs: Tensor
    log_sum_exp: Tensor
    entropy: Tensor
    top_k_log_probs: Tensor
    tail_log_probs: Tensor


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
    """Log-probs under `softmax(hidden W^T / temperature)`, as the top of this page defines them.

    hidden [R, h], the same on every rank of `group`; weight [V / ranks, h], this rank's rows of the padded
    output matrix; tokens int64 [R] and top_k_ids int64 [R, k] (None is k = 0), below `vocab_size`, the same
    on every rank; ids may repeat each other and the token. Weight rows from `vocab_size` on are padding and
    take no probability. `group` None is one rank. `chunk_elements`: logits held at once (CHUNK_ELEMENTS).

    The gradient of `hidden` is this rank's share, from its own slice of the vocabulary: the caller's
    copy_to_tensor_model_parallel_region or gather_from_sequence_parallel_region sums the shares.
    """
    ids = tokens[:, None] if top_k_ids is None else torch.cat([tokens[:, None], top_k_ids], dim=1)
    elements = chunk_elements or CHUNK_ELEMENTS[hidden.device.type]
    vocab = _Slice.of(weight, vocab_size, group, temperature, max(1, elements // max(1, len(hidden))))
    log_probs, log_sum_exp, entropy, tail = _VocabParallelLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, ids, vocab
    )
    return ResponseLogProbs(log_probs[:, 0], log_sum_exp, entropy, log_probs[:, 1:], tail)


@torch.no_grad()
def vocab_parallel_top_k(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    vocab_size: int,
    group: ProcessGroup | None = None,
    chunk_elements: int | None = None,
) -> Tensor:
    """Ids of each row's `k` largest logits, the largest first: int64 [R, k], the same on every rank.

    Arguments as of `vocab_parallel_log_probs`; `k` at most `vocab_size`.
    """
    elements = chunk_elements or CHUNK_ELEMENTS[hidden.device.type]
    vocab = _Slice.of(weight, vocab_size, group, 1.0, max(1, elements // max(1, len(hidden))))
    ids = torch.empty((len(hidden), 0), dtype=torch.int64, device=hidden.device)
    likeliest = _Likeliest.of(ids.to(torch.promote_types(hidden.dtype, torch.float32)), ids, k)
    for block in vocab.blocks(hidden, weight, ids):
        columns = torch.arange(block.logits.shape[1], device=ids.device) + (vocab.start + block.rows.start)
        likeliest = likeliest.merge(_Likeliest.of(block.logits, columns.expand_as(block.logits), k), k)
    if group is not None and group.size() > 1:
        likeliest = likeliest.gather(k, group)
    return likeliest.ids


@dataclass(frozen=True)
class _Likeliest:
    """The largest of some of each row's logits, at most k, the largest first: `values`, `ids` [R, any]."""

    values: Tensor
    ids: Tensor

    @classmethod
    def of(cls, values: Tensor, ids: Tensor, k: int) -> _Likeliest:
        top = values.topk(min(k, values.shape[1]), dim=1)
        return cls(top.values, ids.gather(1, top.indices))

    def merge(self, other: _Likeliest, k: int) -> _Likeliest:
        return self.of(torch.cat([self.values, other.values], 1), torch.cat([self.ids, other.ids], 1), k)

    def gather(self, k: int, group: ProcessGroup) -> _Likeliest:
        """Of all ranks' slices, of which the last can hold fewer than k tokens."""
        missing = k - self.values.shape[1]
        parts: list[Tensor] = []
        for own, filler in ((self.values, -torch.inf), (self.ids, 0)):
            padded = torch.nn.functional.pad(own, (0, missing), value=filler).contiguous()
            ranks = [torch.empty_like(padded) for _ in range(group.size())]
            all_gather(ranks, padded, group=group)
            parts.append(torch.cat(ranks, dim=1))
        values, ids = parts
        return self.of(values, ids, k)


@dataclass(frozen=True)
class _Slice:
    """This rank's columns of the vocabulary: `size` of them, without padding, from `start` on."""

    start: int
    size: int
    group: ProcessGroup | None
    temperature: float
    block: int  # columns held at once

    @classmethod
    def of(
        cls, weight: Tensor, vocab_size: int, group: ProcessGroup | None, temperature: float, block: int
    ) -> _Slice:
        start = 0 if group is None else group.rank() * len(weight)
        # Padding can leave the last ranks without a single token of their own.
        return cls(start, max(0, min(len(weight), vocab_size - start)), group, temperature, block)

    def blocks(self, hidden: Tensor, weight: Tensor, ids: Tensor) -> Iterator[_Block]:
        """All of the slice, block by block, `ids` [R, m] located in each."""
        for start in range(0, self.size, self.block):
            rows = slice(start, min(start + self.block, self.size))
            logits = matmul_fp32(hidden, weight[rows].t())
            if self.temperature != 1.0:
                logits.div_(self.temperature)
            columns = ids - (self.start + start)
            here = (columns >= 0) & (columns < logits.shape[1])
            yield _Block(rows, logits, columns.masked_fill_(~here, 0), here)

    def reduce(self, x: Tensor, op: Any) -> Tensor:
        """All-reduce in place over the ranks that hold the other slices."""
        if self.group is not None and self.group.size() > 1:
            all_reduce(x, op, group=self.group)
        return x


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
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, vocab: _Slice
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        chosen = hidden.new_zeros(ids.shape, dtype=dtype)  # logits of the ids
        sums = _Sums.of_nothing(chosen[:, 0])  # over the tail
        for block in vocab.blocks(hidden, weight, ids):
            chosen += block.take()
            sums = sums.merge(_Sums.of(block.tail_logits()))
        sums, chosen = sums.reduce(vocab, chosen)

        # Everything is taken from the row's largest logit: log-probs keep the digits that large logits lack.
        largest = torch.maximum(sums.largest, chosen.amax(1))
        chosen -= largest[:, None]
        tail = sums.total.log() + (sums.largest - largest)
        distinct = chosen.masked_fill(_repeats(ids), LOG_ZERO)
        log_sum = torch.cat([tail[:, None], distinct], dim=1).logsumexp(1)
        tail_log_probs = tail - log_sum
        log_probs = chosen - log_sum[:, None]
        probs = (distinct - log_sum[:, None]).exp_()  # 0 for a repeat
        tail_mean = sums.weighted / sums.total + (sums.largest - largest - log_sum)  # of log-probs
        entropy = -tail_log_probs.exp() * tail_mean - (probs * log_probs).sum(1)
        ctx.save_for_backward(hidden, weight, ids, probs, tail_log_probs, sums.largest, sums.total)
        ctx.vocab = vocab
        ctx.mark_non_differentiable(entropy)
        return log_probs, log_sum + largest, entropy, tail_log_probs

    @staticmethod
    def backward(
        ctx: Any, g_chosen: Tensor, g_log_sum: Tensor, _entropy: Tensor, g_tail: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, ids, probs, tail_log_probs, largest, total = ctx.saved_tensors
        common = g_log_sum - g_chosen.sum(1) - g_tail
        of_tail = (tail_log_probs.exp() * common + g_tail) / (total * ctx.vocab.temperature)
        of_chosen = (probs * common[:, None] + g_chosen) / ctx.vocab.temperature
        grad_hidden = torch.zeros_like(hidden, dtype=probs.dtype)
        grad_weight = torch.empty_like(weight)
        grad_weight[ctx.vocab.size :] = 0
        for block in ctx.vocab.blocks(hidden, weight, ids):
            grad_logits = block.tail_logits().sub_(largest[:, None]).exp_().mul_(of_tail[:, None])
            grad_logits = grad_logits.scatter_add_(1, block.columns, of_chosen * block.here).to(hidden.dtype)
            grad_hidden += matmul_fp32(grad_logits, weight[block.rows])
            grad_weight[block.rows] = matmul_fp32(grad_logits.t(), hidden)
        return grad_hidden.to(hidden.dtype), grad_weight, None, None


@dataclass(frozen=True)
class _Sums:
    """Over some of each row's logits z, [R] each, with d = z - largest and largest at least max z.

    `total` = sum exp d, `weighted` = sum d exp d.
    """

    largest: Tensor
    total: Tensor
    weighted: Tensor

    @classmethod
    def of_nothing(cls, like: Tensor) -> _Sums:
        return cls(torch.full_like(like, LOG_ZERO), torch.zeros_like(like), torch.zeros_like(like))

    @classmethod
    def of(cls, logits: Tensor) -> _Sums:
        """Overwrites `logits` [R, any], to hold no third copy."""
        largest = logits.amax(1)
        exp = logits.sub_(largest[:, None]).exp()
        total = exp.sum(1)
        return cls(largest, total, exp.mul_(logits).sum(1))

    def merge(self, other: _Sums) -> _Sums:
        largest = torch.maximum(self.largest, other.largest)
        a, b = self._seen_from(largest), other._seen_from(largest)
        return _Sums(largest, a.total + b.total, a.weighted + b.weighted)

    def reduce(self, vocab: _Slice, chosen: Tensor) -> tuple[_Sums, Tensor]:
        """These sums and the ids' logits over the slices of all ranks, in two collectives."""
        own = self._seen_from(vocab.reduce(self.largest.clone(), ReduceOp.MAX))
        columns = torch.cat([own.total[:, None], own.weighted[:, None], chosen], dim=1)
        vocab.reduce(columns, ReduceOp.SUM)
        return _Sums(own.largest, columns[:, 0], columns[:, 1]), columns[:, 2:]

    def _seen_from(self, largest: Tensor) -> _Sums:
        down = self.largest - largest
        scale = down.exp()
        return _Sums(largest, self.total * scale, (self.weighted + self.total * down) * scale)


def _repeats(ids: Tensor) -> Tensor:
    """bool [R, m]: whether the same id stands earlier in its row."""
    ordered, order = ids.sort(dim=1, stable=True)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.zeros_like(repeated).scatter_(1, order, repeated)
