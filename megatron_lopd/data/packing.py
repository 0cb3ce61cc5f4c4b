"""A global batch into packed micro-batches, balanced over data-parallel ranks."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_lopd.config import ParallelConfig
from megatron_lopd.errors import DataError

# The document length at which causal attention costs as much as the rest of a layer: a token's linear
# layers take about 24 h^2 FLOPs and its attention 2 h L, equal at L = 12 h; h = 4096 stands for the
# models this is for. Only the balance over ranks depends on it, never a result.
ATTENTION_PARITY_TOKENS = 12 * 4096

Bins = list[list[int]]


@dataclass(frozen=True)
class Padding:
    """What a layout asks of packed lengths, in tokens: each document's is a multiple of `document`, a
    micro-batch's of `total`, which is a multiple of `document`."""

    document: int = 1
    total: int = 1

    @staticmethod
    def of(parallel: ParallelConfig, tokens_multiple: int = 1) -> Padding:
        """Context parallelism cuts a document into two chunks a rank (context_parallel.py), and sequence
        parallelism its rank's tokens among the tensor parallel ranks; `tokens_multiple` is what a layer
        then wants of the tokens it sees (FP8 kernels, 16 or 32)."""
        document = 2 * parallel.context if parallel.context > 1 else 1
        split = parallel.context * (parallel.tensor if parallel.sequence else 1)
        return Padding(document, math.lcm(document, split * tokens_multiple))

    def documents(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """The padded lengths of documents of `lengths` tokens."""
        return -(-lengths // self.document) * self.document

    def budget(self, token_budget: int) -> int:
        """The most tokens whose padded total is within `token_budget`."""
        return token_budget - token_budget % self.total

    def least_budget(self, length: int) -> int:
        """The least token budget that holds a document of `length` tokens."""
        return -(-length // self.total) * self.total


def pack(
    lengths: Sequence[int] | NDArray[np.int64], token_budget: int, num_ranks: int, multiple: int = 1
) -> list[Bins]:
    """Sample positions as `[rank][micro_batch][samples]`, every rank with as many micro-batches.

    `lengths` are tokens a sample, padded as the layout asks; `token_budget` the most tokens in a
    micro-batch. Best-fit decreasing finds how few micro-batches do; their number is rounded up so that
    each of `num_ranks` has the same, a multiple of `multiple` (interleaved pipelines want one). Where that
    leaves slack, the samples are spread evenly over all of them rather than leaving some nearly empty.
    Micro-batches go to ranks the costliest first, and come in that order, so that a rank that runs out
    of memory does so at once. A micro-batch may be empty (fewer samples than micro-batches).

    Raises DataError naming the sample when one is longer than the budget.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and sizes.max() > token_budget:
        sample = int(sizes.argmax())
        raise DataError(
            f"sample {sample} of the batch has {sizes[sample]} tokens, above the budget of {token_budget} "
            f"tokens a micro-batch: raise micro_batch_tokens to at least {sizes[sample]}"
        )
    cost = sizes * (1.0 + sizes / ATTENTION_PARITY_TOKENS)
    longest_first = [int(sample) for sample in np.argsort(-sizes, kind="stable")]

    bins = _best_fit(sizes, longest_first, token_budget)
    micro_batches = max(1, -(-len(bins) // (num_ranks * multiple))) * multiple
    count = micro_batches * num_ranks
    if len(bins) < count:
        bins = _spread(sizes, cost, longest_first, token_budget, count) or bins
    bins += [[] for _ in range(count - len(bins))]
    return _assign(bins, cost, num_ranks, micro_batches)


def _best_fit(sizes: NDArray[np.int64], longest_first: list[int], token_budget: int) -> Bins:
    """Each sample into the micro-batch it leaves the least room in, or into a new one."""
    bins: Bins = []
    room: list[tuple[int, int]] = []  # (tokens left, micro-batch), ascending
    for sample in longest_first:
        size = int(sizes[sample])
        at = bisect_left(room, (size, -1))
        if at < len(room):
            left, chosen = room.pop(at)
        else:
            left, chosen = token_budget, len(bins)
            bins.append([])
        bins[chosen].append(sample)
        insort(room, (left - size, chosen))
    return bins


def _spread(
    sizes: NDArray[np.int64],
    cost: NDArray[np.float64],
    longest_first: list[int],
    token_budget: int,
    count: int,
) -> Bins | None:
    """Each sample into the cheapest of `count` micro-batches it fits in; None when one fits in none."""
    bins: Bins = [[] for _ in range(count)]
    tokens = np.zeros(count, dtype=np.int64)
    load = np.zeros(count)
    for sample in longest_first:
        chosen = int(np.where(tokens + sizes[sample] <= token_budget, load, np.inf).argmin())
        if tokens[chosen] + sizes[sample] > token_budget:
            return None
        bins[chosen].append(sample)
        tokens[chosen] += sizes[sample]
        load[chosen] += cost[sample]
    return bins


def _assign(bins: Bins, cost: NDArray[np.float64], num_ranks: int, micro_batches: int) -> list[Bins]:
    """Micro-batches to ranks, the costliest first to the least loaded rank that still takes one."""
    costs = [float(cost[samples].sum()) for samples in bins]
    ranks: list[Bins] = [[] for _ in range(num_ranks)]
    load = [0.0] * num_ranks
    for chosen in sorted(range(len(bins)), key=lambda index: -costs[index]):
        rank = min((r for r in range(num_ranks) if len(ranks[r]) < micro_batches), key=load.__getitem__)
        ranks[rank].append(sorted(bins[chosen]))
        load[rank] += costs[chosen]
    return ranks
