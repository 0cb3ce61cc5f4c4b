"""Which Hugging Face tensors make up which Megatron tensor: the rules that families' tables are made of.

What a rank must read, how the parts are put together, and the way back follow from them. Megatron names are
those of its distributed checkpoints, which are the Transformer Engine layer spec's; mcore/names.py turns the
names of either spec into them. Parts are split over tensor-parallel ranks BEFORE they are merged, so one
merge serves a rank's slice (`groups` of that rank) and the whole tensor alike. Some families store the parts
as one tensor, one below the other ("fused"): such a rule names that tensor alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from megatron_lopd.families.architecture import Architecture
from megatron_lopd.registry import FAMILIES

if TYPE_CHECKING:
    from torch import Tensor


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

    def shares(self, arch: Architecture) -> tuple[int, ...]:
        """How the rows of the parts compare: one number each."""
        if self is Split.QKV:
            return arch.num_heads, arch.num_kv_heads, arch.num_kv_heads
        return (1, 1) if self is Split.GATE_UP else (1,)


@dataclass(frozen=True)
class Rule:
    """One kind of Megatron tensor. `{layer}` and `{expert}` stand for 0-based global indices.

    `parts`: the Hugging Face tensors, in the order of `split`'s description; or the one that has them all,
    in that order.
    """

    megatron: str
    parts: tuple[str, ...]
    split: Split


@dataclass(frozen=True)
class TensorMap:
    """One Megatron tensor: a rule with its indices filled in."""

    megatron: str
    parts: tuple[str, ...]
    split: Split
    key: str  # in a distributed checkpoint, where layers (and experts) are stacked in leading axes
    offset: tuple[int, ...]  # its place in those leading axes
    stack: tuple[int, ...]  # their sizes

    @property
    def is_fused(self) -> bool:
        """Whether one Hugging Face tensor has all parts, one below the other."""
        return self.split in (Split.QKV, Split.GATE_UP) and len(self.parts) == 1


def layer_rule(megatron: str, parts: Sequence[str], split: Split) -> Rule:
    """A Rule of every decoder layer, by the names below `decoder.layers.N.` and below `model.layers.N.`."""
    prefix = "model.layers.{layer}."
    return Rule("decoder.layers.{layer}." + megatron, tuple(prefix + part for part in parts), split)


EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
ENDS = (
    Rule(EMBEDDING, ("model.embed_tokens.weight",), Split.VOCAB),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), Split.REPLICATED),
    Rule(OUTPUT, ("lm_head.weight",), Split.VOCAB),  # not where embeddings are tied
)
_QKV = ("self_attn.q_proj.{}", "self_attn.k_proj.{}", "self_attn.v_proj.{}")
ATTENTION = (
    layer_rule("self_attention.linear_qkv.layer_norm_weight", ["input_layernorm.weight"], Split.REPLICATED),
    layer_rule("self_attention.linear_qkv.weight", [name.format("weight") for name in _QKV], Split.QKV),
    layer_rule("self_attention.linear_proj.weight", ["self_attn.o_proj.weight"], Split.COLUMNS),
)
QKV_BIAS = (layer_rule("self_attention.linear_qkv.bias", [name.format("bias") for name in _QKV], Split.QKV),)
QK_NORM = (
    layer_rule("self_attention.q_layernorm.weight", ["self_attn.q_norm.weight"], Split.REPLICATED),
    layer_rule("self_attention.k_layernorm.weight", ["self_attn.k_norm.weight"], Split.REPLICATED),
)
DENSE_MLP = (
    layer_rule("mlp.linear_fc1.layer_norm_weight", ["post_attention_layernorm.weight"], Split.REPLICATED),
    layer_rule("mlp.linear_fc1.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], Split.GATE_UP),
    layer_rule("mlp.linear_fc2.weight", ["mlp.down_proj.weight"], Split.COLUMNS),
)
_EXPERT = "mlp.experts.{expert}."
_EXPERT_HERE = "mlp.experts.experts.{expert}."
MOE_MLP = (
    layer_rule("pre_mlp_layernorm.weight", ["post_attention_layernorm.weight"], Split.REPLICATED),
    layer_rule("mlp.router.weight", ["mlp.gate.weight"], Split.REPLICATED),
    layer_rule(
        _EXPERT_HERE + "linear_fc1.weight",
        [_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"],
        Split.GATE_UP,
    ),
    layer_rule(_EXPERT_HERE + "linear_fc2.weight", [_EXPERT + "down_proj.weight"], Split.COLUMNS),
)


def tensor_maps(arch: Architecture) -> list[TensorMap]:
    """Every Megatron tensor of the model, in the order of its layers, the output layer's last."""
    rules: tuple[Rule, ...] = FAMILIES[arch.family].rules
    experts = range(arch.experts.count) if arch.experts else ()
    ends = [rule for rule in rules if "{layer}" not in rule.megatron]
    maps = [_fill(rule, arch, None) for rule in ends if rule.megatron != OUTPUT]
    for layer in range(arch.num_layers):
        maps += [
            _fill(rule, arch, layer, expert)
            for rule in rules
            if "{layer}" in rule.megatron
            for expert in (experts if "{expert}" in rule.megatron else (None,))
        ]
    return maps + [_fill(rule, arch, None) for rule in ends if rule.megatron == OUTPUT and not arch.tied]


def spare_tensors(arch: Architecture) -> set[str]:
    """Hugging Face names of what a checkpoint may have and the model has not: an output layer beside the
    embedding that it is tied to."""
    rules: tuple[Rule, ...] = FAMILIES[arch.family].rules
    return {part for rule in rules if rule.megatron == OUTPUT and arch.tied for part in rule.parts}


def _fill(rule: Rule, arch: Architecture, layer: int | None, expert: int | None = None) -> TensorMap:
    stacked = [(layer, arch.num_layers), (expert, arch.experts.count if arch.experts else 0)]
    indices = {"layer": layer, "expert": expert}
    return TensorMap(
        megatron=rule.megatron.format(**indices),
        parts=tuple(part.format(**indices) for part in rule.parts),
        split=rule.split,
        key=rule.megatron.replace(".{layer}", "").replace(".{expert}", ""),
        offset=tuple(index for index, _ in stacked if index is not None),
        stack=tuple(size for index, size in stacked if index is not None),
    )


def merge_parts(split: Split, parts: Sequence[Tensor], groups: int) -> Tensor:
    """Parts as Hugging Face has them -> the Megatron tensor, for a rank's slice or the whole.

    QKV: q [groups*heads*d, ...], k and v [groups*d, ...] -> [groups*(heads+2)*d, ...], where heads
    is the query heads a group has and `...` the input size, or nothing for a bias.
    """
    import torch

    if split is Split.QKV:
        tail = parts[0].shape[1:]
        return torch.cat([part.reshape(groups, -1, *tail) for part in parts], dim=1).flatten(0, 1)
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def split_parts(split: Split, tensor: Tensor, groups: int, heads_per_group: int) -> list[Tensor]:
    """The inverse of `merge_parts`: the Megatron tensor -> its parts, contiguous."""
    import torch

    if split is Split.QKV:
        per_group = tensor.reshape(groups, -1, *tensor.shape[1:])
        head = per_group.shape[1] // (heads_per_group + 2)
        parts = torch.split(per_group, [heads_per_group * head, head, head], dim=1)
        return [part.flatten(0, 1).contiguous() for part in parts]
    if split is Split.GATE_UP:
        return [half.contiguous() for half in tensor.chunk(2)]
    return [tensor.contiguous()]


def as_stored(item: TensorMap, parts: list[Tensor]) -> list[Tensor]:
    """The whole parts of a Megatron tensor -> Hugging Face's tensors, one for each name in `item.parts`."""
    import torch

    return [torch.cat(parts)] if item.is_fused else parts
