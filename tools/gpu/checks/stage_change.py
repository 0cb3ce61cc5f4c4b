"""What a stage leaves on the GPU for the next: all of it must be given back, or an engine will not start."""

from __future__ import annotations

import subprocess
import sys

import torch

from megatron_lopd.cli import main
from tools.gpu import device
from tools.gpu.context import CheckFailed, Part
from tools.gpu.recipes import write_recipe

LEFT_ALLOWED = 1e9  # bytes, above this process's CUDA context: cuBLAS's workspaces, kernels that were loaded
SEEN = "import torch; print(torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0)"


def run(part: Part) -> None:
    """Each stage in this one process, and after it the free memory that a fresh process sees."""
    device.open_device(part)
    recipe = write_recipe(part.scratch, part.toy, layers=4)
    device.release()
    before, kept = free_seen_by_a_child(), 0
    for stage in ("generate", "sft", "rollout", "score", "train", "export"):
        seconds = device.seconds_of(lambda stage=stage: _stage(stage, str(recipe)))  # type: ignore[misc]
        left = before - free_seen_by_a_child()
        part.figure(stage, seconds=seconds, left_gb=left / 1e9)
        kept = max(kept, left)
    if kept > LEFT_ALLOWED:
        raise CheckFailed(f"a stage left {kept / 1e9:.1f} GB on the GPU: {LEFT_ALLOWED / 1e9:.0f} at most")


def _stage(name: str, recipe: str) -> None:
    if code := main([name, recipe]):
        raise CheckFailed(f"lopd {name} ended with exit code {code}: its message is in the log")


def free_seen_by_a_child() -> int:
    """Bytes; 0 where there is no GPU."""
    if not torch.cuda.is_available():
        return 0
    seen = subprocess.run([sys.executable, "-c", SEEN], capture_output=True, text=True, check=True)
    return int(seen.stdout)
