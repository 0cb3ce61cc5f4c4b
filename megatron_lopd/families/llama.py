"""Llama 2 and 3, and what is built like them."""

from __future__ import annotations

from megatron_lopd.families.architecture import Architecture
from megatron_lopd.families.config_json import ConfigJson
from megatron_lopd.families.decoder import read_decoder
from megatron_lopd.families.family import Family
from megatron_lopd.families.weight_rules import ATTENTION, DENSE_MLP, ENDS


def _read(config: ConfigJson) -> Architecture:
    return read_decoder(config, positions=2048, grouped=False)


LLAMA = Family(
    name="llama",
    caption="Llama 2 and 3: grouped queries, SwiGLU, rotary positions, Llama 3's stretched ones too",
    read=_read,
    rules=(*ENDS, *ATTENTION, *DENSE_MLP),
)
