"""Qwen3 with a mixture of experts."""

from __future__ import annotations

from megatron_lopd.errors import ConfigError
from megatron_lopd.families.architecture import Architecture, Experts
from megatron_lopd.families.config_json import ConfigJson
from megatron_lopd.families.decoder import read_decoder
from megatron_lopd.families.family import Family
from megatron_lopd.families.weight_rules import ATTENTION, ENDS, MOE_MLP, QK_NORM


def _read(config: ConfigJson) -> Architecture:
    return read_decoder(config, qk_norm=True, experts=_experts(config))


def _experts(config: ConfigJson) -> Experts:
    experts = Experts(
        # transformers 5 writes the second name, the published files have the first.
        count=config.count("num_experts" if "num_experts" in config.raw else "num_local_experts", 128),
        top_k=config.count("num_experts_per_tok", 8),
        ffn_size=config.count("moe_intermediate_size", 768),
        normalize_top_k=config.flag("norm_topk_prob"),
    )
    if experts.normalize_top_k and experts.top_k == 1:
        raise ConfigError(
            f"{config.path}: norm_topk_prob=True with num_experts_per_tok=1 trains no router: set it to false"
        )
    return experts


QWEN3_MOE = Family(
    name="qwen3_moe",
    caption="Qwen3 with experts in every layer: Qwen3's attention, a router, no shared expert",
    read=_read,
    rules=(*ENDS, *ATTENTION, *QK_NORM, *MOE_MLP),
    # The Qwen3 technical report (arXiv 2505.09388), table 2, and the released config.json.
    published={
        "Qwen3-30B-A3B": {
            "num_hidden_layers": 48,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "rope_theta": 1e6,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
        }
    },
)
