"""A model family in one file outside the package: read, trained, exported, planned and told of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gloo import run_ranks
from test_oracle import documents, forward_log_probs, next_token_log_probs

from megatron_lopd.config import ParallelConfig
from megatron_lopd.errors import ConfigError
from megatron_lopd.families.architecture import read_architecture
from megatron_lopd.families.family import own_families
from megatron_lopd.families.memory_shapes import Shape
from megatron_lopd.registry import FAMILIES, allowing_user_code
from tests.model_zoo import contents, make_model_dir
from tests.pipeline import write_recipe

ROOT = Path(__file__).parents[2]
PHI3 = "tests.doors.my_family:PHI3"
PATHS = {
    "phi3": PHI3,
    "glm4": "tests.doors.other_layers:GLM4",
    "gemma": "tests.doors.other_layers:GEMMA",
}
SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
CONFIGS = {
    "phi3": lambda: transformers.Phi3Config(
        **SIZES | {"rope_parameters": HALF, "original_max_position_embeddings": 64}
    ),
    "glm4": lambda: transformers.Glm4Config(**SIZES | {"rope_parameters": HALF}),
    "gemma": lambda: transformers.GemmaConfig(**SIZES | {"head_dim": 16}),
}


def know(family: str) -> None:
    with allowing_user_code(True):
        FAMILIES[PATHS[family]]


def make(directory: Path, family: str, seed: int = 0) -> Path:
    return make_model_dir(directory, config=CONFIGS[family](), seed=seed, std=0.2)


@pytest.mark.parametrize(("family", "layout"), [(family, "PP2") for family in PATHS] + [("phi3", "TP2")])
def test_log_probs_and_weights_are_those_of_transformers(family: str, layout: str, tmp_path: Path) -> None:
    """And back again, from memory and from a checkpoint: to the bit."""
    model_dir = make(tmp_path / "model", family)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    expected = torch.cat([next_token_log_probs(oracle, tokens) for tokens in documents()])
    split = {"TP2": ParallelConfig(tensor=2, processes=2), "PP2": ParallelConfig(pipeline=2, processes=2)}
    *_, (log_probs, weights) = run_ranks(2, run_family, split[layout], tmp_path, family, timeout=280)
    # fp32 against fp64, nats: rounding through two layers is some 1e-6, a wrong rotation 1e-1.
    assert (log_probs - expected).abs().max().item() < 1e-5
    stored = contents(model_dir)[0]
    assert weights.keys() == stored.keys()
    for name, weight in weights.items():
        assert weight.contiguous().view(torch.uint8).numpy().tobytes() == stored[name][2], name

    know(family)
    assert Shape(read_architecture(model_dir)).parameters == oracle.num_parameters()


def run_family(parallel: ParallelConfig, root: Path, family: str) -> tuple[Any, dict[str, torch.Tensor]]:
    from megatron_lopd.config import OptimizerConfig
    from megatron_lopd.convert.gather import WeightGatherer
    from megatron_lopd.convert.load_model import load_hf_weights
    from megatron_lopd.mcore.model import build_model
    from megatron_lopd.mcore.optimizer import build_optimization
    from megatron_lopd.mcore.process_groups import model_parallel

    know(family)
    arch = read_architecture(root / "model")
    with model_parallel(parallel, seed=0):
        model = build_model(arch, parallel, "fp32", seed=None)
        for chunk in model:
            load_hf_weights(chunk, arch, root / "model")
        log_probs = forward_log_probs(model, [documents()])
        optimization = build_optimization(model, OptimizerConfig(), "fp32", total_steps=1)
        return log_probs, {name: each.clone() for name, each in WeightGatherer(optimization, arch).weights()}


def test_a_recipe_trains_and_exports_it(tmp_path: Path) -> None:
    teacher, student = (
        make(tmp_path / name, "phi3", seed) for seed, name in ((1, "teacher"), (2, "student"))
    )
    models = {
        "teacher": {"model": "teacher", "family": PHI3},
        "student": {"model": "student", "family": PHI3},
    }
    recipe = write_recipe(tmp_path, **models, allow_user_code=True)
    refused = lopd(tmp_path, "run", recipe.name, "allow_user_code=false", fails=True)
    assert "set allow_user_code=true" in refused.splitlines()[-1]
    lopd(tmp_path, "run", recipe.name)

    exported = contents(tmp_path / "run" / "export" / "model")[0]
    before = contents(student)[0]
    assert {name: each[:2] for name, each in exported.items()} == {k: each[:2] for k, each in before.items()}
    assert all(exported[name] != before[name] for name in before)  # every tensor learns
    assert exported.keys() == contents(teacher)[0].keys()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export" / "model")
    assert torch.isfinite(model(torch.arange(5)[None]).logits).all()

    told = lopd(tmp_path, "doctor", recipe.name)
    assert f"phi3 ({PHI3})" in told
    assert "family (model family or module:name" in lopd(tmp_path, "sft", "--help")
    planned = json.loads(lopd(tmp_path, "plan", recipe.name, "--gpus", "h100:1", "--json"))
    assert planned["models"]["student"]["parameters"] == model.num_parameters()


def test_its_code_is_part_of_what_a_training_stage_is_made_from(tmp_path: Path, monkeypatch: Any) -> None:
    """A family computes the model: checkpoints of other code are not gone on from."""
    monkeypatch.syspath_prepend(tmp_path)
    source = (ROOT / "tests" / "doors" / "my_family.py").read_text().replace('"phi3"', '"phi_of_mine"')
    (tmp_path / "changing.py").write_text(source)
    monkeypatch.setattr(FAMILIES, "_things", FAMILIES.things())
    monkeypatch.setattr(FAMILIES, "_imported", {})
    assert own_families(["changing:PHI3"]) == {}
    with allowing_user_code(True):
        FAMILIES["changing:PHI3"]
    before = own_families(["changing:PHI3"])["phi_of_mine"]
    assert before.startswith("changing:PHI3 sha256:")
    (tmp_path / "changing.py").write_text(source + "# changed\n")
    with pytest.raises(ConfigError, match="has changed since this process imported it"):
        own_families(["changing:PHI3"])
    sys.modules.pop("changing")
    FAMILIES._things.pop("phi_of_mine")
    FAMILIES._imported.clear()
    with allowing_user_code(True):
        FAMILIES["changing:PHI3"]
    assert own_families(["changing:PHI3"])["phi_of_mine"] != before
    assert own_families([None, "qwen3"]) == {}  # another recipe's, in the same process


def test_the_tools_take_it(tmp_path: Path) -> None:
    model_dir = make(tmp_path / "model", "phi3")
    script = [sys.executable, ROOT / "tools" / "hf_to_megatron.py", model_dir, tmp_path / "megatron"]
    without = run(script, tmp_path, fails=True)
    assert "model_type='phi3' is not supported, only llama, qwen2, qwen3, qwen3_moe are" in without
    assert "student.family" in without
    run([*script, "--family", PHI3], tmp_path)
    back = [sys.executable, ROOT / "tools" / "megatron_to_hf.py", tmp_path / "megatron", tmp_path / "back"]
    run([*back, "--family", PHI3], tmp_path)
    assert contents(tmp_path / "back") == contents(model_dir)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"sliding_window": 47}, "sliding_window=47"), ({"hidden_act": "gelu"}, "hidden_act='gelu'")],
)
def test_what_the_family_does_not_support_is_refused_by_key(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    know("phi3")
    config = make(tmp_path / "model", "phi3") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ConfigError, match=f"config.json: {named} is not supported"):
        read_architecture(tmp_path / "model")


def test_a_fused_tensor_of_another_model_is_refused(tmp_path: Path) -> None:
    """Where its rows cannot be shared out as config.json says: 63 rows over 4 + 2 + 2 heads."""
    from safetensors.torch import load_file, save_file

    from megatron_lopd.convert.offline import hf_to_megatron
    from megatron_lopd.errors import DataError

    know("phi3")
    file = make(tmp_path / "model", "phi3") / "model.safetensors"
    name = "model.layers.1.self_attn.qkv_proj.weight"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name][:63].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=rf"the 63 rows of {name} are not a multiple of 8"):
        hf_to_megatron(tmp_path / "model", tmp_path / "megatron")


def lopd(directory: Path, *arguments: str, fails: bool = False) -> str:
    return run([sys.executable, "-m", "megatron_lopd.cli", *arguments], directory, fails)


def run(command: list[Any], directory: Path, fails: bool = False) -> str:
    """What it printed: of a command that fails, its last words."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        list(map(str, command)), cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode != 0) == fails, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stderr if fails else done.stdout
