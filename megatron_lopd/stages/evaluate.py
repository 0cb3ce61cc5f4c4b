"""7. evaluate: sampled and greedy accuracy of the student before and after OPD, and of the teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_lopd.artifacts.files import atomic_write_json
from megatron_lopd.config import Recipe, deciding
from megatron_lopd.data.chat import Chat
from megatron_lopd.data.dataset import open_shards
from megatron_lopd.data.prompts import Prompt
from megatron_lopd.data.schemas import ROLLOUTS
from megatron_lopd.stages import inputs
from megatron_lopd.stages.base import Output, Plan, Stage, directory_of, parent_manifest
from megatron_lopd.stages.sampling import SamplingJob, count_rollouts, write_rollouts
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
    files: list[str] = []
    tokens = 0
    for model, model_dir in _models(recipe).items():
        accuracy[model] = {"n": len(prompts)}
        for mode in ("sampled", "greedy"):
            target = directory / model / mode
            names = write_rollouts(_job(recipe, model_dir, prompts, model, mode), target)
            accuracy[model][mode] = _share_right(recipe, target, model_dir, prompts)
            tokens += count_rollouts(target)["tokens"]
            files += [f"{model}/{mode}/{name}" for name in names]
    results = {
        "accuracy": accuracy,
        "grader": recipe.evaluate.grader,
        "teacher_answers": _teacher_answers(recipe),
    }
    atomic_write_json(directory / RESULTS, results)
    return Output([*files, RESULTS], {"prompts": len(prompts), "tokens": tokens})


def _models(recipe: Recipe) -> dict[str, Path]:
    models = {"sft": inputs.reference_directory(recipe)}
    if recipe.train is not None:
        models["lightning_opd"] = directory_of(recipe, "export") / "model"
    return models


def _job(recipe: Recipe, model_dir: Path, prompts: list[Prompt], model: str, mode: str) -> SamplingJob:
    settings = recipe.evaluate
    sampling = settings.sampling if mode == "sampled" else replace(settings.sampling, temperature=0.0)
    return SamplingJob(
        model_dir=model_dir,
        prompts=prompts,
        max_prompt_tokens=inputs.longest_prompt(model_dir, sampling, None),
        sampling=sampling,
        engine=settings.engine,
        seed=recipe.seed,
        stream=f"evaluate {mode}",  # the same draws for every model: they are compared on equal luck
        label=f"evaluate {model} {mode}",
    )


def _share_right(recipe: Recipe, directory: Path, model_dir: Path, prompts: list[Prompt]) -> float:
    """The share of graded responses in a directory of rollouts that are right, in [0, 1]."""
    by_id = {prompt.id: prompt for prompt in prompts}
    is_right, chat = (
        grader(recipe.evaluate.grader),
        Chat(str(model_dir), recipe.evaluate.engine.trust_remote_code),
    )
    responses = open_shards(ROLLOUTS, directory)
    right = sum(
        rollout.finish_reason == "stop"
        and is_right(by_id[rollout.sample_id.rpartition("/")[0]], chat.decode(rollout.response_tokens))
        for rollout in responses
    )
    return right / len(responses)


def _teacher_answers(recipe: Recipe) -> dict[str, Any] | None:
    """How often the teacher's answers that SFT learned from are right; None unless generate ran."""
    directory = directory_of(recipe, "generate")
    if recipe.prompts.sft is None or not (directory / "manifest.json").is_file():
        return None
    prompts, _ = inputs.prompts_of(recipe, "sft")
    share = _share_right(recipe, directory, directory / "tokenizer", prompts)
    return {"sampled": share, "n": len(open_shards(ROLLOUTS, directory))}


STAGE = Stage(
    "evaluate",
    "evaluation",
    check,
    plan,
    run,
    needed=lambda recipe: recipe.prompts.eval is not None and recipe.sft is not None,
)
