"""A row's softmax from sums over its tail: what it says of chosen tokens, and its gradient.

With z a row of logits after temperature, p = softmax(z), the row's chosen set K = its token and its top-k
ids, and the tail all that is not in K:
    log_sum_exp = log sum_v exp z_v             log p(v) = z_v - log_sum_exp
    log p_tail  = log sum_{v not in K} exp z_v - log_sum_exp    (summed itself: 1 - sum_K p would cancel)
    entropy     = -sum_v p_v log p_v            (a metric: it carries no gradient)
and with g the gradients that come in (g_K one for each chosen log-prob) and c = g_lse - sum g_K - g_tail:
    d / d z_v   = p_v c + g_v                   for v in K
                = (p_v / p_tail) (p_tail c + g_tail)     for v in the tail
where p_v / p_tail is a softmax over the tail alone, at most 1 however small the tail is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce

# Stands for log 0 where -inf would turn 0 * log 0 into NaN. Adding any logit to it changes nothing.
LOG_ZERO = -1e30
# Rows of logits, and of their gradients, begin this many elements apart or a multiple: without that, as where
# the vocabulary is odd, cuBLAS leaves its fast kernels.
WIDTH_MULTIPLE = 16


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


@dataclass(frozen=True)
class VocabularySlice:
    """This rank's columns of the vocabulary: `size` of them, without padding, from `start` on.

    `padded`: with padding, the same on every rank.
    """

    start: int
    size: int
    padded: int
    group: ProcessGroup | None

    @classmethod
    def of(cls, weight: Tensor, vocab_size: int, group: ProcessGroup | None) -> VocabularySlice:
        """`weight` [V / ranks, h], this rank's rows of the padded output matrix."""
        start = 0 if group is None else group.rank() * len(weight)
        # Padding can leave the last ranks without a single token of their own.
        return cls(start, max(0, min(len(weight), vocab_size - start)), len(weight), group)

    @property
    def is_shared(self) -> bool:
        """Whether other ranks hold the rest."""
        return self.group is not None and self.group.size() > 1

    def reduce(self, x: Tensor, op: Any, *, async_op: bool = False) -> Any:
        """All-reduce in place over the ranks; `async_op` returns what to `wait` on, None alone."""
        return all_reduce(x, op, group=self.group, async_op=async_op) if self.is_shared else None


@dataclass(frozen=True)
class Sums:
    """Over some of each row's logits z, [R] each, with d = z - largest and largest at least max z.

    `total` = sum exp d, `weighted` = sum d exp d.
    """

    largest: Tensor
    total: Tensor
    weighted: Tensor

    @classmethod
    def of_nothing(cls, like: Tensor) -> Sums:
        return cls(torch.full_like(like, LOG_ZERO), torch.zeros_like(like), torch.zeros_like(like))

    @classmethod
    def of(cls, logits: Tensor) -> Sums:
        """Overwrites `logits` [R, any], to hold no third copy."""
        largest = logits.amax(1)
        exp = logits.sub_(largest[:, None]).exp()
        total = exp.sum(1)
        return cls(largest, total, exp.mul_(logits).sum(1))

    def merge(self, other: Sums) -> Sums:
        largest = torch.maximum(self.largest, other.largest)
        a, b = self.seen_from(largest), other.seen_from(largest)
        return Sums(largest, a.total + b.total, a.weighted + b.weighted)

    def seen_from(self, largest: Tensor) -> Sums:
        """The same sums with another `largest`, not below this one."""
        down = self.largest - largest
        scale = down.exp()
        return Sums(largest, self.total * scale, (self.weighted + self.total * down) * scale)

    def with_logits(self, chosen: Tensor) -> Tensor:
        """[R, 2 + m]: all that ranks which share a `largest` add up, `chosen` [R, m] beside the sums."""
        return torch.cat([self.total[:, None], self.weighted[:, None], chosen], dim=1)


@dataclass(frozen=True)
class Kept:
    """What a gradient needs of a Softmax: `ids` and `probs` [R, m], 0 where an id stands earlier in its row;
    `tail_log_probs`, and of the sums over the tail `largest` and `total`, [R]."""

    ids: Tensor
    probs: Tensor
    tail_log_probs: Tensor
    largest: Tensor
    total: Tensor

    def logit_gradient(
        self, g_chosen: Tensor, g_log_sum: Tensor, g_tail: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """From the gradients of log_probs [R, m], log_sum_exp [R] and tail_log_probs [R] to those of logits
        before `temperature`: (of the ids [R, m], the first of each in its row having all and the others 0;
        f [R], such that a token v of the tail has f exp(z_v - largest))."""
        common = g_log_sum - g_chosen.sum(1) - g_tail
        of_tail = (self.tail_log_probs.exp() * common + g_tail) / (self.total * temperature)
        of_chosen = (self.probs * common[:, None] + g_chosen) / temperature
        return fold_repeats(of_chosen, self.ids), of_tail


@dataclass(frozen=True)
class Softmax:
    """Of the rows: `log_probs` [R, m] of the ids; `log_sum_exp`, `entropy`, `tail_log_probs` [R]."""

    log_probs: Tensor
    log_sum_exp: Tensor
    entropy: Tensor
    tail_log_probs: Tensor
    kept: Kept

    @classmethod
    def of(cls, sums: Sums, chosen: Tensor, ids: Tensor) -> Softmax:
        """`sums` over the tail and the `ids`' logits `chosen` [R, m], over all ranks; ids may repeat."""
        # Everything is taken from the row's largest logit: log-probs keep the digits that large logits lack.
        largest = torch.maximum(sums.largest, chosen.amax(1))
        chosen = chosen - largest[:, None]
        tail = sums.total.log() + (sums.largest - largest)
        distinct = chosen.masked_fill(repeats(ids), LOG_ZERO)
        log_sum = torch.cat([tail[:, None], distinct], dim=1).logsumexp(1)
        tail_log_probs = tail - log_sum
        log_probs = chosen - log_sum[:, None]
        probs = (distinct - log_sum[:, None]).exp_()
        tail_mean = sums.weighted / sums.total + (sums.largest - largest - log_sum)  # of log-probs
        entropy = -tail_log_probs.exp() * tail_mean - (probs * log_probs).sum(1)
        kept = Kept(ids, probs, tail_log_probs, sums.largest, sums.total)
        return cls(log_probs, log_sum + largest, entropy, tail_log_probs, kept)


def repeats(ids: Tensor) -> Tensor:
    """bool [R, m]: whether the same id stands earlier in its row."""
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    if ids.shape[1] == 1:
        return repeated
    ordered, order = ids.sort(dim=1, stable=True)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.zeros_like(repeated).scatter_(1, order, repeated)


def fold_repeats(values: Tensor, ids: Tensor) -> Tensor:
    """[R, m]: each id's values summed where it stands first in its row, 0 where it stands again.

    By halves and always in the same order: a scatter that adds would sum in whatever order threads come.
    """
    if ids.shape[1] == 1:
        return values
    ordered, order = ids.sort(dim=1, stable=True)
    sums = values.gather(1, order)
    reach = 1  # how many of its own kind, from itself on, each sum has by now
    while reach < ids.shape[1]:
        other = ordered[:, reach:] != ordered[:, :-reach]
        sums[:, :-reach] += sums[:, reach:].masked_fill(other, 0.0)
        reach *= 2
    sums[:, 1:].masked_fill_(ordered[:, 1:] == ordered[:, :-1], 0.0)
    return torch.empty_like(sums).scatter_(1, order, sums)


def aligned_matrix(rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, columns], not filled, whose rows begin at multiples of WIDTH_MULTIPLE."""
    return like.new_empty(rows, -(-columns // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, dtype=dtype)[:, :columns]
