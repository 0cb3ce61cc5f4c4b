"""Experts over the ranks: what Megatron-Core is told of them, and which part of them a rank holds.

The ranks of a pipeline stage are cut twice: tensor x context x data for all other weights, and expert
tensor x expert x expert data for the experts'. Every rank routes its own tokens, sends each to the ranks
of its experts, and gets the results back. No token is dropped and no loss is put on the routing, so
what a token becomes does not depend on the others, those of the padding included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_lopd.config import ParallelConfig
from megatron_lopd.families.architecture import Architecture
from megatron_lopd.mcore import compat


def moe_options(
    arch: Architecture, parallel: ParallelConfig, precision: Literal["fp32", "bf16"]
) -> dict[str, Any]:
    """TransformerConfig's fields for the experts of `arch`; none for a dense model.

    Where the layers are Transformer Engine's, one grouped product takes all experts of a rank, and its own
    kernels sort tokens by expert and add their results up, in a fixed order, where Megatron-Core's
    `scatter_add_` would in any.
    """
    if arch.experts is None:
        return {}
    engine = compat.takes_transformer_engine(precision)
    # Megatron-Core routes with Transformer Engine's product wherever that is loaded, unless in fp64; between
    # fp32 factors it is one of TF32, which sends tokens to other experts.
    in_tf32 = not engine and compat.has_transformer_engine()
    return {
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
        "num_moe_experts": arch.experts.count,
        "moe_router_topk": arch.experts.top_k,
        "moe_ffn_hidden_size": arch.experts.ffn_size,
        "moe_router_pre_softmax": not arch.experts.normalize_top_k,
        "moe_router_dtype": "fp64" if in_tf32 else "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": engine,
        "moe_permute_fusion": engine,
    }


def first_expert(arch: Architecture) -> int:
    """The 0-based global index of this rank's expert 0; 0 for a dense model."""
    count = arch.experts.count if arch.experts else 0
    per_rank: int = count // parallel_state.get_expert_model_parallel_world_size()
    rank: int = parallel_state.get_expert_model_parallel_rank()
    return per_rank * rank


def mark_expert_weights(model: GPTModel) -> None:
    """Give the experts' weights the attributes that decide how they are split, reduced and counted.

    `allreduce` False puts them on the expert data parallel ranks. Megatron-Core does so only at
    expert parallel sizes above 1, where an expert tensor size other than the dense one needs it too; and
    with it everywhere, optimizer checkpoints have one form at every layout. The partition attributes are
    those of Megatron-Core's linear layers, which Transformer Engine's grouped ones do not have.
    """
    for name, weight in model.named_parameters():
        if ".mlp.experts." in name:
            is_input = ".linear_fc1." in name
            weight.allreduce = False
            weight.tensor_model_parallel = True
            weight.partition_dim = 0 if is_input else 1
            weight.partition_stride = 2 if is_input else 1  # [gate; up]


def forget_routing(chunks: Sequence[torch.nn.Module]) -> None:
    """Detach what Megatron-Core's dispatchers keep of the last micro-batch: its routing, with its graph.

    That graph holds the weights' hooks and these the model, by ways that Python's garbage collector cannot
    see. A model that holds such a graph itself is never freed: weights, gradients and main weights stay.
    """
    layers = (module for chunk in chunks for module in chunk.modules() if isinstance(module, MoELayer))
    for kept in (vars(layer.token_dispatcher) for layer in layers):
        kept.update({name: value.detach() for name, value in kept.items() if isinstance(value, torch.Tensor)})


def tensor_split(weight: Any) -> tuple[int, int]:
    """(this rank's place, size) of the group that splits `weight`: experts have one of their own."""
    if getattr(weight, "allreduce", True):
        return (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
    return (
        parallel_state.get_expert_tensor_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )
