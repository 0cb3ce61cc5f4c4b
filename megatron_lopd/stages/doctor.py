"""`lopd doctor`: what this machine has, and what a recipe would use of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

from megatron_lopd.config import Recipe
from megatron_lopd.mcore import compat
from megatron_lopd.stages.base import base_versions
from megatron_lopd.stages.run import STAGES, describe


def diagnose(recipe: Recipe | None) -> Iterator[str]:
    """Yield the lines of the diagnosis. Raises ConfigError when the recipe cannot run here."""
    memory = psutil.virtual_memory().total / 2**30
    yield f"machine: {os.cpu_count()} CPU cores, {memory:.0f} GiB memory"
    yield f"disk: {_free_disk(recipe):.0f} GiB free for the run"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            yield f"GPU {index}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
    else:
        yield "GPU: none: everything runs on the CPU"
    yield "versions: " + ", ".join(f"{name} {text}" for name, text in base_versions().items())
    yield f"vLLM: {'installed' if find_spec('vllm') else 'absent'}"
    compat.prepare()
    yield f"collectives: {compat.backend()}"
    layers = (
        "Transformer Engine"
        if compat.has_transformer_engine()
        else "torch-native (no Transformer Engine with a GPU)"
    )
    yield f"layers: {layers}"
    if recipe is not None:
        layout = f"tensor {recipe.parallel.tensor} x pipeline {recipe.parallel.pipeline}"
        yield f"training: {recipe.precision}, {layout}, {recipe.parallel.processes} processes"
        yield from describe(recipe, [stage.name for stage in STAGES])


def _free_disk(recipe: Recipe | None) -> float:
    """GiB free where the run would be written: at the nearest directory that exists."""
    path = Path(recipe.run_dir if recipe is not None else ".").absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / 2**30
