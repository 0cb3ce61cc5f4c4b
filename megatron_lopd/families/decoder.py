"""What most decoders' config.json files have in common: one reader, of which a family names what differs."""

from __future__ import annotations

from typing import Any

from megatron_lopd.errors import ConfigError
from megatron_lopd.families.architecture import Architecture, Experts, RopeScaling
from megatron_lopd.families.config_json import ConfigJson

# key of config.json -> the only value that is supported (absent counts as that value)
SUPPORTED_OPTIONS: dict[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "quantization_config": None,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def read_decoder(
    config: ConfigJson,
    *,
    positions: int = 32768,
    norm_eps: float = 1e-6,
    head_dim: int | None = None,
    tied: bool = False,
    grouped: bool = True,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    partial_rotary: bool = False,
    experts: Experts | None = None,
    supported: dict[str, object] = SUPPORTED_OPTIONS,
) -> Architecture:
    """A config.json with Llama's names for its sizes, and the family's defaults for what it leaves out.

    `positions`, `norm_eps`, `head_dim` (None: hidden_size / heads), `tied`: where max_position_embeddings,
    rms_norm_eps, head_dim and tie_word_embeddings are not there. `grouped`: num_key_value_heads must be;
    otherwise it is as many as heads. `qkv_bias`, `qk_norm`, `experts`: what the family has.
    `partial_rotary`: it takes partial_rotary_factor. `supported`: options, and the value that each must have.
    Raises ConfigError naming the file and the key.
    """
    config.allow_only(supported)
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    if config.raw.get("head_dim") is None and head_dim is None and hidden % heads:
        raise ConfigError(
            f"{config.path}: hidden_size={hidden} does not divide by num_attention_heads={heads}"
        )
    most = config.count("max_position_embeddings", positions)
    rope = _rope_of(config)
    return Architecture(
        family=config.raw["model_type"],
        num_layers=config.count("num_hidden_layers"),
        hidden_size=hidden,
        ffn_size=config.count("intermediate_size"),
        num_heads=heads,
        num_kv_heads=config.count("num_key_value_heads", None if grouped else heads),
        head_dim=config.count("head_dim", head_dim or hidden // heads),
        vocab_size=config.count("vocab_size"),
        max_positions=most,
        norm_eps=config.number("rms_norm_eps", norm_eps),
        init_std=config.number("initializer_range", 0.02),
        tied=config.flag("tie_word_embeddings", tied),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        rope_theta=_nested(config, {"rope_theta": config.raw.get("rope_theta")} | rope).number(
            "rope_theta", 1e4
        ),
        rope_scaling=_rope_scaling(config, rope, most),
        experts=experts,
        rotary_share=_rotary_share(config, rope, partial_rotary),
    )


def _nested(config: ConfigJson, raw: dict[str, Any]) -> ConfigJson:
    return ConfigJson(config.path, raw)


def _rope_of(config: ConfigJson) -> dict[str, Any]:
    """The rotary options: transformers 5 writes `rope_parameters`, older ones `rope_scaling` or nothing."""
    rope = config.raw.get("rope_scaling") or config.raw.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError(
            f"{config.path}: rope_parameters={rope!r} is not supported, only one set for all layers is"
        )
    return rope


def _rotary_share(config: ConfigJson, rope: dict[str, Any], partial_rotary: bool) -> float:
    values = {"partial_rotary_factor": config.raw.get("partial_rotary_factor")} if partial_rotary else {}
    share = _nested(config, values | rope).number("partial_rotary_factor", 1.0)
    if share > 1 or (share != 1 and not partial_rotary):
        raise ConfigError(
            f"{config.path}: partial_rotary_factor={share} is not supported, only "
            f"{'a share up to ' if partial_rotary else ''}1.0 is"
        )
    return share


def _rope_scaling(config: ConfigJson, rope: dict[str, Any], positions: int) -> RopeScaling | None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return None
    if rope_type != "llama3":
        raise ConfigError(
            f"{config.path}: rope_type={rope_type!r} (rope_parameters, or rope_scaling in older files) is "
            "not supported, only 'default' and 'llama3' are"
        )
    values = _nested(config, rope)
    return RopeScaling(
        factor=values.number("factor"),
        low_freq_factor=values.number("low_freq_factor"),
        high_freq_factor=values.number("high_freq_factor"),
        original_max_position_embeddings=values.count("original_max_position_embeddings", positions),
    )
