"""Which Hugging Face tensors make up which Megatron tensor: one table of rules per architecture.

Everything else in this package follows from the tables: what a rank must read, how the parts are
put together, and the way back. Megatron names are those of its distributed checkpoints, which are
the Transformer Engine layer spec's; mcore/names.py turns the names of either spec into them.
Hugging Face tensors are split over tensor-parallel ranks BEFORE they are merged, so one merge
serves a rank's slice (`groups` of that rank) and the whole tensor alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from megatron_lopd.errors import ConfigError
from megatron_lopd.families.architecture import Architecture


class Split(Enum):
    """How a Megatron tensor is split over tensor-parallel ranks and merged from its parts."""

    REPLICATED = "every rank holds the whole"
    ROWS = "output rows split"
    COLUMNS = "input columns split"
    VOCAB = "rows split, after padding them to a multiple of the ranks"
    QKV = "rows split; per query group its query heads, its key head, its value head"
    GATE_UP = "each half's rows split; [gate; up]"

    @property
    def split_axis(self) -> int | None:
        """The axis of every part that tensor-parallel ranks share; None: they all hold the whole."""
        if self is Split.REPLICATED:
            return None
        return 1 if self is Split.COLUMNS else 0


@dataclass(frozen=True)
class Rule:
    """One kind of Megatron tensor. `{layer}` and `{expert}` stand for 0-based global indices."""

    megatron: str
    parts: tuple[str, ...]
    layout: Split


@dataclass(frozen=True)
class TensorMap:
    """One Megatron tensor: a rule with its indices filled in."""

    megatron: str
    parts: tuple[str, ...]
    layout: Split
    key: str  # in a distributed checkpoint, where layers (and experts) are stacked in leading axes
    offset: tuple[int, ...]  # its place in those leading axes
    stack: tuple[int, ...]  # their sizes


_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."


def _layer(megatron: str, parts: Sequence[str], layout: Split) -> Rule:
    return Rule(_LAYER + megatron, tuple(_HF_LAYER + part for part in parts), layout)


_ENDS = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Split.VOCAB),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), Split.REPLICATED),
)
_OUTPUT = Rule("output_layer.weight", ("lm_head.weight",), Split.VOCAB)
_QKV = ("self_attn.q_proj.{}", "self_attn.k_proj.{}", "self_attn.v_proj.{}")
_ATTENTION = (
    _layer("self_attention.linear_qkv.layer_norm_weight", ["input_layernorm.weight"], Split.REPLICATED),
    _layer("self_attention.linear_qkv.weight", [name.format("weight") for name in _QKV], Split.QKV),
    _layer("self_attention.linear_proj.weight", ["self_attn.o_proj.weight"], Split.COLUMNS),
)
_QKV_BIAS = (_layer("self_attention.linear_qkv.bias", [name.format("bias") for name in _QKV], Split.QKV),)
_QK_NORM = (
    _layer("self_attention.q_layernorm.weight", ["self_attn.q_norm.weight"], Split.REPLICATED),
    _layer("self_attention.k_layernorm.weight", ["self_attn.k_norm.weight"], Split.REPLICATED),
)
_DENSE_MLP = (
    _layer("mlp.linear_fc1.layer_norm_weight", ["post_attention_layernorm.weight"], Split.REPLICATED),
    _layer("mlp.linear_fc1.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], Split.GATE_UP),
    _layer("mlp.linear_fc2.weight", ["mlp.down_proj.weight"], Split.COLUMNS),
)
_EXPERT = "mlp.experts.{expert}."
_MOE_MLP = (
    _layer("pre_mlp_layernorm.weight", ["post_attention_layernorm.weight"], Split.REPLICATED),
    _layer("mlp.router.weight", ["mlp.gate.weight"], Split.REPLICATED),
    _layer(
        "mlp.experts.experts.{expert}.linear_fc1.weight",
        [_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"],
        Split.GATE_UP,
    ),
    _layer("mlp.experts.experts.{expert}.linear_fc2.weight", [_EXPERT + "down_proj.weight"], Split.COLUMNS),
)

RULES: dict[str, tuple[Rule, ...]] = {
    "llama": (*_ENDS, *_ATTENTION, *_DENSE_MLP),
    "qwen2": (*_ENDS, *_ATTENTION, *_QKV_BIAS, *_DENSE_MLP),
    "qwen3": (*_ENDS, *_ATTENTION, *_QK_NORM, *_DENSE_MLP),
    "qwen3_moe": (*_ENDS, *_ATTENTION, *_QK_NORM, *_MOE_MLP),
}


def tensor_maps(arch: Architecture) -> list[TensorMap]:
    """Every Megatron tensor of the model, in the order of its layers.

    Raises ConfigError for an architecture without a table.
    """
    if arch.family not in RULES:
        raise ConfigError(f"model_type {arch.family} has no weight mapping: use one of {', '.join(RULES)}")
    rules = RULES[arch.family]
    experts = range(arch.experts.count) if arch.experts else ()
    maps = [_fill(rule, arch, None) for rule in rules if "{layer}" not in rule.megatron]
    for layer in range(arch.num_layers):
        maps += [
            _fill(rule, arch, layer, expert)
            for rule in rules
            if "{layer}" in rule.megatron
            for expert in (experts if "{expert}" in rule.megatron else (None,))
        ]
    return maps if arch.tied else [*maps, _fill(_OUTPUT, arch, None)]


def _fill(rule: Rule, arch: Architecture, layer: int | None, expert: int | None = None) -> TensorMap:
    stacked = [(layer, arch.num_layers), (expert, arch.experts.count if arch.experts else 0)]
    indices = {"layer": layer, "expert": expert}
    return TensorMap(
        megatron=rule.megatron.format(**indices),
        parts=tuple(part.format(**indices) for part in rule.parts),
        layout=rule.layout,
        key=rule.megatron.replace(".{layer}", "").replace(".{expert}", ""),
        offset=tuple(index for index, _ in stacked if index is not None),
        stack=tuple(size for index, size in stacked if index is not None),
    )


def merge_parts(layout: Split, parts: Sequence[Tensor], groups: int) -> Tensor:
    """Parts as Hugging Face has them -> the Megatron tensor, for a rank's slice or the whole.

    QKV: q [groups*heads*d, ...], k and v [groups*d, ...] -> [groups*(heads+2)*d, ...], where heads
    is the query heads a group has and `...` the input size, or nothing for a bias.
    """
    if layout is Split.QKV:
        tail = parts[0].shape[1:]
        return torch.cat([part.reshape(groups, -1, *tail) for part in parts], dim=1).flatten(0, 1)
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def split_parts(layout: Split, tensor: Tensor, groups: int, heads_per_group: int) -> list[Tensor]:
    """The inverse of `merge_parts`: the Megatron tensor -> its parts, contiguous."""
    if layout is Split.QKV:
        per_group = tensor.reshape(groups, -1, *tensor.shape[1:])
        head = per_group.shape[1] // (heads_per_group + 2)
        parts = torch.split(per_group, [heads_per_group * head, head, head], dim=1)
        return [part.flatten(0, 1).contiguous() for part in parts]
    if layout is Split.GATE_UP:
        return [half.contiguous() for half in tensor.chunk(2)]
    return [tensor.contiguous()]
