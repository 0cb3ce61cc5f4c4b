"""What this machine and its packages can do for training, found by importing and asking, never by a flag."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch

from megatron_lopd.mcore import compat, kernels

FP8_RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")

# recipe -> the function by which Transformer Engine says (whether it runs here, why not)
_FP8_CHECKS = {
    "delayed": "check_fp8_support",
    "tensorwise": "check_fp8_support",
    "blockwise": "check_fp8_block_scaling_support",
    "mxfp8": "check_mxfp8_support",
}


@dataclass(frozen=True)
class Capabilities:
    """Of this process's GPU and installation.

    `gpu`, `compute_capability`: None without a GPU. `transformer_engine`: its version where the layers are
    its own, else None. `fp8`: for each recipe why it cannot run here, "" where it can. `adam`: whose Adam
    Megatron-Core takes. `variable_length_attention`: torch's own packed flash attention, in bf16.
    """

    gpu: str | None
    compute_capability: tuple[int, int] | None
    transformer_engine: str | None
    fp8: Mapping[str, str]
    adam: str
    gradient_accumulation_fusion: bool
    activation_fusion: bool
    rope_fusion: bool
    variable_length_attention: bool


@functools.cache
def capabilities() -> Capabilities:
    """Look once; the machine does not change under a process."""
    has_gpu = torch.cuda.is_available()
    return Capabilities(
        gpu=torch.cuda.get_device_name() if has_gpu else None,
        compute_capability=torch.cuda.get_device_capability() if has_gpu else None,
        transformer_engine=_engine_version() if compat.has_transformer_engine() else None,
        fp8={recipe: _why_no_fp8(recipe) for recipe in FP8_RECIPES},
        adam=_adam(),
        # Megatron-Core's output layer refuses the option without Apex's kernel, TE's own layers or not.
        gradient_accumulation_fusion=has_gpu and _imports("fused_weight_gradient_mlp_cuda"),
        activation_fusion=has_gpu and kernels.is_installed(),  # SwiGLU and its gradient: mcore/swiglu.py
        rope_fusion=compat.has_transformer_engine(),
        variable_length_attention=compat.variable_length_attention(torch.bfloat16) is not None,
    )


def _why_no_fp8(recipe: str) -> str:
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU here"
    if not compat.has_transformer_engine():
        return "Transformer Engine cannot be imported"
    check = getattr(_quantization(), _FP8_CHECKS[recipe], None)
    if check is None:
        return f"Transformer Engine {_engine_version()} does not know this recipe"
    supported, reason = check()
    return "" if supported else str(reason).rstrip(".")


def _quantization() -> ModuleType:
    """Where Transformer Engine's checks are: `quantization` since 2.9, `fp8` before."""
    try:
        return importlib.import_module("transformer_engine.pytorch.quantization")
    except ImportError:
        return importlib.import_module("transformer_engine.pytorch.fp8")


def _engine_version() -> str:
    for package in ("transformer-engine", "transformer-engine-torch", "transformer_engine_torch"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "of unknown version"


def _adam() -> str:
    """Whose Adam megatron.core.optimizer has imported: Transformer Engine's, else Apex's, else torch's."""
    adam = importlib.import_module("megatron.core.optimizer").Adam
    owner = adam.__module__.partition(".")[0]
    return {"transformer_engine": "Transformer Engine", "apex": "Apex"}.get(owner, "torch")


def _imports(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True
