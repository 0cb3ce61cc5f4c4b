"""4. score: the SAME teacher scores every rollout token, once. After this the teacher is gone."""

from __future__ import annotations

from pathlib import Path

from megatron_lopd.artifacts.lineage import artifact_parent, prove_parent
from megatron_lopd.config import Recipe, deciding
from megatron_lopd.stages import inputs
from megatron_lopd.stages.base import Output, Plan, Stage, directory_of, parent_manifest
from megatron_lopd.stages.sampling import score_output, score_work
from megatron_lopd.stages.sharing import make_parts


def check(recipe: Recipe) -> list[str]:
    teacher, top_k = inputs.teacher_directory(recipe), recipe.score.top_k
    if teacher.exists():  # once it has scored, it may be gone
        inputs.check_top_k(recipe)
    kept = f", and its {top_k} likeliest tokens at each are kept" if top_k else ""
    return [f"{teacher} scores every rollout token, once{kept}"]


def plan(recipe: Recipe) -> Plan:
    teacher = inputs.teacher_parent(recipe, "score")
    sft, rollout = parent_manifest(recipe, "sft"), parent_manifest(recipe, "rollout")
    proofs = [
        prove_parent("rollout", "sft", rollout.parents["sft"], sft, directory_of(recipe, "sft")),
        *inputs.prove_teacher(recipe, sft, teacher),
        inputs.prove_tokens(recipe, teacher, rollout.parents["student"]),
    ]
    return Plan(
        config=deciding(recipe.score),
        parents={"rollouts": artifact_parent("rollout", rollout), "teacher": teacher},
        lineage=inputs.status_of(proofs, rollout.lineage),
    )


def share(recipe: Recipe, plan: Plan, directory: Path) -> None:
    files = list(parent_manifest(recipe, "rollout").files)
    teacher, rollouts = inputs.teacher_directory(recipe), directory_of(recipe, "rollout")
    make_parts([score_work(teacher, recipe.score, rollouts, files, directory)])


def run(recipe: Recipe, plan: Plan, directory: Path) -> Output:
    rollout, rollout_dir = parent_manifest(recipe, "rollout"), directory_of(recipe, "rollout")
    return score_output(rollout, rollout_dir, directory)


STAGE = Stage(
    "score",
    "scores",
    check,
    plan,
    run,
    needed=lambda recipe: recipe.train is not None,
    share=share,
    workers=lambda recipe: recipe.score.engine.workers,
)
