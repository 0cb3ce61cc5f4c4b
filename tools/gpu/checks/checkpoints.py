"""A checkpoint of a 0.6B model: how long a step is blocked, how fast it is written and read, its memory."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

from megatron_lopd.mcore import compat
from megatron_lopd.mcore.capabilities import capabilities
from megatron_lopd.training.checkpoints import Checkpoints, Progress
from megatron_lopd.training.saving import Saver, load_checkpoint
from tools.bench.checkpoint import peak_resident, resident
from tools.gpu import device
from tools.gpu.context import CheckFailed, LeftOut, Part
from tools.gpu.training import QWEN3_06B, Job, Steps, training

GPU_ALLOWED = 1e9  # bytes of GPU memory that a save may take
BYTES_PER_WEIGHT = 14  # bf16, and the fp32 master and moments


def run(part: Part) -> None:
    """Two saves, since the first makes the buffers; one load. A save that takes 1 GB of the GPU fails."""
    device.open_device(part)
    compat.prepare()
    job = Job("Qwen3-0.6B", QWEN3_06B, micro_batch_tokens=4096, samples=4, longest=1024)
    job = replace(job, engine=capabilities().transformer_engine is not None)
    if part.toy:
        job = job.toy()
    device.need_memory(job.planned_bytes, job.largest_fitting(device.free_bytes()))
    with training(job) as steps:
        _need_disk(part.scratch, steps)
        steps.step()
        checkpoints = Checkpoints(part.scratch / "checkpoints", "a check", job.arch, "proved", keep=1)
        saver = Saver(checkpoints, steps.ranks, compat.device())
        for number in (1, 2):
            _save(part, saver, steps, number)
        newest = checkpoints.newest_whole(print)
        if newest is None:
            raise CheckFailed("the checkpoint does not pass its own digests")
        held = device.start_peak()
        seconds = device.seconds_of(lambda: load_checkpoint(newest, steps.optimization, steps.ranks))
        gigabytes = _size(newest.path) / 1e9
        gpu = (device.read_peak() - held) / 1e9
        part.figure("load", seconds=seconds, gb_per_s=gigabytes / seconds, gpu_gb=gpu)


def _need_disk(folder: Path, steps: Steps) -> None:
    """Two checkpoints are there at once when the second is committed."""
    weights = sum(each.numel() for chunk in steps.optimization.chunks for each in chunk.parameters())
    needed, free = 2.5 * BYTES_PER_WEIGHT * weights, shutil.disk_usage(folder).free
    if needed > free:
        raise LeftOut(f"needs {needed / 1e9:.1f} GB of disk below --out, there are {free / 1e9:.1f}")


def _save(part: Part, saver: Saver, steps: Steps, number: int) -> None:
    held, before = device.start_peak(), resident()
    with peak_resident() as peak:
        began = time.perf_counter()
        saver.start(steps.optimization, Progress(step=number))
        blocked = time.perf_counter() - began
        saver.finish()
        whole = time.perf_counter() - began
    gpu = device.read_peak() - held
    gigabytes = _size(part.scratch / "checkpoints" / f"step_{number:08d}") / 1e9
    part.figure(
        f"save {number}",
        gb=gigabytes,
        blocked_s=blocked,
        staged_gb_per_s=gigabytes / blocked,
        written_gb_per_s=gigabytes / (whole - blocked),
        gpu_gb=gpu / 1e9,
        host_gb=(peak[0] - before) / 1e9,
    )
    if gpu > GPU_ALLOWED:
        raise CheckFailed(f"a save took {gpu / 1e9:.1f} GB of GPU memory: {GPU_ALLOWED / 1e9:.0f} at most")


def _size(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.iterdir())
