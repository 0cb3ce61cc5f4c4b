"""7. evaluate: how good the student's answers are before and after OPD, and the teacher's, on each set."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_lopd.artifacts.files import atomic_write_json
from megatron_lopd.config import Recipe, deciding
from megatron_lopd.data.dataset import open_shards
from megatron_lopd.data.schemas import ROLLOUTS
from megatron_lopd.engines import kind_of
from megatron_lopd.evaluation.grading import answering, check_sets, grade_answers, share_right
from megatron_lopd.graders.grader import Grader, open_grader
from megatron_lopd.pipeline import inputs
from megatron_lopd.pipeline.shard_jobs import count_rollouts
from megatron_lopd.pipeline.stage import Output, Plan, directory_of, parent_manifest
from megatron_lopd.pipeline.workers import Work, make_parts

RESULTS = "results.json"


def check(recipe: Recipe) -> list[str]:
    models, k = ", ".join(_models(recipe)), recipe.evaluate.sampling.samples_per_prompt
    kind_of(recipe.evaluate.engine).require(recipe.evaluate.engine, "evaluate")
    return [
        f"grade {models} on {len(prompts)} prompts of {name}, {k} sampled and 1 greedy each"
        for name, prompts in check_sets(recipe).items()
    ]


def plan(recipe: Recipe) -> Plan:
    parents = {_role(name): parent for name, (_, parent) in inputs.evaluation_sets(recipe).items()}
    for name, directory in _models(recipe).items():
        is_teacher = name == "teacher"
        parents[name] = (
            inputs.teacher_parent(recipe, "evaluate") if is_teacher else inputs.parent_of_model(directory)
        )
    stage = parent_manifest(recipe, "train" if recipe.train is not None else "sft")
    return Plan(deciding(recipe.evaluate) | {"seed": recipe.seed}, parents, stage.lineage)


def share(recipe: Recipe, plan: Plan, directory: Path) -> None:
    settings, seed = recipe.evaluate, recipe.seed
    works: list[Work] = []
    for model, model_dir in _models(recipe).items():
        for name, (prompts, _) in inputs.evaluation_sets(recipe).items():
            label = f"{model} on {name}"
            works += answering(model_dir, prompts, settings, seed, directory / model / name, label)
    make_parts(works)


def run(recipe: Recipe, plan: Plan, directory: Path) -> Output:
    accuracy: dict[str, dict[str, Any]] = {}
    counts: Counter[str] = Counter()
    with open_grader(recipe.evaluate.grader) as grader:
        for name, (prompts, _) in inputs.evaluation_sets(recipe).items():
            counts["prompts"] += len(prompts)
            accuracy[name] = {}
            for model, model_dir in _models(recipe).items():
                place = directory / model / name
                grades = grade_answers(place, model_dir, prompts, recipe.evaluate, grader)
                print(f"lopd: {model} on {name}: {grades}", flush=True)
                accuracy[name][model] = asdict(grades)
                counts["ungraded"] += grades.ungraded
                for mode in ("sampled", "greedy"):
                    counts["tokens"] += count_rollouts(place / mode)["tokens"]
        answers = _teacher_answers(recipe, grader)
    results = {"accuracy": accuracy, "grader": recipe.evaluate.grader, "teacher_answers": answers}
    atomic_write_json(directory / RESULTS, results)
    files = sorted(str(path.relative_to(directory)) for path in directory.rglob("*.arrow"))
    return Output(
        [*files, RESULTS], dict(counts), kind_of(recipe.evaluate.engine).versions(recipe.evaluate.engine)
    )


def _role(name: str) -> str:
    """What a set is called among the parents: only the one that has no name of its own is just prompts."""
    return "prompts" if name == inputs.ONLY_SET else f"prompts {name}"


def _models(recipe: Recipe) -> dict[str, Path]:
    models = {"sft": inputs.reference_directory(recipe)}
    if recipe.train is not None:
        models["lightning_opd"] = directory_of(recipe, "export") / "model"
    if recipe.evaluate.teacher:
        models["teacher"] = inputs.teacher_directory(recipe)
    return models


def _teacher_answers(recipe: Recipe, grader: Grader) -> dict[str, Any] | None:
    """How often the teacher's answers that SFT learned from are right; None unless generate ran.

    None too where the SFT prompts come without answers to grade by.
    """
    directory = directory_of(recipe, "generate")
    if recipe.prompts.sft is None or not (directory / "manifest.json").is_file():
        return None
    prompts, _ = inputs.prompts_of(recipe, "sft")
    if any(prompt.answer is None for prompt in prompts):
        return None
    share = share_right(directory, directory / "tokenizer", prompts, recipe.evaluate, grader)
    return {"sampled": share, "n": len(open_shards(ROLLOUTS, directory))}
