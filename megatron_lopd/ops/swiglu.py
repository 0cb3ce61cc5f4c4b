"""SwiGLU, silu(gate) * up, and its gradient as one Triton kernel each, in place of Megatron-Core's.

Megatron-Core has torch.compile make these, and its backward reaches a quarter of the GPU's memory bandwidth.
Its autograd functions stay, with what they save, and whether in FP8 or offloaded: replaced are the four
functions that they call (mcore/swiglu_patches.py). Rows are tokens: [S, 2 f], the gate's f columns first,
of which all arithmetic is in fp32 and rounded once; of experts with a weight a row, the router's probability.
With s = sigmoid(g) and y = w g s u: dy/dg = w u s (1 + g (1 - s)), dy/du = w g s, dy/dw = sum_f g s u.

A program takes a row, so that a row's sum needs no second pass and is always added up in one order. No
argument of the kernels depends on S, so that no number of tokens compiles anew.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of a pass over a row, and what of them a thread takes: 8 of bf16 are its widest load, 16 bytes.
COLUMNS, COLUMNS_A_THREAD, WARP = 2048, 8, 32


@triton.jit  # type: ignore[untyped-decorator]
def _forward(x_ptr, weight_ptr, y_ptr, f, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    gate_ptr, y_ptr = x_ptr + row * (2 * f), y_ptr + row * f
    for start in range(0, f, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < f
        gate = tl.load(gate_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_ptr + f + columns, mask=inside, other=0.0).to(tl.float32)
        y = gate * tl.sigmoid(gate) * up
        if WEIGHTED:
            y *= tl.load(weight_ptr + row).to(tl.float32)
        tl.store(y_ptr + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    dy_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    dweight_ptr,
    f,
    WEIGHTED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    dy_ptr, gate_ptr, dgate_ptr = dy_ptr + row * f, x_ptr + row * (2 * f), dx_ptr + row * (2 * f)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, f, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < f
        dy = tl.load(dy_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_ptr + f + columns, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        if WEIGHTED:
            products += dy * silu * up
            dy *= tl.load(weight_ptr + row).to(tl.float32)
        dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(dgate_ptr + columns, dgate.to(dx_ptr.dtype.element_ty), mask=inside)
        tl.store(dgate_ptr + f + columns, (dy * silu).to(dx_ptr.dtype.element_ty), mask=inside)
    if WEIGHTED:
        tl.store(dweight_ptr + row, tl.sum(products, 0).to(dweight_ptr.dtype.element_ty))


def swiglu(y: Tensor) -> Tensor:
    """silu of the left half of each row times the right half: [S, 2 f] -> [S, f], fp32 or bf16."""
    return _run_forward(y, None)


def swiglu_back(g: Tensor, y: Tensor) -> Tensor:
    """The gradient of `swiglu(y)`: g [S, f], y [S, 2 f] -> [S, 2 f]."""
    return _run_backward(g, y, None)[0]


def weighted_swiglu(y: Tensor, weights: Tensor) -> Tensor:
    """`swiglu(y) * weights`, rounded once: [S, 2 f], weights [S, 1] of a dtype of their own -> [S, f]."""
    return _run_forward(y, weights)


def weighted_swiglu_back(g: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `weighted_swiglu`: (of y [S, 2 f], of weights [S, 1])."""
    return _run_backward(g, y, weights)


def _run_forward(x: Tensor, weights: Tensor | None) -> Tensor:
    x, f = x.contiguous(), x.shape[-1] // 2
    y = x.new_empty(len(x), f)
    if y.numel():
        scale = x if weights is None else weights.contiguous()
        _forward[(len(x),)](x, scale, y, f, WEIGHTED=weights is not None, **_shape(f))
    return y


def _run_backward(dy: Tensor, x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    dy, x, f = dy.contiguous(), x.contiguous(), x.shape[-1] // 2
    dx = torch.empty_like(x)
    scale = x if weights is None else weights.contiguous()
    dweights = dx if weights is None else torch.zeros_like(scale)
    if dy.numel():
        _backward[(len(x),)](dy, x, scale, dx, dweights, f, WEIGHTED=weights is not None, **_shape(f))
    return dx, dweights


def _shape(f: int) -> dict[str, int]:
    """A pass's columns and the warps that share them, for rows of 2 f."""
    block = min(COLUMNS, triton.next_power_of_2(f))
    return {"BLOCK": block, "num_warps": max(1, block // (COLUMNS_A_THREAD * WARP))}
