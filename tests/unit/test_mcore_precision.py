"""FP8 on paper: what is asked of Megatron-Core, of sizes and of the machine. Nothing here runs in FP8."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_lopd.config import Fp8Config, ParallelConfig
from megatron_lopd.errors import ConfigError
from megatron_lopd.families.architecture import Experts, read_architecture
from megatron_lopd.families.memory_shapes import published
from megatron_lopd.mcore import compat, spec
from megatron_lopd.mcore.capabilities import FP8_RECIPES
from megatron_lopd.mcore.model import transformer_config
from megatron_lopd.mcore.precision import check_fp8, require_fp8, token_alignment
from tests.machines import BLACKWELL, CPU, GPU_ALONE, H100, fake_kernels
from tests.training_zoo import assert_agree, make_root, train

PUBLISHED = published()

QWEN3_06B = read_architecture(Path(__file__).parents[2] / "tools" / "bench" / "qwen3_0.6b")


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_megatron_core_takes_the_options_of_every_recipe(recipe: str) -> None:
    compat.prepare()
    fp8 = Fp8Config(recipe, bf16_first_last_layers=0 if recipe == "delayed" else 2)
    config = transformer_config(QWEN3_06B, ParallelConfig(), "bf16", fp8)
    assert config.fp8_recipe == recipe
    # Transformer Engine's defaults: hybrid where a whole tensor shares one scale.
    assert config.fp8 == ("hybrid" if recipe in ("delayed", "tensorwise") else "e4m3")
    assert config.first_last_layers_bf16 == (recipe != "delayed")
    if recipe == "delayed":
        assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (1024, "max")
    else:
        assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (2, 2)
    plain = transformer_config(QWEN3_06B, ParallelConfig(), "bf16")
    assert not plain.fp8
    assert transformer_config(QWEN3_06B, ParallelConfig(), "bf16", Fp8Config(recipe, "e4m3")).fp8 == "e4m3"


def test_what_the_machine_cannot_is_refused_with_its_reason() -> None:
    cases = {
        "there is no NVIDIA GPU here: drop": (CPU, "tensorwise"),
        "Transformer Engine is not installed: drop": (GPU_ALONE, "delayed"),
        "10.0 or higher required for MXFP8 execution: set fp8.recipe to delayed or tensorwise or blockwise": (
            H100,
            "mxfp8",
        ),
    }
    for message, (machine, recipe) in cases.items():
        with pytest.raises(ConfigError, match=message) as refusal:
            require_fp8(Fp8Config(recipe), machine)
        assert f"fp8.recipe={recipe}" in str(refusal.value)
    for machine in (H100, BLACKWELL):
        for recipe in FP8_RECIPES:
            if not machine.fp8[recipe]:
                require_fp8(Fp8Config(recipe), machine)
    require_fp8(None, CPU)


@pytest.mark.parametrize(
    ("changes", "parallel", "recipe", "message"),
    [
        ({"hidden_size": 1000}, {}, "tensorwise", "hidden_size is 1000: set another"),
        ({"hidden_size": 1040}, {}, "mxfp8", "multiples of 32, and the model's hidden_size is 1040"),
        ({"ffn_size": 3080}, {}, "delayed", "intermediate_size is 3080"),
        ({"ffn_size": 4864}, {"tensor": 32, "processes": 32}, "tensorwise", "152 on each of 32 ranks"),
        ({"hidden_size": 1088}, {"tensor": 2, "processes": 2}, "blockwise", "multiples of 128"),
        (
            {"experts": Experts(4, 2, 24, True)},
            {},
            "tensorwise",
            "moe_intermediate_size is 24",
        ),
        ({"num_heads": 3, "num_kv_heads": 3, "head_dim": 8}, {}, "tensorwise", "num_attention_heads x head_"),
    ],
)
def test_sizes_that_fp8_cannot_take_are_named(
    changes: dict[str, object], parallel: dict[str, int], recipe: str, message: str
) -> None:
    check_fp8(QWEN3_06B, ParallelConfig(tensor=2, processes=2), Fp8Config(recipe))
    with pytest.raises(ConfigError, match=message):
        check_fp8(replace(QWEN3_06B, **changes), ParallelConfig(**parallel), Fp8Config(recipe))
    check_fp8(replace(QWEN3_06B, **changes), ParallelConfig(**parallel), None)


def test_more_bf16_layers_than_a_pipeline_stage_has_are_refused() -> None:
    stage = ParallelConfig(pipeline=4, processes=4)
    check_fp8(QWEN3_06B, stage, Fp8Config("tensorwise", bf16_first_last_layers=7))
    with pytest.raises(ConfigError, match=r"bf16_first_last_layers=8 .* at most 7"):
        check_fp8(QWEN3_06B, stage, Fp8Config("tensorwise", bf16_first_last_layers=8))


@given(
    recipe=st.sampled_from(FP8_RECIPES),
    tensor=st.sampled_from([1, 2, 4, 8]),
    context=st.sampled_from([1, 2, 4]),
    sequence=st.booleans(),
)
def test_padding_leaves_every_part_what_transformer_engine_asserts(
    recipe: str, tensor: int, context: int, sequence: bool
) -> None:
    """TE 2.11: assert_dim_for_fp8_exec, get_align_size_for_quantization and is_quantizable, in its words."""
    parallel = ParallelConfig(tensor=tensor, context=context, sequence=sequence, processes=tensor * context)
    part = token_alignment(Fp8Config(recipe), parallel)
    assert part % 8 == 0
    gathered = part * tensor if sequence else part
    assert gathered % (32 if recipe == "mxfp8" else 16) == 0
    if sequence and tensor > 1:
        assert part % {"blockwise": 128, "mxfp8": 32}.get(recipe, 8) == 0
    assert token_alignment(None, parallel) == 1


def test_fp32_takes_no_layer_of_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products of fp32 are of TF32, and where it is loaded, Megatron-Core's router takes them."""
    fake_kernels(monkeypatch)
    monkeypatch.setattr(spec, "get_gpt_layer_with_transformer_engine_spec", lambda **options: "engine")
    monkeypatch.setattr(spec, "get_num_layers_to_build", lambda config, vp_stage: 2)
    experts = PUBLISHED["Qwen3-30B-A3B"]
    bf16, fp32 = (transformer_config(experts, ParallelConfig(), each) for each in ("bf16", "fp32"))
    assert spec.decoder_spec(experts, bf16, 0) == "engine"
    assert isinstance(spec.decoder_spec(experts, fp32, 0), TransformerBlockSubmodules)
    assert (bf16.moe_grouped_gemm, bf16.moe_permute_fusion, bf16.moe_router_dtype) == (True, True, "fp32")
    assert (fp32.moe_grouped_gemm, fp32.moe_permute_fusion, fp32.moe_router_dtype) == (False, False, "fp64")
    assert (bf16.apply_rope_fusion, fp32.apply_rope_fusion) == (True, False)
    monkeypatch.setattr(compat, "has_transformer_engine", lambda: False)
    assert transformer_config(experts, ParallelConfig(), "fp32").moe_router_dtype == "fp32"


def test_a_router_in_fp64_and_products_without_tf32(tmp_path: Path) -> None:
    root = make_root(tmp_path, family="qwen3_moe")
    ((plain, was_on, is_on),) = run_ranks(1, _train_experts, root, "plain", False)
    assert was_on
    assert not is_on, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE would go for the log-probs"
    ((routed, *_),) = run_ranks(1, _train_experts, root, "routed", True)
    assert_agree(routed, plain)


def _train_experts(root: Path, work: str, engine: bool) -> tuple[list[dict[str, Any]], bool, bool]:
    """(the steps, whether TF32 was on, whether it is when Megatron-Core is ready)."""
    torch.backends.cuda.matmul.allow_tf32 = True  # as an image's environment has it
    was_on = torch.backends.cuda.matmul.allow_tf32
    compat.prepare()
    compat.has_transformer_engine = lambda: engine
    steps = train(root, work, steps=3)[1]
    return steps, was_on, torch.backends.cuda.matmul.allow_tf32
