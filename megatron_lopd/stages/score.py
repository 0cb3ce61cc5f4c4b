"""4. score: the SAME teacher scores every rollout token, once. After this the teacher is gone."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from megatron_lopd.artifacts.lineage import artifact_parent, prove_parent
from megatron_lopd.config import EngineConfig, Recipe, ScoreConfig, deciding
from megatron_lopd.engines import EngineKind, kind_of
from megatron_lopd.pipeline import inputs
from megatron_lopd.pipeline.engine_gate import AGREEMENT_FILE, check_agreement, check_engine
from megatron_lopd.pipeline.shard_jobs import score_output, score_work
from megatron_lopd.pipeline.stage import OTHER_RANK, Output, Plan, directory_of, identity_of, parent_manifest
from megatron_lopd.pipeline.workers import make_parts


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
    kind_of(recipe.score.engine).require(recipe.score.engine, "score")
    if recipe.score.agreement is not None:
        kind_of(recipe.score.agreement.engine).require(recipe.score.agreement.engine, "score.agreement")
    return lines + kind_of(recipe.score.engine).score_advice(recipe.score.engine)


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
    scoring = inputs.scoring_of(recipe)
    ranks = _of_ranks(scoring)
    with ranks.leading() if ranks is not None else nullcontext():
        _share(recipe, scoring, plan, directory)


def _share(recipe: Recipe, scoring: ScoreConfig, plan: Plan, directory: Path) -> None:
    files = list(parent_manifest(recipe, "rollout").files)
    teacher, rollouts = inputs.teacher_directory(recipe), directory_of(recipe, "rollout")
    if scoring.agreement is not None:
        check_agreement(scoring, scoring.agreement, teacher, rollouts, directory, identity_of(plan))
    make_parts([score_work(teacher, scoring, rollouts, files, directory)])


def run(recipe: Recipe, plan: Plan, directory: Path) -> Output:
    scoring = inputs.scoring_of(recipe)
    if plan is OTHER_RANK:
        ranks = _of_ranks(scoring)
        if ranks is not None:
            ranks.serve()
        return Output([], {})
    output = score_output(parent_manifest(recipe, "rollout"), directory_of(recipe, "rollout"), directory)
    gate = [AGREEMENT_FILE] if scoring.agreement is not None else []
    return replace(
        output, files=[*output.files, *gate], versions=kind_of(scoring.engine).versions(scoring.engine)
    )


def _of_ranks(scoring: ScoreConfig) -> EngineKind | None:
    """The engine that is made of ranks, which rank 0 leads; of any other, the other ranks have no part."""
    return next((kind_of(each) for each in _engines(scoring) if each.options.layout is not None), None)


def _engines(scoring: ScoreConfig) -> list[EngineConfig]:
    return [scoring.engine, *([scoring.agreement.engine] if scoring.agreement else [])]


def processes(recipe: Recipe) -> int:
    """As many as the larger of its engines wants."""
    return max(
        each.options.layout.processes if each.options.layout else 1
        for each in _engines(inputs.scoring_of(recipe))
    )
