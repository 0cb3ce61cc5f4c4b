"""The softmax of one chunk of rows after another, each chunk's logits made once and at hand as it comes.

What is read off a row's whole distribution (the likeliest tokens, a loss's gradient) is taken while its
logits are there, and they are never made again. Where ranks share the vocabulary, they meet twice a chunk,
and the next chunk's product runs meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from megatron_lopd.ops import CHUNK_BYTES
from megatron_lopd.ops.kernel_trial import usable
from megatron_lopd.ops.products import matmul_fp32
from megatron_lopd.ops.softmax import LOG_ZERO, WIDTH_MULTIPLE, Softmax, Sums, VocabularySlice

# Chunks are whole tiles of a GPU's matrix products.
ROW_MULTIPLE = 256


@dataclass(frozen=True)
class RowChunk:
    """Rows `rows` of all. `logits` [rows, width] of this rank's `size` columns, which are LOG_ZERO at the ids
    and from `size` on; `columns` int64 [rows, m]: where each id is, `size` where another rank has it."""

    rows: slice
    logits: Tensor
    size: int
    columns: Tensor
    softmax: Softmax


def rows_at_once(hidden: Tensor, vocab: VocabularySlice, rows: int | None) -> int:
    """Rows of a chunk, at most `rows` (None: what CHUNK_BYTES holds), so that all chunks are about equal.

    The same on every rank that shares the vocabulary: they meet once a chunk.
    """
    if rows is None:
        buffers = 2 if vocab.is_shared else 1
        row_bytes = _width(vocab.padded) * torch.promote_types(hidden.dtype, torch.float32).itemsize * buffers
        rows = max(1, CHUNK_BYTES[hidden.device.type] // row_bytes // ROW_MULTIPLE) * ROW_MULTIPLE
    chunks = max(1, -(-len(hidden) // rows))
    even = -(-len(hidden) // chunks)
    return max(1, min(rows, -(-even // ROW_MULTIPLE) * ROW_MULTIPLE))


def row_chunks(
    hidden: Tensor,
    weight: Tensor,
    vocab: VocabularySlice,
    temperature: float,
    rows: int,
    ids_of: Callable[[slice, Tensor], Tensor],
) -> Iterator[RowChunk]:
    """All of `hidden` [R, h], `rows` at a time; not differentiable. R = 0 is one chunk of no rows.

    `ids_of(rows, logits)` gives the ids [rows, m] to locate, from this rank's logits [rows, size] of these
    rows, the same on every rank. A chunk's logits may be overwritten, and are gone when the next one comes.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    shape = 2 if vocab.is_shared else 1, min(rows, len(hidden)), _width(vocab.size)
    buffer = hidden.new_empty(shape, dtype=dtype)
    passes = _Passes(hidden, weight, vocab, temperature, ids_of)
    parts = [slice(start, min(start + rows, len(hidden))) for start in range(0, max(1, len(hidden)), rows)]
    begins = (passes.begin(part, whole) for part, whole in zip(parts, cycle(buffer), strict=False))
    begun = next(begins, None)
    while begun is not None:
        begun.add_up()
        following = next(begins, None) if vocab.is_shared else None
        yield begun.finish()
        begun = following if vocab.is_shared else next(begins, None)


@dataclass(frozen=True)
class _Passes:
    hidden: Tensor
    weight: Tensor
    vocab: VocabularySlice
    temperature: float
    ids_of: Callable[[slice, Tensor], Tensor]

    def begin(self, rows: slice, buffer: Tensor) -> _Begun:
        """The logits and their sums on this rank; the largest of all ranks are on their way."""
        size, start = self.vocab.size, self.vocab.start
        whole = buffer[: rows.stop - rows.start]
        logits = whole[:, :size]
        matmul_fp32(self.hidden[rows], self.weight[:size].t(), out=logits)
        if self.temperature != 1.0:
            logits.div_(self.temperature)
        whole[:, size:] = LOG_ZERO
        ids = self.ids_of(rows, logits)
        here = (ids >= start) & (ids < start + size)
        columns = torch.where(here, ids - start, size)
        chosen = whole.gather(1, columns).masked_fill_(~here, 0.0)
        whole.scatter_(1, columns, LOG_ZERO)  # all the same value: repeats do no harm
        return _Begun(self.vocab, rows, whole, columns, ids, chosen, _sums(whole))


class _Begun:
    """A chunk whose sums are being brought together: add_up, then finish."""

    def __init__(
        self,
        vocab: VocabularySlice,
        rows: slice,
        logits: Tensor,
        columns: Tensor,
        ids: Tensor,
        chosen: Tensor,
        own: Sums,
    ) -> None:
        self._vocab, self._rows, self._logits, self._columns, self._ids = vocab, rows, logits, columns, ids
        self._chosen, self._own = chosen, own
        self._largest = own.largest.clone() if vocab.is_shared else own.largest
        self._arrival: Any = vocab.reduce(self._largest, ReduceOp.MAX, async_op=True)

    def add_up(self) -> None:
        """Wait for the largest logits; send off the sums seen from them."""
        self._wait()
        self._added_up = self._own.seen_from(self._largest).with_logits(self._chosen)
        self._arrival = self._vocab.reduce(self._added_up, ReduceOp.SUM, async_op=True)

    def finish(self) -> RowChunk:
        """Wait for the sums."""
        self._wait()
        total, weighted, chosen = self._added_up[:, 0], self._added_up[:, 1], self._added_up[:, 2:]
        softmax = Softmax.of(Sums(self._largest, total, weighted), chosen, self._ids)
        return RowChunk(self._rows, self._logits, self._vocab.size, self._columns, softmax)

    def _wait(self) -> None:
        if self._arrival is not None:
            self._arrival.wait()


def _sums(logits: Tensor) -> Sums:
    """Over all of each row; `logits` are of no more use where torch does it."""
    if not usable(logits.device):
        return Sums.of(logits)
    from megatron_lopd.ops.log_prob_kernels import statistics

    return statistics(logits)


def _width(columns: int) -> int:
    """A column at least beside the slice's own, for ids that other ranks have."""
    return (columns // WIDTH_MULTIPLE + 1) * WIDTH_MULTIPLE
