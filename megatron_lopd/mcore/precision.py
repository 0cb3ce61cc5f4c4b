"""FP8: what Megatron-Core is told, what it asks of sizes and padding, and where it is refused.

Transformer Engine computes the layers' matrix products in FP8. Embedding, norms, attention and the router
stay in bf16 or fp32, and so does the output layer: `token_loss.py`, `top_k.py` and `log_probs.py` make its
product, outside Transformer Engine. Master weights and the optimizer's moments are fp32 as ever.
"""

from __future__ import annotations

from typing import Any

from megatron_lopd.config import Fp8Config, ParallelConfig
from megatron_lopd.data.packing import Padding
from megatron_lopd.errors import ConfigError
from megatron_lopd.families.architecture import Architecture
from megatron_lopd.mcore.capabilities import FP8_RECIPES, Capabilities, capabilities

# Steps over which delayed scaling takes the largest value: Transformer Engine's own default, where
# Megatron-Core's is 1, which clips whatever is larger than in the micro-batch before.
AMAX_HISTORY = 1024

# Rows and columns of the matrices in an FP8 product (transformer_engine get_align_size_for_quantization).
_ALIGNMENT = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}
# A part of a sequence that is gathered over tensor parallel ranks in FP8 must hold whole blocks
# (transformer_engine assert_dim_for_all_gather and the quantizers' is_quantizable).
_GATHERED_ALIGNMENT = _ALIGNMENT | {"blockwise": 128}


def fp8_options(fp8: Fp8Config | None) -> dict[str, Any]:
    """The FP8 fields of a Megatron-Core TransformerConfig."""
    if fp8 is None:
        return {}
    options: dict[str, Any] = {"fp8": fp8.number_format, "fp8_recipe": fp8.recipe}
    if fp8.recipe == "delayed":
        options |= {"fp8_amax_history_len": AMAX_HISTORY, "fp8_amax_compute_algo": "max"}
    if fp8.bf16_first_last_layers:
        options |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": fp8.bf16_first_last_layers,
            "num_layers_at_end_in_bf16": fp8.bf16_first_last_layers,
        }
    return options


def token_alignment(fp8: Fp8Config | None, parallel: ParallelConfig) -> int:
    """Each rank's part of a micro-batch must be a multiple of this many tokens; 1 without FP8.

    A part is what context parallelism and, where it is on, sequence parallelism leave a rank: a micro-batch
    is padded to this times their sizes. What experts get, Megatron-Core pads itself (TEGroupedMLP).
    """
    if fp8 is None:
        return 1
    return (_GATHERED_ALIGNMENT if _gathers(parallel) else _ALIGNMENT)[fp8.recipe]


def packed_padding(parallel: ParallelConfig, fp8: Fp8Config | None) -> Padding:
    """What the layout and FP8 ask of packed lengths."""
    return Padding.of(parallel, token_alignment(fp8, parallel))


def check_precision(arch: Architecture, parallel: ParallelConfig, fp8: Fp8Config | None) -> None:
    """Raise ConfigError unless `fp8` goes with the model, its split and this machine. Allocates nothing."""
    check_fp8(arch, parallel, fp8)
    require_fp8(fp8, capabilities())


def require_fp8(fp8: Fp8Config | None, machine: Capabilities) -> None:
    """Raise ConfigError unless `machine` can run the recipe.

    Without Transformer Engine, Megatron-Core would train in bf16 and not say so (fp8_utils.get_fp8_context).
    """
    if fp8 is None or not machine.fp8[fp8.recipe]:
        return
    possible = [recipe for recipe in FP8_RECIPES if not machine.fp8[recipe]]
    remedy = f"set fp8.recipe to {' or '.join(possible)}, or drop" if possible else "drop"
    raise ConfigError(
        f"fp8.recipe={fp8.recipe} cannot run here: {machine.fp8[fp8.recipe]}: {remedy} the fp8 section"
    )


def check_fp8(arch: Architecture, parallel: ParallelConfig, fp8: Fp8Config | None) -> None:
    """Raise ConfigError naming the size unless FP8 takes the model's matrices as `parallel` splits them."""
    if fp8 is None:
        return
    stage = arch.num_layers // parallel.pipeline
    if fp8.bf16_first_last_layers > stage:
        raise ConfigError(
            f"fp8.bf16_first_last_layers={fp8.bf16_first_last_layers} is more than the {stage} layers of a "
            f"pipeline stage (num_hidden_layers={arch.num_layers} over parallel.pipeline="
            f"{parallel.pipeline}): set it to at most {stage}"
        )
    multiple = token_alignment(fp8, parallel)
    gathered = {"hidden_size": (arch.hidden_size, 1)}
    tensor = parallel.tensor
    inner = {
        "num_attention_heads x head_dim": (arch.num_heads * arch.head_dim, tensor),
        "(num_attention_heads + 2 x num_key_value_heads) x head_dim": (
            (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim,
            tensor,
        ),
    }
    if arch.experts is None:
        inner["intermediate_size"] = (arch.ffn_size, tensor)
    else:
        inner["moe_intermediate_size"] = (arch.experts.ffn_size, parallel.expert_tensor_size)
    for sizes, needed in ((gathered, multiple), (inner, _ALIGNMENT[fp8.recipe])):
        for name, (size, ranks) in sizes.items():
            if size % (needed * ranks):
                on_each = f" ({size / ranks:g} on each of {ranks} ranks)" if ranks > 1 else ""
                lower = "lower parallel.tensor, set" if ranks > 1 and not size % needed else "set"
                raise ConfigError(
                    f"fp8.recipe={fp8.recipe} needs multiples of {needed}, and the model's {name} is "
                    f"{size}{on_each}: {lower} another fp8.recipe, or drop the fp8 section"
                )


def _gathers(parallel: ParallelConfig) -> bool:
    return parallel.sequence and parallel.tensor > 1
