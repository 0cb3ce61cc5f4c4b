"""A whole run in miniature: random tiny models on the arithmetic task, a few seconds from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.model_zoo import make_model_dir

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}


def write_recipe(root: Path, **sections: Any) -> Path:
    """Make a teacher, a base student and a recipe below `root`, all paths relative to it."""
    if not (root / "teacher").exists():
        make_model_dir(root / "teacher", seed=1, **SMALL)
        make_model_dir(root / "student", seed=2, tied=True, **SMALL)
    engine = {"batch_size": 16, "shard_samples": 16}
    sampling = {"max_new_tokens": 12}
    training = {
        "global_batch_size": 8,
        "micro_batch_tokens": 96,
        "checkpoint_every": 2,
        "optimizer": {"lr": 1e-3},
    }
    recipe = {
        "run_dir": "run",
        "seed": 5,
        "precision": "fp32",
        "teacher": {"model": "teacher"},
        "student": {"model": "student"},
        "prompts": {
            "sft": {"task": "arithmetic", "count": 40},
            "opd": {"task": "arithmetic", "count": 40},
            "eval": {"task": "arithmetic", "count": 20},
        },
        "generate": {"sampling": sampling, "engine": engine},
        "sft": {"steps": 5, **training},
        "rollout": {"sampling": sampling, "engine": engine},
        "score": {"engine": engine, "top_k": 0},
        "train": {"objective": "sampled_reverse_kl", "steps": 5, **training},
        "evaluate": {"sampling": sampling, "engine": engine},
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, **sections}))
    return path
