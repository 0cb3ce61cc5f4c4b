"""What the doctor says on machines that are not here (fakes of tests.machines), and what it refuses."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_lopd.commands.doctor import WIDTH, choices, plan
from megatron_lopd.config import Fp8Config, ParallelConfig, Recipe
from megatron_lopd.errors import ConfigError
from megatron_lopd.mcore import capabilities as probing
from megatron_lopd.mcore import compat, transformer_engine
from megatron_lopd.mcore.capabilities import UNFUSED, Capabilities, capabilities
from megatron_lopd.mcore.transformer_engine import TransformerEngine
from tests.machines import BLACKWELL, CPU, GPU_ALONE, H100

EXPECTED = {
    "cpu": (
        CPU,
        "gloo",
        "torch-native (there is no NVIDIA GPU here)",
        "SDPA",
        "cannot: there is no NVIDIA GPU",
        "torch's",
    ),
    "gpu without TE": (
        GPU_ALONE,
        "nccl",
        "torch-native (Transformer Engine is not installed)",
        "variable-length",
        "cannot: Transformer Engine is not installed",
        "torch's",
    ),
    "h100": (
        H100,
        "nccl",
        "Transformer Engine 2.11.0",
        "Transformer Engine's FusedAttention, packed",
        "can: delayed, tensorwise, blockwise",
        "Transformer Engine's, fused",
    ),
    "blackwell": (
        BLACKWELL,
        "nccl",
        "Transformer Engine 2.11.0",
        "Transformer Engine's FusedAttention, packed",
        "can: delayed, tensorwise, blockwise, mxfp8",
        "Transformer Engine's, fused",
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_choices_by_machine(name: str) -> None:
    machine, *expected = EXPECTED[name]
    lines = dict(choices(machine, "FusedAttention" if machine.transformer_engine else None))
    seen = [lines[feature] for feature in ("collectives", "layers", "attention", "FP8", "Adam")]
    for text, part in zip(seen, expected, strict=True):
        assert part in text
    assert all(len(feature) < WIDTH and len(text) < 95 for feature, text in lines.items())
    assert ("10.0 or higher" in lines.get("FP8 mxfp8", "")) == (machine is H100)
    grouped = machine in (H100, BLACKWELL)
    assert (lines["experts"] == "grouped GEMM") == grouped
    assert lines["weight gradients"].startswith("added up in place" if grouped else "not added")
    assert lines["log-probs, SwiGLU"].startswith("torch" if machine is CPU else "Triton kernels")


def test_the_plan_gives_the_data_parallel_size_and_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(
        "run",
        fp8=Fp8Config("blockwise", bf16_first_last_layers=1),
        parallel=ParallelConfig(tensor=4, context=2, processes=16, recompute="full"),
    )
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    lines = dict(plan(recipe, H100))
    assert lines["layout"] == (
        "16 processes = tensor 4 (with sequence parallelism) x context 2 x pipeline 1 x data 2"
    )
    assert lines["precision"].startswith("FP8 blockwise (e4m3) among bf16, first and last 1 layers bf16")
    assert lines["recompute"] == "full"
    assert lines["communication"].startswith("gradients reduced during")
    assert dict(plan(Recipe("run"), CPU))["communication"].startswith("nothing to overlap")
    monkeypatch.setenv("WORLD_SIZE", "64")
    assert dict(plan(recipe, H100))["layout"].endswith("data 8")
    monkeypatch.setenv("WORLD_SIZE", "12")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=12 .* a multiple of 8"):
        list(plan(recipe, H100))
    with pytest.raises(ConfigError, match=r"fp8\.recipe=blockwise cannot run here: there is no NVIDIA GPU"):
        list(plan(recipe, CPU))


def test_what_slows_training_down_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    a100 = replace(H100, gpu="NVIDIA A100", compute_capability=(8, 0))
    line = dict(choices(a100, UNFUSED))["attention"]
    assert line.startswith("WARNING: Transformer Engine's UnfusedDotProductAttention: time and memory grow")
    assert "install flash-attn" in line
    assert dict(choices(H100, None))["attention"] == "Transformer Engine's own, packed"
    broken = "Transformer Engine 2.11.0 cannot be loaded, because of OSError: libcudnn"
    assert broken in dict(choices(replace(GPU_ALONE, lacking=broken), None))["layers"]

    monkeypatch.setattr(transformer_engine, "load", lambda: TransformerEngine("2.11.0"))
    for backend, said in ((UNFUSED, 1), ("FlashAttention", 0), (None, 0)):
        monkeypatch.setattr(probing, "attention_backend", lambda backend=backend: backend)
        assert len(probing.notices("bf16")) == said
        assert not probing.notices("fp32")


def test_fp32_is_not_left_to_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert "torch-native" in dict(plan(Recipe("run", precision="fp32"), H100))["precision"]
    assert "torch-native" not in dict(plan(Recipe("run", precision="fp32"), CPU))["precision"]
    assert "torch-native" not in dict(plan(Recipe("run"), H100))["precision"]


def test_an_engine_in_fp32_beside_bf16_training_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert "rollout.engine.dtype=bf16 takes half" in dict(plan(Recipe("run"), CPU))["rollout engine"]
    assert "bf16" not in dict(plan(Recipe("run", precision="fp32"), CPU))["rollout engine"]


@dataclass
class AttentionParams:
    """A fake of Transformer Engine's, with the fields of 2.11 that are given."""

    qkv_dtype: torch.dtype
    qkv_layout: str
    batch_size: int
    num_heads: int
    num_gqa_groups: int
    max_seqlen_q: int
    max_seqlen_kv: int
    head_dim_qk: int
    head_dim_v: int
    attn_mask_type: str
    window_size: tuple[int, int]
    core_attention_bias_shape: None
    core_attention_bias_requires_grad: bool
    deterministic: bool


def test_transformer_engine_is_asked_for_its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake of its choice: cuDNN's on sm_90, flash-attn where it is, and neither if it may not."""
    has_flash, asked = False, []

    def get_attention_backend(params: AttentionParams) -> tuple[Any, ...]:
        asked.append(params)
        fused = not params.deterministic
        flash = not fused and has_flash
        return flash, None, fused, None, not fused and not flash, []

    module = SimpleNamespace(AttentionParams=AttentionParams, get_attention_backend=get_attention_backend)
    path = "transformer_engine.pytorch.attention.dot_product_attention.utils"
    monkeypatch.setattr(probing, "importlib", SimpleNamespace(import_module={path: module}.__getitem__))
    ask = probing.attention_backend.__wrapped__
    assert ask() is None
    monkeypatch.setattr(compat, "has_transformer_engine", lambda: True)
    monkeypatch.delenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", raising=False)
    assert ask() == "FusedAttention"
    assert (asked[-1].qkv_layout, asked[-1].attn_mask_type) == ("thd_thd_thd", "padding_causal")
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    assert ask() == UNFUSED
    has_flash = True
    assert ask() == "FlashAttention"
    module.get_attention_backend = lambda: None  # of a release that asks for something else
    assert ask() is None


def test_this_machine_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probing itself, on a GPU and a Transformer Engine faked down to the functions that are asked."""
    if not torch.cuda.is_available():
        assert capabilities() == CPU
    checks = SimpleNamespace(
        check_fp8_support=lambda: (True, ""), check_mxfp8_support=lambda: (False, "Too old a device.")
    )
    monkeypatch.setitem(sys.modules, "fused_weight_gradient_mlp_cuda", ModuleType("apex's kernel"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a fake")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(transformer_engine, "load", lambda: TransformerEngine("2.0"))
    monkeypatch.setattr(transformer_engine, "quantization", lambda: checks)
    seen: Capabilities = capabilities.__wrapped__()
    assert seen.fp8 == {
        "delayed": "",
        "tensorwise": "",
        "blockwise": "Transformer Engine 2.0 does not know this recipe",
        "mxfp8": "Too old a device",
    }
    assert (seen.gpu, seen.transformer_engine, seen.rope_fusion) == ("a fake", "2.0", True)
    assert seen.gradient_accumulation_fusion
    monkeypatch.setattr(transformer_engine, "load", lambda: TransformerEngine(None, "broken", broken=True))
    assert set(capabilities.__wrapped__().fp8.values()) == {"broken"}
