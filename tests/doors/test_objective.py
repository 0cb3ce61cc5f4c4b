from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from megatron_lopd.objectives import SampledReverseKl, TokenLogProbs, get_objective
from tests.pipeline import write_recipe

WITH = ("recipe.yaml", "allow_user_code=true")


def test_an_objective_of_ones_own(
    root: Path, edited: Callable[[Path], None], refused: Callable[..., str], told: Callable[..., str]
) -> None:
    recipe = yaml.safe_load(write_recipe(root).read_text())
    train = recipe["train"] | {
        "objective": "my_objective:BoundedReverseKl",
        "bounded_reverse_kl": {"bound": 2},
    }
    write_recipe(root, train=train)

    assert "my_objective:BoundedReverseKl is code of yours: set allow_user_code=true" in refused(
        2, "run", "recipe.yaml"
    )
    assert "train.bounded_reverse_kl" in told("train", *WITH, "--help")
    assert "bounded_reverse_kl (my_objective:BoundedReverseKl)" in told("doctor", *WITH)
    told("run", *WITH)
    assert "held constant and within a bound" in (root / "run/report/index.html").read_text()

    source = root / "code/my_objective.py"
    config = json.loads((root / "run/train/manifest.json").read_text())["config"]
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert config["objective"] == f"my_objective:BoundedReverseKl sha256:{digest}"
    assert config["bounded_reverse_kl"] == {"bound": 2.0}

    edited(source)
    line = refused(3, "run", *WITH)
    assert "run/train was made with objective='my_objective:BoundedReverseKl sha256:" in line
    told("score", *WITH)  # and what comes before has nothing to do with it


def test_its_options_reach_it() -> None:
    """What the example says it computes: the plain loss within the bound, and the bound beyond."""
    from tests.doors.my_objective import BoundedReverseKl, BoundedReverseKlOptions

    tokens = TokenLogProbs(torch.tensor([-1.0, -1.0]), torch.tensor([-1.5, -9.0]), torch.zeros(2))
    bounded = BoundedReverseKl(BoundedReverseKlOptions(bound=2)).token_loss(tokens)
    plain = get_objective(SampledReverseKl.name).token_loss(tokens)
    assert bounded[0] == plain[0]
    assert bounded[1] == -2.0  # -(-2) * -1
