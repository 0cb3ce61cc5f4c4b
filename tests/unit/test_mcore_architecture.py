"""config.json -> Architecture, and every refusal naming its key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from megatron_lopd.config import ParallelConfig
from megatron_lopd.errors import ConfigError
from megatron_lopd.families.architecture import (
    Architecture,
    Experts,
    RopeScaling,
    check_layout,
    read_architecture,
)
from tests.model_zoo import FAMILIES, Family, make_config

QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 101,
    "tie_word_embeddings": True,
}
QWEN3_MOE = {"model_type": "qwen3_moe", "num_experts": 6, "moe_intermediate_size": 9}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def write(directory: Path, **changes: Any) -> Path:
    (directory / "config.json").write_text(json.dumps({**QWEN3, **changes}))
    return directory


def test_reads_a_qwen3(tmp_path: Path) -> None:
    arch = read_architecture(write(tmp_path, rope_theta=1e6))
    assert (arch.family, arch.num_layers, arch.hidden_size, arch.ffn_size) == ("qwen3", 6, 64, 96)
    assert (arch.num_heads, arch.num_kv_heads, arch.head_dim, arch.vocab_size) == (8, 2, 16, 101)
    assert (arch.tied, arch.qk_norm, arch.qkv_bias, arch.experts) == (True, True, False, None)
    assert arch.padded_vocab_size(4) == 104


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3_ROPE}},
    ],
    ids=["before transformers 5", "transformers 5"],
)
def test_reads_rope_of_either_age(tmp_path: Path, rope: dict[str, Any]) -> None:
    arch = read_architecture(write(tmp_path, model_type="llama", max_position_embeddings=512, **rope))
    assert arch.rope_theta == 5e5
    assert arch.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 64)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gpt2"},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"attention_dropout": 0.1},
        {"use_sliding_window": True},
        {"quantization_config": {"quant_method": "fp8"}},
        {"model_type": "llama", "mlp_bias": True},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"model_type": "qwen3_moe", "mlp_only_layers": [0]},
        {"model_type": "qwen3_moe", "decoder_sparse_step": 2},
        {"model_type": "qwen3_moe", "norm_topk_prob": True, "num_experts_per_tok": 1},
    ],
    ids=lambda changes: list(changes)[-1],
)
def test_refuses_what_it_cannot_run_and_names_the_key(tmp_path: Path, changes: dict[str, Any]) -> None:
    key = list(changes)[-1]
    named = {"rope_scaling": "rope_type", "rope_parameters": "partial_rotary_factor"}.get(key, key)
    with pytest.raises(ConfigError) as refusal:
        read_architecture(write(tmp_path, **changes))
    assert str(tmp_path / "config.json") in str(refusal.value)
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_what_transformers_reads_whatever_a_file_leaves_out(tmp_path: Path, family: Family) -> None:
    """Of each optional key in turn, and of all of them."""
    needed = {"model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    needed |= {"vocab_size"} if family == "llama" else {"vocab_size", "num_key_value_heads"}
    make_config(family, tied=True, max_position_embeddings=1024, rms_norm_eps=1e-5).save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())
    optional = [key for key in whole if key not in needed]
    assert {"head_dim", "tie_word_embeddings", "rope_parameters", "initializer_range"} <= {
        *optional,
        "head_dim",
    }
    for left_out in ([], optional, *([key] for key in optional)):
        kept = {key: value for key, value in whole.items() if key not in left_out}
        (tmp_path / "config.json").write_text(json.dumps(kept))
        config = AutoConfig.from_pretrained(tmp_path)
        experts = None
        if family == "qwen3_moe":
            experts = Experts(
                config.num_experts,
                config.num_experts_per_tok,
                config.moe_intermediate_size,
                config.norm_topk_prob,
            )
        heads = config.num_attention_heads
        assert read_architecture(tmp_path) == Architecture(
            family,
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            heads,
            config.num_key_value_heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            config.vocab_size,
            config.max_position_embeddings,
            config.rms_norm_eps,
            config.initializer_range,
            config.tie_word_embeddings,
            family == "qwen2",
            family.startswith("qwen3"),
            config.rope_parameters["rope_theta"],
            None,
            experts,
        ), left_out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "64"}, "hidden_size is '64': it must be a whole number of at least 1"),
        ({"vocab_size": True}, "vocab_size is True: it must be a whole"),
        ({"num_key_value_heads": None}, "num_key_value_heads is None: it must be a whole"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small': it must be a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1: it must be true or false"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing: it must be"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "only one set for all layers"),
        ({"model_type": "llama", "head_dim": None, "hidden_size": 65}, "65 does not divide by num_attention"),
    ],
    ids=lambda case: list(case)[-1] if isinstance(case, dict) else "",
)
def test_refuses_a_value_that_is_none(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        read_architecture(write(tmp_path, **changes))
    assert f"{tmp_path}/config.json: " in str(refusal.value)
    assert message in str(refusal.value)


@pytest.mark.parametrize("content", [None, "{", "[]", "\xff"])
def test_refuses_a_file_that_is_no_config(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("changes", "parallel", "message"),
    [
        ({}, ParallelConfig(tensor=4, processes=4), "num_key_value_heads=2: set parallel.tensor to 1 or 2"),
        ({}, ParallelConfig(tensor=3, processes=3), "num_attention_heads=8: set parallel.tensor to 1 or 2"),
        ({}, ParallelConfig(pipeline=4, processes=4), "=6: set parallel.pipeline to 1 or 2 or 3 or 6"),
        (
            {},
            ParallelConfig(pipeline=3, virtual_pipeline=3, processes=3),
            "2 layers of a pipeline rank (num_hidden_layers=6, parallel.pipeline=3): set "
            "parallel.virtual_pipeline to 1 or 2",
        ),
        ({"intermediate_size": 95}, ParallelConfig(tensor=2, processes=2), "intermediate_size=95"),
        ({"vocab_size": 1}, ParallelConfig(tensor=2, processes=2), "vocab_size=1: set parallel.tensor to 1"),
        (
            {"model_type": "qwen3_moe"},
            ParallelConfig(tensor=2, processes=2, sequence=False),
            "set parallel.sequence to true",
        ),
        ({}, ParallelConfig(expert=2, processes=2), "a qwen3 model has none: set parallel.expert to 1"),
        ({}, ParallelConfig(expert_tensor=2, processes=2), "leave parallel.expert_tensor empty"),
        (
            QWEN3_MOE,
            ParallelConfig(expert=4, processes=4),
            "num_experts=6: set parallel.expert to 1 or 2 or 3 or 6",
        ),
        (
            QWEN3_MOE,
            ParallelConfig(expert_tensor=2, processes=2),
            "moe_intermediate_size=9: set parallel.expert_tensor to 1 or 3 or 9",
        ),
        (
            QWEN3_MOE,
            ParallelConfig(tensor=2, processes=2),
            "moe_intermediate_size=9: set parallel.expert_tensor to 1 or 3 or 9",
        ),
    ],
)
def test_a_bad_layout_says_which_number_to_change_and_to_what(
    tmp_path: Path, changes: dict[str, Any], parallel: ParallelConfig, message: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_layout(read_architecture(write(tmp_path, **changes)), parallel)
    assert message in str(refusal.value)


def test_experts_alone_need_to_divide_by_their_own_tensor_size(tmp_path: Path) -> None:
    arch = read_architecture(write(tmp_path, **QWEN3_MOE))
    check_layout(arch, ParallelConfig(tensor=2, expert=3, expert_tensor=1, processes=6))


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (ParallelConfig(tensor=2, pipeline=2, processes=4), "2 x 1 x 2 needs a multiple of 4 processes"),
        (ParallelConfig(tensor=2, expert=3, processes=6), "= 2 x 3 x 1 needs a multiple of 6 processes"),
    ],
)
def test_too_few_processes_are_refused(parallel: ParallelConfig, message: str) -> None:
    from megatron_lopd.mcore.process_groups import model_parallel

    with pytest.raises(ConfigError, match=message), model_parallel(parallel, 0):
        pass
