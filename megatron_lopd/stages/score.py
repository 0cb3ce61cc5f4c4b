"""4. score: the SAME teacher scores every rollout token, once. After this the teacher is gone."""

from __future__ import annotations

from pathlib import Path

from megatron_lopd.artifacts.lineage import artifact_parent, prove_parent
from megatron_lopd.config import EngineConfig, Recipe, ScoreConfig, deciding
from megatron_lopd.data.dataset import TrainingData
from megatron_lopd.stages import inputs
from megatron_lopd.stages.agreement import check_agreement, check_engine
from megatron_lopd.stages.base import OTHER_RANK, Output, Plan, Stage, directory_of, parent_manifest
from megatron_lopd.stages.sampling import write_scores
from megatron_lopd.stages.students import identity_of


def check(recipe: Recipe) -> list[str]:
    teacher, top_k, scoring = inputs.teacher_directory(recipe), recipe.score.top_k, inputs.scoring_of(recipe)
    if teacher.exists():  # once it has scored, it may be gone
        inputs.check_top_k(recipe)
        for engine in _engines(scoring):
            check_engine(engine, teacher)
    kept = f", and its {top_k} likeliest tokens at each are kept" if top_k else ""
    lines = [f"{teacher} scores every rollout token, once{kept}"]
    if scoring.agreement is not None:
        lines.append(
            f"{scoring.engine.name} and {scoring.agreement.engine.name} must agree on "
            f"{scoring.agreement.samples} rollouts first"
        )
    return lines


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


def run(recipe: Recipe, plan: Plan, directory: Path) -> Output:
    scoring = inputs.scoring_of(recipe)
    if not any(engine.name == "megatron" for engine in _engines(scoring)):
        return Output([], {}) if plan is OTHER_RANK else _score(recipe, scoring, plan, directory)
    from megatron_lopd.engines.megatron import leading, serve  # takes seconds, and no other engine needs it

    if plan is OTHER_RANK:
        serve()
        return Output([], {})
    with leading():
        return _score(recipe, scoring, plan, directory)


def _score(recipe: Recipe, scoring: ScoreConfig, plan: Plan, directory: Path) -> Output:
    rollout = parent_manifest(recipe, "rollout")
    rollout_dir, teacher = directory_of(recipe, "rollout"), inputs.teacher_directory(recipe)
    files = []
    if scoring.agreement is not None:
        identity = identity_of(plan)
        files.append(check_agreement(scoring, scoring.agreement, teacher, rollout_dir, directory, identity))
    files += write_scores(teacher, scoring, rollout_dir, list(rollout.files), directory)
    TrainingData(rollout_dir, directory)  # every rollout has its score, of the right length
    return Output(files, {name: rollout.counts[name] for name in ("samples", "response_tokens", "tokens")})


def _engines(scoring: ScoreConfig) -> list[EngineConfig]:
    return [scoring.engine, *([scoring.agreement.engine] if scoring.agreement else [])]


def _processes(recipe: Recipe) -> int:
    """As many as the larger of its engines wants."""
    return max(
        each.parallel.processes if each.parallel else 1 for each in _engines(inputs.scoring_of(recipe))
    )


STAGE = Stage(
    "score",
    "scores",
    check,
    plan,
    run,
    processes=_processes,
    needed=lambda recipe: recipe.train is not None,
)
