"""Qwen3, dense."""

from __future__ import annotations

from typing import Any

from megatron_lopd.families.architecture import Architecture
from megatron_lopd.families.config_json import ConfigJson
from megatron_lopd.families.decoder import read_decoder
from megatron_lopd.families.family import Family
from megatron_lopd.families.weight_rules import ATTENTION, DENSE_MLP, ENDS, QK_NORM


def _read(config: ConfigJson) -> Architecture:
    return read_decoder(config, head_dim=128, qk_norm=True)


def _published(layers: int, hidden: int, ffn: int, heads: int, tied: bool) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "tie_word_embeddings": tied,
    }


QWEN3 = Family(
    name="qwen3",
    caption="Qwen3, dense: Llama's layers with a norm of each head's queries and keys",
    read=_read,
    rules=(*ENDS, *ATTENTION, *QK_NORM, *DENSE_MLP),
    # The Qwen3 technical report (arXiv 2505.09388), table 1, and the released config.json files.
    published={
        "Qwen3-0.6B": _published(28, 1024, 3072, 16, tied=True),
        "Qwen3-1.7B": _published(28, 2048, 6144, 16, tied=True),
        "Qwen3-4B": _published(36, 2560, 9728, 32, tied=True),
        "Qwen3-8B": _published(36, 4096, 12288, 32, tied=False),
        "Qwen3-14B": _published(40, 5120, 17408, 40, tied=False),
        "Qwen3-32B": _published(64, 5120, 25600, 64, tied=False),
    },
)
