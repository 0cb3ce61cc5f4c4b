"""One name for a weight, whichever layers hold it and wherever."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lopd.families.architecture import read_architecture
from megatron_lopd.families.weight_rules import tensor_maps
from megatron_lopd.mcore.names import canonical_name
from tests.model_zoo import FAMILIES, make_config

pytestmark = pytest.mark.release


def test_both_layer_specs_have_one_name(tmp_path: Path) -> None:
    archs = {}
    for family in FAMILIES:
        make_config(family, tied=family == "qwen3").save_pretrained(tmp_path / family)
        archs[family] = read_architecture(tmp_path / family)
    cases = [
        ("qwen3", "decoder.layers.0.input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("qwen3", "decoder.layers.0.pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        ("qwen3_moe", "decoder.layers.0.pre_mlp_layernorm.weight", "pre_mlp_layernorm.weight"),
        (
            "qwen3_moe",
            "decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight",
            "mlp.experts.experts.3.linear_fc1.weight",
        ),
        (
            "qwen3_moe",
            "decoder.layers.0.mlp.experts.linear_fc2.weight1",
            "mlp.experts.experts.3.linear_fc2.weight",
        ),
    ]
    for family, native, expected in cases:
        name = canonical_name(native, archs[family], first_layer=2, first_expert=2)
        assert name == f"decoder.layers.2.{expected}"
        assert name in {item.megatron for item in tensor_maps(archs[family])}
    for family, expected in (("qwen3", "embedding.word_embeddings.weight"), ("llama", "output_layer.weight")):
        assert canonical_name("output_layer.weight", archs[family], 2, 0) == expected
