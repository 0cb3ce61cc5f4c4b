"""`lopd doctor`: what this machine has, what training would choose of it and why, and what a recipe asks."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

from megatron_lopd.commands.run import describe
from megatron_lopd.config import EngineConfig, ParallelConfig, Recipe
from megatron_lopd.engines import kind_of
from megatron_lopd.errors import ConfigError
from megatron_lopd.mcore import compat, gpus
from megatron_lopd.mcore.capabilities import (
    FP8_RECIPES,
    UNFUSED,
    UNFUSED_REMEDY,
    Capabilities,
    attention_backend,
    capabilities,
)
from megatron_lopd.mcore.precision import require_fp8
from megatron_lopd.pipeline.execute import base_versions
from megatron_lopd.pipeline.resolved import ResolvedRun
from megatron_lopd.registry import DOORS, ENGINES
from megatron_lopd.stages.table import STAGES

WIDTH = 18  # of the column of names


def diagnose(recipe: Recipe | None) -> Iterator[str]:
    """Yield the lines of the diagnosis. Raises ConfigError when the recipe cannot run here."""
    compat.prepare()
    machine = capabilities()
    for name, text in (*_machine(recipe), *choices(machine, attention_backend())):
        yield f"{name:{WIDTH}}{text}"
    for name, text in doors():
        yield f"{name:{WIDTH}}{text}"
    if recipe is not None:
        for name, text in plan(recipe, machine):
            yield f"{name:{WIDTH}}{text}"
        yield from describe(ResolvedRun(recipe), [stage.name for stage in STAGES])


def doors() -> Iterator[tuple[str, str]]:
    """(what is behind a door, the names known by now); of the user's own, with where they are from."""
    for door in DOORS:
        named = [(name, door.import_path(name)) for name in door.things()]
        if named:
            yield door.what, ", ".join(f"{name} ({path})" if path else name for name, path in named)


def _machine(recipe: Recipe | None) -> Iterator[tuple[str, str]]:
    memory = psutil.virtual_memory().total / 2**30
    yield "machine", f"{os.cpu_count()} CPU cores, {memory:.0f} GiB memory"
    yield "disk", f"{_free_disk(recipe):.0f} GiB free for the run"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield f"GPU {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
    if len(kinds := gpus.kinds()) > 1:
        yield "", f"{len(kinds)} kinds: the ranks of a job must be on one: set CUDA_VISIBLE_DEVICES to it"
    if not torch.cuda.is_available():
        unusable = gpus.why_unusable()
        yield "GPU", f"torch cannot use it: {unusable}" if unusable else "none: everything runs on the CPU"
    yield "versions", ", ".join(f"{name} {text}" for name, text in base_versions().items())
    for name, kind in ENGINES.things().items():
        yield f"engine {name} ", kind.here()
    yield "modelopt", "installed" if find_spec("modelopt") else "absent: no export.quantization=fp8"


def choices(machine: Capabilities, backend: str | None) -> Iterator[tuple[str, str]]:
    """(feature, what training in bf16 takes for it and why), from what the machine can.

    `backend` is `attention_backend()`.
    """
    engine = machine.transformer_engine
    lacking = "no GPU" if machine.gpu is None else "no Transformer Engine"
    yield "collectives", "gloo (no GPU)" if machine.gpu is None else f"nccl, on {machine.gpu}"
    yield "layers", f"Transformer Engine {engine}" if engine else f"torch-native ({machine.lacking})"
    yield "attention", _attention(machine, backend)
    yield "experts", "grouped GEMM" if engine else f"one after another ({lacking})"
    yield from _fp8_choices(machine)
    yield "Adam", f"{machine.adam}'s{'' if machine.adam == 'torch' else ', fused'}"
    yield (
        "weight gradients",
        _chosen(machine, machine.gradient_accumulation_fusion, "Apex", "added up in place"),
    )
    kernels = "Triton kernels, if they pass their trial when the model is built"
    plain = f"torch's operations ({'no GPU' if machine.gpu is None else 'no Triton'})"
    yield "log-probs, SwiGLU", kernels if machine.activation_fusion else plain
    yield "rotary embedding", _chosen(machine, machine.rope_fusion, "Transformer Engine", "fused")


def _chosen(machine: Capabilities, possible: bool, needed: str, name: str) -> str:
    if possible:
        return f"{name} ({needed})"
    return f"not {name} ({'no GPU' if machine.gpu is None else f'no {needed}'})"


def _attention(machine: Capabilities, backend: str | None) -> str:
    if backend == UNFUSED:
        return f"WARNING: Transformer Engine's {UNFUSED}: {UNFUSED_REMEDY}"
    if machine.transformer_engine is not None:
        return f"Transformer Engine's {backend or 'own'}, packed"
    if machine.variable_length_attention:
        return "torch's variable-length flash attention in bf16, SDPA in fp32 (no Transformer Engine)"
    return f"torch SDPA, documents of like length together ({'old torch' if machine.gpu else 'no GPU'})"


def _fp8_choices(machine: Capabilities) -> Iterator[tuple[str, str]]:
    possible = [recipe for recipe in FP8_RECIPES if not machine.fp8[recipe]]
    yield "FP8", f"can: {', '.join(possible)}" if possible else f"cannot: {machine.fp8['tensorwise']}"
    for recipe in FP8_RECIPES if possible else ():
        if machine.fp8[recipe]:
            yield f"FP8 {recipe}", f"cannot: {machine.fp8[recipe]}"


def plan(recipe: Recipe, machine: Capabilities) -> Iterator[tuple[str, str]]:
    """(setting, what the recipe makes of it here). Raises ConfigError for what the machine cannot do."""
    gpus.require_usable()
    require_fp8(recipe.fp8, machine)
    yield "precision", _precision(recipe, machine)
    parallel = recipe.parallel
    processes = int(os.environ.get("WORLD_SIZE", parallel.processes))
    gpus.require_one_kind(processes)
    yield "layout", _layout(parallel, processes)
    yield (
        "communication",
        (
            "gradients reduced during the backward pass, weights gathered during the forward pass"
            if processes > parallel.tensor * parallel.pipeline  # several data or context parallel ranks
            else "nothing to overlap: one data parallel rank"
        ),
    )
    if parallel.virtual_pipeline > 1:
        yield "pipeline", f"{parallel.virtual_pipeline} interleaved parts on each rank"
    if parallel.expert > 1 or parallel.expert_tensor is not None:
        yield "expert layout", f"expert {parallel.expert} x tensor {parallel.expert_tensor_size}"
    engines = ("generate", recipe.generate), ("rollout", recipe.rollout), ("score", recipe.score)
    for section, settings in (*engines, ("evaluate", recipe.evaluate)):
        yield f"{section} engine", _engine(settings.engine, section, recipe.precision)
    yield "recompute", parallel.recompute
    for name, config in (("sft", recipe.sft), ("train", recipe.train)):
        if config is not None:
            every, keep = config.checkpoint_every, config.keep_checkpoints
            yield (
                f"{name} checkpoints",
                f"every {every} steps, in the background, the newest {keep} kept",
            )


def _engine(engine: EngineConfig, section: str, precision: str) -> str:
    """What would run a stage's model, beside training in `precision`. ConfigError when it is not there."""
    kind = kind_of(engine)
    kind.require(engine, section)
    versions = ", ".join(f"{name} {version}" for name, version in kind.versions(engine).items())
    python = kind.python(engine)
    place = f" of {python}" if python != sys.executable else ""
    shared = f", {engine.workers} workers on each machine" if engine.workers > 1 else ""
    coarser = (
        f" (training is in bf16: {section}.engine.dtype=bf16 takes half the memory)"
        if (engine.dtype, precision) == ("fp32", "bf16")
        else ""
    )
    return f"{versions or engine.name}{place}, {engine.dtype}{shared}{coarser}"


def _precision(recipe: Recipe, machine: Capabilities) -> str:
    precision, fp8 = recipe.precision, recipe.fp8
    if fp8 is None:
        native = precision == "fp32" and machine.transformer_engine is not None
        layers = " in torch-native layers, for Transformer Engine's multiply in TF32" if native else ""
        return f"{precision}{layers}, master weights and log-probs fp32"
    ends = fp8.bf16_first_last_layers
    kept = f", first and last {ends} layers bf16" if ends else ""
    return (
        f"FP8 {fp8.recipe} ({fp8.number_format}) among {precision}{kept}, master weights and log-probs fp32"
    )


def _layout(parallel: ParallelConfig, processes: int) -> str:
    """The axes, and the data-parallel size that `processes` leave."""
    if processes % parallel.ranks_multiple:
        raise ConfigError(
            f"WORLD_SIZE={processes} processes do not divide into {parallel.product}: start a multiple of "
            f"{parallel.ranks_multiple}"
        )
    model = parallel.tensor * parallel.context * parallel.pipeline
    sequence = " (with sequence parallelism)" if parallel.sequence and parallel.tensor > 1 else ""
    return (
        f"{processes} processes = tensor {parallel.tensor}{sequence} x context {parallel.context} x pipeline "
        f"{parallel.pipeline} x data {processes // model}"
    )


def _free_disk(recipe: Recipe | None) -> float:
    """GiB free where the run would be written: at the nearest directory that exists."""
    path = Path(recipe.run_dir if recipe is not None else ".").absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / 2**30
