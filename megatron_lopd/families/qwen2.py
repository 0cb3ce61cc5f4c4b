"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from megatron_lopd.families.architecture import Architecture
from megatron_lopd.families.config_json import ConfigJson
from megatron_lopd.families.decoder import read_decoder
from megatron_lopd.families.family import Family
from megatron_lopd.families.weight_rules import ATTENTION, DENSE_MLP, ENDS, QKV_BIAS


def _read(config: ConfigJson) -> Architecture:
    return read_decoder(config, qkv_bias=True)


QWEN2 = Family(
    name="qwen2",
    caption="Qwen2 and 2.5: Llama's layers with biases on queries, keys and values",
    read=_read,
    rules=(*ENDS, *ATTENTION, *QKV_BIAS, *DENSE_MLP),
)
