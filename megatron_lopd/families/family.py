"""A model family: all that this project has to know of one kind of Hugging Face model.

The trainer, the converters, the estimates and the checks ask the family, and no other file names one. To add
one is one file that makes a `Family`: the project's own are registered in this folder's `__init__.py`, a
user's is named in the recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_lopd.families.architecture import Architecture
from megatron_lopd.families.config_json import ConfigJson
from megatron_lopd.families.weight_rules import Rule
from megatron_lopd.registry import FAMILIES, identity


@dataclass(frozen=True)
class LayerSizes:
    """A decoder layer, counted: FLOPs and memory follow from it.

    `weights`: outside its experts, norms, biases and router among them; `replicated`: those of them that
    every tensor-parallel rank has whole; `expert_weights`: of all its experts; `products`: multiply-adds a
    token in its matrices, those of the experts that one token goes to.
    """

    weights: int
    replicated: int
    expert_weights: int
    products: int


def gated_layer_sizes(arch: Architecture) -> LayerSizes:
    """Of a layer with two norms, grouped-query attention and a gated feed-forward, dense or of experts."""
    inner, groups = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    attention = arch.hidden_size * (2 * inner + 2 * groups)
    bias = inner + 2 * groups if arch.qkv_bias else 0
    norms = 2 * arch.hidden_size + (2 * arch.head_dim if arch.qk_norm else 0)
    if arch.experts is None:
        feed_forward = 3 * arch.hidden_size * arch.ffn_size
        return LayerSizes(attention + bias + norms + feed_forward, norms, 0, attention + feed_forward)
    router = arch.hidden_size * arch.experts.count
    expert = 3 * arch.hidden_size * arch.experts.ffn_size
    return LayerSizes(
        weights=attention + bias + norms + router,
        replicated=norms + router,
        expert_weights=expert * arch.experts.count,
        products=attention + router + expert * arch.experts.top_k,
    )


@dataclass(frozen=True)
class Family:
    """One kind of model. What has a default is what Llama's descendants have in common.

    Functions that need torch or Megatron-Core import them when they are called: whoever only asks for a
    family's name must not wait for those.
    """

    name: str
    """`model_type` in config.json."""

    caption: str
    """What it is, in a line, for help and doctor."""

    read: Callable[[ConfigJson], Architecture]
    """config.json -> Architecture, or ConfigError naming the key. Most call `decoder.read_decoder`."""

    rules: tuple[Rule, ...]
    """Which Hugging Face tensors make up which Megatron tensor."""

    aliases: tuple[tuple[str, str], ...] = ()
    """(pattern, replacement), as of `re.sub`: names of parameters of `layer_spec`'s -> those in `rules`."""

    options: Callable[[Architecture], Mapping[str, Any]] = lambda arch: {}
    """Fields of Megatron-Core's TransformerConfig that are not what mcore/model.py sets."""

    layer_spec: Callable[[Any, Architecture, Any, int], Any] | None = None
    """(the common ModuleSpec of a layer, architecture, TransformerConfig, 0-based layer) -> the ModuleSpec
    to build. The common one is made anew each time, of Transformer Engine's modules or of ours, and may be
    changed; None keeps it."""

    adapt: Callable[[Any], None] = lambda model: None
    """Changes a GPTModel that has just been built: it is one chunk of consecutive layers, has `arch`, and has
    an embedding where `pre_process` is true."""

    initial_std: Callable[[Architecture, str], float] = lambda arch, name: arch.init_std
    """Standard deviation of the initial values of a matrix, by its name in the rules."""

    layer_sizes: Callable[[Architecture], LayerSizes] = gated_layer_sizes
    """What a layer holds and multiplies, for FLOPs and memory."""

    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Models by name -> what their config.json says, to plan a run before they are fetched."""


def family_of(arch: Architecture) -> Family:
    """The family that `arch` was read by. Raises ConfigError when this process does not know it."""
    family: Family = FAMILIES[arch.family]
    return family


def own_families(named: Collection[str | None]) -> dict[str, str]:
    """The families of the user's among those that are `named`, each with its code's digest.

    They decide what a model computes, so that the plans of what trains or scores on Megatron-Core hold them.
    """
    paths = {name: FAMILIES.import_path(name) for name in FAMILIES.things()}
    return {name: identity(path) for name, path in paths.items() if path is not None and path in named}
