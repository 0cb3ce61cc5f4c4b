"""What this machine and its packages can do for training, found by importing and asking, never by a flag."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from megatron_lopd.mcore import compat, transformer_engine

FP8_RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")

# recipe -> the function by which Transformer Engine says (whether it runs here, why not)
_FP8_CHECKS = {
    "delayed": "check_fp8_support",
    "tensorwise": "check_fp8_support",
    "blockwise": "check_fp8_block_scaling_support",
    "mxfp8": "check_mxfp8_support",
}

UNFUSED = "UnfusedDotProductAttention"
UNFUSED_REMEDY = (
    "time and memory grow with the square of a document: install flash-attn, and see that NVTE_FLASH_ATTN, "
    "NVTE_FUSED_ATTN and NVTE_ALLOW_NONDETERMINISTIC_ALGO do not forbid the others"
)


@dataclass(frozen=True)
class Capabilities:
    """Of this process's GPU and installation.

    `gpu`, `compute_capability`: None without a GPU. `transformer_engine`: its version where it is loaded,
    else None, and `lacking` says why. `fp8`: for each recipe why it cannot run here, "" where it can. `adam`:
    whose Adam Megatron-Core takes. `variable_length_attention`: torch's own packed flash attention, in bf16.
    """

    gpu: str | None
    compute_capability: tuple[int, int] | None
    transformer_engine: str | None
    lacking: str
    fp8: Mapping[str, str]
    adam: str
    gradient_accumulation_fusion: bool
    activation_fusion: bool
    rope_fusion: bool
    variable_length_attention: bool


@functools.cache
def capabilities() -> Capabilities:
    """Look once; the machine does not change under a process."""
    has_gpu, engine = torch.cuda.is_available(), transformer_engine.load()
    return Capabilities(
        gpu=torch.cuda.get_device_name() if has_gpu else None,
        compute_capability=torch.cuda.get_device_capability() if has_gpu else None,
        transformer_engine=engine.version,
        lacking=engine.lacking,
        fp8={recipe: _why_no_fp8(recipe) for recipe in FP8_RECIPES},
        adam=_adam(),
        # Megatron-Core's output layer refuses the option without Apex's kernel, TE's own layers or not.
        gradient_accumulation_fusion=has_gpu and _imports("fused_weight_gradient_mlp_cuda"),
        activation_fusion=has_gpu and find_spec("triton") is not None,  # ops/swiglu.py
        rope_fusion=compat.has_transformer_engine(),
        variable_length_attention=compat.variable_length_attention(torch.bfloat16) is not None,
    )


def _why_no_fp8(recipe: str) -> str:
    engine = transformer_engine.load()
    if engine.version is None:
        return engine.lacking
    check = getattr(transformer_engine.quantization(), _FP8_CHECKS[recipe], None)
    if check is None:
        return f"Transformer Engine {engine.version} does not know this recipe"
    supported, reason = check()
    return "" if supported else str(reason).rstrip(".")


@functools.cache
def attention_backend() -> str | None:
    """Which of its attentions Transformer Engine takes for packed documents, by its own choice.

    FlashAttention, FusedAttention (cuDNN's), or UNFUSED, which makes the [S, S] matrices of every head; None
    where it is not loaded, takes none, or cannot be asked in this release. As Megatron-Core calls it: causal,
    in bf16, heads of 128. GPU, cuDNN, flash-attn and NVTE_* variables decide: cuDNN's takes packed documents
    from sm_90 on, so that an A100 needs flash-attn.
    """
    if not compat.has_transformer_engine():
        return None
    try:
        utils = importlib.import_module(
            "transformer_engine.pytorch.attention.dot_product_attention.utils"  # since 2.3
        )
        packed = utils.AttentionParams(
            qkv_dtype=torch.bfloat16,
            qkv_layout="thd_thd_thd",
            batch_size=2,
            num_heads=16,
            num_gqa_groups=8,
            max_seqlen_q=2048,
            max_seqlen_kv=2048,
            head_dim_qk=128,
            head_dim_v=128,
            attn_mask_type="padding_causal",
            window_size=(-1, 0),
            core_attention_bias_shape=None,  # no bias, of which the defaults describe one
            core_attention_bias_requires_grad=False,
            deterministic=os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1") == "0",
        )
        flash, _, fused, _, unfused, _ = utils.get_attention_backend(packed)
    except (ImportError, AttributeError, TypeError, ValueError):  # of a release that spells it otherwise
        return None
    chosen = {"FlashAttention": flash, "FusedAttention": fused, UNFUSED: unfused}
    return next((name for name, is_chosen in chosen.items() if is_chosen), None)


def notices(precision: Literal["fp32", "bf16"]) -> list[str]:
    """What a training run on this machine should say before it starts: why it is slower than it could be."""
    engine = transformer_engine.load()
    if precision == "fp32":
        return []  # its layers are torch's on every machine
    if engine.broken:
        return [f"{engine.lacking}: training goes on with torch-native layers, which are slower"]
    if attention_backend() == UNFUSED:
        return [f"attention is Transformer Engine's {UNFUSED}: {UNFUSED_REMEDY}"]
    return []


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
