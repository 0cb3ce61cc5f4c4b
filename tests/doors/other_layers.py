"""Families that are further from Llama than my_family.py's, which is the one to read first: GLM-4, Gemma."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_lopd.families import (
    ATTENTION,
    DENSE_MLP,
    ENDS,
    QKV_BIAS,
    SUPPORTED_OPTIONS,
    Architecture,
    ConfigJson,
    Family,
    LayerSizes,
    Split,
    gated_layer_sizes,
    layer_rule,
    read_decoder,
)


def read_glm4(config: ConfigJson) -> Architecture:
    """GLM-4-0414: norms before and behind each part, and a rotation of neighbours in half of a head."""
    biased = SUPPORTED_OPTIONS | {"attention_bias": True}
    return read_decoder(config, norm_eps=1.5625e-07, qkv_bias=True, partial_rotary=True, supported=biased)


def norms_behind(spec: Any, arch: Architecture, config: Any, layer: int) -> Any:
    """Have the attention's and the feed-forward's last product followed by a norm."""
    from megatron.core.tensor_parallel import RowParallelLinear

    from megatron_lopd.mcore.norm import RMSNorm

    class ThenNorm(RowParallelLinear):  # type: ignore[misc]
        def __init__(self, *arguments: Any, config: Any, **options: Any) -> None:
            super().__init__(*arguments, config=config, **options)
            self.norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

        def forward(self, hidden: Any) -> Any:
            product, bias = super().forward(hidden)
            return self.norm(product), bias

    spec.submodules.self_attention.submodules.linear_proj = ThenNorm
    spec.submodules.mlp.submodules.linear_fc2 = ThenNorm
    return spec


def glm4_sizes(arch: Architecture) -> LayerSizes:
    """Two norms more than Llama's layer."""
    common, norms = gated_layer_sizes(arch), 2 * arch.hidden_size
    return replace(common, weights=common.weights + norms, replicated=common.replicated + norms)


GLM4 = Family(
    name="glm4",
    caption="GLM-4: norms before and behind attention and feed-forward",
    read=read_glm4,
    options=lambda arch: {"rotary_interleaved": True},
    layer_spec=norms_behind,
    layer_sizes=glm4_sizes,
    rules=(
        *ENDS,
        *ATTENTION,
        *QKV_BIAS,
        layer_rule(
            "self_attention.linear_proj.norm.weight", ["post_self_attn_layernorm.weight"], Split.REPLICATED
        ),
        layer_rule("mlp.linear_fc1.layer_norm_weight", ["post_attention_layernorm.weight"], Split.REPLICATED),
        layer_rule("mlp.linear_fc1.weight", ["mlp.gate_up_proj.weight"], Split.GATE_UP),
        layer_rule("mlp.linear_fc2.weight", ["mlp.down_proj.weight"], Split.COLUMNS),
        layer_rule("mlp.linear_fc2.norm.weight", ["post_mlp_layernorm.weight"], Split.REPLICATED),
    ),
)


def read_gemma(config: ConfigJson) -> Architecture:
    """Gemma 1: heads of 256 whatever the width, tied embeddings."""
    return read_decoder(
        config,
        positions=8192,
        head_dim=256,
        tied=True,
        supported=SUPPORTED_OPTIONS | {"hidden_act": "gelu_pytorch_tanh"},
    )


def gemma_options(arch: Architecture) -> dict[str, Any]:
    """GeGLU in place of SwiGLU, and norms whose weights are what is added to 1."""
    from functools import partial

    from torch.nn.functional import gelu

    return {"activation_func": partial(gelu, approximate="tanh"), "layernorm_zero_centered_gamma": True}


def scale_embedding(model: Any) -> None:
    """Gemma's embeddings are sqrt(hidden size) times what its output layer has of the same matrix."""
    if model.pre_process:
        model.embedding.register_forward_hook(
            lambda module, inputs, hidden: hidden * model.config.hidden_size**0.5
        )


GEMMA = Family(
    name="gemma",
    caption="Gemma 1: GeGLU, zero-centred norms, scaled embeddings",
    read=read_gemma,
    options=gemma_options,
    adapt=scale_embedding,
    rules=(*ENDS, *ATTENTION, *DENSE_MLP),
)
