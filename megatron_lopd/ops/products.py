"""Products of two matrices, in fp32 whatever type these have."""

from __future__ import annotations

import functools

import torch


def without_tf32() -> None:
    """Products of fp32 stay fp32: images may turn TF32 on by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE."""
    torch.backends.cuda.matmul.allow_tf32 = False


def matmul_fp32(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`a @ b` of two matrices, accumulated and returned in fp32 (fp64 for fp64 inputs); into `out` if given,
    whose rows may stand apart."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


# Elements of a product that is made before it is added: 32 MiB, which a GPU's cache holds.
_ADDED_AT_ONCE = 2**23


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`total += a @ b`, in `total`'s fp32 (fp64 for fp64 inputs), without a second matrix of its size."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and _addmm_accumulates_fp32():
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        rows = max(1, _ADDED_AT_ONCE // total.shape[1] // 256) * 256  # whole tiles
        for start in range(0, len(total), rows):
            total[start : start + rows] += matmul_fp32(a[start : start + rows], b)


@functools.cache
def _addmm_accumulates_fp32() -> bool:
    """Whether this torch adds a product of bf16 matrices to an fp32 one: some releases refuse."""
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device="cuda")
    total = torch.ones(16, 16, device="cuda")
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())
