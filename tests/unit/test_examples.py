"""The recipes that ship: each is one that `lopd` takes, and so is the published alternative it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_lopd.config import Recipe, load_recipe
from megatron_lopd.families.architecture import check_layout
from megatron_lopd.families.memory_shapes import published

PUBLISHED = published()

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted(EXAMPLES.glob("*/*.yaml"))
QWEN3 = sorted(EXAMPLES.glob("qwen3_*/recipe.yaml"))
GPUS_A_NODE = 8


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
def test_the_layout_divides_the_published_model(path: Path) -> None:
    recipe = load_recipe(str(path), [])
    parallel = recipe.parallel
    assert recipe.student is not None
    check_layout(PUBLISHED[Path(recipe.student.model).name.removesuffix("-Base")], parallel)
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
