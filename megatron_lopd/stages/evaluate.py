"""7. evaluate: how good the student's answers are before and after OPD, and the teacher's."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_lopd.artifacts.files import atomic_write_json
from megatron_lopd.config import Recipe, deciding
from megatron_lopd.data.dataset import open_shards
from megatron_lopd.data.schemas import ROLLOUTS
from megatron_lopd.stages import inputs
from megatron_lopd.stages.base import Output, Plan, Stage, directory_of, parent_manifest
from megatron_lopd.stages.grading import grade_model, share_right
from megatron_lopd.stages.sampling import count_rollouts
from megatron_lopd.tasks.prompts import grader

RESULTS = "results.json"


def check(recipe: Recipe) -> list[str]:
    prompts = inputs.prompts_of(recipe, "eval")[0]
    grader(recipe.evaluate.grader)
    return [f"grade {', '.join(_models(recipe))} on {len(prompts)} prompts, sampled and greedy"]


def plan(recipe: Recipe) -> Plan:
    parents = {"prompts": inputs.prompts_of(recipe, "eval")[1]}
    for name, directory in _models(recipe).items():
        parents[name] = inputs.parent_of_model(directory)
    stage = parent_manifest(recipe, "train" if recipe.train is not None else "sft")
    return Plan(deciding(recipe.evaluate) | {"seed": recipe.seed}, parents, stage.lineage)


def run(recipe: Recipe, plan: Plan, directory: Path) -> Output:
    prompts = inputs.prompts_of(recipe, "eval")[0]
    accuracy: dict[str, dict[str, Any]] = {}
    tokens = 0
    for model, model_dir in _models(recipe).items():
        grades = grade_model(model_dir, prompts, recipe.evaluate, recipe.seed, directory / model, model)
        accuracy[model] = asdict(grades)
        tokens += sum(count_rollouts(directory / model / mode)["tokens"] for mode in ("sampled", "greedy"))
    results = {
        "accuracy": accuracy,
        "grader": recipe.evaluate.grader,
        "teacher_answers": _teacher_answers(recipe),
    }
    atomic_write_json(directory / RESULTS, results)
    files = sorted(str(path.relative_to(directory)) for path in directory.rglob("*.arrow"))
    return Output([*files, RESULTS], {"prompts": len(prompts), "tokens": tokens})


def _models(recipe: Recipe) -> dict[str, Path]:
    models = {"sft": inputs.reference_directory(recipe)}
    if recipe.train is not None:
        models["lightning_opd"] = directory_of(recipe, "export") / "model"
    return models


def _teacher_answers(recipe: Recipe) -> dict[str, Any] | None:
    """How often the teacher's answers that SFT learned from are right; None unless generate ran."""
    directory = directory_of(recipe, "generate")
    if recipe.prompts.sft is None or not (directory / "manifest.json").is_file():
        return None
    prompts, _ = inputs.prompts_of(recipe, "sft")
    share = share_right(directory, directory / "tokenizer", prompts, recipe.evaluate)
    return {"sampled": share, "n": len(open_shards(ROLLOUTS, directory))}


STAGE = Stage(
    "evaluate",
    "evaluation",
    check,
    plan,
    run,
    needed=lambda recipe: recipe.prompts.eval is not None and recipe.sft is not None,
)
