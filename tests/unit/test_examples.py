"""The recipes that ship: each is one that `lopd` takes, and so is the published alternative it names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_lopd.config import Recipe, load_recipe
from megatron_lopd.mcore.architecture import check_layout, read_architecture

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted(EXAMPLES.glob("*/*.yaml"))
QWEN3 = sorted(EXAMPLES.glob("qwen3_*/recipe.yaml"))
GPUS_A_NODE = 8
# The config.json of the published base models, as far as a layout depends on it.
_QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_attention_heads": 32, "rms_norm_eps": 1e-6}
_QWEN3 |= {"max_position_embeddings": 32768, "rope_theta": 1e6, "hidden_act": "silu", "attention_bias": False}
_DENSE = _QWEN3 | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 36}
PUBLISHED = {
    "qwen3_4b": _DENSE
    | {"hidden_size": 2560, "intermediate_size": 9728, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "qwen3_8b": _DENSE
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "qwen3_30b_a3b": _QWEN3
    | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 48}
    | {"hidden_size": 2048, "intermediate_size": 6144, "num_key_value_heads": 4, "tie_word_embeddings": False}
    | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_loads(path: Path) -> None:
    assert isinstance(load_recipe(str(path), []), Recipe)


@pytest.mark.parametrize("path", QWEN3, ids=lambda path: path.parent.name)
def test_the_published_objective_is_one_command_away(path: Path) -> None:
    command = re.search(r"lopd run (\S+recipe\.yaml) (.+)", path.read_text())
    assert command is not None
    assert EXAMPLES.parent / command[1] == path
    recipe = load_recipe(str(path), command[2].split())
    assert recipe.train is not None
    assert recipe.train.objective == "sampled_reverse_kl"
    assert recipe.score.top_k == 0
    assert (recipe.train.optimizer.lr, recipe.train.global_batch_size) == (2e-6, 256)  # arXiv 2604.13010


@pytest.mark.parametrize("path", QWEN3, ids=lambda path: path.parent.name)
def test_the_layout_divides_the_published_model(path: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[path.parent.name]))
    recipe = load_recipe(str(path), [])
    parallel = recipe.parallel
    check_layout(read_architecture(tmp_path), parallel)
    assert (parallel.tensor, parallel.sequence) == (4, True)  # published: TP 4 with sequence parallelism
    assert parallel.processes % GPUS_A_NODE == 0
    assert recipe.train is not None
    ranks = parallel.processes // (parallel.tensor * parallel.pipeline * parallel.context)
    assert recipe.train.global_batch_size % ranks == 0


@pytest.mark.parametrize("path", QWEN3, ids=lambda path: path.parent.name)
def test_engines_take_the_gpus_of_a_node(path: Path) -> None:
    recipe = load_recipe(str(path), [])
    for section in (recipe.generate, recipe.rollout, recipe.score, recipe.evaluate):
        assert section.engine.name == "vllm"
        assert section.engine.tensor * section.engine.workers == GPUS_A_NODE


@pytest.mark.parametrize("path", QWEN3, ids=lambda path: path.parent.name)
def test_what_is_sampled_fits_what_is_packed(path: Path) -> None:
    recipe = load_recipe(str(path), [])
    assert recipe.sft is not None
    assert recipe.train is not None
    assert recipe.generate.sampling.max_new_tokens < recipe.sft.micro_batch_tokens
    assert recipe.rollout.sampling.max_new_tokens < recipe.train.micro_batch_tokens
