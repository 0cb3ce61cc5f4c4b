"""SwiGLU by itself, forward and backward: our kernels beside the others that are here."""

from __future__ import annotations

import os

from megatron_lopd.mcore import compat
from tools.gpu import device
from tools.gpu.context import Part


def run(part: Part) -> None:
    """As of Qwen3-8B at 16,384 tokens, each path's milliseconds and how near it is to its floor."""
    if part.toy:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    device.open_device(part)
    compat.prepare()
    from tools.bench.swiglu import measure

    rows, columns = (8, 96) if part.toy else (16384, 12288)
    device.need_memory(16.0 * rows * columns * 2, "fewer rows say less")
    for name, figures in measure(rows, columns, rounds=1 if part.toy else 20).items():
        part.figure(name, **figures)
