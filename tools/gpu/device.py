"""The device under check: which it is, its clock and its memory."""

from __future__ import annotations

import gc
import importlib
import statistics
import time
from collections.abc import Callable

import torch

from tools.gpu.context import CheckFailed, LeftOut, Part


def open_device(part: Part) -> torch.device:
    """The GPU, or the CPU at toy sizes. Raises CheckFailed, in torch's own words, where it cannot use it.

    Transformer Engine, if it is there, is loaded first: it fails once torch has loaded its own cuDNN.
    """
    if part.toy:
        return torch.device("cpu")
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (AssertionError, RuntimeError) as error:
        raise CheckFailed(f"torch {torch.__version__} cannot use the GPU: {error}") from error
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # noqa: BLE001  a broken one raises anything: `machine` says what
        print(f"Transformer Engine cannot be loaded: {error}", flush=True)
    return torch.device("cuda", 0)


def gpu_name() -> str | None:
    """What torch calls the GPU; None on a CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def free_bytes() -> float:
    """Of the GPU's memory what no one has, this process's cache included; without end on a CPU."""
    if not torch.cuda.is_available():
        return float("inf")
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return float(torch.cuda.mem_get_info()[0] + cached)


def need_memory(needed: float, would_fit: str) -> None:
    """Raise LeftOut unless that many bytes are free; `would_fit`: what would."""
    free = free_bytes()
    if needed > free:
        raise LeftOut(f"needs {needed / 1e9:.1f} GB, this has {free / 1e9:.1f} free; {would_fit}")


def synchronize() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def release() -> None:
    """Give memory back before the next measurement."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def start_peak() -> int:
    """Bytes that tensors hold now; the peak is counted anew from here."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def read_peak() -> int:
    """The most bytes that tensors held since `start_peak`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def seconds_of(work: Callable[[], object]) -> float:
    """Of one call, by the clock, with nothing before it or after it in flight."""
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Of `repeats` calls, after two to warm up."""
    for _ in range(2):
        work()
    return statistics.median(seconds_of(work) for _ in range(repeats))


def gemm_flops(size: int, device: torch.device, repeats: int = 10) -> float:
    """FLOP/s of a bf16 product of two square matrices: what a product here can have at most."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, repeats)
