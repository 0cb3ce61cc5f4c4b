"""Which activations of a layer are made again in its backward pass, in place of being kept.

By Megatron-Core's names (TransformerConfig.recompute_modules). Left out of those that it offers: layernorm,
which in Transformer Engine's layers is part of the linear one behind it, and elsewhere fails.
"""

from __future__ import annotations

from typing import Any, Literal

from megatron_lopd.config import Fp8Config, ParallelConfig
from megatron_lopd.errors import ConfigError
from megatron_lopd.families.architecture import Architecture

Part = Literal["none", "core_attn", "mlp", "moe_act", "moe", "full"]


def recomputed_part(
    arch: Architecture, parallel: ParallelConfig, fp8: Fp8Config | None, *, grouped: bool
) -> Part:
    """`parallel.recompute`, `selective` resolved to the widest part that costs little to make again.

    `grouped`: experts are Transformer Engine's grouped ones, which alone recompute just their activation.
    """
    if parallel.recompute != "selective":
        return parallel.recompute
    if arch.experts is None:
        return "mlp"
    return "moe_act" if grouped and not _is_delayed(fp8) else "moe"


def check_recompute(
    arch: Architecture, parallel: ParallelConfig, fp8: Fp8Config | None, *, grouped: bool
) -> None:
    """Raise ConfigError unless the model's layers, as they are on this machine, have the named part."""
    part, dense = parallel.recompute, arch.experts is None
    problem = ""
    if part in ("moe", "moe_act") and dense:
        problem = f"a {arch.family} model has no experts: set parallel.recompute to mlp"
    elif part == "mlp" and not dense:
        problem = f"a {arch.family} model's are experts: set parallel.recompute to moe_act or moe"
    elif part == "moe_act" and not grouped:
        problem = (
            "it takes Transformer Engine's grouped experts, in bf16 on a GPU: set parallel.recompute to moe"
        )
    elif part == "moe_act" and _is_delayed(fp8):
        problem = "not with fp8.recipe=delayed: set fp8.recipe to another, or parallel.recompute to moe"
    if problem:
        raise ConfigError(f"parallel.recompute={part}: {problem}")


def recompute_options(
    arch: Architecture, parallel: ParallelConfig, fp8: Fp8Config | None, *, grouped: bool
) -> dict[str, Any]:
    """TransformerConfig's fields for `parallel.recompute`; `check_recompute` must hold."""
    part = recomputed_part(arch, parallel, fp8, grouped=grouped)
    if part == "none":
        return {}
    if part == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {"recompute_granularity": "selective", "recompute_modules": [part]}


def _is_delayed(fp8: Fp8Config | None) -> bool:
    """Megatron-Core refuses an activation alone under delayed scaling, whose scales would be one pass off."""
    return fp8 is not None and fp8.recipe == "delayed"
