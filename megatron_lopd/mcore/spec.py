"""Which modules a transformer layer is made of: Transformer Engine's, or torch-native ones."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import (
    ModuleSpec,
    TransformerConfig,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_lopd.families.architecture import Architecture
from megatron_lopd.families.family import family_of
from megatron_lopd.mcore import compat
from megatron_lopd.mcore.attention import PackedAttention
from megatron_lopd.mcore.norm import RMSNorm


def decoder_spec(
    arch: Architecture, config: TransformerConfig, chunk: int
) -> ModuleSpec | TransformerBlockSubmodules:
    """The decoder of this pipeline rank's model chunk `chunk`, for GPTModel's `transformer_layer_spec`.

    Transformer Engine's layers in bf16 where it is loaded (compat), otherwise `native_layer`, each as the
    family changes it.
    """
    change, engine = family_of(arch).layer_spec, takes_engine(config)
    if change is None and engine:
        return engine_layer(arch)
    count = get_num_layers_to_build(config, vp_stage=chunk)
    if change is None:
        return TransformerBlockSubmodules(layer_specs=[native_layer(arch)] * count, layer_norm=RMSNorm)
    first = get_transformer_layer_offset(config, vp_stage=chunk)
    layers = [
        change((engine_layer if engine else native_layer)(arch), arch, config, first + number)
        for number in range(count)
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=engine_norm() if engine else RMSNorm)


def takes_engine(config: TransformerConfig) -> bool:
    """Whether a model of these settings is made of Transformer Engine's layers."""
    return compat.takes_transformer_engine("bf16" if config.bf16 else "fp32")


def engine_norm() -> type:
    """Transformer Engine's norm, as a module of its own."""
    from megatron.core.extensions.transformer_engine import TENorm  # there only where the engine is

    norm: type = TENorm
    return norm


def engine_layer(arch: Architecture) -> ModuleSpec:
    """Transformer Engine's layer."""
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=arch.experts.count if arch.experts else None,
        moe_grouped_gemm=arch.experts is not None,
        qk_layernorm=arch.qk_norm,
    )


def native_layer(arch: Architecture) -> ModuleSpec:
    """Megatron-Core's parallel linear layers, with our own norm and packed attention between them."""
    qk_norm = RMSNorm if arch.qk_norm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=PackedAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    # The names under which Transformer Engine's fused layers keep these weights, so that a checkpoint
    # written with one kind of layer is read with the other.
    checkpoint_names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if arch.experts is None:
        checkpoint_names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_native_feed_forward(arch),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=checkpoint_names,
        ),
    )


def _native_feed_forward(arch: Architecture) -> ModuleSpec:
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    if arch.experts is None:
        return ModuleSpec(module=MLP, submodules=linears)
    # One expert after another: Megatron-Core's grouped GEMM needs Transformer Engine.
    experts = ModuleSpec(module=SequentialMLP, submodules=linears)
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts))
