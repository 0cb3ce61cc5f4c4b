"""Model families: what may be trained and scored on Megatron-Core, each in a file of its own.

A user's own family is one file outside the package that makes a `Family` of what is here; the recipe names
it as `student.family` or `teacher.family`, `my_module:MY_FAMILY`.
"""

from megatron_lopd.families.architecture import Architecture, Experts, RopeScaling
from megatron_lopd.families.config_json import ConfigJson
from megatron_lopd.families.decoder import SUPPORTED_OPTIONS, read_decoder
from megatron_lopd.families.family import Family, LayerSizes, family_of, gated_layer_sizes
from megatron_lopd.families.llama import LLAMA
from megatron_lopd.families.qwen2 import QWEN2
from megatron_lopd.families.qwen3 import QWEN3
from megatron_lopd.families.qwen3_moe import QWEN3_MOE
from megatron_lopd.families.weight_rules import (
    ATTENTION,
    DENSE_MLP,
    ENDS,
    MOE_MLP,
    QK_NORM,
    QKV_BIAS,
    Rule,
    Split,
    layer_rule,
)
from megatron_lopd.registry import FAMILIES

__all__ = [
    "ATTENTION",
    "DENSE_MLP",
    "ENDS",
    "MOE_MLP",
    "QKV_BIAS",
    "QK_NORM",
    "SUPPORTED_OPTIONS",
    "Architecture",
    "ConfigJson",
    "Experts",
    "Family",
    "LayerSizes",
    "RopeScaling",
    "Rule",
    "Split",
    "family_of",
    "gated_layer_sizes",
    "layer_rule",
    "read_decoder",
]

FAMILIES.add(LLAMA, QWEN2, QWEN3, QWEN3_MOE)
