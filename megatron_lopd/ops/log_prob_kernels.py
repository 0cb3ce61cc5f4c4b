"""The two elementwise passes over a chunk's logits, as Triton kernels: one program a row, one pass each.

The gradient is written over the logits it is made of. Where its elements are narrower (bf16 over fp32), the
row shrinks to the front of its own memory: a program goes through its row in order and never writes beyond
what it has read, so all it takes is that a block has been read by every thread before any writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lopd.ops.softmax import WIDTH_MULTIPLE, Sums

BLOCK, WARPS = 4096, 8  # columns at a time, and warps over them


@triton.jit  # type: ignore[untyped-decorator]
def _statistics(logits, stride, width, largest_out, total_out, weighted_out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    largest = tl.full((), -1e30, logits.dtype.element_ty)
    total = tl.full((), 0.0, logits.dtype.element_ty)
    weighted = tl.full((), 0.0, logits.dtype.element_ty)
    for start in range(0, width, BLOCK):
        here = start + columns < width
        z = tl.load(logits + row * stride + start + columns, mask=here, other=-1e30)
        above = tl.maximum(largest, tl.max(z, 0))
        down = largest - above
        scale = tl.exp(down)
        d = z - above
        exp = tl.where(here, tl.exp(d), 0.0)
        weighted = (weighted + total * down) * scale + tl.sum(d * exp, 0)
        total = total * scale + tl.sum(exp, 0)
        largest = above
    tl.store(largest_out + row, largest)
    tl.store(total_out + row, total)
    tl.store(weighted_out + row, weighted)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient(logits, stride, width, largest, factor, gradient, gradient_stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    row_largest = tl.load(largest + row)
    row_factor = tl.load(factor + row)
    for start in range(0, width, BLOCK):
        here = start + columns < width
        z = tl.load(logits + row * stride + start + columns, mask=here, other=-1e30)
        g = tl.exp(z - row_largest) * row_factor
        tl.debug_barrier()  # what is written next may be what another thread has still to read
        tl.store(
            gradient + row * gradient_stride + start + columns, g.to(gradient.dtype.element_ty), mask=here
        )


def statistics(logits: Tensor) -> Sums:
    """`Sums` of each row of `logits` [R, width], which stay as they are.

    Rows begin at multiples of WIDTH_MULTIPLE and so does `width`: Triton then loads 16 bytes a thread, and
    compiles once for every vocabulary.
    """
    assert logits.stride(0) % WIDTH_MULTIPLE == logits.shape[1] % WIDTH_MULTIPLE == 0
    rows, width = logits.shape
    # Each at a multiple of 16 bytes, or Triton compiles anew for other numbers of rows.
    largest, total, weighted = logits.new_empty(3, -(-rows // 4) * 4)[:, :rows]
    if rows:
        _statistics[(rows,)](
            logits, logits.stride(0), width, largest, total, weighted, BLOCK=BLOCK, num_warps=WARPS
        )
    return Sums(largest, total, weighted)


def gradient_in_place(logits: Tensor, largest: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`factor exp(logits - largest)` [R, width] as `dtype`, in the memory of `logits` [R, width], contiguous.

    `largest`, `factor` [R] in the logits' own type.
    """
    rows, width = logits.shape
    gradient = logits.view(dtype)[:, :width]
    if rows:
        _gradient[(rows,)](
            logits,
            logits.stride(0),
            width,
            largest.contiguous(),
            factor.contiguous(),
            gradient,
            gradient.stride(0),
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return gradient
