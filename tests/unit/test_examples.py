"""The recipes that ship: each is one that `lopd` takes, and so is the published alternative it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_lopd.config import Recipe, load_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted(EXAMPLES.glob("*/*.yaml"))
QWEN3 = sorted(EXAMPLES.glob("qwen3_*/recipe.yaml"))


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
