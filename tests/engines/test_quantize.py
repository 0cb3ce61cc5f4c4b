"""FP8 by NVIDIA modelopt itself: what it wrote against an fp64 oracle, and a run that exports it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_lopd.artifacts.fingerprint import fingerprint_model
from megatron_lopd.artifacts.lineage import read_model_lineage
from megatron_lopd.cli import main
from megatron_lopd.convert import quantize
from megatron_lopd.data.dataset import shard_name
from megatron_lopd.data.records import Rollout
from megatron_lopd.data.schemas import ROLLOUTS
from tests.model_zoo import make_model_dir
from tests.pipeline import write_recipe
from tests.shard_zoo import write_committed

E4M3_MAX = 448.0
# Rounding to 3 bits of mantissa errs by at most 2^-4 of the value, and by 2^-10 among subnormals.
RELATIVE, SUBNORMAL = 2.0**-4, 2.0**-10
SLACK = 1 + 2.0**-8  # weight / scale is itself rounded, at worst to bf16, before it is rounded to e4m3
FUSED = ("gate_proj", "up_proj")  # of an expert: they are one tensor in transformers


def check_fp8(exact_dir: Path, fp8_dir: Path) -> int:
    """Hold every tensor against the exact one; returns how many are FP8."""
    exact, stored = load_file(exact_dir / "model.safetensors"), load_file(fp8_dir / "model.safetensors")
    assert {name for name in stored if not name.endswith("_scale")} == exact.keys()
    quantized = [name for name in exact if stored[name].dtype == torch.float8_e4m3fn]
    assert quantized == [name for name in exact if name.endswith("_proj.weight")]
    for name in exact.keys() - set(quantized):
        torch.testing.assert_close(stored[name], exact[name], rtol=0, atol=0)  # untouched, bit for bit
    for name in quantized:
        prefix, projection, _ = name.rsplit(".", 2)
        group = FUSED if ".experts." in name and projection in FUSED else (projection,)
        largest = max(exact[f"{prefix}.{each}.weight"].abs().max().item() for each in group)
        scale = stored[name.replace("weight", "weight_scale")].double()
        assert scale.item() == pytest.approx(largest / E4M3_MAX, rel=2**-20)  # fp32 arithmetic
        error = (stored[name].double() * scale - exact[name].double()).abs()
        bound = torch.clamp(exact[name].double().abs() * RELATIVE, min=scale.item() * SUBNORMAL) * SLACK
        assert bool((error <= bound).all()), name
        assert error.max() > 0
        assert stored[name.replace("weight", "input_scale")].item() > 0
    return len(quantized)


def write_rollouts(directory: Path) -> Path:
    directory.mkdir()
    generator = np.random.default_rng(0)
    draw = lambda: generator.integers(5, 60, 12, dtype=np.int32)  # noqa: E731
    records = [Rollout(f"{number:032x}", draw(), draw(), "length", None) for number in range(9)]
    write_committed(directory, shard_name(ROLLOUTS, 0), ROLLOUTS, records)
    return directory


@pytest.mark.nightly  # the run below is of a dense model
def test_experts_in_bf16(tmp_path: Path) -> None:
    exact = make_model_dir(tmp_path / "exact", "qwen3_moe", dtype=torch.bfloat16)
    quantize.quantize_fp8(exact, tmp_path / "fp8", write_rollouts(tmp_path / "rollouts"), 4)
    assert check_fp8(exact, tmp_path / "fp8") == 4 * (4 + 4 * 3)  # layers x (attention + experts)


def test_a_run_exports_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = str(write_recipe(tmp_path, export={"quantization": "fp8", "calibration_samples": 8}))
    assert main(["run", recipe]) == 0, capsys.readouterr().err
    exact, fp8 = tmp_path / "run/export/model", tmp_path / "run/export/model-fp8"
    assert check_fp8(exact, fp8) == 2 * 7
    config = json.loads((fp8 / "hf_quant_config.json").read_text())
    assert config["quantization"]["quant_algo"] == "FP8"
    ours, theirs = read_model_lineage(fp8), read_model_lineage(exact)
    assert ours is not None
    assert theirs is not None
    assert (ours.teacher, ours.chain, ours.status) == (theirs.teacher, theirs.chain, theirs.status)
    digests = fingerprint_model(fp8).parts()
    assert ours.model == digests
    assert all(digests[part] == theirs.model[part] for part in ("tokenizer", "chat_template"))
    assert main(["verify", "run/export"]) == 0


def test_without_modelopt_nothing_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    recipe = str(write_recipe(tmp_path))
    capsys.readouterr()  # what making the models said
    assert main(["run", recipe, "export.quantization=fp8"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "modelopt, which is not installed" in line
    assert not (tmp_path / "run").exists()


def test_what_modelopt_leaves_is_refused(tmp_path: Path) -> None:
    exact = make_model_dir(tmp_path / "exact")
    with pytest.raises(quantize.ConfigError, match=r"layers\.0\.mlp\.down_proj\.weight"):
        quantize._require_quantized(exact, exact)
