"""A checkpoint: how long it blocks a step, how fast it is staged, written and read, what memory it takes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from megatron_lopd.mcore import compat
from megatron_lopd.mcore.capabilities import capabilities
from tools.bench.checkpoint import floors, measure_saves
from tools.gpu import device
from tools.gpu.context import CheckFailed, LeftOut, Part
from tools.gpu.training import QWEN3_06B, Job, Steps, training

GPU_ALLOWED = 1e9  # bytes of GPU memory that a save may take
BYTES_PER_WEIGHT = 14  # bf16, and the fp32 master and moments


def run(part: Part) -> None:
    """Of 8 layers of Qwen3-0.6B after a step, 4 GB. A save that takes more than 1 GB of the GPU fails."""
    device.open_device(part)
    compat.prepare()
    arch = replace(QWEN3_06B, num_layers=8)
    job = Job("8 layers of Qwen3-0.6B", arch, micro_batch_tokens=4096, samples=4, longest=1024)
    job = replace(job, engine=capabilities().transformer_engine is not None)
    if part.toy:
        job = job.toy()
    device.need_memory(job.planned_bytes, job.largest_fitting(device.free_bytes()))
    with training(job) as steps:
        _need_disk(part.scratch, steps)
        steps.step()
        device.release()
        measured = measure_saves(steps.optimization, steps.ranks, job.arch, part.scratch, saves=1)
    part.figure(job.name, **measured)
    part.figure("this machine at best", **floors(part.scratch))
    peak = measured["gpu_peak_bytes"]
    if peak > GPU_ALLOWED:
        raise CheckFailed(f"a save took {peak / 1e9:.1f} GB of GPU memory: {GPU_ALLOWED / 1e9:.0f} at most")


def _need_disk(folder: Path, steps: Steps) -> None:
    """Two checkpoints are kept, and one is being written."""
    weights = sum(each.numel() for chunk in steps.optimization.chunks for each in chunk.parameters())
    needed, free = 3.0 * BYTES_PER_WEIGHT * weights, shutil.disk_usage(folder).free
    if needed > free:
        raise LeftOut(f"needs {needed / 1e9:.1f} GB of disk below --out, there are {free / 1e9:.1f}")
