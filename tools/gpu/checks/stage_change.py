"""What a stage of `lopd run` leaves on the GPU: all is to be given back, so that an engine can start."""

from __future__ import annotations

import time

import torch

from tools.gpu import device
from tools.gpu.context import CheckFailed, Part
from tools.gpu.recipes import run_stages, write_recipe

LEFT_ALLOWED = 1e9  # bytes: the CUDA context and the libraries of the process that goes on
WATCHED_SECONDS = 4.0  # after a stage's last word, until its process is gone; the next one still imports


def run(part: Part) -> None:
    """A run of a model whose training takes several GB, and what is still taken just after each stage.

    Without OPD: an engine, training, an engine, each in a process that imports all it needs.
    """
    device.open_device(part)
    recipe = write_recipe(part.scratch, part.toy, layers=4, train=None)
    device.release()
    before, most = free_bytes(), 0
    for stage, seconds in run_stages(recipe):
        left = before - _most_free(before)
        most = max(most, left)
        part.figure(stage, seconds=seconds, left_gb=left / 1e9)
    if most > LEFT_ALLOWED:
        raise CheckFailed(f"a stage left {most / 1e9:.1f} GB on the GPU: {LEFT_ALLOWED / 1e9:.0f} at most")


def _most_free(wanted: int) -> int:
    """What was free at best, up to `wanted`: a process that ends gives its memory back piece by piece."""
    samples: list[int] = []
    deadline = time.monotonic() + WATCHED_SECONDS
    while not samples or (max(samples) < wanted and time.monotonic() < deadline):
        samples.append(free_bytes())
        time.sleep(0.02)
    return max(samples)


def free_bytes() -> int:
    """Of the GPU, whoever holds the rest; 0 where there is none."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
