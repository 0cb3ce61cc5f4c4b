"""What the doctor says on machines that are not here (fakes of tests.machines), and what it refuses."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from megatron_lopd.config import Fp8Config, ParallelConfig, Recipe
from megatron_lopd.errors import ConfigError
from megatron_lopd.mcore import capabilities as probing
from megatron_lopd.mcore import compat
from megatron_lopd.mcore.capabilities import Capabilities, capabilities
from megatron_lopd.stages.doctor import WIDTH, choices, plan
from tests.machines import BLACKWELL, CPU, GPU_ALONE, H100

EXPECTED = {
    "cpu": (CPU, "gloo", "torch-native (no GPU)", "SDPA", "cannot: there is no NVIDIA GPU", "torch's"),
    "gpu without TE": (
        GPU_ALONE,
        "nccl",
        "torch-native (no Transformer Engine)",
        "variable-length",
        "cannot: Transformer Engine cannot be imported",
        "torch's",
    ),
    "h100": (
        H100,
        "nccl",
        "Transformer Engine 2.11.0",
        "packed",
        "can: delayed, tensorwise, blockwise",
        "Transformer Engine's, fused",
    ),
    "blackwell": (
        BLACKWELL,
        "nccl",
        "Transformer Engine 2.11.0",
        "packed",
        "can: delayed, tensorwise, blockwise, mxfp8",
        "Transformer Engine's, fused",
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_choices_by_machine(name: str) -> None:
    machine, *expected = EXPECTED[name]
    lines = dict(choices(machine))
    seen = [lines[feature] for feature in ("collectives", "layers", "attention", "FP8", "Adam")]
    for text, part in zip(seen, expected, strict=True):
        assert part in text
    assert all(len(feature) < WIDTH and len(text) < 95 for feature, text in lines.items())
    assert ("10.0 or higher" in lines.get("FP8 mxfp8", "")) == (machine is H100)
    grouped = machine in (H100, BLACKWELL)
    assert (lines["experts"] == "grouped GEMM") == grouped
    assert lines["weight gradients"].startswith("added up in place" if grouped else "not added")
    assert lines["SwiGLU"].startswith("not compiled" if machine is CPU else "compiled")


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


def test_this_machine_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probing itself, on a GPU and a Transformer Engine faked down to the functions that are asked."""
    if not torch.cuda.is_available():
        assert capabilities() == CPU
    engine = ModuleType("transformer_engine.pytorch.quantization")
    engine.check_fp8_support = lambda: (True, "")  # type: ignore[attr-defined]
    engine.check_mxfp8_support = lambda: (False, "Too old a device.")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", ModuleType("transformer_engine.pytorch"))
    monkeypatch.setitem(sys.modules, engine.__name__, engine)
    monkeypatch.setitem(sys.modules, "fused_weight_gradient_mlp_cuda", ModuleType("apex's kernel"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a fake")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(compat, "has_transformer_engine", lambda: True)
    monkeypatch.setattr(probing, "_engine_version", lambda: "2.0")
    seen: Capabilities = capabilities.__wrapped__()
    assert seen.fp8 == {
        "delayed": "",
        "tensorwise": "",
        "blockwise": "Transformer Engine 2.0 does not know this recipe",
        "mxfp8": "Too old a device",
    }
    assert seen.gpu == "a fake"
    assert seen.gradient_accumulation_fusion
    monkeypatch.setattr(compat, "has_transformer_engine", lambda: False)
    assert set(capabilities.__wrapped__().fp8.values()) == {"Transformer Engine cannot be imported"}
