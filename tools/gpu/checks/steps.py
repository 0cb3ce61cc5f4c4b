"""Training steps of several models and precisions, in one process: imports take as long as a model does."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

from megatron_lopd.config import Fp8Config
from megatron_lopd.families.flops import peak_flops
from megatron_lopd.mcore import compat
from tools.gpu import device
from tools.gpu.context import Part
from tools.gpu.training import EXPERTS_CUT, QWEN3_06B, QWEN3_8B_CUT, Job, require_kind, training

WARMUP, STEPS = 2, 4
CUT = Job("8 layers of Qwen3-8B, bf16", QWEN3_8B_CUT)
JOBS = (
    CUT,
    replace(CUT, name="the same, FP8 tensorwise", fp8=Fp8Config("tensorwise")),
    replace(CUT, name="the same, bf16, top-k 64", objective="topk_reverse_kl"),
    replace(CUT, name="the same, bf16, torch's log-probs", fused=False),
    replace(CUT, name="the same, FP8 blockwise", fp8=Fp8Config("blockwise")),
    Job("Qwen3-0.6B, bf16", QWEN3_06B),
    Job("Qwen3-0.6B, native layers, 8k tokens", QWEN3_06B, micro_batch_tokens=8192, samples=8, engine=False),
    Job("MoE of 32 experts, bf16", EXPERTS_CUT),
    replace(CUT, name="8 layers of Qwen3-8B, FP8 delayed", fp8=Fp8Config("delayed")),
)


def run(part: Part) -> None:
    """The median step of each, told as it comes."""
    device.open_device(part)
    compat.prepare()
    for job in JOBS:
        part.attempt(job.name, _measuring(part, job.toy() if part.toy else job))


def _measuring(part: Part, job: Job) -> Callable[[], None]:
    def measure() -> None:
        device.release()  # what a job that failed has held till now
        try:
            _measure(part, job)
        finally:
            device.release()

    return measure


def _measure(part: Part, job: Job) -> None:
    require_kind(job)
    device.need_memory(job.planned_bytes, job.largest_fitting(device.free_bytes()))
    held = device.start_peak()
    with training(job) as steps:
        for _ in range(WARMUP):
            steps.step()
        seconds = [device.seconds_of(steps.step) for _ in range(STEPS)]
        flops, tokens = steps.flops, steps.tokens
    median = statistics.median(seconds)
    peak = peak_flops(device.gpu_name())
    part.figure(
        job.name,
        seconds=median,
        spread=max(seconds) - min(seconds),
        tokens_per_s=tokens / median,
        mfu=None if peak is None else flops / median / peak,  # of the bf16 peak, for FP8 too
        peak_gb=device.read_peak() / 1e9,
        held_gb=held / 1e9,  # of it by what came before, and to be near 0
        planned_gb=job.planned_bytes / 1e9,
    )
