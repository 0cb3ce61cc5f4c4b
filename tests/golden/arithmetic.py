"""Float arithmetic that does not depend on the processor, as far as its libraries let themselves be told.

`python -m tests.golden.arithmetic` prints a digest of what each kind of operation gives here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
TESTS = REPOSITORY / "tests"


def _numpy_features() -> list[str]:
    """All that numpy has kernels for beside its baseline, whether this processor has it or not."""
    known = np.show_config(mode="dicts")["SIMD Extensions"]
    return sorted({*known.get("found", []), *known.get("not found", [])})


# Each library picks its kernels by processor, and they sum in other orders and fuse other products. These
# name the ones that every x86-64 has. One thread, since threads cut sums; nothing compiled for a processor.
PINNED = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Nehalem",
    "NPY_DISABLE_CPU_FEATURES": " ".join(_numpy_features()),
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4,-AVX512F",
    "TORCHDYNAMO_DISABLE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, TESTS / "dist", TESTS / "golden" / "exact"))),
}


def canary() -> dict[str, str]:
    """SHA-256 of what a fixed set of operations gives, by name: those that training a small model takes."""
    return {name: _digest(make()) for name, make in _operations().items()}


def _digest(results: Any) -> str:
    digest = hashlib.sha256()
    for each in results if isinstance(results, (tuple, list)) else [results]:
        raw = each.detach().reshape(-1).view(torch.uint8).numpy() if isinstance(each, Tensor) else each
        digest.update(raw.tobytes())
    return digest.hexdigest()


def _operations() -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)
    # Exact on any processor: whole numbers over a power of two.
    draws = (torch.randint(-(2**20), 2**20, (40, 131), generator=generator) / 2**18 for _ in iter(int, 1))
    a, b, c = (next(draws) for _ in range(3))
    heads = [torch.stack([x[:33, :16], x[:33, 16:32]])[None] for x in (a, b, c)]
    singles, doubles = a.numpy(), a.double().numpy()
    normal, gumbel = np.random.Generator.normal, np.random.Generator.gumbel
    return {
        "randn": lambda: torch.randn(4099, generator=torch.Generator().manual_seed(1)),
        "matmul fp32": lambda: [a @ b.T, a.T @ b, F.linear(a[:7], b, c[0, :40])],
        "matmul bf16": lambda: a.bfloat16() @ b.bfloat16().T,
        "batched matmul": lambda: torch.bmm(a[:, :120].reshape(8, 5, 120), b[:, :120].reshape(8, 120, 5)),
        "sums": lambda: [a.sum(), a.sum(0), a.sum(1), a.norm(), a.cumsum(1), a.double().mean()],
        "exp, log": lambda: [a.exp(), a.abs().log(), a.tanh(), a.sin(), a.cos()],
        "roots": lambda: [
            a.abs().sqrt(),
            a[0, 0].abs().sqrt(),
            a.double().abs().sqrt(),
            (a.abs() + 1).rsqrt(),
        ],
        "doubles": lambda: [a.double().exp(), a.double().abs().log1p(), a.double() @ b.double().T],
        "softmax": lambda: [a.log_softmax(-1), a.softmax(-1), a.logsumexp(-1), a.bfloat16().softmax(-1)],
        "silu, gelu": lambda: [F.silu(a), F.gelu(a), F.silu(a.bfloat16()), torch.sigmoid(a)],
        "attention": lambda: [F.scaled_dot_product_attention(*heads, is_causal=True)],
        "norms": lambda: [F.rms_norm(a, (131,), b[0]), F.layer_norm(a, (131,), b[0], c[0])],
        "AdamW": lambda: list(_adamw(a, b, c)),
        "numpy": lambda: [f(x + 5) for f in (np.exp, np.log, np.sqrt, np.sin) for x in (singles, doubles)],
        "numpy products": lambda: [singles @ singles.T, doubles @ doubles.T, doubles.sum(), doubles.mean(1)],
        "numpy draws": lambda: [draw(np.random.default_rng(0), size=999) for draw in (normal, gumbel)],
    }


def _adamw(weight: Tensor, gradient: Tensor, target: Tensor) -> Iterator[Tensor]:
    for fused in (False, True):
        parameter = torch.nn.Parameter(weight.clone())
        optimizer = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.1, fused=fused)
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(parameter @ gradient.T, target[:, 0].abs().long())
            (loss + (parameter**2).mean()).backward()
            yield parameter.grad.clone()  # type: ignore[union-attr]
            optimizer.step()
        yield parameter


if __name__ == "__main__":
    print(json.dumps(canary(), indent=1))
