"""Whether Triton's kernels run here, found by compiling one, before a step depends on it."""

from __future__ import annotations

import functools
import os
import sys
from importlib.util import find_spec

import torch


def is_installed() -> bool:
    """Whether there is a Triton to write kernels with. Nothing is compiled, and no GPU is touched."""
    return find_spec("triton") is not None


@functools.cache
def triton_runs() -> bool:
    """Whether Triton compiles and runs a kernel on this process's GPU, or is being interpreted on a CPU.

    Call it with the GPU chosen (`torch.cuda.set_device`): it makes that one's CUDA context. Where there is a
    GPU and Triton does not run, rank 0 says so and why, once, in one line on stderr.
    """
    if not torch.cuda.is_available():
        return is_installed() and os.environ.get("TRITON_INTERPRET") == "1"
    reason = _why_not()
    if reason and os.environ.get("RANK", "0") == "0":
        print(f"lopd: Triton does not run here, so torch's slower operations do: {reason}", file=sys.stderr)
    return not reason


def _why_not() -> str:
    """One line; "" where it runs."""
    if not is_installed():
        return "it is not installed"
    try:
        from megatron_lopd.mcore.swiglu import swiglu  # needs Triton

        swiglu(torch.ones(1, 2, device="cuda"))
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - no C compiler, a full or read-only cache, a new GPU: any of them
        return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no more is said'}"
    return ""
