"""A model's parameters under the names of its distributed checkpoint, numbered over the whole model."""

from __future__ import annotations

import re
from typing import Any

from megatron.core.models.gpt import GPTModel

from megatron_lopd.families.architecture import Architecture
from megatron_lopd.families.family import family_of
from megatron_lopd.families.weight_rules import EMBEDDING, OUTPUT
from megatron_lopd.mcore.experts import first_expert

# The torch-native spec keeps norms as modules of their own and experts in a list; Transformer
# Engine fuses the norms into the linear that follows and numbers its grouped expert weights.
_ALIASES = (
    (re.compile(r"\.input_layernorm\.weight$"), ".self_attention.linear_qkv.layer_norm_weight"),
    (re.compile(r"\.mlp\.experts\.local_experts\."), ".mlp.experts.experts."),
    (re.compile(r"\.mlp\.experts\.(linear_fc[12])\.weight(\d+)$"), r".mlp.experts.experts.\2.\1.weight"),
)
_DENSE_ALIAS = (re.compile(r"\.pre_mlp_layernorm\.weight$"), ".mlp.linear_fc1.layer_norm_weight")
_LOCAL_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_LOCAL_EXPERT = re.compile(r"\.mlp\.experts\.experts\.(\d+)\.")


def parameters_by_name(model: GPTModel, arch: Architecture) -> dict[str, Any]:
    """This rank's parameters by `canonical_name`.

    Typed Any for the attributes by which Megatron-Core says how they are split.
    """
    layer, expert = model.decoder.layers[0].layer_number - 1, first_expert(arch)
    return {canonical_name(name, arch, layer, expert): value for name, value in model.named_parameters()}


def canonical_name(parameter: str, arch: Architecture, first_layer: int, first_expert: int) -> str:
    """The checkpoint's name of a model parameter, under either layer spec.

    `first_layer` and `first_expert` are the 0-based global indices of this rank's layer 0 and of its
    expert 0. With tied embeddings the last stage's own output layer is a copy of the embedding, and gets
    its name.
    """
    if arch.tied and parameter == OUTPUT:
        return EMBEDDING
    name = _LOCAL_LAYER.sub(lambda found: f"decoder.layers.{int(found[1]) + first_layer}.", parameter)
    for pattern, replacement in _ALIASES if arch.experts else (*_ALIASES, _DENSE_ALIAS):
        name = pattern.sub(replacement, name)
    for own_pattern, replacement in family_of(arch).aliases:
        name = re.sub(own_pattern, replacement, name)
    return _LOCAL_EXPERT.sub(lambda found: f".mlp.experts.experts.{int(found[1]) + first_expert}.", name)
