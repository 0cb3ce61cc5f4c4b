"""One training step by kernel: what the time goes into."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from megatron_lopd.mcore import compat
from tools.gpu import device
from tools.gpu.checks.steps import CUT
from tools.gpu.context import Part
from tools.gpu.training import require_kind, training

SHOWN = 30
# In this order, by the names of kernels. Ours: those of ops/log_prob_kernels.py and of ops/swiglu.py.
CLASSES = (
    ("collectives", r"nccl"),
    ("attention", r"flash|fmha|sdpa|attention"),
    ("log-probs", r"^_statistics$|^_gradient$|log_?prob|softmax|logsumexp"),
    ("SwiGLU", r"swiglu|silu|^_forward$|^_backward$"),
    ("optimizer", r"adam|multi_tensor|l2norm"),
    ("GEMM", r"gemm|nvjet|cutlass|xmma|wgmma|aten::mm|aten::addmm|aten::bmm"),
    ("FP8 casts", r"cast_|quantize|amax"),
    ("norms and RoPE", r"norm|rope|rotary"),
    ("copies", r"memcpy|memset|copy"),
)


def run(part: Part) -> None:
    """Kernels of one step of the 8-layer cut in bf16: shares of the time that kernels run."""
    device.open_device(part)
    compat.prepare()
    job = CUT.toy() if part.toy else CUT
    require_kind(job)
    device.need_memory(job.planned_bytes, job.largest_fitting(device.free_bytes()))
    activity = torch.profiler.ProfilerActivity
    with training(job) as steps:
        for _ in range(2):
            steps.step()
        with torch.profiler.profile(activities=[activity.CPU if part.toy else activity.CUDA]) as profiler:
            seconds = device.seconds_of(steps.step)
    trace = part.scratch / "trace.json"
    profiler.export_chrome_trace(str(trace))
    kernels = read_kernels(trace, ("cpu_op",) if part.toy else ("kernel", "gpu_memcpy", "gpu_memset"))
    _tell(part, kernels, seconds)


def read_kernels(trace: Path, categories: tuple[str, ...]) -> dict[str, list[float]]:
    """Milliseconds of each launch by the kernel's name, from a Chrome trace."""
    events: list[dict[str, Any]] = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") in categories and "dur" in event:
            kernels[event["name"]].append(event["dur"] / 1000)
    return kernels


def kernel_class(name: str) -> str:
    """What a kernel is for, as far as its name tells."""
    return next((kind for kind, pattern in CLASSES if re.search(pattern, name, re.IGNORECASE)), "the rest")


def _tell(part: Part, kernels: dict[str, list[float]], seconds: float) -> None:
    totals = {name: sum(times) for name, times in kernels.items()}
    whole = sum(totals.values())
    part.figure("step", seconds=seconds, kernels_ms=whole, launches=sum(map(len, kernels.values())))
    classes: dict[str, float] = defaultdict(float)
    for name, total in totals.items():
        classes[kernel_class(name)] += total
    for kind, total in sorted(classes.items(), key=lambda item: -item[1]):
        part.figure(kind, ms=total, share=total / whole)
    for name in sorted(totals, key=lambda name: -totals[name])[:SHOWN]:
        shown = {"ms": totals[name], "share": totals[name] / whole, "launches": len(kernels[name])}
        part.figure(f"kernel {name[:90]}", kind=kernel_class(name), **shown)
